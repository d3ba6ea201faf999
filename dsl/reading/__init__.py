"""Text to statements: the parser, and its errors."""
