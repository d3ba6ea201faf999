"""Walk torch's own table of operators, each in the middle of a small model, under multiple plans.

`torch.testing._internal` lists every operator with samples of its arguments. The differentiable
tensors of a sample become values that depend on parameters, split by `data`, by a weight's columns
or by both, or are parameters themselves; all that the operator returns enters a scalar. The loss
and every gradient are compared with eager mode in float64 and, where they differ, with finite
differences, since torch's own derivative of some operators is wrong. An operator that draws random
numbers is compared with the same program on one rank instead: no plan may change what it draws.
"""

from __future__ import annotations

import copy
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import meshwright
from meshwright.runtime.errors import MismatchError

PLANS = ("dp", "dp + parameters", "tp", "dp x tp", "parameters")
"""What is split: the batch of all operands, that of the first, their last dim, both, or none."""

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one sample under one plan."""

    operator: str
    sample: int
    plan: str
    verdict: str
    """`equal`, `refused`, `eager` (torch itself cannot do it), `wrong` or `foreign`."""
    reason: str = ""


@dataclass
class Sample:
    """One call of an operator: tensors and plain values, in the order of `tree`."""

    leaves: list[Any]
    tree: pytree.TreeSpec
    function: Callable[..., Any]
    finish: Callable[[Any], Any]
    """Keeps of the results what is unique, such as eigenvectors without their signs."""

    def tensors(self) -> list[int]:
        return [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]

    def differentiable(self) -> list[int]:
        return [i for i in self.tensors() if self.leaves[i].requires_grad]

    def call(self, leaves: Sequence[Any]) -> list[Tensor]:
        args, kwargs = pytree.tree_unflatten(list(leaves), self.tree)
        result = self.finish(self.function(*args, **kwargs))
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


@dataclass
class Setting:
    """One sample under one plan: the plan's text, the inputs, and the values of parameters."""

    plan: str
    inputs: Values = field(default_factory=dict)
    scales: dict[int, Tensor] = field(default_factory=dict)
    """Ones that multiply the inputs of these operands."""
    parameters: dict[int, Tensor] = field(default_factory=dict)


class Middle(nn.Module):
    """Scaled inputs and parameters, the operator, and a scalar of all that it returns."""

    def __init__(self, sample: Sample, setting: Setting) -> None:
        super().__init__()
        self.sample, self.own = sample, frozenset(setting.parameters)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        for i, value in (*setting.scales.items(), *setting.parameters.items()):
            self.register_parameter(f"w{i}", nn.Parameter(value.clone()))

    def forward(self, **inputs: Tensor) -> Tensor:
        leaves = list(self.sample.leaves)
        for i in self.sample.tensors():
            weight = getattr(self, f"w{i}", None)
            leaves[i] = weight if i in self.own else inputs[f"x{i}"]
            if weight is not None and i not in self.own:
                leaves[i] = leaves[i] * weight
        total = self.scale
        for result in self.sample.call(leaves):
            total = total + self.scale * scalar(result)
        return (inputs["batch"] * total).mean() if "batch" in inputs else total


def scalar(value: Tensor) -> Tensor:
    """A weighted sum of squares, in float64."""
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    value = value.to(torch.float64)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).view(value.shape)
    return (value * value * weights).sum()


def setting(sample: Sample, name: str) -> Setting | None:
    """The sample under the plan of this name; `None` where nothing can be split in this way."""
    if name == "parameters":
        return _parameters(sample)
    wanted = sample.differentiable()
    own = wanted[1:] if name == "dp + parameters" else []
    if not wanted or (name == "dp + parameters" and not own):
        return None
    made = Setting("")
    made.parameters = {i: sample.leaves[i].detach() for i in own}
    made.inputs = {f"x{i}": sample.leaves[i].detach() for i in sample.tensors() if i not in own}
    axes = {"tp": ("tp",), "dp x tp": ("dp", "tp")}.get(name, ("dp",))
    sizes, lines = {}, []
    if "dp" in axes:
        length = next(iter(sample.leaves[wanted[0]].shape), 0)
        rows = [key for key, x in made.inputs.items() if x.dim() and x.shape[0] == length]
        lines.append(f"data {', '.join(rows)} over dp")
        sizes["dp"] = divisor(length)
    last = [i for i in wanted if i not in own and sample.leaves[i].dim() >= len(axes)]
    if "tp" in axes:
        sizes["tp"] = next((n for i in last if (n := divisor(sample.leaves[i].shape[-1]))), 0)
    for i in wanted:
        if i in own:
            continue
        value = sample.leaves[i]
        if "tp" in axes and i in last and divisor(value.shape[-1]) == sizes["tp"]:
            made.scales[i] = torch.ones(value.shape[-1], dtype=value.dtype)
            lines.append(f"shard w{i} [{value.shape[-1]}@tp]")
        else:
            made.scales[i] = torch.ones(value.shape[1:], dtype=value.dtype)
    mesh = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    made.plan = "\n".join([f"mesh {mesh}", *lines])
    return made if all(sizes.values()) else None


