"""The figures of a program, for `show` and `--json`: equal layers fold into one row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from meshwright.compiler.graph.aliasing import node_bytes
from meshwright.compiler.graph.ir import TensorType
from meshwright.compiler.graph.names import fold
from meshwright.compiler.graph.text import op_text, type_text
from meshwright.compiler.placing.movement import Movement
from meshwright.compiler.placing.rules.lookup import has_rule
from meshwright.compiler.program import Budgeted, Compiled, Stored
from meshwright.compiler.report.ledger import Comm, Moved, ledger
from meshwright.compiler.report.memory.holding import Memory
from meshwright.compiler.report.memory.prediction import memories
from meshwright.compiler.report.recompute import Recomputed, recomputed, share_recomputed
from meshwright.compiler.report.staging import (
    Passed,
    Repeated,
    StageRow,
    passed,
    repeated,
    schedule_text,
    stage_rows,
)
from meshwright.compiler.schedules.balanced import Balance
from meshwright.dsl.statements import Accumulate, Stages, Statement, Zero


@dataclass(frozen=True, slots=True)
class Held:
    """Parameters, buffers or inputs that are laid out alike: `count` of them under one selector.

    `bytes` is what one rank holds of all of them.
    """

    kind: str
    names: str
    count: int
    type: str
    bytes: int
    note: str
    plan_line: str


@dataclass(frozen=True, slots=True)
class SharedRow:
    """Layers, as selectors, that use `parameters` of the layer `first`, by their names inside."""

    layers: tuple[str, ...]
    first: str
    parameters: tuple[str, ...]
    plan_line: str


@dataclass(frozen=True, slots=True)
class Traffic:
    """Collectives of a step that are alike: `bytes` is what one rank sends for all of them."""

    phase: str
    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    modules: tuple[str, ...]
    plan_line: str


@dataclass(frozen=True, slots=True)
class Gather:
    """Gathers that the plan does not ask for: an operator needs whole what is split, or has no
    rule."""

    op: str
    value: str
    source: str
    target: str
    modules: tuple[str, ...]
    count: int
    bytes: int
    has_rule: bool


@dataclass(frozen=True, slots=True)
class PlanLine:
    """A statement, and what moves in a step because of it."""

    place: str
    text: str
    count: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What `show` prints. The text is deterministic: no addresses, no paths, no times."""

    model: str
    plan: str
    mode: str
    device: str
    mesh: tuple[tuple[str, int], ...]
    held: tuple[Held, ...]
    shared: tuple[SharedRow, ...]
    traffic: tuple[Traffic, ...]
    bytes_by_axis: tuple[tuple[str, int], ...]
    gathers: tuple[Gather, ...]
    lines: tuple[PlanLine, ...]
    memory: Memory
    memories: tuple[tuple[str, Memory], ...]
    """That of ranks at different coordinates, where these run different stages."""
    sent: tuple[tuple[str, int, int], ...]
    """By coordinates, where ranks run different stages: collectives, and the bytes sent."""
    schedule: str
    stages: tuple[StageRow, ...]
    passed: tuple[Passed, ...]
    repeated: tuple[Repeated, ...]
    recomputed: tuple[Recomputed, ...]
    share_recomputed: float
    """How many more operations a rank has in a step because of them, as a share of the others."""
    balance: Balance | None
    budgeted: Budgeted | None

    def to_json(self) -> dict[str, object]:
        """Plain dictionaries and lists."""
        pairs = {"mesh": dict(self.mesh), "bytes_by_axis": dict(self.bytes_by_axis)}
        places = {place: each.figures() for place, each in self.memories}
        return {**asdict(self), **pairs, "memory": self.memory.figures(), "memories": places}


def summarise(program: Compiled, *, local: bool = False) -> Summary:
    """The figures of a program; with `local`, shapes are those that one rank holds."""
    comm, places = ledger(program), memories(program)
    return Summary(
        type(program.model).__name__,
        program.plan.source.name,
        program.mode,
        program.device.type,
        program.mesh.axes,
        (*_stored(program, local), *_inputs(program, local)),
        tuple(_shared(program)),
        tuple(_traffic(program, comm)),
        tuple(comm.bytes_by_axis().items()),
        tuple(_gathers(program)),
        tuple(_lines(program, comm)),
        max(places.values(), key=lambda each: each.peak),
        tuple(places.items()) if len(places) > 1 else (),
        tuple((at, own.times(), own.total_bytes()) for at, own in comm.by_place().items() if at),
        schedule_text(program),
        tuple(stage_rows(program)),
        tuple(passed(program)),
        tuple(repeated(program)),
        recomputed(program),
        share_recomputed(program),
        program.balance,
        program.budgeted,
    )


