"""A graph as the Python generator of one rank."""
