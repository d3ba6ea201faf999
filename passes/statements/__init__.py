"""Passes that carry out what a statement of the plan says of layouts."""
