"""What ranks hold: first values, on which they agree, and the way from and to global tensors."""
