"""The picture: how fast training is, what fits, and how the work has to grow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from examples.optimus import paper
from examples.optimus.measure import CONVENTIONS, Fit, Largest, Rates


def draw(
    path: Path,
    rates: Rates,
    largest: Mapping[str, Largest],
    fits: Mapping[str, Fit],
) -> None:
    """Write the picture, in the format of the path's ending."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    trained = {setting: found for (setting, mode), found in rates.items() if mode == "train"}
    ranks = [str(each.ranks) for each in trained]
    for form, color in (("1-D", "tab:orange"), ("2-D", "tab:blue")):
        published = [paper.PUBLISHED[each][form].train for each in trained]
        left.semilogy(ranks, published, "s--", color=color, label=f"{form}, published")
        for convention, line in zip(CONVENTIONS[form], ("o-", "o:"), strict=False):
            name = f"{form}, {convention}"
            modelled = [found[name] for found in trained.values()]
            left.semilogy(ranks, modelled, line, color=color, label=name)
        right.loglog(*zip(*fits[form].points, strict=True), "o-", color=color, label=form)
    left.set(title="training, sequences per second", xlabel="ranks")
    middle.bar([*largest], [each.batch for each in largest.values()], color="tab:blue", width=0.5)
    for place, (form, each) in enumerate(largest.items()):
        text = f"{each.batch}" + (
            f"\n(paper {paper.LARGEST[form]})" if form in paper.LARGEST else ""
        )
        middle.annotate(text, (place, each.batch), ha="center", va="bottom")
    middle.set(title="largest batch on 64 ranks")
    middle.margins(y=0.2)
    right.set(title="isoefficient work, operations of a step", xlabel="ranks")
    for axes in (left, right):
        axes.legend()
    figure.savefig(path, dpi=100)
