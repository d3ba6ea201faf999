"""Feed-forward regions of a model become mixtures of experts."""
