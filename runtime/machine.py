"""What runs programs on this machine."""

from __future__ import annotations

from meshwright.compiler.public import Runtime
from meshwright.runtime.measuring import measured
from meshwright.runtime.run import launch

RUNTIME = Runtime(launch, measured)
