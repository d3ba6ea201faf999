"""Plans built in Python, each statement checked by the call that adds it.

    plan = (
        Plan.build(mesh={"dp": 2, "tp": 2})
        .data("tokens", "targets", over="dp")
        .columns("blocks.*.up", over="tp")
        .rows("blocks.*.down", over="tp")
        .plan()
    )

Each method writes one statement of the language, which is parsed at once: a mistake is a
`PlanError` raised by that call, and a built plan can say exactly what a plan's text can.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from meshwright.dsl.check import Said, check
from meshwright.dsl.errors import PlanError, either, plural, quoted, spelled
from meshwright.dsl.layouts import LayoutTemplate, format_axes
from meshwright.dsl.plan import Plan
from meshwright.dsl.statements import ARROWS, Axes, Let, MeshStatement
from meshwright.dsl.values import LARGEST

if TYPE_CHECKING:
    from typing import Self

AxisNames: TypeAlias = "str | Iterable[str]"
Option: TypeAlias = "str | int | float | bool | Iterable[str] | None"


class PlanBuilder:
    """A plan under construction: each call adds a statement, and `plan` returns the plan.

    Made by `Plan.build`. Each method is a verb of the
    [plan language](plan-language.md#every-statement). `targets` are selectors (`"blocks.*.up"`),
    `over` is an axis or a tuple of axes, and options are keywords. A call raises `PlanError` for a
    mistake in its statement.
    """

    def __init__(self, mesh: Mapping[str, int] | None, name: str) -> None:
        self._name = name
        self._lines: list[str] = []
        self._named: list[str] = []
        """The lines that bind names, which are all that is needed to read another line."""
        self._said: Said = {}
        if mesh is not None and not isinstance(mesh, Mapping):
            help = 'write `Plan.build(mesh={"dp": 2, "tp": 2})`'
            raise PlanError("P115", f"`mesh` is {spelled(mesh)}, not a dict", help=help)
        if mesh:
            self._add("mesh", _sizings(mesh))

    def __repr__(self) -> str:
        return f"<PlanBuilder {self._name}: {plural(len(self._lines), 'statement')}>"

    def plan(self) -> Plan:
        """The `Plan` of all statements so far."""
        return Plan.parse("".join(f"{line}\n" for line in self._lines), self._name)

    def axes(self, **groups: AxisNames) -> Self:
        """Name groups of axes: `axes(model=("row", "col"))`; `groups` maps names to axes."""
        pairs = (f"{name} = {_axes(members)}" for name, members in groups.items())
        return self._add("axes", ", ".join(pairs))

    def let(self, **sizes: int | str) -> Self:
        """Name `sizes`, given as numbers or as expressions in text: `let(d=768, f="4*d")`."""
        return self._add("let", _sizings(sizes))

    def data(self, *inputs: str, over: AxisNames, dim: int | None = None) -> Self:
        """Split these `inputs` along `dim`, 0 by default, and reduce gradients over the axes."""
        return self._spread("data", inputs, over, dim=dim)

    def shard(self, *targets: str, layout: str | LayoutTemplate, of: str = "tensor") -> Self:
        """Give the `targets` this `layout`: `shard("wte.weight", layout="[v@tp, d]")`.

        `of` is `"tensor"` for a parameter, buffer or input, `"output"` (`->`) or `"input"` (`<-`)
        for those of a module.
        """
        help = f"use {either(ARROWS)}"
        if _text("`of`", of, help) not in ARROWS:
            raise PlanError("P111", f"`of` is {spelled(of)}", help=help)
        if not isinstance(layout, LayoutTemplate):
            layout = _text("the layout", layout, 'write one such as `layout="[f@tp, d]"`')
        return self._add("shard", _listed(targets), ARROWS[of], str(layout))

    def columns(self, *targets: str, over: AxisNames, factors: str = "") -> Self:
        """Split the output features of these linears.

        `factors` is what follows `as`, for a fused output: `"(3 heads hd)"`.
        """
        return self._fused("columns", targets, over, factors)

    def rows(self, *targets: str, over: AxisNames) -> Self:
        """Split the input features of these linears, and reduce their outputs."""
        return self._spread("rows", targets, over)

    def vocab(self, *targets: str, over: AxisNames) -> Self:
        """Split an embedding and a head over the vocabulary, and the loss with them."""
        return self._spread("vocab", targets, over)

    def sequence(self, *targets: str, over: AxisNames, keep: Option = None) -> Self:
        """Split activations along the sequence between split linears.

        `keep=["all_gather"]` saves the gathered inputs of linears for the backward.
        """
        return self._spread("sequence", targets, over, keep=keep)

    def context(
        self,
        *targets: str,
        over: AxisNames,
        method: str | None = None,
        order: str | None = None,
    ) -> Self:
        """Split sequences, attention included; `method` is `"ring"` or `"ulysses"`, and the `order`
        of a ring `"contiguous"` or `"zigzag"`."""
        return self._spread("context", targets, over, method=method, order=order)

    def summa(
        self, *targets: str, over: AxisNames, factors: str = "", depth: str | None = None
    ) -> Self:
        """Multiply in blocks over two axes; `depth` is the third axis of 2.5-D.

        `factors` is as in `columns`.
        """
        return self._fused("summa", targets, over, factors, depth=depth)

    def experts(self, *targets: str, over: AxisNames, **options: Option) -> Self:
        """Place experts on different ranks; `options` are `count`, `route`, `top` and so on."""
        return self._spread("experts", targets, over, **options)

    def zero(self, level: int, *targets: str, over: AxisNames, **options: Option) -> Self:
        """Shard optimizer state (`level` 1), gradients too (2), parameters too (3).

        `options` are `every`: `"step"` or `"microbatch"`.
        """
        level_text, place = _value(level, "the level"), f"over {_axes(over)}"
        return self._add("zero", level_text, _listed(targets), place, _options(options))

    def stages(
        self, *at: str, count: int | None = None, over: AxisNames, **options: Option
    ) -> Self:
        """Form a pipeline: a stage begins before each module of `at`, or there are `count` of them.

        `options` are `schedule`, `microbatches`, `virtual` and `balance`.
        """
        where = f"at {_listed(at)}" if at else _value(count, "`count`")
        return self._add("stages", where, f"over {_axes(over)}", _options(options))

    def accumulate(self, count: int) -> Self:
        """Run a step in `count` microbatches, one after the other."""
        return self._add("accumulate", _value(count, "`count`"))

    def memory(self, *, budget: str | int) -> Self:
        """Recompute and offload to stay within a `budget` per rank, such as `"60GiB"`."""
        return self._add("memory", _options({"budget": budget}))

    def checkpoint(self, *targets: str, **options: Option) -> Self:
        """Recompute these regions in the backward.

        `options` are `keep`, `segments`, `split` and `budget`.
        """
        return self._add("checkpoint", _listed(targets), _options(options))

    def offload(self, what: str, *targets: str, **options: Option) -> Self:
        """Keep `what` (`"activations"`, `"parameters"`, `"optimizer"`) in host memory or in files.

        `options` are `fraction`, `budget`, `prefetch`, `to` (`"host"` or `"disk"`) and `path`, the
        folder of the files.
        """
        word = _text("`what`", what, 'write one such as `"optimizer"`')
        if (path := options.get("path")) is not None:
            text = _text("`path`", path, 'write it as text: `path="/scratch"`')
            options["path"] = f'"{text}"'
        return self._add("offload", word, _listed(targets), _options(options))

    def share(self, *targets: str, **options: Option) -> Self:
        """Let the selected layers use one layer's parameters, until `Run.delink`.

        `options` are `group`, `every` and `except_`.
        """
        if (names := options.pop("except_", None)) is not None:
            options["except"] = names
        return self._add("share", _listed(targets), _options(options))

    def precision(self, dtype: str, **options: Option) -> Self:
        """Compute in this `dtype`, such as `"bf16"`; `options` are `master`, `keep`, `reduce` and
        `dropout`."""
        word = _text("the dtype", dtype, 'write one such as `"bf16"`')
        return self._add("precision", word, _options(options))

    def expect(self, contract: str, *, per: str | Iterable[str] = ()) -> Self:
        """Refuse a program that breaks this `contract`, for each module of `per`.

        The contract is what follows the verb: `"all_reduce[tp] == 0"`.
        """
        text = _text("a contract", contract, 'write one such as `"all_reduce[tp] == 0"`')
        alone = isinstance(per, str) or not isinstance(per, Iterable)
        targets = _listed((per,) if alone else per)
        return self._add("expect", text, f"per {targets}" if targets else "")

    def allow(self, what: str, *targets: str) -> Self:
        """Accept here what is refused elsewhere: `what` is `"replicate"` or `"local"`."""
        return self._add("allow", _text("`what`", what, 'write `"replicate"`'), _listed(targets))

    def _spread(
        self, verb: str, targets: Iterable[str], over: AxisNames, **options: Option
    ) -> Self:
        return self._add(verb, _listed(targets), f"over {_axes(over)}", _options(options))

    def _fused(
        self,
        verb: str,
        targets: Iterable[str],
        over: AxisNames,
        factors: str,
        **options: Option,
    ) -> Self:
        text = _text("`factors`", factors, 'write them as text: `factors="(3 heads hd)"`')
        place = f"over {_axes(over)} {f'as {text}' if text else ''}".rstrip()
        return self._add(verb, _listed(targets), place, _options(options))

    def _add(self, *parts: str) -> Self:
        line = " ".join(filter(None, parts))
        try:
            plan = Plan.parse("".join(f"{each}\n" for each in [*self._named, line]), self._name)
            *before, added = plan.statements
            if len(before) != len(self._named) or plan.comments:
                message = f"{quoted(line)} is more than one statement"
                raise PlanError(
                    "P100", message, help="write one statement per call, without comments"
                )
            self._said = check([added], dict(plan.mesh), self._said)
        except PlanError:
            # The same mistake, shown at the line where it would stand.
            Plan.parse("".join(f"{each}\n" for each in [*self._lines, line]), self._name)
            raise
        self._lines.append(line)
        if isinstance(added, (MeshStatement, Let, Axes)):
            self._named.append(line)
        return self


def _axes(axes: AxisNames) -> str:
    help = 'write an axis, `over="tp"`, or multiple axes in a tuple'
    names = axes if isinstance(axes, (tuple, list)) else (axes,)
    return format_axes(tuple(_text("`over`", name, help) for name in names))


def _listed(targets: Iterable[object]) -> str:
    help = 'write selectors one by one: `"wte", "head"`'
    return ", ".join(_text("a target", target, help) for target in targets)


def _sizings(sizes: Mapping[str, int | str]) -> str:
    return ", ".join(f"{name}={_value(size, f'`{name}`')}" for name, size in sizes.items())


def _options(options: Mapping[str, Option]) -> str:
    return " ".join(
        f"{key}={_value(value, f'`{key}`')}" for key, value in options.items() if value is not None
    )


def _value(value: Option, what: str) -> str:
    """A value as a plan writes it; `what` is its name in an error."""
    help = "write a number, a word or a list of words"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and abs(value) > LARGEST:
        raise PlanError("P106", f"{what} is too large", help="use numbers below 2**63")
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_text(what, each, help) for each in value)}]"
    return _text(what, value, help, wanted="a number or text")


def _text(what: str, value: object, help: str, wanted: str = "text") -> str:
    """`value`, which must be text; raises `PlanError` that calls it `what`."""
    if not isinstance(value, str):
        raise PlanError("P115", f"{what} is {spelled(value)}, not {wanted}", help=help)
    return value
