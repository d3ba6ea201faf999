"""One rule for each operator: the splits it allows, and the pending sums they leave."""
