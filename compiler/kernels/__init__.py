"""Local kernels of the composite operators: pure functions on one rank's tensors."""
