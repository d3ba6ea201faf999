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

from meshwright.compiler.annotate import layout
from meshwright.compiler.custom import custom
from meshwright.compiler.errors import CaptureError, LayoutError, PassError
from meshwright.compiler.program import Program
from meshwright.dsl.errors import MeshwrightError, PlanError
from meshwright.dsl.plan import Plan
from meshwright.passes import driver
from meshwright.runtime.errors import RunError
from meshwright.runtime.run import Run, launch

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
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
    """Compile `model` under `plan` for inputs like `example`.

    `example` is a tuple of positional inputs, a dict of keywords, or `(tuple, dict)`: the global
    batch. `loss` is a path into the model's output, or a function of it that gives the scalar to
    differentiate; by default the output itself if it is one, else its `loss`. `outputs` are paths
    of further results that `step` returns. `mode` is "train" or "infer". `device` is the type that
    is compiled for; by default what `launch` would use here. `static` are inputs whose values in
    the example are part of the program, because the forward reads them in Python (the grid of
    images that Qwen2-VL turns into sizes); a step with other values is an error.

    A branch of the forward that only raises (`if labels.max() >= vocab: raise ...`, `assert`) is
    not part of the program, and `print` runs once, while the model is captured.

    Needs no devices and no process group; the model may be on the meta device, and is not touched.
    Raises `PlanError` for the plan, alone or against the model, `CaptureError` for a model that
    cannot be captured, `LayoutError` where an operator cannot run as it is laid out.
    """
    return driver.compile_program(
        model,
        plan,
        example,
        loss=loss,
        outputs=outputs or (),
        mode=mode,
        device=device,
        static=static or (),
        launcher=launch,
    )
