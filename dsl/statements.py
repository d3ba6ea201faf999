"""The statements of the language: one frozen dataclass per verb.

Two statements are equal when they say the same, wherever and however they are written: spans and
spellings (a name of a `let` or of a group, in place of a value) do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar

import sympy

from meshwright.dsl.kinds import AxisName, ByteSize, Choice, Count, Flag, Folder, Kind, Ratio, Words
from meshwright.dsl.layouts import DimTemplate, LayoutTemplate
from meshwright.dsl.selectors import Selector
from meshwright.dsl.source import Span

DTYPES = ("bf16", "fp16", "fp32", "fp64")
COUNTED = (
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "exchange_rows", "permute",
    "broadcast", "reduce", "transfer",
)  # fmt: skip
METRICS = (*COUNTED, "bytes", "peak_memory")
OFFLOADED = ("activations", "parameters", "optimizer")
ALLOWED = ("replicate", "local")
ARROWS = {"tensor": "", "output": "->", "input": "<-"}
"""What `shard` writes before the layout, by what the layout is of."""
SCHEDULES = {
    "gpipe": (1, None),
    "1f1b": (1, 1),
    "interleaved": (2, None),
    "zb": (1, None),
    "zbh2": (1, 1),
    "zbv": (2, 2),
    "dualpipe": (1, 1),
    "dualpipev": (2, 2),
}
"""The least and the most stages per rank (`virtual=`) of each schedule; dualpipe runs its stages in
two copies."""


def option(kind: Kind, default: Any = None) -> Any:
    """A field that is written `name=value`, which its kind reads."""
    return field(default=default, metadata={"kind": kind})


def option_name(field: Field[Any]) -> str:
    """The name of an option in a plan: that of its field, without the underscore that sets a word
    of Python apart (`except_`)."""
    return field.name.rstrip("_")


@dataclass(frozen=True, kw_only=True)
class Statement:
    """The base of all statements: the place of each and of its parts, and how values were spelt.

    `scope` is the path of the module whose class carries the statement, `None` for the plan's own.
    """

    verb: ClassVar[str]
    span: Span | None = field(default=None, compare=False, repr=False)
    parts: Mapping[str, Span] = field(default_factory=dict, compare=False, repr=False)
    spelling: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    scope: str | None = field(default=None, compare=False)

    def at(self, part: str) -> Span | None:
        """The place of a part (`over`, `as`, an option's name), else of the whole statement."""
        return self.parts.get(part, self.span)

    @property
    def plan_line(self) -> str:
        """Its file and line, `gpt.plan:6`; empty if it was not read from a text."""
        return f"{self.span.source.name}:{self.span.line}" if self.span is not None else ""

    @classmethod
    def options(cls) -> Iterator[Field[Any]]:
        """The fields that are written `name=value`."""
        return (each for each in fields(cls) if "kind" in each.metadata)


@dataclass(frozen=True, kw_only=True)
class Targeted(Statement):
    """A statement about what its selectors match."""

    targets: tuple[Selector, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Spread(Targeted):
    """A statement about targets `over` mesh axes, the first of them major."""

    over: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MeshStatement(Statement):
    """`mesh dp=2, tp=4`: the first axis varies slowest over the ranks."""

    verb = "mesh"
    axes: tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class Axes(Statement):
    """`axes model = (row, col)`: names for groups of axes."""

    verb = "axes"
    groups: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class Let(Statement):
    """`let d = 768, f = 4*d`: named sizes; the values are exact."""

    verb = "let"
    values: tuple[tuple[str, sympy.Rational], ...]


@dataclass(frozen=True, kw_only=True)
class Precision(Statement):
    """`precision bf16 master=fp32 keep=[norm, head] reduce=bf16`; without `master`, parameters are
    stored as the model has them, and without `reduce`, gradients are reduced in float32."""

    verb = "precision"
    dtype: str
    master: str | None = option(Choice(("fp32", "bf16")))
    keep: tuple[str, ...] = option(Words(quoted=True), ())
    reduce: str | None = option(Choice(("fp32", "bf16")))
    dropout: str = option(Choice(("hash", "native")), "hash")


@dataclass(frozen=True, kw_only=True)
class Memory(Statement):
    """`memory budget=60GiB`; the budget is in bytes, per rank."""

    verb = "memory"
    budget: int = option(ByteSize(), 0)


@dataclass(frozen=True, kw_only=True)
class Accumulate(Statement):
    """`accumulate 4`: that many microbatches one after the other."""

    verb = "accumulate"
    count: int


@dataclass(frozen=True, kw_only=True)
class Data(Spread):
    """`data X, ... over dp`: inputs split along their batch dimension."""

    verb = "data"
    dim: int = option(Count(0), 0)


@dataclass(frozen=True, kw_only=True)
class Shard(Targeted):
    """`shard SEL LAYOUT`: the layout of a tensor.

    `of` is `tensor` (a parameter, buffer or input), or a module's `output` or `input`.
    """

    verb = "shard"
    layout: LayoutTemplate
    of: str = "tensor"


@dataclass(frozen=True, kw_only=True)
class Fused(Spread):
    """A statement that may name the `factors` of a fused output: `as (3 heads hd)`."""

    factors: DimTemplate | None = None


@dataclass(frozen=True, kw_only=True)
class Columns(Fused):
    """`columns SEL over tp as (3 heads hd)`: linears with split output features."""

    verb = "columns"


@dataclass(frozen=True, kw_only=True)
class Rows(Spread):
    """`rows SEL over tp`: linears with split input features."""

    verb = "rows"


@dataclass(frozen=True, kw_only=True)
class Vocab(Spread):
    """`vocab SEL over tp`: embedding, head and loss split over the vocabulary."""

    verb = "vocab"


@dataclass(frozen=True, kw_only=True)
class Sequence(Spread):
    """`sequence SEL over tp`: activations split along the sequence between split linears.

    `keep=[all_gather]` saves gathered inputs for the backward, which otherwise gathers them again.
    """

    verb = "sequence"
    keep: tuple[str, ...] = option(Words(("all_gather",)), ())


@dataclass(frozen=True, kw_only=True)
class Context(Spread):
    """`context SEL over cp method=ring`: attention over a split sequence.

    `order` is that of a sequence over the ranks of a ring; `None` takes zigzag where that is right.
    """

    verb = "context"
    method: str = option(Choice(("ring", "ulysses")), "ring")
    order: str | None = option(Choice(("contiguous", "zigzag")))


@dataclass(frozen=True, kw_only=True)
class Summa(Fused):
    """`summa SEL over (row, col)`: both matrices of each product in blocks over two axes; `depth`
    names the third axis of 2.5-D."""

    verb = "summa"
    depth: str | None = option(AxisName())


@dataclass(frozen=True, kw_only=True)
class Experts(Spread):
    """`experts SEL over ep count=8`; without `count`, the model already has them.

    `top` experts take each token (of `prototype`, one in each of `top` prototypes). `groups` is the
    number of groups of tokens in a batch, of which each expert takes `capacity` times its share;
    None takes the batch's rows. With `dropless` an expert takes all, and those of one rank have
    room for `maximum` times its even share. `weight` is that of the auxiliary loss, and `rate` what
    a step adds to biases. `second` says which second experts are taken, `noise` how much what the
    router sees is changed in training, and `init` and `seed` how experts begin.
    """

    verb = "experts"
    count: int | None = option(Count())
    route: str | None = option(Choice(("topk", "switch", "expert_choice", "prototype")))
    top: int | None = option(Count())
    capacity: float | None = option(Ratio())
    dropless: bool = option(Flag(), False)
    maximum: float | None = option(Ratio())
    groups: int | None = option(Count())
    balance: str | None = option(Choice(("aux", "bias", "none")))
    weight: float | None = option(Ratio())
    rate: float | None = option(Ratio())
    second: str | None = option(Choice(("all", "random")))
    noise: float | None = option(Ratio(high=1.0))
    init: str | None = option(Choice(("copy", "fresh")))
    seed: int | None = option(Count(low=0))


@dataclass(frozen=True, kw_only=True)
class Zero(Spread):
    """`zero 2 over dp`: 1 splits optimizer state, 2 gradients too, 3 parameters too.

    `every` says whether what the level splits is gathered and scattered in every microbatch, or
    once per step: then ranks have all of it until the step is over.
    """

    verb = "zero"
    level: int
    every: str | None = option(Choice(("step", "microbatch")))

    def when(self, *, pipelined: bool) -> str:
        """When weights are gathered and gradients scattered, as the option is written."""
        return f"every={self.every or ('step' if pipelined else 'microbatch')}"


@dataclass(frozen=True, kw_only=True)
class Stages(Spread):
    """`stages at blocks.6 over pp`, where `targets` each begin a stage, or `stages 4`."""

    verb = "stages"
    count: int | None = None
    schedule: str = option(Choice(tuple(SCHEDULES), path=True), "1f1b")
    microbatches: int | None = option(Count())
    virtual: int = option(Count(), 1)
    balance: str | None = option(Choice(("flops", "parameters", "memory")))

    @property
    def num_stages(self) -> int:
        """The number of stages, where every target matches one module."""
        return self.count if self.count is not None else len(self.targets) + 1


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Targeted):
    """`checkpoint SEL keep=[sdpa, "up.linear"]`, or `checkpoint budget=40GiB`.

    Each call of a module is a region; with `segments`, all of them together are that many, and with
    `split`, ranks along that axis each keep a part of what regions save. The budget is in bytes per
    rank, or `auto`: what the device has.
    """

    verb = "checkpoint"
    keep: tuple[str, ...] = option(Words(quoted=True), ())
    segments: int | None = option(Count())
    split: str | None = option(AxisName())
    budget: int | str | None = option(ByteSize(auto=True))


@dataclass(frozen=True, kw_only=True)
class Offload(Targeted):
    """`offload activations blocks.* prefetch=20`: `what` is kept in host memory, or with `to=disk`
    in files under `path`; no target means all of it.

    `fraction` is that of the layers, `budget` the bytes that a rank may hold on its device, and
    `prefetch` how many nodes before its use a value begins to come back.
    """

    verb = "offload"
    what: str
    fraction: float | None = option(Ratio(0.0, 1.0))
    budget: int | None = option(ByteSize())
    prefetch: int | None = option(Count(0))
    to: str = option(Choice(("host", "disk")), "host")
    path: str | None = option(Folder())


@dataclass(frozen=True, kw_only=True)
class Share(Targeted):
    """`share SEL`: the selected layers use the first one's parameters.

    With `group`, so many consecutive layers use those of the first of them; with `every`, each
    layer those of the one that many before it. `except_` are selectors of modules and parameters
    inside of a layer, which stay its own.
    """

    verb = "share"
    group: int | None = option(Count())
    every: int | None = option(Count())
    except_: tuple[str, ...] = option(Words(quoted=True), ())


@dataclass(frozen=True, kw_only=True)
class Expect(Targeted):
    """`expect all_reduce[tp] == 0 per blocks.*`.

    `window` is `forward`, `backward`, `step`, or empty: forward plus backward of one microbatch.
    Without axes every axis counts; `bound` of `bytes` and `peak_memory` is in bytes.
    """

    verb = "expect"
    metric: str
    axes: tuple[str, ...] = ()
    comparison: str
    bound: int | float
    window: str = ""


@dataclass(frozen=True, kw_only=True)
class Allow(Targeted):
    """`allow replicate SEL` or `allow local SEL`: accept what is otherwise an error there."""

    verb = "allow"
    what: str


STATEMENTS: dict[str, type[Statement]] = {
    each.verb: each
    for each in (
        MeshStatement, Axes, Let, Precision, Memory, Accumulate,
        Data, Shard, Columns, Rows, Vocab, Sequence, Context, Summa, Experts,
        Zero, Stages, Checkpoint, Offload, Share, Expect, Allow,
    )
}  # fmt: skip
"""Every verb and its statement, in the order in which the language is taught."""

CONNECTIVES = ("over", "as", "at", "per")
