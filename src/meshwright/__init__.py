"""Meshwright: compile an ordinary model and a short plan into what each device of a mesh runs.

In short:

    plan = meshwright.Plan.load("gpt.plan")
    program = meshwright.compile(model, plan, example=(tokens, targets))
    program.show()
    run = program.launch()
    optimizer = run.optimizer(torch.optim.AdamW, lr=3e-4)
    loss = run.step(tokens, targets)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from meshwright.compiler.costs.cluster import Cluster
from meshwright.compiler.errors import CaptureError, LayoutError, PassError
from meshwright.compiler.graph.annotate import layout
from meshwright.compiler.graph.custom import custom
from meshwright.compiler.public import Program
from meshwright.dsl.errors import MeshwrightError, PlanError
from meshwright.dsl.plan import Plan
from meshwright.passes import driver
from meshwright.runtime.checkpoint import read_state_dict
from meshwright.runtime.errors import RunError
from meshwright.runtime.machine import RUNTIME
from meshwright.runtime.run import Run
from meshwright.runtime.world.launcher import guard

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "Cluster",
    "LayoutError",
    "MeshwrightError",
    "PassError",
    "Plan",
    "PlanError",
    "Program",
    "Run",
    "RunError",
    "compile",
    "custom",
    "layout",
    "read_state_dict",
]


def compile(
    model: nn.Module,
    plan: Plan,
    example: Any,
    loss: Any = None,
    outputs: Sequence[str] = (),
    mode: str = "train",
    device: str | torch.device | None = None,
    static: Sequence[str] = (),
) -> Program:
    """Compile `model` under `plan` for inputs like `example`, without running anything.

    - `model`: an `nn.Module`, not wrapped (`DistributedDataParallel`, `torch.compile`). It is
      captured with the flags that it has, so call `model.train()` before if it was loaded in eval
      mode; it is left as it was, and may be on the meta device.
    - `plan`: a `Plan`, which says what the mesh is and how the model is split over it.
    - `example`: one global batch, as a tuple of positional inputs, a dict of keywords, or
      `(tuple, dict)`. Shapes and types count, values do not.
    - `loss`: the scalar to differentiate, as a path into the model's output (`"losses.total"`) or a
      function of the output. By default the output itself if it is a scalar, its tensor `loss`, or
      its only scalar.
    - `outputs`: paths of further results that `Run.step` returns, such as `["logits"]`.
    - `mode`: `"train"`, or `"infer"` for a program without a backward, for `Run.forward` alone.
    - `device`: the type of device to compile for: by default `"cuda"` where there is one, and
      `"cpu"` elsewhere.
    - `static`: inputs whose values in the example are part of the program, because the forward
      reads them in Python (the grid of images that Qwen2-VL turns into sizes). A step with other
      values is an error.

    A branch of the forward that only raises (`if labels.max() >= vocab: raise ...`, `assert`) is
    not part of the program, and `print` runs once, while the model is captured.

    Needs no devices and no process group. Raises `PlanError` for the plan, alone or against the
    model, `CaptureError` for a model or an argument that cannot be used, and `LayoutError` where an
    operator needs a tensor whole that the plan splits, and the plan does not allow a gather.
    """
    guard()
    return driver.compile_program(
        model,
        plan,
        example,
        loss=loss,
        outputs=() if outputs is None else outputs,  # type: ignore[redundant-expr]  # as a default
        mode=mode,
        device=device,
        static=() if static is None else static,  # type: ignore[redundant-expr]  # as a default
        runtime=RUNTIME,
    )
