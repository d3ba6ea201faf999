"""Passes over the global graph, which replace many operators by the few that can be placed."""
