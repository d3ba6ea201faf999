"""Write `docs/api.md` from the signatures and docstrings of the public interface.

    python -m docs.make_api            write the page
    python -m docs.make_api --check    write nothing, and exit with 1 where the page differs

A docstring is Markdown. A name in backticks that has an entry of its own becomes a link.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import textwrap
from collections import ChainMap
from collections.abc import Iterator, Mapping
from functools import cached_property
from inspect import Parameter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import meshwright as mw
from docs.generated import write_or_check
from meshwright.compiler import errors, program
from meshwright.compiler.costs import cluster
from meshwright.compiler.graph import ir
from meshwright.compiler.layout import mesh
from meshwright.compiler.report import explain, ledger, listing, pipeline, recompute, sums
from meshwright.compiler.report.cost import cost as formulas
from meshwright.compiler.report.cost import step
from meshwright.compiler.report.memory import holding
from meshwright.dsl import PlanBuilder
from meshwright.runtime import errors as run_errors
from meshwright.runtime.reports import Reporting

PAGE = Path(__file__).with_name("api.md")
COMMAND = "python -m docs.make_api"
WIDTH = 88


class Entry(NamedTuple):
    """A function, class, method or property, and its name on the page."""

    name: str
    object: Any

    @property
    def function(self) -> Any:
        """The function of a property; anything else as it is."""
        if isinstance(self.object, property):
            return self.object.fget
        return self.object.func if isinstance(self.object, cached_property) else self.object

    @property
    def text(self) -> str:
        """The docstring."""
        return inspect.getdoc(self.function) or ""

    @property
    def parameters(self) -> list[Parameter]:
        """The parameters of a function, without `self`; none of a class."""
        if isinstance(self.object, type):
            return []
        listed = inspect.signature(self.function).parameters.values()
        return [each for each in listed if each.name != "self"]


class Section(NamedTuple):
    title: str
    text: str
    entries: tuple[Entry, ...]


MACHINERY: Mapping[type, tuple[str, ...]] = {
    mw.Program: (
        "captured", "stages", "table", "pipeline", "entries", "transfers", "apart", "movements",
        "recompile", "compile_delinked", "initialise", "runtime", "code", "inputs", "trains",
        "scaled", "instructions", "with_model", "with_structure", "updated", "updates",
        "updates_of", "different_ranks", "imagined_on",
    ),
    program.Stored: (
        "held_at", "held_by", "num_holders", "paddings", "padded", "unpadded", "plan_line",
    ),
    mw.Plan: (
        "names", "comments", "resolve", "layout", "dims", "columns_dim", "merged", "error",
        "with_text",
    ),
    mesh.Mesh: ("groups", "position"),
    pipeline.PipelineSchedule: ("table", "links", "assumed", "simulation"),
    ir.Graph: ("users",),
    ir.Node: ("tensor", "placed", "held", "of_model", "operands", "requires_grad"),
    cluster.Cluster: ("link", "spans_nodes", "rate"),
    mw.PlanError: ("about",),
}  # fmt: skip
"""Members for passes and the runtime, which the page leaves out."""


def members(cls: type) -> Iterator[Entry]:
    """The methods and properties of a class that the page shows, in the order of the source.

    Those of dataclasses that a dataclass extends, and of the parts of `Run`, come first.
    """
    above = reversed(cls.__mro__[1:])
    bases = [base for base in above if dataclasses.is_dataclass(base) or base is Reporting]
    for name, value in (item for each in (*bases, cls) for item in vars(each).items()):
        if name.startswith("_") or name in MACHINERY.get(cls, ()):
            continue
        value = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        if inspect.isfunction(value) or isinstance(value, (property, cached_property)):
            yield Entry(f"{cls.__name__}.{name}", value)


def attributes(cls: object) -> list[str]:
    """The names of a dataclass's fields that the page shows; none for anything else."""
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        return []
    hidden = MACHINERY.get(cls, ())
    return [f.name for f in dataclasses.fields(cls) if f.name not in hidden and f.name[0] != "_"]


def of(*classes: type, prefix: str = "") -> tuple[Entry, ...]:
    """The entries of each class and of its members."""
    found: list[Entry] = []
    for cls in classes:
        found += [Entry(f"{prefix}{cls.__name__}", cls), *members(cls)]
    return tuple(found)


def run_error_kinds() -> list[type]:
    """The subclasses of `RunError`, in the order of the source."""
    classes = [value for value in vars(run_errors).values() if isinstance(value, type)]
    return [kind for kind in classes if issubclass(kind, mw.RunError) and kind is not mw.RunError]