def divisor(size: int) -> int:
    """A number of ranks that divides `size`; 0 where there is none."""
    return next((n for n in (2, 3, 5) if size and size % n == 0), 0)


def _parameters(sample: Sample) -> Setting:
    """Every differentiable operand is a parameter; a batch enters after the operator."""
    tensors, wanted = sample.tensors(), sample.differentiable()
    sizes = {sample.leaves[i].shape[0] for i in tensors if sample.leaves[i].dim()}
    size = next(n for n in (6, 14, 22, 26, 34) if n not in sizes)
    made = Setting("mesh dp=2\ndata batch over dp")
    made.inputs["batch"] = torch.linspace(0.5, 1.5, size, dtype=torch.float64)
    made.inputs |= {f"x{i}": sample.leaves[i].detach() for i in tensors if i not in wanted}
    made.parameters = {i: sample.leaves[i].detach() for i in wanted}
    return made


def eager(model: nn.Module, inputs: Values, seed: int) -> Values:
    """The loss and the gradients, by name."""
    _seed(seed)
    model = copy.deepcopy(model)
    loss = model(**{key: value.clone() for key, value in inputs.items()})
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **named}


def compiled(model: nn.Module, inputs: Values, plan: str) -> Values:
    """The same compiled under `plan`, on the virtual mesh; copies on ranks are compared."""
    given = {key: value.clone() for key, value in inputs.items()}
    run = meshwright.compile(model, meshwright.Plan.parse(plan), example=given).launch()
    loss = run.step(**{key: value.clone() for key, value in inputs.items()})
    run.check()
    return {"loss": loss.detach(), **run.gradients()}


def difference(found: Values, wanted: Values, tolerance: float) -> str:
    """The differences in words; empty where there are none."""
    if set(found) != set(wanted):
        return f"gradients of {sorted(set(found) ^ set(wanted))} on one side only"
    wrong = []
    for name, theirs in wanted.items():
        ours = found[name]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            wrong.append(f"{name}: {ours.dtype}{tuple(ours.shape)}")
        elif not torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True):
            wrong.append(f"{name} by {(ours - theirs).abs().max().item():.1e}")
    return ", ".join(wrong)


def attempt(sample: Sample, name: str) -> tuple[str, str] | None:
    """Verdict and reason of one sample under one plan; `None` where the plan does not apply."""
    made = setting(sample, name)
    if made is None:
        return None
    model = Middle(sample, made)
    try:
        wanted, again = (eager(model, made.inputs, seed) for seed in (0, 1))
        tolerance = _tolerance(sample)
    except Exception as error:
        return "eager", _words(error)
    try:
        if difference(again, wanted, tolerance):
            wanted = compiled(model, made.inputs, "mesh one=1")
        found = compiled(model, made.inputs, made.plan)
    except MismatchError as error:
        return "wrong", _words(error)
    except (meshwright.PlanError, meshwright.CaptureError, meshwright.LayoutError) as error:
        return "refused", f"{type(error).__name__}: {error}"
    except Exception as error:
        return _torch_s_own(sample, error)
    wrong = difference(found, wanted, tolerance)
    if wrong and not difference(found, by_differences(model, made.inputs, wanted), 1e-4):
        return "eager", "torch's derivative is not what finite differences give; this one is"
    return ("wrong", wrong) if wrong else ("equal", "")


