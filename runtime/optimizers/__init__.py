"""Optimizers over the shards of one rank: what they may be, what they would do wrong, clipping."""
