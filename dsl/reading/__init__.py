"""Text to statements: the parser, and what it says of text that it cannot read."""
