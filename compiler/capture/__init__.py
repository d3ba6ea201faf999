"""Model capture: an unmodified `nn.Module` becomes a graph."""
