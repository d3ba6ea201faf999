"""The tables that the command prints."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from examples.optimus import paper
from examples.optimus.measure import CLUSTER, Fit, Largest, Rates
from examples.optimus.model import LAYERS, LENGTH, VOCABULARY, Setting


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for head in heads:
        table.add_column(head, justify="left" if head in ("", "plan", "part") else "right")
    return table


def volumes(setting: Setting, counts: Mapping[str, Mapping[str, float]]) -> Table:
    """What a rank sends in a layer: counted, and by the paper's formulas."""
    table = _table(
        f"p = {setting.ranks}, h {setting.width}: millions of elements a rank sends in a layer",
        *("plan", "batch", "part", "counted", "formula", "less what is not sent", "down a tree"),
    )
    for form, found in counts.items():
        batch = paper.PUBLISHED[setting][form].batch
        for part, count in found.items():
            formula = paper.elements(form, part, setting, batch, tree=False)
            again = part == paper.PARTS[-1]
            less = formula - (paper.unused(form, setting, batch, tree=False) if again else 0)
            tree = paper.elements(form, part, setting, batch, tree=True)
            row = (count, formula, less, tree)
            table.add_row(form, str(batch), part, *(f"{each / 1e6:.3f}" for each in row))
    return table


def times(modelled: Rates) -> Table:
    """Sequences per second: modelled, and published."""
    forms = list(next(iter(modelled.values())))
    table = _table(
        f"sequences per second: modelled on {CLUSTER}, where a grid has squares of 2 x 2 to a node",
        *("p", "h", "", *forms, "published 1-D", "2-D", "ratio"),
    )
    for (setting, mode), found in modelled.items():
        one, two = (getattr(paper.PUBLISHED[setting][form], mode) for form in ("1-D", "2-D"))
        rates = (f"{found[form]:.3g}" for form in forms)
        published = f"{one:.4g}", f"{two:.4g}", f"{two / one:.2f}"
        table.add_row(str(setting.ranks), str(setting.width), mode, *rates, *published)
    return table


def largest(setting: Setting, limit: float, found: Mapping[str, Largest]) -> Table:
    """The largest batches, and what the peak of each is made of."""
    table = _table(
        f"the largest batch on {setting.ranks} ranks within {limit / 1e9:g} GB: h {setting.width}, "
        f"{setting.heads} heads, {LAYERS} layers, s {LENGTH}, v {VOCABULARY}, float32, AdamW",
        *(
            "plan",
            "batch",
            "2-D / this",
            "paper",
            "peak GB",
            "next batch",
            "states GB",
            "rest, bsh/p",
        ),
    )
    for form, each in found.items():
        states = sum(each.parts.get(name, 0) for name in ("parameters", "optimizer", "gradients"))
        unit = 4 * each.batch * LENGTH * setting.width / setting.ranks
        table.add_row(
            *(form, str(each.batch), f"{found['2-D'].batch / each.batch:.2f}"),
            str(paper.LARGEST.get(form, "")),
            *(f"{size / 1e9:.2f}" for size in (each.peak, each.above, states)),
            f"{(each.peak - states) / unit:.1f}",
        )
    return table


def fits(found: Mapping[str, Fit]) -> Table:
    """The fitted exponents."""
    table = _table(
        "isoefficiency: the work W at which a rank sends for as long as it computes",
        *("plan", "", "exponent", "residual"),
    )
    for form, fit in found.items():
        table.add_row(form, f"W ~ ({fit.base})^x", f"{fit.exponent:.4f}", f"{fit.residual:.2%}")
    return table
