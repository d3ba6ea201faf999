"""Model capture: an unmodified `nn.Module` becomes a graph."""

from meshwright.compiler.capture.capture import Captured, capture
from meshwright.compiler.capture.inputs import InputSpec

__all__ = ["Captured", "InputSpec", "capture"]
