"""Why one module is laid out as it is: its parameters, their statements, and what it moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from torch import nn

from meshwright.compiler.graph.ir import INPUT, Node, Phase, TensorType
from meshwright.compiler.graph.text import size_text, type_text
from meshwright.compiler.program import Compiled, Stored
from meshwright.compiler.report.ledger import Moved, collectives
from meshwright.compiler.report.recompute import Recomputed, flops_text, recomputed_in
from meshwright.compiler.report.shares import shares
from meshwright.compiler.report.sheet import Column, Sheet
from meshwright.compiler.report.summary import statement_texts
from meshwright.compiler.report.sums import Part, Sum, Sums, inside
from meshwright.dsl.errors import PlanError, did_you_mean, plural, spelled
from meshwright.dsl.writing.html import html_text

WIDTH = 100
"""Columns of the text."""
_MOST = 12
"""How many of the modules inside a module are named."""
_NUMBER = Column("", right=True)
_SENT = Column("sent per rank", right=True)


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A parameter, buffer or input with its layout.

    `name` is the model's, `type` has the global shape and the axes that split it, as in
    `f32[64, 256@tp]`, and `plan_line` are the places of the statements behind it. `used` is the
    type in which operators take a tensor that is stored in another layout, and `at` says whose
    ranks hold it, such as `pp=0`, where not all do.
    """

    name: str
    type: str
    plan_line: str
    used: str = ""
    at: str = ""

    def __str__(self) -> str:
        used = f", used as {self.used}" if self.used else ""
        return f"{self.name}: {self.type}" + (f" at {self.at}" if self.at else "") + used


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why one part of a model is laid out as it is; it prints as text.

    `name` and `kind` say which part, `tensors` are its `LaidOut` parameters, buffers and inputs,
    `collectives` those that `Moved` because of it, and `statements` maps places, such as
    `gpt.plan:6`, to the statements there. For a module that contains others, `whole` is the `Part`
    that sums them up, `sums` are its collectives with equal ones together, and `children` the
    modules inside, the largest first. `stages` are those of a pipeline in which it is computed,
    and `recomputed` is what the backward computes again of a module.
    """

    name: str
    kind: str
    tensors: tuple[LaidOut, ...]
    collectives: tuple[Moved, ...]
    statements: dict[str, str]
    whole: Part | None = None
    sums: tuple[Sum, ...] = ()
    children: tuple[Part, ...] = ()
    stages: tuple[int, ...] = ()
    recomputed: Recomputed | None = None

    def to_json(self) -> dict[str, object]:
        """The same as plain dictionaries and lists."""
        return asdict(self)

    def __repr__(self) -> str:
        tensors, moved = len(self.tensors), len(self.collectives)
        return (
            f"<Explanation of {self.name} ({self.kind}): {plural(tensors, 'tensor')}, "
            f"{plural(moved, 'collective')} per step>"
        )

    def _repr_html_(self) -> str:
        return html_text(str(self))

    def __str__(self) -> str:
        stages = ", ".join(map(str, self.stages))
        within = f", in stage{'s' * (len(self.stages) > 1)} {stages}" if stages else ""
        lines = [f"{self.name} ({self.kind}){within}"]
        width = max((len(str(each)) for each in self.tensors), default=0)
        for each in self.tensors:
            reason = self._why(each.plan_line) or "  no statement: whole"
            lines.append(f"  {each!s:<{width}}{reason}")
        lines += self._again()
        if self.whole is not None:
            return "\n".join([*lines, *self._summed(self.whole)])
        for phase in ("forward", "backward"):
            found = [item for item in self.collectives if item.phase == phase]
            if found:
                lines += [f"  {phase}", *self._moves(found)]
        if not self.collectives:
            lines.append("  moves nothing")
        return "\n".join(lines)

    def _again(self) -> Iterable[str]:
        if (found := self.recomputed) is not None:
            what = f"{plural(found.operators, 'operator')}, {flops_text(found.flops)} per rank"
            yield f"  computed again in the backward: {what}{self._why(found.plan_line)}"

    def _summed(self, whole: Part) -> Iterable[str]:
        from meshwright.compiler.report.tables import sheet_text

        sheets = (self._held_sheet(whole), self._sums_sheet(whole), _parts_sheet(self.children))
        for sheet in sheets:
            yield f"\n{sheet.title}"
            yield sheet_text(sheet, WIDTH) if sheet.rows else "  nothing"

    @property
    def _who(self) -> str:
        """The ranks whose figures are given."""
        if not self.stages:
            return "each rank"
        return "each rank of the stage" if len(self.stages) == 1 else "the rank that has most"

    def _held_sheet(self, whole: Part) -> Sheet:
        rows = (
            ("parameters", whole.parameters),
            ("buffers", whole.buffers),
            ("gradients", whole.gradients),
            ("optimizer, AdamW", whole.optimizer),
            ("saved for the backward", whole.saved),
        )
        kept = tuple((name, size_text(size)) for name, size in rows if size)
        title = f"held by {self._who}, of {whole.num_parameters:,} parameters in all"
        return Sheet(title, (Column(""), _NUMBER), kept)

    def _sums_sheet(self, whole: Part) -> Sheet:
        columns = (Column(""), Column("", fixed=True), _NUMBER, _SENT, Column("because of"))
        rows = [
            (
                each.phase,
                f"{each.kind}[{', '.join(each.axes)}]",
                f"x {each.count}",
                size_text(each.bytes),
                self._why(each.plan_line).removeprefix("  <- "),
            )
            for each in self.sums
        ]
        total = ("in all", "", "", size_text(whole.sent), "")
        totals = (total,) if len(rows) > 1 else ()
        return Sheet(f"sent by {self._who} in a step", columns, tuple(rows), totals)

    def _moves(self, items: list[Moved]) -> Iterable[str]:
        rows = [(f"{item.kind}[{', '.join(item.axes)}]", _operand_text(item)) for item in items]
        width, types = (max(map(len, column)) for column in zip(*rows, strict=True))
        for item, (head, operand) in zip(items, rows, strict=True):
            size = size_text(item.bytes) + (f" x {item.times}" if item.times > 1 else "")
            line = f"    {head:<{width}}  of {operand:<{types}}  {size:>8}"
            if len(item.stages) > 1:
                line += f"  stage {item.stages[0]} to {item.stages[1]}"
            elif item.at:
                line += f"  stage {item.stages[0]}"
            instead = f"  cheapest: {item.instead}" if item.instead else ""
            yield line + (self._why(item.plan_line) or instead)

    def _why(self, places: str) -> str:
        said = [f"{place}: {self.statements.get(place, '')}" for place in places.split(", ")]
        return f"  <- {'; '.join(said)}" if places else ""


def _parts_sheet(parts: Sequence[Part]) -> Sheet:
    right = (Column(heading, right=True) for heading in ("parameters", "held per rank"))
    columns = (Column("name"), Column("", fixed=True), _NUMBER, *right, _SENT)
    rows = tuple(
        (
            part.name,
            part.kind,
            f"x {part.count}" if part.count > 1 else "",
            f"{part.num_parameters:,}",
            size_text(part.parameters + part.buffers),
            size_text(part.sent),
        )
        for part in parts[:_MOST]
    )
    rest = (f"and {len(parts) - _MOST} more",) + ("",) * 5
    totals = (rest,) if len(parts) > _MOST else ()
    return Sheet("the modules inside, the largest first", columns, rows, totals)


def _operand_text(item: Moved) -> str:
    """The type of what is moved, or how many tensors of a block are."""
    return f"{item.operands} tensors of {item.module}" if item.operands > 1 else item.type


def explain(program: Compiled, name: str) -> Explanation:
    """The explanation of the module, parameter, buffer or input `name`; see `Program.explain`."""
    if not isinstance(name, str):
        raise PlanError(
            "P115",
            f"a name is text, not {spelled(name)}",
            help='pass the name of a module, parameter or input, or `""` for the model',
        )
    modules = dict(program.model.named_modules(remove_duplicate=False))
    tensors = _tensors(program)
    own = program.captured.aliases.get(name, name)
    if name in modules:
        return _of_module(program, name, modules, tensors)
    if own not in tensors:
        raise PlanError(
            "P401",
            f"the model has no module, parameter or input `{name}`",
            help=did_you_mean(name, [*filter(None, modules), *tensors, *program.captured.aliases]),
        )
    kind = "tensor" if own == name else f"tensor, the same as {own}"
    texts = statement_texts(program)
    stages = _stages(program, lambda node: node.op == INPUT and node.args[1] == own)
    return Explanation(name, kind, (tensors[own],), _moved(program, {own}), texts, stages=stages)


def _of_module(
    program: Compiled, name: str, modules: Mapping[str, nn.Module], tensors: Mapping[str, LaidOut]
) -> Explanation:
    module = modules[name]
    path = next(path for path, each in modules.items() if each is module)
    kind = type(module).__name__ + (f", the same as {path}" if path != name else "")
    names = {**{key: key for key in tensors}, **program.captured.aliases}
    direct = {own: tensors[own] for key, own in names.items() if key.rpartition(".")[0] == path}
    held = {own for key, own in names.items() if not path or key.startswith(f"{path}.")}
    moved, texts = _moved(program, held, path), statement_texts(program)
    shown = (name or "the model", kind, tuple(direct.values()), moved, texts)

    def within(node: Node) -> bool:
        return node.op != INPUT and inside(path, (each for each, _ in node.origin.modules))

    stages, again = _stages(program, within), recomputed_in(program, within)
    if next(module.children(), None) is None:
        return Explanation(*shown, stages=stages, recomputed=again)
    sums = Sums(program)
    whole = sums.of(path, type(module).__name__)
    parts = sums.children(path, module)
    return Explanation(*shown, whole, sums.sums(path), parts, stages, again)


def _moved(program: Compiled, names: set[str], path: str | None = None) -> tuple[Moved, ...]:
    """The collectives for these tensors, and those inside the module at `path`."""
    own = shares(program)
    return tuple(
        item
        for node, item in collectives(program)
        if not names.isdisjoint((*own.get(node, ()), *_inputs_of(node)))
        or (path is not None and inside(path, item.modules))
    )


def _stages(program: Compiled, test: Callable[[Node], bool]) -> tuple[int, ...]:
    """The stages of a pipeline that have such a node in what they run forward."""
    return tuple(
        stage.number
        for stage in (program.stages if program.pipeline else ())
        if any(
            test(node)
            for phase, graph in stage.graphs.items()
            if phase in (Phase.BEFORE, Phase.FORWARD)
            for node in graph.nodes
        )
    )


def _inputs_of(node: Node) -> list[str]:
    return [str(operand.args[1]) for operand in node.operands() if operand.op == INPUT]


def _tensors(program: Compiled) -> dict[str, LaidOut]:
    stored: dict[str, Stored] = {**program.parameters, **program.buffers}
    graph = program.stages[0].forward
    found: dict[str, LaidOut] = {}
    for name, each in stored.items():
        type, used = (
            type_text(TensorType(layout.shape, each.type.dtype), layout, graph)
            for layout in (each.layout, each.used)
        )
        found[name] = LaidOut(
            name, type, each.plan_line, used if used != type else "", each.held_text
        )
    for node in program.inputs():
        text = type_text(node.tensor, node.placed, graph)
        found[str(node.args[1])] = LaidOut(str(node.args[1]), text, node.origin.plan_line)
    return found
