"""What runs programs on this machine."""

from __future__ import annotations

from meshwright.compiler.public import Runtime
from meshwright.runtime.measuring import measured
from meshwright.runtime.optimizers.predicted import predicted_update
from meshwright.runtime.run import launch

RUNTIME = Runtime(launch, measured, predicted_update)
