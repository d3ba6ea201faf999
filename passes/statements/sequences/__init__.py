"""Splits along the sequence: between split linears, or of the whole, attention included."""
