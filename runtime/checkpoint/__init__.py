"""Checkpoints: safetensors shards and a JSON manifest, written by any plan and read by any other.

A tensor is cut into parts by its layout; of the ranks that hold a part, one owns and writes it.
The manifest says how each tensor was cut and who wrote what, so that a reader with another mesh
takes from each part what it needs. Padding is left out.
"""

from meshwright.runtime.checkpoint.loading import load, read_state_dict
from meshwright.runtime.checkpoint.saving import Saves

__all__ = ["Saves", "load", "read_state_dict"]
