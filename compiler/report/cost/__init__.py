"""What a step costs: its time on a cluster, and formulas of what it moves, computes and holds."""
