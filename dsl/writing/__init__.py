"""Statements to text, and to the tables of notebooks."""
