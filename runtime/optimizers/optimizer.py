"""Make optimizers over local shards: parameter groups by name, and which classes may be used."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.program import Place
from meshwright.compiler.public import Program
from meshwright.dsl.errors import MeshwrightError, one_line
from meshwright.dsl.selectors import Selector
from meshwright.dsl.suggest import nothing_matches
from meshwright.runtime.errors import RunError, check_kind
from meshwright.runtime.optimizers.elementwise import Make, same_on_parts, same_with_copies

Groups = Sequence[Mapping[str, Any]]

_ELEMENTWISE = (
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop",
    "SGD", "SparseAdam",
)  # fmt: skip
"""Classes of torch that update each element by itself; others are tried out."""
_FUSED = {"Adagrad": ("cpu",), **dict.fromkeys(("Adam", "AdamW", "SGD"), ("cpu", "cuda"))}
"""Classes of torch that have a kernel for the whole update, by device: it makes no temporary
tensors, where `foreach` makes some as large as the parameters, and is the fastest."""
HOW = ("differentiable", "foreach", "fused")
"""Options that say how an update is computed; where one is given, it stays as it is."""


def make_optimizer(
    program: Program,
    parameters: Iterable[tuple[str, nn.Parameter]],
    kind: Callable[..., torch.optim.Optimizer],
    groups: Groups,
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """The optimizer that `Run.optimizer` returns, over the local shards `parameters`."""
    if program.mode != "train":
        raise RunError(
            f"the program was compiled with `mode={program.mode!r}`: no optimizer updates it",
            help="compile it with `mode='train'`",
        )
    if not callable(kind):
        raise RunError(f"the optimizer is a `{type(kind).__name__}`", help=_OPTIONS_HELP)
    held = list(parameters)
    aliases = program.captured.aliases
    named = {alias: own for alias, own in aliases.items() if own in program.parameters}
    trained = [name for name, each in program.parameters.items() if each.requires_grad]
    chosen = grouped(trained, groups, named)
    if not chosen:
        raise RunError(
            "no parameter asks for a gradient: there is nothing to optimize",
            help="set `requires_grad` on a parameter before `compile`",
        )
    if not is_known(kind):
        copies = max(Counter(name for name, _ in held).values(), default=1)
        for group in chosen:
            make = partial(_make_group, kind, group, options)
            _check_elementwise(program, kind, make, group["params"], copies)
    # A rank may hold none of a group: it has the group all the same, as every rank must.
    listed = [
        {**group, "params": [each for name, each in held if name in own]}
        for group in chosen
        for own in (set(group["params"]),)
    ]
    fused = {"fused": True} if _may_fuse(kind, listed, options) else {}
    found = _make(kind, listed, {**options, **fused})
    _warn_of_unread(found)
    return found


def is_known(kind: object) -> bool:
    """Whether this is a class of torch that updates each element by itself."""
    return any(kind is getattr(torch.optim, name) for name in _ELEMENTWISE)


def is_elementwise(program: Program, optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer updates each element by itself: that is known of its class, or it was
    tried out on parts of a parameter."""
    trained = [stored for stored in program.parameters.values() if stored.requires_grad]
    return is_known(type(optimizer)) or any(
        stored.layout.canonical(program.mesh).split_axes for stored in trained
    )


def fused_on(kind: object) -> tuple[str, ...]:
    """The types of devices on which a class has a fused kernel."""
    return next((_FUSED[name] for name in _FUSED if kind is getattr(torch.optim, name)), ())


def _may_fuse(kind: object, listed: Groups, options: Mapping[str, Any]) -> bool:
    """Whether the class has a fused kernel for these parameters, and nobody has chosen another.

    In torch 2.11 to 2.13 those for the CPU are wrong in 16 bits: SGD's momentum is that of other
    memory. Those for CUDA compute 16 bits in float32.
    """
    devices = fused_on(kind)
    given = {*options, *(option for group in listed for option in group)}
    return (
        bool(devices)
        and given.isdisjoint(HOW)
        and all(
            parameter.device.type in devices
            and parameter.is_floating_point()
            and (parameter.is_cuda or parameter.itemsize >= torch.float32.itemsize)
            for group in listed
            for parameter in group["params"]
        )
    )


def _check_elementwise(
    program: Program, kind: object, make: Make, names: Sequence[str], copies: int
) -> None:
    """Raise `RunError` if the optimizer looks at more than single elements and must not.

    It is tried out on each layout in which one of the parameters `names` is split. Where none is
    split it may look at whole tensors, but not at all of them together if it has `copies` of each,
    those of multiple ranks, or only those that some ranks hold.
    """
    split: dict[Layout, str] = {}
    for name in names:
        layout = program.parameters[name].layout.canonical(program.mesh)
        if layout.split_axes:
            split.setdefault(layout, name)
    for layout, name in split.items():
        if not tried(
            kind, f"a tensor like `{name}`", partial(same_on_parts, make, layout, program.mesh)
        ):
            raise RunError(
                f"`{_spell(kind)}` does not update elements one by one, and `{name}` is split",
                where=(f"`{name}`: `{layout}` on `{program.mesh}`",),
                help="use an elementwise optimizer such as AdamW or SGD",
            )
    _check_together(program, kind, make, names, copies, split=bool(split))


