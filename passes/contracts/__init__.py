"""Passes that change nothing and refuse what the plan does not allow."""
