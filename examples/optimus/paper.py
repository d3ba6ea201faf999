"""What the paper says: its configurations, its measurements and its formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass

from examples.optimus.model import Setting


@dataclass(frozen=True)
class Measured:
    """A published run: the batch, and the sequences per second in training and inference."""

    batch: int
    train: float
    infer: float


PUBLISHED = {
    Setting(4, 2048, 32): {
        "1-D": Measured(60, 2.936, 12.61),
        "2-D": Measured(96, 2.523, 10.15),
    },
    Setting(16, 4096, 64): {
        "1-D": Measured(60, 1.383, 4.805),
        "2-D": Measured(192, 1.413, 5.670),
    },
    Setting(36, 6120, 72): {
        "1-D": Measured(40, 0.8823, 2.960),
        "2-D": Measured(288, 1.306, 5.259),
    },
    Setting(64, 8192, 128): {
        "1-D": Measured(30, 0.6410, 2.156),
        "2-D": Measured(384, 0.9502, 3.863),
    },
}
LARGEST = {"1-D": 60, "2-D": 480}
"""The largest batches on 64 GPUs of 16 GB."""
PARTS = ("forward", "backward", "with recomputation")
_ACTIVATIONS = {"forward": 7, "backward": 14, "with recomputation": 21}
_WEIGHTS = {"forward": 12, "backward": 24, "with recomputation": 36}
_FLAT = {"forward": 4, "backward": 4, "with recomputation": 8}
UNUSED = {"1-D": (2, 0), "2-D": (4, 4)}
"""What the paper's backward with recomputation sends and that of the compiled graphs does not, in
units of b s h and of h h. They leave out a block's last product, whose result nothing takes; and in
one dimension they gather what the first sum has left, in place of the sum."""


def elements(form: str, part: str, setting: Setting, batch: int, *, tree: bool) -> float:
    """The elements that a rank sends in a layer: `part` is one of `PARTS`. Blocks go through the
    grid in whole messages down a `tree`, as in the paper, or cut up, so that links are busy."""
    activation, weight = batch * setting.length * setting.width, setting.width**2
    if form == "1-D":
        return _FLAT[part] * (setting.ranks - 1) / setting.ranks * activation
    total = _ACTIVATIONS[part] * activation + _WEIGHTS[part] * weight
    return share(setting.side, tree=tree) * total


def unused(form: str, setting: Setting, batch: int, *, tree: bool) -> float:
    """`UNUSED` in elements that a rank sends."""
    activations, weights = UNUSED[form]
    total = activations * batch * setting.length * setting.width + weights * setting.width**2
    if form == "1-D":
        return total * (setting.ranks - 1) / setting.ranks
    return total * share(setting.side, tree=tree)


def share(side: int, *, tree: bool) -> float:
    """What a rank sends on average of a matrix that goes through a grid of side x side."""
    return math.log2(side) / side if tree else (side - 1) / side**2