def _check_together(
    program: Program, kind: object, make: Make, names: Sequence[str], copies: int, *, split: bool
) -> None:
    """Raise `RunError` if the optimizer looks at all tensors together where none has them all: what
    is `split` has been tried, but for what is updated in chunks."""
    held = program.parameters
    apart = next((each for each in held.values() if each.held_at), None)
    away = next((held[name] for name in names if held[name].kept.update.away), None)
    alone = split or (copies < 2 and apart is None)
    together = partial(same_with_copies, make, max(copies, 2))
    if (alone and away is None) or tried(kind, f"a tensor like `{names[0]}`", together):
        return
    said = f"`{_spell(kind)}` looks at all tensors together"
    if away is not None:
        raise RunError(
            f"{said}, and those that are offloaded are updated in chunks",
            where=(f"`{away.name}`: kept in {_where(away.kept.update)}",),
            help="use an elementwise optimizer such as AdamW or SGD, or remove "
            "`offload optimizer` and `offload parameters`",
        )
    if apart is not None:
        raise RunError(
            f"{said}, and no rank holds all of them",
            where=(f"`{apart.name}`: held at {apart.held_text} of `{program.mesh}`",),
            help="use an elementwise optimizer such as AdamW or SGD",
        )
    raise RunError(
        f"{said}, and this process has those of {copies} ranks",
        help="start one process per rank, or use an elementwise optimizer",
    )


def _make_group(
    kind: Callable[..., Any],
    group: Mapping[str, Any],
    options: Mapping[str, Any],
    parameters: list[nn.Parameter],
) -> torch.optim.Optimizer:
    return _make(kind, [{**group, "params": parameters}], options)


FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError),
    ValueError,
)


Found = TypeVar("Found")


def tried(kind: object, what: str, trial: Callable[[], Found]) -> Found:
    """The result of a trial on `what`. Raises `RunError` for an optimizer that fails in it."""
    try:
        return trial()
    except MeshwrightError:
        raise
    except FAILURES as error:
        raise RunError(
            f"`{_spell(kind)}` fails where it is tried out on {what}: {one_line(str(error))}",
            help="use an optimizer that updates any tensor, such as AdamW or SGD",
        ) from error


def _make(
    kind: Callable[..., Any], parameters: Sequence[Any], options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """An optimizer of this class. Raises `RunError` for options that it does not take."""
    try:
        found = kind(parameters, **options)
    except (RuntimeError, TypeError, ValueError) as error:
        raise RunError(
            f"`{_spell(kind)}` cannot be made with these options: {one_line(str(error))}",
            help="pass other options, as in `run.optimizer(torch.optim.AdamW, lr=1e-3)`, or use a "
            "class that takes parameters of every shape",
        ) from error
    if not isinstance(found, torch.optim.Optimizer):
        raise RunError(
            f"`{_spell(kind)}` makes a `{type(found).__name__}`, not an optimizer",
            help=_OPTIONS_HELP,
        )
    return found


_BESIDE_OPTIONS = {"params", "param_names", "name", "initial_lr", "max_lr", "min_lr"}
"""Keys of groups that are not options of a class, but for schedulers and for people."""


def _warn_of_unread(optimizer: torch.optim.Optimizer) -> None:
    """Warn of options of groups that the class does not have: torch keeps them without a word."""
    given = {name for group in optimizer.param_groups for name in group}
    for name in sorted(given - set(optimizer.defaults) - _BESIDE_OPTIONS):
        known = ", ".join(f"`{each}`" for each in optimizer.defaults)
        warnings.warn(
            f"`{_spell(type(optimizer))}` has no option `{name}`: in a parameter group it changes "
            f"nothing by itself; its options are {known}",
            stacklevel=4,
        )


def _where(place: Place) -> str:
    return "host memory" if place.path is None else f"files of `{place.path}`"


_OPTIONS_HELP = "pass a class and its options: `run.optimizer(torch.optim.AdamW, lr=1e-3)`"


def _spell(kind: object) -> str:
    return getattr(kind, "__name__", None) or type(kind).__name__


def grouped(
    trained: Iterable[str], groups: Groups, aliases: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Groups with the names of `trained` parameters as `"params"`, which are selectors in `groups`:
    a parameter is in the first group that matches it, and the rest are in a group of their own.

    Raises `PlanError` for a selector that matches nothing, `RunError` for a group without `params`
    and for one whose parameters are all in groups before it.
    """
    check_kind(groups, (list, tuple), "`groups`", _GROUPS_HELP)
    names = list(aliases)
    chosen: dict[str, int] = {}
    for i, group in enumerate(groups):
        texts = _selectors(group)
        for text in texts:
            selector = Selector(text)
            matched = selector.match(names)
            if not matched:
                raise nothing_matches(selector, names)
            for name in matched:
                chosen.setdefault(aliases[name], i)
        if texts and i not in chosen.values():
            raise RunError(
                f"groups before it have all parameters of the group of `{'`, `'.join(texts)}`",
                help="move it before them: the first group that matches a parameter has it",
            )
    members: list[list[str]] = [[] for _ in range(len(groups) + 1)]
    for name in trained:
        members[chosen.get(name, len(groups))].append(name)
    return [
        {**group, "params": listed}
        for group, listed in zip((*groups, {}), members, strict=True)
        if listed
    ]


_GROUPS_HELP = 'write names or selectors: `groups=[{"params": ["**.bias"], "lr": 1e-4}]`'


def _selectors(group: Mapping[str, Any]) -> list[str]:
    check_kind(group, Mapping, "a parameter group", _GROUPS_HELP)
    found = group.get("params")
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
        kind = type(found).__name__
        raise RunError(f"a parameter group's `params` is a `{kind}`", help=_GROUPS_HELP)
    return list(texts)
