"""Layouts: which part of a global tensor each rank holds, and what moves between two of them."""
