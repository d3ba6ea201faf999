"""Random numbers of the forward that do not come from torch's default stream.

A seed set in the forward is refused: the program's numbers have keys of their own. What Python and
NumPy draw becomes a constant of the graph, with a warning. `x.random_(low, high)`, which export
cannot record, is traced as `randint`, and `trunc_normal_` as one draw. Distributions check their
arguments, which takes values of tensors, only when told to.
"""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from meshwright.compiler.capture.origin import current_line, is_user, origin_of
from meshwright.compiler.errors import CaptureError


@contextmanager
def draws_noticed(what: str = "the forward") -> Iterator[None]:
    """Warn if `what` runs inside this context draws from Python's or NumPy's stream."""
    before = _streams()
    yield
    moved = [name for name, state in _streams().items() if before.get(name, state) != state]
    for name in moved:
        warnings.warn(
            f"{what} draws from {name}: the program keeps the numbers that were drawn while "
            "it was captured; draw with `torch.rand`, or pass the numbers to the model",
            stacklevel=4,
        )


def _streams() -> dict[str, Any]:
    found: dict[str, Any] = {"Python's `random`": random.getstate()}
    if "numpy" in sys.modules:
        kind, key, *rest = sys.modules["numpy"].random.get_state()
        found["`numpy.random`"] = (kind, key.tobytes(), *rest)
    return found


def refuse_generators(program: ExportedProgram) -> None:
    """Raise `CaptureError` for an operator that is given a generator or another object."""
    placeholders = program.graph.find_nodes(op="placeholder")
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind is not InputKind.CUSTOM_OBJ or not node.users:
            continue
        user, held = next(iter(node.users)), program.constants[str(spec.target)]
        help = "pass the operator tensors and numbers alone"
        if isinstance(held, torch.Generator):
            help = "leave out `generator`: the `seed` of `launch` and the step key random numbers"
        raise CaptureError(
            f"`{user.target}` is given a `{type(held).__name__}`",
            code="generator",
            culprit=origin_of(user).source,
            help=help,
        )


def _refused(original: Callable[..., Any]) -> Callable[..., Any]:
    def seeded(*args: Any, **kwargs: Any) -> Any:
        if is_user(sys._getframe(1).f_code.co_filename):
            raise CaptureError(
                f"the forward calls `torch.{original.__name__}`",
                code="seed",
                culprit=current_line(),
                help="remove it: the `seed` of `launch` and the step key random numbers",
            )
        return original(*args, **kwargs)

    return seeded


_NO_SHAPE = torch.Size()


def _random(tensor: Tensor, *bounds: Any, **options: Any) -> Tensor:
    if len(bounds) == 2 and None not in bounds:
        drawn = torch.randint(*bounds, tensor.shape, device=tensor.device, **options)
        return tensor.copy_(drawn)
    filled: Tensor = _ORIGINAL_RANDOM(tensor, *bounds, **options)
    return filled


def _gamma(self: Any, sample_shape: torch.Size = _NO_SHAPE) -> Tensor:
    """`Gamma.rsample`, where torch bounds the sample by a write that autograd does not see."""
    shape = self._extended_shape(sample_shape)
    sample = torch._standard_gamma(self.concentration.expand(shape)) / self.rate.expand(shape)
    free = sample.detach()
    raised: Tensor = sample + (free.clamp(min=torch.finfo(sample.dtype).tiny) - free)
    return raised


def _trunc_normal(
    tensor: Tensor, mean: float, std: float, a: float, b: float, generator: Any = None
) -> Tensor:
    """`trunc_normal_` by the inverse of the distribution function: torch draws again, as often as
    the values say, and so records nothing. Numbers far from the mean need more digits."""

    def cdf(x: float) -> float:
        return math.erf((x - mean) / std / math.sqrt(2.0))

    low, high = cdf(a), cdf(b)
    dtype = torch.float64 if high - low < 0.6 else torch.promote_types(tensor.dtype, torch.float32)
    drawn = torch.empty_like(tensor, dtype=dtype).uniform_(low, high, generator=generator)
    with torch.no_grad():
        return tensor.copy_(drawn.erfinv_().mul_(std * math.sqrt(2.0)).add_(mean).clamp_(a, b))


_ORIGINAL_RANDOM: Any = torch.Tensor.random_
_SEEDS = ("manual_seed", "seed", "set_rng_state")
TRANSLATED: tuple[tuple[Any, str, Any], ...] = (
    *((o, name, _refused(getattr(o, name))) for o in (torch, torch.random) for name in _SEEDS),
    (torch.Tensor, "random_", _random),
    (torch.nn.init, "_no_grad_trunc_normal_", _trunc_normal),
    (torch.distributions.Gamma, "rsample", _gamma),
    (torch.distributions.Distribution, "_validate_args", False),
)
