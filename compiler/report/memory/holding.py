"""The memory of a rank as data, as tables, and as a chart of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, pairwise

from meshwright.compiler.graph.names import fold
from meshwright.compiler.graph.text import size_text
from meshwright.compiler.report.sheet import Column, Sheet

_MOST_ROWS, _MOST_NAMES = 16, 3
"""The most rows of what is alive at the peak, and the most names in one."""
_WIDTH, _HEIGHT = 72, 8
"""The columns and lines of a chart."""
_EIGHTHS = " ▁▂▃▄▅▆▇█"
UPDATE = "update"
"""What `Memory` calls the optimizer's part of a step."""


@dataclass(frozen=True, slots=True)
class Alive:
    """A tensor or more that are alive at the peak: `bytes` for one `use`, as in `Memory.parts`.

    `name` is that of a parameter, a buffer, an input or a node, or the operator of an update. Of a
    node, `op` is its operator, `type` what one rank holds of it, and `module` and `source` say
    where in the model it comes from.
    """

    bytes: int
    use: str
    name: str
    op: str = ""
    type: str = ""
    module: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Moment:
    """An instruction, of `node` if of any, while the rank does `entry` of its schedule: the `most`
    bytes alive meanwhile, and those `alive` after it."""

    entry: str
    node: str
    most: int
    alive: int


@dataclass(frozen=True, slots=True, repr=False)
class Memory:
    """Bytes per rank, which prints as tables and as a timeline of a step.

    `parameters`, `buffers`, `constants` (tensors that the model holds without a name), `gradients`
    and what the `optimizer` keeps outlive a step; `batch` is the rank's rows of the inputs.
    `masters` are those of the parameters in float32 of which a step computes copies in 16 bits.
    `activations` are the most that graphs save for later ones. `host` and `disk` are the most that
    `offload` keeps in host memory and in files, where the CPU updates it in chunks: with what it
    makes of a chunk, and staging buffers of files, but without the system's cache. All other
    figures are of the device.

    `peak` is the most alive at once from the beginning of a step to the end of the update by an
    optimizer of class `updated_by`, and `peak_at` says when. `parts` adds up to it, by use:
    besides those above, copies of parameters, communication, values, and temporaries of operators.
    `alive` has the same in detail, the largest first, and `timeline` the bytes at each instruction.

    Not counted: what the caller keeps (earlier losses, gradients that were not set to None before
    a step), and what a transport holds; Gloo's is at most 64 MiB per group of ranks. The memory
    that kernels need inside themselves counts on the CPU; on a GPU it does not. For a device of
    another type, `in_place_of`, values and kernels are those of the CPU.
    """

    parameters: int
    masters: int
    buffers: int
    constants: int
    batch: int
    gradients: int
    optimizer: int
    activations: int
    host: int
    disk: int
    peak: int
    peak_at: str
    updated_by: str
    parts: Mapping[str, int]
    alive: tuple[Alive, ...]
    timeline: tuple[Moment, ...]
    in_place_of: str = ""

    def __str__(self) -> str:
        from meshwright.compiler.report.tables import sheet_text  # takes rich, which few runs need

        parts, alive = _parts(self), _alive(self)
        return "\n\n".join(
            (
                self._heading(),
                sheet_text(parts),
                f"{alive.title}\n{sheet_text(alive, 100)}",
                "\n".join(("bytes alive, by instruction", *_chart(self.timeline, _WIDTH))),
            )
        )

    def __repr__(self) -> str:
        return f"<Memory: {self._heading()}>"

    def _heading(self) -> str:
        found = [f"at most {size_text(self.peak)} per rank, in {self.peak_at}"]
        away = (("in host memory", self.host), ("in files", self.disk))
        found += [f"{size_text(size)} {where}" for where, size in away if size]
        found += [f"updated by {self.updated_by}"] if self.updated_by else []
        found += [f"as on a CPU in place of `{self.in_place_of}`"] if self.in_place_of else []
        return "; ".join(found)

    def to_json(self) -> dict[str, object]:
        """The same as plain dictionaries and lists."""
        return asdict(self)

    def figures(self) -> dict[str, object]:
        """The same without what is alive at the peak and the timeline."""
        return {name: value for name, value in asdict(self).items() if name not in _DETAILS}


_DETAILS = ("alive", "timeline")


def places_sheet(places: Mapping[str, Memory], title: str) -> Sheet:
    """The figures of ranks, one column for each place."""
    updated_by = next(iter(places.values())).updated_by
    rows = (
        ("parameters", "parameters"),
        ("  of these masters", "masters"),
        ("buffers", "buffers"),
        ("gradients", "gradients"),
        (f"optimizer, {updated_by}", "optimizer"),
        ("saved for the backward", "activations"),
        ("peak of a step", "peak"),
        ("in host memory", "host"),
        ("in files", "disk"),
    )
    sizes = ((name, [getattr(each, key) for each in places.values()]) for name, key in rows)
    kept = tuple((name, *map(size_text, found)) for name, found in sizes if any(found))
    columns = (Column(place, "bold", right=True) for place in places)
    return Sheet(title, (Column(""), *columns), kept)


