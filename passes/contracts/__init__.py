"""Passes that change nothing: they refuse what the plan does not allow."""
