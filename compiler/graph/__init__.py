"""Graphs of operators: nodes, their types, their text, and which of them share memory."""
