"""Why one module is laid out as it is: its parameters, their statements, and what it moves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from meshwright.compiler.ir import INPUT, TensorType
from meshwright.compiler.ledger import Moved
from meshwright.compiler.summary import statement_texts
from meshwright.compiler.text import size_text, type_text
from meshwright.dsl.errors import PlanError, did_you_mean, plural

if TYPE_CHECKING:
    from meshwright.compiler.program import Program, Stored


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A parameter, buffer or input with its layout.

    `name` is the model's, `type` has the global shape and the axes that split it, as in
    `f32[64, 256@tp]`, and `plan_line` are the places of the statements behind it.
    """

    name: str
    type: str
    plan_line: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why one part of a model is laid out as it is; it prints as text.

    `name` and `kind` say of what, `tensors` are its `LaidOut` parameters, buffers and inputs,
    `collectives` what `Moved` because of it, and `statements` maps places, such as `gpt.plan:6`,
    to what stands there.
    """

    name: str
    kind: str
    tensors: tuple[LaidOut, ...]
    collectives: tuple[Moved, ...]
    statements: dict[str, str]

    def to_json(self) -> dict[str, object]:
        """The same as plain dictionaries and lists."""
        return asdict(self)

    def __repr__(self) -> str:
        tensors, moved = len(self.tensors), len(self.collectives)
        return (
            f"<Explanation of {self.name} ({self.kind}): {plural(tensors, 'tensor')}, "
            f"{plural(moved, 'collective')} per step>"
        )

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.kind})"]
        width = max((len(each.name) + len(each.type) + 2 for each in self.tensors), default=0)
        for each in self.tensors:
            head = f"{each.name}: {each.type}"
            lines.append(f"  {head:<{width}}{self._why(each.plan_line) or '  no statement: whole'}")
        for phase in ("forward", "backward"):
            found = [item for item in self.collectives if item.phase == phase]
            if found:
                lines += [f"  {phase}", *self._moves(found)]
        if not self.collectives:
            lines.append("  moves nothing")
        return "\n".join(lines)

    def _moves(self, items: list[Moved]) -> Iterable[str]:
        heads = [f"{item.kind}[{', '.join(item.axes)}]" for item in items]
        width, types = max(map(len, heads)), max(len(item.type) for item in items)
        for item, head in zip(items, heads, strict=True):
            size = size_text(item.bytes)
            line = f"    {head:<{width}}  of {item.type:<{types}}  {size:>8}"
            yield line + self._why(item.plan_line)

    def _why(self, places: str) -> str:
        said = [f"{place}: {self.statements.get(place, '')}" for place in places.split(", ")]
        return f"  <- {'; '.join(said)}" if places else ""


def explain(program: Program, name: str) -> Explanation:
    """What is said of the module, parameter, buffer or input `name`; see `Program.explain`."""
    modules = {path: type(module).__name__ for path, module in program.model.named_modules()}
    tensors = _tensors(program)
    own = program.captured.aliases.get(name, name)
    if name in modules:
        kind = modules[name]
        names = {**{key: key for key in tensors}, **program.captured.aliases}
        shown = {own: tensors[own] for key, own in names.items() if key.rpartition(".")[0] == name}
    elif own in tensors:
        kind, shown = "tensor", {own: tensors[own]}
    else:
        raise PlanError(
            "P401",
            f"the model has no module, parameter or input `{name}`",
            help=did_you_mean(name, [*filter(None, modules), *tensors]),
        )
    reduced = _moved_for(program, set(shown))
    moved = program.comm().where(
        lambda item: name in item.modules or (item.phase, item.value) in reduced
    )
    texts = statement_texts(program.plan)
    return Explanation(name or "the model", kind, tuple(shown.values()), moved.moved, texts)


def _moved_for(program: Program, names: set[str]) -> set[tuple[str, str]]:
    """(phase, node) of collectives that take these tensors or reduce their gradients."""
    found: set[tuple[str, str]] = set()
    for graph in program.graphs().values():
        phase = graph.name.rpartition(".")[2]
        for node in graph.nodes:
            source = next(node.operands(), None)
            if source is not None and source.op == INPUT and source.args[1] in names:
                found.add((phase, node.name))
        for label, node in graph.outputs:
            if label.partition(":")[2] in names and label.startswith("gradient:"):
                found.update((phase, operand.name) for operand in node.operands())
    return found


def _tensors(program: Program) -> dict[str, LaidOut]:
    stored: dict[str, Stored] = {**program.parameters, **program.buffers}
    graph = program.step.forward
    found: dict[str, LaidOut] = {}
    for name, each in stored.items():
        type = TensorType(each.padded_shape, each.type.dtype)
        found[name] = LaidOut(name, type_text(type, each.layout, graph), each.plan_line)
    for node in program.inputs():
        text = type_text(node.tensor, node.placed, graph)
        found[str(node.args[1])] = LaidOut(str(node.args[1]), text, node.origin.plan_line)
    return found
