"""The statement `offload`: what a rank keeps in host memory or in files, and when it moves."""
