"""The tables that the command prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from examples.m6.measure import LIMIT, OFFLOADED, Figures
from examples.m6.model import Setting
from examples.m6.paper import PUBLISHED

_LEFT = ("", "model", "stage", "kept in host memory", "published")
_STATES = ("parameters", "gradients", "optimizer")


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for head in heads:
        table.add_column(head, justify="left" if head in _LEFT else "right")
    return table


def models(found: Mapping[Setting, Figures]) -> Table:
    """The real models: sizes, and what a GPU has of the weights; ours beside what was published."""
    table = _table(
        "models: parameters in billions, and a GPU's share of the weights in GB, float32 and half",
        *("model", "layers", "h", "FFN", "experts", "GPUs", "tokens per GPU"),
        *("in experts", "in all", "published in experts", "GB", "GB in half", "published"),
    )
    for setting, each in found.items():
        published = PUBLISHED[setting.name]
        sizes = (setting.layers, setting.width, setting.inner, setting.experts, setting.gpus)
        table.add_row(
            setting.name,
            *map(str, (*sizes, setting.rows * setting.length)),
            *(f"{n / 1e9:,.1f}" for n in (each.in_experts, each.parameters)),
            f"{published.in_experts / 1e9:,.1f}",
            *(f"{each.held / part / 1e9:.1f}" for part in (1, 2)),
            published.note,
        )
    return table


def memory(found: Sequence[Figures]) -> Table:
    """What a GPU holds at its peak, with what is kept in host memory."""
    table = _table(
        f"GB per GPU at the peak of a step and its update by AdamW, and whether {LIMIT} have room",
        *("model", "stage", "kept in host memory", "layers", "peak", "fits", *_STATES),
        *("activations", "rest", "host"),
    )
    for each in found:
        parts = [each.parts.get(name, 0) for name in (*_STATES, "activations")]
        sizes = (*parts, each.peak - sum(parts), each.host)
        table.add_row(
            *(each.setting.name, each.stage, each.offload.removeprefix("offload ")),
            str(each.away) if each.away else "",
            f"{each.peak / 1e9:.2f}",
            "yes" if each.fits else "no",
            *(f"{size / 1e9:.2f}" for size in sizes),
        )
    return table


def sent(found: Sequence[Figures]) -> Table:
    """What a GPU sends in a step."""
    kinds = sorted({kind for each in found for kind in each.sent})
    table = _table("GB that a GPU sends in a step", "model", "stage", *kinds, "in all")
    for each in found:
        sizes = [each.sent.get(kind, 0) for kind in kinds]
        row = (f"{size / 1e9:.3f}" for size in (*sizes, sum(sizes)))
        table.add_row(each.setting.name, each.stage, *row)
    return table


ORDER = f"""\
Tried in this order, and the first that fits is the least: nothing, {", ".join(OFFLOADED)};
of that, as few layers as fit. What is not kept in host memory is resident on the GPU."""
