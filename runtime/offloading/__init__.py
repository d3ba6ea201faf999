"""Values that leave the device: to host memory, and to files."""
