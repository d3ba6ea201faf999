"""Tensor parallelism over two axes (Optimus, arXiv 2104.05343) against one axis (Megatron)."""