def _stored(program: Compiled, local: bool) -> Iterable[Held]:
    # Selectors are of the model's names, also where some of them are one parameter.
    own = (program.captured.apart or program.captured).parameters
    for kind, tensors, known in (
        ("parameter", program.parameters, own),
        ("buffer", program.buffers, program.buffers),
    ):
        groups: dict[tuple[str, str, str], list[Stored]] = {}
        for stored in tensors.values():
            type = TensorType(stored.padded_shape, stored.type.dtype)
            text = type_text(type, stored.layout, program.stages[0].forward, local=local)
            note = "buffer" if kind == "buffer" else _note(stored)
            groups.setdefault((text, note, stored.plan_line), []).append(stored)
        order = {name: i for i, name in enumerate(tensors)}
        folded = [
            (order[names[0]], _row(program, kind, selector, [tensors[name] for name in names], key))
            for key, group in groups.items()
            for selector, names in fold([s.name for s in group], list(known)).items()
        ]
        yield from (held for _, held in sorted(folded, key=lambda item: item[0]))


def _row(
    program: Compiled, kind: str, names: str, tensors: list[Stored], alike: tuple[str, str, str]
) -> Held:
    """Tensors that are laid out alike, and what the rank that holds most of them holds."""
    text, note, line = alike
    mesh, places = program.mesh, dict.fromkeys(each.held_text for each in tensors)
    size = max(
        sum(each.local_bytes(mesh) for each in tensors if each.held_by(mesh.coords(rank)))
        for rank in mesh.group(0, program.apart)
    )
    place = f"over {', '.join(program.apart)}" if len(places) > 1 else f"at {next(iter(places))}"
    note = ", ".join(filter(None, (note, place if any(places) else "")))
    return Held(kind, names, len(tensors), text, size, note, line)


def _note(stored: Stored) -> str:
    sizes = zip(stored.type.shape, stored.padded_shape, strict=True)
    longer = [f"{own} padded to {held}" for own, held in sizes if own != held]
    if longer:
        return ", ".join(longer)
    return "" if stored.requires_grad else "frozen"


def _inputs(program: Compiled, local: bool) -> Iterable[Held]:
    graph = program.stages[0].forward
    for node in program.inputs():
        text = type_text(node.tensor, node.placed, graph, local=local)
        name, line = str(node.args[1]), node.origin.plan_line
        yield Held("input", name, 1, text, node_bytes(node, graph), "", line)


def _shared(program: Compiled) -> Iterable[SharedRow]:
    for each in program.shared:
        first, *others = each.layers
        yield SharedRow(_modules(others, program), first, each.parameters, each.plan_line)


def _traffic(program: Compiled, comm: Comm) -> Iterable[Traffic]:
    groups: dict[tuple[str, str, tuple[str, ...], str], list[Moved]] = {}
    for item in comm:
        key = (item.phase, item.kind, item.axes, item.plan_line)
        groups.setdefault(key, []).append(item)
    for (phase, kind, axes, line), items in groups.items():
        own = Comm(tuple(items))
        modules = _modules((item.module for item in items), program)
        yield Traffic(phase, kind, axes, own.times(), own.total_bytes(), modules, line)


def _modules(paths: Iterable[str], program: Compiled) -> tuple[str, ...]:
    known = [name for name, _ in program.model.named_modules() if name]
    found = dict.fromkeys(paths)
    return tuple(fold([path for path in found if path], known))


def _gathers(program: Compiled) -> Iterable[Gather]:
    groups: dict[tuple[str, str, str, bool], list[Movement]] = {}
    for movement in program.movements:
        if movement.implicit:
            source, target = str(movement.collective.source), str(movement.collective.target)
            key = (op_text(movement.user), source, target, has_rule(movement.user))
            groups.setdefault(key, []).append(movement)
    mesh = next(iter(program.graphs().values())).mesh  # with the axis of microbatches
    for (op, source, target, known), found in groups.items():
        modules = _modules((m.node.origin.module for m in found), program)
        size = sum(movement.sent_bytes(mesh) for movement in found)
        value = found[0].value.name
        yield Gather(op, value, source, target, modules, len(found), size, known)


def _lines(program: Compiled, comm: Comm) -> Iterable[PlanLine]:
    moved: dict[str, list[Moved]] = {}
    for item in comm:
        moved.setdefault(item.plan_line, []).append(item)
    texts = statement_texts(program)
    for place in dict.fromkeys((*texts, *filter(None, moved))):
        own = Comm(tuple(moved.get(place, ())))
        yield PlanLine(place, texts.get(place, "both together"), own.times(), own.total_bytes())


def statement_texts(program: Compiled) -> dict[str, str]:
    """The statement at each place, such as `gpt.plan:6`, with what was decided for it: the plan's
    own first."""
    plan, found = program.plan, dict[str, str]()
    looped = any(each.microbatches for each in plan.of(Stages)) or bool(plan.of(Accumulate))
    for statement in plan.statements:
        text = _text(statement)
        if looped and isinstance(statement, Zero) and statement.every is None:
            text += f" ({statement.when(pipelined=bool(plan.of(Stages)))})"
        if note := program.notes.get(statement):
            text += f" ({note})"
        found.setdefault(statement.plan_line, text)
    found.pop("", None)
    return found


def _text(statement: Statement) -> str:
    span = statement.span
    if span is None:
        return ""
    lines = (span.source.line(n) for n in range(span.line, span.last_line + 1))
    return " ".join(" ".join(line.partition("#")[0].split()) for line in lines)
