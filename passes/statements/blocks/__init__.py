"""Matrices in blocks over two axes or three, and parameters stored split further."""
