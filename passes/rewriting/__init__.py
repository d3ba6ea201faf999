"""Passes over the global graph: the few operators that are placed, in place of many."""