SECTIONS: tuple[Section, ...] = (
    Section(
        "Compiling",
        "A model and a plan go in, a program comes out. Nothing is run.",
        (Entry("meshwright.compile", mw.compile),),
    ),
    Section(
        "Plans",
        """\
The language of plans is on [a page of its own](plan-language.md).

```python
plan = mw.Plan.parse(text)
same = (
    mw.Plan.build(mesh={"dp": 2, "tp": 2})
    .data("x", "y", over="dp")
    .columns("up", over="tp")
    .rows("down", over="tp")
    .plan()
)
assert plan == same
assert dict(plan.mesh) == {"dp": 2, "tp": 2}
```""",
        of(mw.Plan, PlanBuilder),
    ),
    Section(
        "Programs",
        """\
What was compiled: the graphs, what moves, and what a rank holds.

```python
program = mw.compile(model, plan, example=(x, y))
comm = program.comm()
print(comm.counts())
print(program.memory().parameters, "bytes of parameters per rank")
for moved in comm.under("down"):
    print(moved.phase, moved.kind, moved.axes, moved.bytes, moved.plan_line)
```

```output
{'all_reduce[dp]': 2, 'all_reduce[tp]': 1}
2176 bytes of parameters per rank
forward all_reduce ('tp',) 256 <plan>:5
```""",
        of(
            mw.Program,
            listing.GraphText,
            ir.Graph,
            ir.Node,
            program.Stored,
            mesh.Mesh,
            ledger.Comm,
            ledger.Moved,
            holding.Memory,
            holding.Alive,
            holding.Moment,
            explain.Explanation,
            explain.LaidOut,
            sums.Part,
            sums.Sum,
            recompute.Recomputed,
            pipeline.PipelineSchedule,
            formulas.Cost,
            formulas.Formula,
            step.StepTime,
            step.GraphTime,
            cluster.Cluster,
            cluster.Link,
        ),
    ),
    Section(
        "Runs",
        """\
How a loop is written around a run is on [a page of its own](training.md).

```python
with program.launch(seed=1) as run:
    optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2)
    for _ in range(3):
        loss = run.step(x, y)
        run.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert run.evaluate(x, y) < loss
    run.check(optimizer)
    run.save("checkpoint", optimizer)
    run.copy_to(model)
```""",
        (*of(mw.Run), Entry("meshwright.read_state_dict", mw.read_state_dict)),
    ),
    Section(
        "In a model",
        """\
For the code of a model; neither changes what it computes.

```python
def straight_through(grads, inputs, outputs):
    return grads[0]

rounded = mw.custom(torch.round, rule="... -> ...", vjp=straight_through)

class Quantized(MLP):
    def forward(self, x, y):
        hidden = mw.layout(F.gelu(self.up(x)), "[b@dp, f@tp]")
        return F.mse_loss(self.down(rounded(hidden)), y)

mw.compile(Quantized(), plan, (x, y)).launch().step(x, y)
```""",
        (Entry("meshwright.custom", mw.custom), Entry("meshwright.layout", mw.layout)),
    ),
    Section(
        "Errors",
        """\
Every error that Meshwright raises on purpose is a `MeshwrightError`, whose text ends in a line that
says what to do.

```python
try:
    mw.compile(model, mw.Plan.parse("mesh tp=2\\ncolumns upp over tp", "mlp.plan"), (x, y))
except mw.PlanError as error:
    print(error)
    assert error.code == "P401"
```

```output
error[P401]: `upp` matches nothing
  --> mlp.plan:2:9
  2 | columns upp over tp
    |         ^^^
  help: write `up`
```""",
        (
            *of(mw.MeshwrightError, mw.PlanError),
            *of(errors.CompilerError, prefix="meshwright.compiler.errors."),
            *of(mw.CaptureError, mw.LayoutError, mw.PassError, mw.RunError),
            *of(*run_error_kinds(), prefix=f"{run_errors.__name__}."),
        ),
    ),
)

HEAD = """\
# The API

Generated by `{command}` from the docstrings; a test keeps it up to date. `mw` is
`meshwright`, which has the functions, `Plan`, `Program`, `Run` and the errors without a prefix. The
other classes are those of what these return, and need no import. The examples run in this order, on
this model:

```python
import torch
import meshwright as mw
from torch import nn
from torch.nn import functional as F

class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x, y):
        return F.mse_loss(self.down(F.gelu(self.up(x))), y)

model, x, y = MLP(), torch.randn(8, 16), torch.randn(8, 16)
text = \"\"\"
mesh    dp=2, tp=2
data    x, y over dp
columns up over tp
rows    down over tp
\"\"\"
```

*Global* means of the whole model, *local* of one rank; shapes and batches are global unless said
otherwise. Sizes are in bytes.
"""


def entries() -> Iterator[Entry]:
    """Every entry of the page."""
    for section in SECTIONS:
        yield from section.entries


def page() -> str:
    """The whole page."""
    anchors = {entry.name: anchor(entry.name) for entry in entries()}
    names = {name.rpartition("meshwright.")[2].rpartition("errors.")[2]: name for name in anchors}
    link = {name: f"[`{name}`](#{anchors[full]})" for name, full in names.items()}
    parts = [HEAD.format(command=COMMAND), contents()]
    for section in SECTIONS:
        parts.append(f"## {section.title}\n\n{linked(section.text, link)}\n")
        parts += [shown(entry, link) for entry in section.entries]
    return "\n".join(parts)


