"""Optimizers over local shards: groups by name, and which classes do with a part of a tensor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from meshwright.compiler.public import Program
from meshwright.dsl.errors import one_line
from meshwright.dsl.selectors import Selector
from meshwright.dsl.suggest import nothing_matches
from meshwright.runtime.errors import RunError, check_kind

Groups = Sequence[Mapping[str, Any]]

_WHOLE_TENSORS = ("Muon", "Adafactor", "LBFGS", "Shampoo", "SOAP", "LAMB", "Lamb", "LARS", "Lars")
"""Optimizers whose update of an element looks at its whole tensor, or at all tensors."""


def make_optimizer(
    program: Program,
    parameters: Iterable[tuple[str, nn.Parameter]],
    kind: Callable[..., torch.optim.Optimizer],
    groups: Groups,
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """What `Run.optimizer` gives, over the local shards `parameters`."""
    check_elementwise(kind, program, options)
    aliases = program.captured.aliases
    named = {alias: own for alias, own in aliases.items() if own in program.parameters}
    listed = grouped(parameters, groups, named)
    if not listed:
        raise RunError(
            "no parameter asks for a gradient: there is nothing to optimize",
            help="set `requires_grad` on a parameter before `compile`",
        )
    return made(kind, listed, options)


def check_elementwise(
    kind: Callable[..., Any], program: Program, options: Mapping[str, Any]
) -> None:
    """Raise `RunError` if a parameter is split and `kind` looks at more than single elements.

    Classes that torch does not have are tried out: on halves of a tensor they must do what they do
    on the whole.
    """
    if not callable(kind):
        raise RunError(
            f"the optimizer is a `{type(kind).__name__}`",
            help=_OPTIONS_HELP,
        )
    split = [s for s in program.parameters.values() if s.requires_grad and s.layout.split_axes]
    if not split:
        return
    classes = kind.__mro__ if isinstance(kind, type) else ()
    known = any(each.__name__ in _WHOLE_TENSORS for each in classes)
    torchs = getattr(kind, "__module__", "").startswith("torch.optim")
    if known or not (torchs or _same_on_halves(kind, options)):
        raise RunError(
            f"`{_spell(kind)}` does not update elements one by one, and `{split[0].name}` is split",
            where=(f"`{split[0].name}`: `{split[0].layout}` on `{program.mesh}`",),
            help="use an elementwise optimizer such as AdamW or SGD",
        )


def made(
    kind: Callable[..., Any], parameters: Sequence[Any], options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """An optimizer of this class. Raises `RunError` for options that it does not take."""
    try:
        found = kind(parameters, **options)
    except (TypeError, ValueError) as error:
        raise RunError(
            f"`{_spell(kind)}` cannot be made with these options: {one_line(str(error))}",
            help=_OPTIONS_HELP,
        ) from error
    if not isinstance(found, torch.optim.Optimizer):
        raise RunError(
            f"`{_spell(kind)}` makes a `{type(found).__name__}`, not an optimizer",
            help=_OPTIONS_HELP,
        )
    _warn_of_unread(found)
    return found


_BESIDE_OPTIONS = {"params", "param_names", "name", "initial_lr", "max_lr", "min_lr"}
"""What groups have beside the options of a class, for schedulers and for people."""


def _warn_of_unread(optimizer: torch.optim.Optimizer) -> None:
    """Name the options of groups that the class does not have: torch keeps them and is silent."""
    given = {name for group in optimizer.param_groups for name in group}
    for name in sorted(given - set(optimizer.defaults) - _BESIDE_OPTIONS):
        known = ", ".join(f"`{each}`" for each in optimizer.defaults)
        warnings.warn(
            f"`{_spell(type(optimizer))}` has no option `{name}`: in a parameter group it changes "
            f"nothing by itself; its options are {known}",
            stacklevel=5,
        )


_OPTIONS_HELP = "pass a class and its options: `run.optimizer(torch.optim.AdamW, lr=1e-3)`"


def _spell(kind: object) -> str:
    return getattr(kind, "__name__", None) or type(kind).__name__


def _same_on_halves(kind: Callable[..., Any], options: Mapping[str, Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    value, *gradients = torch.randn(4, 4, 6, generator=generator, dtype=torch.float64).unbind()
    whole, halves = nn.Parameter(value.clone()), [nn.Parameter(h.clone()) for h in value.chunk(2)]
    optimizers = (made(kind, [whole], options), made(kind, halves, options))
    for gradient in gradients:
        whole.grad = gradient.clone()
        for half, part in zip(halves, gradient.chunk(2), strict=True):
            half.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    return torch.allclose(whole, torch.cat(list(halves)), rtol=1e-9, atol=1e-12)


def grouped(
    parameters: Iterable[tuple[str, nn.Parameter]], groups: Groups, aliases: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer. The `"params"` of `groups` are selectors; the first
    group that matches a parameter has it, and the rest are in a group of their own.

    Raises `PlanError` for a selector that matches nothing, `RunError` for a group without `params`
    and for one of which groups before it have all.
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
    members: list[list[nn.Parameter]] = [[] for _ in range(len(groups) + 1)]
    for name, parameter in parameters:
        if parameter.requires_grad:
            members[chosen.get(name, len(groups))].append(parameter)
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
