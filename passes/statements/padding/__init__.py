"""Sizes that do not divide: what a plan splits is made larger, and the rest is cut off again."""
