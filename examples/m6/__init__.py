"""M6 with 100 billion, 1 trillion and 10 trillion parameters (arXiv 2105.15082, 2110.03888)."""
