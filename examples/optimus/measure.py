"""What the compiled graphs of a plan send, hold and take: everything is counted, nothing runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import sympy

import meshwright as mw
from examples.optimus.model import LAYERS, LENGTH, Setting
from examples.optimus.paper import PARTS
from meshwright.compiler.report.cost.cost import Cost

CLUSTER = "4xv100"
SHALLOW = 3
"""Layers from which on each further one adds the same: to what is sent, and to the time."""
CONVENTIONS = {"1-D": ("ring",), "2-D": ("tree", "pipelined")}
"""How collectives go, the paper's way first: sums round a ring, blocks down a tree or cut up."""
_ITEM = 4
_KINDS = {"2-D": ("broadcast", "reduce")}
"""What products in blocks send; norms and biases send other kinds."""


Rates: TypeAlias = "dict[tuple[Setting, str], dict[str, float]]"
"""Sequences per second by setting and mode, and by plan and convention."""


def volumes(setting: Setting, form: str, batch: int) -> dict[str, float]:
    """The elements that a rank sends in a layer, by `PARTS`, pipelined: for the products."""
    plain, again = (
        replace(setting, layers=2).compiled(form, batch, checkpoint=checkpoint)
        for checkpoint in (False, True)
    )
    counts = (_sent(plain, form, "forward"), _sent(plain, form, "backward"))
    return dict(zip(PARTS, (*counts, _sent(again, form, "backward")), strict=True))


def _sent(program: mw.Program, form: str, phase: str) -> float:
    kinds = _KINDS.get(form, ("all_reduce", "all_gather"))
    found = (each for each in program.comm().moved if each.module.startswith("blocks."))
    sizes = (each.bytes for each in found if each.phase == phase and each.kind in kinds)
    return sum(sizes) / _ITEM / 2


def rates(setting: Setting, form: str, batch: int, mode: str) -> dict[str, float]:
    """The modelled sequences per second with all layers, from two programs of few, by plan and
    convention."""
    cluster = _cluster(setting, form)
    programs = [
        replace(setting, layers=layers).compiled(form, batch, mode=mode)
        for layers in (SHALLOW, SHALLOW + 1)
    ]
    found = {}
    for convention in CONVENTIONS[form]:
        first, second = (each.cost(cluster, convention=convention).seconds for each in programs)
        seconds = first + (setting.layers - SHALLOW) * (second - first)
        found[f"{form}, {convention}"] = batch / seconds
    return found


def _cluster(setting: Setting, form: str) -> mw.Cluster:
    """The cluster as a mesh lies on it: in one dimension ranks fill one node after another, and a
    grid has a square of its ranks in each node, so that both of its axes go between nodes."""
    cluster = mw.Cluster.load(CLUSTER)
    if form != "2-D" or setting.ranks <= cluster.devices:
        return cluster
    return replace(cluster, axes={"row": "network", "col": "network"})


@dataclass(frozen=True)
class Largest:
    """The largest `batch` that fits: its `peak` is within the limit, that of the next one, `above`,
    is not; in bytes per rank. `parts` says what the peak is made of, and `at` where it is."""

    batch: int
    peak: int
    above: int
    at: str
    parts: Mapping[str, int]


def largest_batch(
    setting: Setting, form: str, limit: float, guess: int, say: Callable[[str], None]
) -> Largest:
    """The largest batch with which a rank needs no more than `limit` bytes, by the memory of whole
    programs; in two dimensions rows of the grid share the batch."""
    step = setting.side if form == "2-D" else 1
    found: dict[int, Largest] = {}

    def peak(count: int) -> int:
        if count not in found:
            memory = setting.compiled(form, count * step).memory()
            found[count] = Largest(count * step, memory.peak, 0, memory.peak_at, memory.parts)
            say(f"{form}: a batch of {count * step} needs {memory.peak / 1e9:.2f} GB")
        return found[count].peak

    count = max(guess // step, 1)
    peak(count)
    parts = found[count].parts
    lines = {0: parts["parameters"] + parts["optimizer"], count: peak(count)}
    low, high = (count, 0) if peak(count) <= limit else (0, count)
    while high - low != 1:
        first, second = (low, high) if high else sorted(lines)[-2:]
        slope = (lines[second] - lines[first]) / (second - first)
        count = max(first + int((limit - lines[first]) / slope), low + 1)
        count = min(count, high - 1) if high else count
        lines[count] = peak(count)
        low, high = (count, high) if peak(count) <= limit else (low, count)
    return replace(found[low], above=peak(high))


_NAMES = {"wte": "[v, h]", "blocks.*.up": "[(4 h), h]", "blocks.*.proj": "[h, h]"}


@dataclass(frozen=True)
class Fit:
    """W grows like `base` to the power of `exponent`: `residual` is the largest relative error of
    the fit. `points` are pairs of ranks and W, in floating-point operations of a step."""

    base: str
    exponent: float
    residual: float
    points: tuple[tuple[int, float], ...]


BASES = {
    "1-D": ("p", float),
    "2-D": ("sqrt(p) log p", lambda ranks: math.sqrt(ranks) * math.log2(ranks)),
}


def isoefficiency(form: str, ranks: Sequence[int], share: float) -> Fit:
    """How the work W has to grow with p, so that a rank sends for as long as it computes: by the
    formulas of compiled graphs in their sizes, as in the paper; the batch is `share` of the
    width, and rates are those of `CLUSTER`."""
    # Long enough for panels that do not come in one message, as those of the paper's models.
    cost = formulas(Setting(4, 64, 8, layers=3, vocabulary=96, length=1024), form, 8)
    sent, computed = cost.sent(module="blocks.*").expr, cost.flops(module="blocks.*").expr
    points = tuple(
        (count, count * _balanced(sent, computed, _values(form, count), share)) for count in ranks
    )
    name, base = BASES[form]
    x = [math.log(base(count)) for count, _ in points]
    y = [math.log(work) for _, work in points]
    exponent, shift = statistics.linear_regression(x, y)
    off = max(abs(b - exponent * a - shift) for a, b in zip(x, y, strict=True))
    return Fit(name, exponent, math.expm1(off), points)


def formulas(setting: Setting, form: str, batch: int) -> Cost:
    """What a rank sends and computes in a step, in the names b, s, h, layers and axes."""
    return setting.compiled(form, batch).cost(names=_NAMES, convention=CONVENTIONS[form][0])


def _values(form: str, ranks: int) -> dict[str, int]:
    side = math.isqrt(ranks)
    axes = {"tp": ranks} if form != "2-D" else {"row": side, "col": side}
    return {"s": LENGTH, "layers": LAYERS, **axes}


def _balanced(
    sent: sympy.Expr, computed: sympy.Expr, values: Mapping[str, int], share: float
) -> float:
    """What a rank computes in a step at the width at which that takes as long as what it sends."""
    cluster = mw.Cluster.load(CLUSTER)
    assert cluster.network is not None
    width = sympy.Symbol("h", positive=True)
    symbols = {str(each): each for each in sent.free_symbols | computed.free_symbols}
    known = {symbols[name]: value for name, value in values.items() if name in symbols}
    known |= {symbols["b"]: share * width, symbols["h"]: width}
    sending = sympy.lambdify(width, sent.subs(known) / cluster.network.bandwidth)
    computing = sympy.lambdify(width, computed.subs(known) / cluster.rate("float32"))
    low, high = 1.0, 1e12
    while high / low > 1 + 1e-12:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if sending(middle) > computing(middle) else (low, middle)
    return float(computing(low) * cluster.rate("float32"))
