"""Put back what a graph of `torch.export` has lost: stopped gradients, and writes in place."""
