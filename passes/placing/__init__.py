"""Choose the layout of every value, and then insert what moves."""
