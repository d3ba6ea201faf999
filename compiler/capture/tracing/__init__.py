"""What is watched, replaced and refused while `torch.export` runs a forward."""
