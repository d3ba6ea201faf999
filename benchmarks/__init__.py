"""Meshwright beside its peers. See RESULTS.md for how to run and what came out."""