def moments_sheet(memory: Memory) -> Sheet:
    """The bytes at each instruction that computes or moves a value, until the next one."""
    moments = _folded(memory.timeline)
    low = min((each.alive for each in moments), default=0)
    scale = max((each.most - low for each in moments), default=0) or 1
    columns = (
        *(Column("at most", right=True), Column("after", right=True), Column("", fixed=True)),
        *(Column("value", "cyan", fixed=True), Column("in", fixed=True)),
    )
    rows = []
    for entry, own in groupby(moments, lambda each: each.entry):
        for i, each in enumerate(own):
            bar, where = "█" * round((each.most - low) / scale * 30), "" if i else entry
            rows.append((size_text(each.most), size_text(each.alive), bar, each.node, where))
    return Sheet("bytes alive, by instruction", columns, tuple(rows))


def _folded(timeline: Iterable[Moment]) -> list[Moment]:
    """What only lets go of values joined to the instruction before."""
    found: list[Moment] = []
    for each in timeline:
        if found and not each.node and found[-1].entry == each.entry:
            before = found.pop()
            each = replace(before, most=max(before.most, each.most), alive=each.alive)
        found.append(each)
    return found


def _parts(memory: Memory) -> Sheet:
    """What the peak is made of."""
    columns = (Column(""), Column("at the peak", right=True), Column("", right=True), Column(""))
    rows = []
    for use, size in memory.parts.items():
        share = size / memory.peak
        bar = "█" * round(share * 30)
        rows.append((use, size_text(size), f"{share:.0%}", bar))
        if use == "parameters" and memory.masters:
            rows.append(("  of these masters", size_text(memory.masters), "", ""))
    return Sheet("", columns, tuple(rows))


def _alive(memory: Memory) -> Sheet:
    """What is alive at the peak, alike ones together, the largest first."""
    groups: dict[tuple[str, ...], list[Alive]] = {}
    for each in memory.alive:
        groups.setdefault((each.use, each.op, each.type, each.source), []).append(each)
    rows = sorted(groups.items(), key=lambda item: -sum(each.bytes for each in item[1]))
    columns = (
        *(Column("", right=True), Column("", "dim", right=True), Column("for")),
        *(Column("value", "cyan"), Column("in"), Column("source", "dim")),
    )
    cells = tuple(
        (
            size_text(sum(each.bytes for each in alike)),
            f"x {len(alike)}" if len(alike) > 1 else "",
            use,
            f"{op} {type}".strip() if op else type,
            _where([each.module if op else each.name for each in alike]),
            source,
        )
        for (use, op, type, source), alike in rows[:_MOST_ROWS]
    )
    left = [each for _, alike in rows[_MOST_ROWS:] for each in alike]
    size = size_text(sum(each.bytes for each in left))
    total = ((size, f"x {len(left)}", "", "all others", "", ""),) if left else ()
    return Sheet("alive at the peak, largest first", columns, cells, total)


def _where(names: Sequence[str]) -> str:
    found = list(fold(list(dict.fromkeys(filter(None, names))), names))
    more = [f"and {len(found) - _MOST_NAMES} more"] if len(found) > _MOST_NAMES else []
    return ", ".join((*found[:_MOST_NAMES], *more))


def _chart(timeline: Sequence[Moment], width: int) -> Iterator[str]:
    """Lines of a chart: the most bytes alive over the instructions, from the least on."""
    if not timeline:
        return
    low, high = min(each.alive for each in timeline), max(each.most for each in timeline)
    columns = min(width, len(timeline))
    starts = [i * len(timeline) // columns for i in range(columns)] + [len(timeline)]
    parts = [timeline[a:b] for a, b in pairwise(starts)]
    levels = [
        round((max(each.most for each in part) - low) / max(high - low, 1) * _HEIGHT * 8)
        for part in parts
    ]
    labels = {_HEIGHT - 1: size_text(high), 0: size_text(low)}
    margin = max(map(len, labels.values()))
    for line in reversed(range(_HEIGHT)):
        bars = "".join(_EIGHTHS[min(max(level - 8 * line, 0), 8)] for level in levels)
        yield f"{labels.get(line, ''):>{margin}} ┤{bars}".rstrip()
    spans = [(entry, len(list(own))) for entry, own in groupby(part[0].entry for part in parts)]
    yield f"{'':>{margin}}  {''.join(_label(*span) for span in spans)}".rstrip()


def _label(entry: str, width: int) -> str:
    """As much of the name of an entry as there is room for."""
    texts = (entry, entry.partition(" of ")[0], entry.partition(" ")[0], "╵")
    return next(text for text in texts if len(text) < width or text == "╵").ljust(width)