def by_differences(model: nn.Module, inputs: Values, wanted: Values) -> Values:
    """`wanted`, with gradients of real parameters by central differences of the eager loss."""
    step, found = 1e-6, dict(wanted)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in wanted or parameter.is_complex():
                continue
            found[name] = torch.empty_like(parameter)
            for place, value in enumerate(parameter.view(-1).tolist()):
                ends = []
                for moved in (value + step, value - step):
                    parameter.view(-1)[place] = moved
                    ends.append(model(**inputs).item())
                parameter.view(-1)[place] = value
                found[name].view(-1)[place] = (ends[0] - ends[1]) / (2 * step)
    return found


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _torch_s_own(sample: Sample, error: Exception) -> tuple[str, str]:
    """`foreign`, unless torch's shape function for the operator gives other shapes than it does."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in sample.leaves]
        shapes = [tuple(x.shape) for x in sample.call(fakes)]
    if shapes != [tuple(x.shape) for x in sample.call(sample.leaves)]:
        return "eager", "torch's shape function for it gives other shapes than it returns"
    return "foreign", _words(error)


def _tolerance(sample: Sample) -> float:
    """The difference that rounding allows: an operator that casts to half rounds parts of ranks."""
    types = [x.dtype for x in sample.call(sample.leaves)]
    lossy = [torch.finfo(t).eps for t in types if t.is_floating_point or t.is_complex]
    return max([1e-8, *(64 * eps for eps in lossy)])


_LEFT_OUT = ("jiterator", "empty", "new_empty")
"""Operators of other devices only, and those whose result is uninitialised memory."""


def operators() -> list[Any]:
    """The entries of torch's table that take float64."""
    from torch.testing._internal import common_methods_invocations as table

    # Random operators must not seed themselves.
    table.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
    return [
        op for op in table.op_db if torch.float64 in op.dtypes and not op.name.startswith(_LEFT_OUT)
    ]


def label(op: Any) -> str:
    """The operator's name in torch's table, with its variant's."""
    return f"{op.name} ({op.variant_test_name})" if op.variant_test_name else str(op.name)


_SIZE = 4
"""The size of most samples, in place of 5, which does not divide."""

_FIXED_SIZES = {"_segment_reduce"}
"""Operators whose samples have lengths that are written out for the size 5."""


@contextmanager
def _sized(size: int) -> Iterator[None]:
    """A context in which samples are made of `size`."""
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("torch.testing._internal.") and getattr(module, "S", None) == 5
    ]
    for module in modules:
        module.S = size  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module.S = 5  # type: ignore[attr-defined]


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _listed(op: Any, size: int) -> list[Any]:
    _seed(7)
    with _sized(size):
        return list(op.sample_inputs("cpu", torch.float64, requires_grad=op.supports_autograd))


def samples(op: Any, count: int) -> list[tuple[int, Sample]]:
    """`count` samples of the operator that can be split and one that cannot, with their numbers."""
    try:
        listed = _listed(op, 5 if op.name in _FIXED_SIZES else _SIZE)
    except (IndexError, RuntimeError):
        listed = _listed(op, 5)
    found = []
    for number, each in enumerate(listed):
        leaves, tree = pytree.tree_flatten(((each.input, *each.args), each.kwargs))
        found.append((number, Sample(leaves, tree, op.op, each.output_process_fn_grad)))
    even = [(number, sample) for number, sample in found if _divides(sample)]
    chosen = _spread(even, count)
    rest = [each for each in found if each not in even]
    return chosen + _spread(rest, max(1, count - len(chosen)))


def _divides(sample: Sample) -> bool:
    wanted = sample.differentiable()
    shape = sample.leaves[wanted[0]].shape if wanted else ()
    return bool(shape) and all(map(divisor, (shape[0], shape[-1])))


def _spread(items: list[Any], count: int) -> list[Any]:
    """`count` items at equal distances."""
    if len(items) <= count:
        return items
    last = len(items) - 1
    return [items[i * last // max(count - 1, 1)] for i in range(count)]


def walk(op: Any, count: int = 2, plans: Sequence[str] = PLANS) -> list[Outcome]:
    """The outcomes of one operator."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [
                Outcome(label(op), number, plan, *found)
                for number, sample in samples(op, count)
                for plan in plans
                if (found := attempt(sample, plan)) is not None
            ]
    finally:
        logging.disable(logging.NOTSET)
