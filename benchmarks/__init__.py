"""Meshwright beside its peers; RESULTS.md says how to run this, and has the results."""
