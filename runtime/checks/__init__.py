"""Checks while training: what ranks are given, what they hold copies of, and finite values."""