def contents() -> str:
    """A line for each section, with its classes and functions."""
    lines = []
    for section in SECTIONS:
        tops = [entry.name for entry in section.entries if not is_member(entry)]
        listed = ", ".join(f"[`{name}`](#{anchor(name)})" for name in tops)
        lines.append(f"- [{section.title}](#{anchor(section.title)}): {listed}")
    return "\n".join(lines) + "\n"


def is_member(entry: Entry) -> bool:
    """Whether this is a method or property, whose name begins with that of its class."""
    return entry.name[0].isupper() and "." in entry.name


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading of code."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def shown(entry: Entry, link: Mapping[str, str]) -> str:
    """One entry: its heading, its signature or fields, and its docstring."""
    own = dict(link)
    name = entry.name.rpartition("meshwright.")[2]
    owner = name.rpartition(".")[0] if is_member(entry) else name
    own.pop(name.rpartition("errors.")[2], None)
    taken = {*(parameter.name for parameter in entry.parameters), *attributes(entry.object)}
    for full, target in link.items():
        short = full.removeprefix(f"{owner}.")
        if short != full and full != name:
            own[short] = target.replace(f"[`{full}`]", f"[`{short}`]")
    for parameter in taken:
        own.pop(parameter, None)
    stub = f"```pyi\n{signature(entry)}\n```\n\n" if signature(entry) else ""
    return f"{'####' if is_member(entry) else '###'} `{entry.name}`\n\n{stub}{body(entry, own)}\n"


def body(entry: Entry, link: Mapping[str, str]) -> str:
    """The docstring with links, and its indented blocks as code that runs."""
    text = re.sub(
        r"(?:^ {4}.*\n?|^\n(?= {4}))+",
        lambda block: f"```python\n{textwrap.dedent(block.group()).strip()}\n```\n",
        f"{entry.text}\n",
        flags=re.M,
    )
    return linked(text, link).rstrip()


def linked(text: str, link: Mapping[str, str]) -> str:
    """Code spans that name an entry become links to it; blocks of code stay as they are."""
    pieces = re.split(r"(```.*?```)", text, flags=re.S)
    span = re.compile(r"(?<![\[`])`([\w.]+)`(?!`)")
    pieces[::2] = [
        span.sub(lambda m: link.get(m.group(1), m.group()), each) for each in pieces[::2]
    ]
    return "".join(pieces)


def signature(entry: Entry) -> str:
    """A stub of the entry: `def` with types and defaults, or a class with its fields."""
    name = entry.name.rpartition(".")[2]
    if isinstance(entry.object, type):
        where = vars(sys.modules[entry.object.__module__])
        known = ChainMap(*map(inspect.get_annotations, entry.object.__mro__))
        lines = [f"    {each}: {spelt(known[each], where)}" for each in attributes(entry.object)]
        return "\n".join([f"class {name}:", *lines]) if lines else ""
    function = entry.function
    returned = spelt(inspect.signature(function).return_annotation, function.__globals__)
    if function is not entry.object:
        return f"@property\ndef {name}(self) -> {returned}: ..."
    words = arguments(entry)
    line = f"def {name}({', '.join(words)}) -> {returned}: ..."
    if len(line) <= WIDTH:
        return line
    inside = "".join(f"    {word},\n" for word in words)
    return f"def {name}(\n{inside}) -> {returned}: ..."


def arguments(entry: Entry) -> list[str]:
    """The parameters as a signature writes them, with the `*` before those given by name alone."""
    found = [str(stub(each, entry.function.__globals__)) for each in entry.parameters]
    kinds = [each.kind for each in entry.parameters]
    if Parameter.KEYWORD_ONLY in kinds and Parameter.VAR_POSITIONAL not in kinds:
        found.insert(kinds.index(Parameter.KEYWORD_ONLY), "*")
    return found


def stub(parameter: Parameter, where: Mapping[str, Any]) -> Parameter:
    """The parameter, whose type and default print as they are written."""
    default = parameter.default
    if isinstance(default, str):
        default = _Verbatim(json.dumps(default))
    return parameter.replace(
        annotation=_Verbatim(spelt(parameter.annotation, where)), default=default
    )


class _Verbatim(str):
    """A text that `inspect` prints as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def spelt(written: str, where: Mapping[str, Any]) -> str:
    """An annotation as it is written, with aliases written out and without `Final`."""
    written = re.sub(r"^Final\[(.*)\]$", r"\1", written)
    ours = [
        name
        for name, value in where.items()
        if inspect.ismodule(value) and value.__name__.startswith("meshwright.")
    ]
    text = re.sub(rf"\b({'|'.join(ours)})\.", "", written) if ours else written
    return re.sub(r"\b_?[A-Z]\w*\b", lambda name: meaning(name.group(), where), text)


def meaning(name: str, where: Mapping[str, Any]) -> str:
    """What an alias or a type variable stands for; any other name as it is."""
    found = where.get(name)
    if isinstance(found, TypeVar):
        return str(getattr(found.__bound__, "__name__", found.__bound__))
    if isinstance(found, str):
        return found
    if getattr(found, "__origin__", None) is not None:
        return re.sub(r"\b(?:collections\.abc|typing)\.", "", str(found))
    return name


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page, __doc__))
