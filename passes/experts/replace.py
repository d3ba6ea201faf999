"""Put mixtures of experts in the place of modules, before a model is captured under a plan.

Requires: the model as it is, captured. Ensures: every module under an `experts` statement with a
`count` is a `Mixture`, in a copy of the model that shares all other tensors with it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from meshwright.compiler.capture.capture import Captured
from meshwright.compiler.graph.ir import Node
from meshwright.dsl.plan import Plan
from meshwright.dsl.statements import Experts
from meshwright.passes.experts.mixture import Mixture, Settings
from meshwright.passes.experts.routes import Routing
from meshwright.passes.experts.rowwise import mixing
from meshwright.passes.statements.targets import entered


def mixtures_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the mixtures of experts of a model."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, Mixture))


def with_mixtures(model: nn.Module, captured: Captured, plan: Plan) -> nn.Module:
    """The model with mixtures where a plan wants them; itself where it wants none.

    Raises `PlanError` for a module that cannot be an expert.
    """
    wanted = _wanted(model, plan)
    if not wanted:
        return model
    values = entered(captured.graph, wanted)
    for name, statement in wanted.items():
        _check_tokens(captured, plan, name, statement, values)
        _check_parameters(model, captured, plan, name, statement)
    _check_apart(plan, wanted)
    copied = _sharing_tensors(model)
    for name, statement in wanted.items():
        region = copied.get_submodule(name)
        width = values[name][1].tensor.shape[-1]
        mixture = Mixture(name, region, width, settings(statement))
        _replace(copied, region, mixture)
    return copied


def _wanted(model: nn.Module, plan: Plan) -> dict[str, Experts]:
    """The statement for each module that is to become a mixture."""
    if not plan.of(Experts):
        return {}
    before = mixtures_of(model)
    names = [
        name
        for name, _ in model.named_modules()
        if name and not any(name == each or name.startswith(f"{each}.") for each in before)
    ]
    if before and not names:
        return {}
    resolved = plan.resolve(Experts, [*names, *before])
    for name in before:
        if name in resolved and resolved[name].count:
            _check_same(model, plan, name, resolved[name])
    return {name: each for name, each in resolved.items() if each.count and name not in before}


def _check_same(model: nn.Module, plan: Plan, name: str, statement: Experts) -> None:
    """Raises `PlanError` for a mixture that was made as another than the plan asks for."""
    mixture = model.get_submodule(name)
    assert isinstance(mixture, Mixture)
    # How its experts began does not matter any more.
    begun, asked = (
        replace(each, fresh=False, seed=0, statement=None)
        for each in (mixture.settings, settings(statement))
    )
    if begun != asked:
        raise plan.error(
            "P501",
            f"`{name}` is a mixture of experts already, which was made with other options",
            (mixture.settings.statement, statement),
            help="repeat the options, or compile the model that has no mixtures",
        )


def settings(statement: Experts) -> Settings:
    """What a statement says, with what holds where it says nothing."""
    assert statement.count is not None
    route = statement.route or "topk"
    top = 1 if route == "switch" else statement.top or min(2, statement.count)
    weight = 0.01 if statement.weight is None else statement.weight
    usual = 1.0 if route == "expert_choice" else 1.25
    factor = None if statement.dropless else statement.capacity or usual
    return Settings(
        Routing(route, statement.count, top, factor, statement.second == "random"),
        statement.groups,
        weight if (statement.balance or "aux") == "aux" else 0.0,
        statement.noise or 0.0,
        (statement.rate or 0.001) if statement.balance == "bias" else 0.0,
        statement.init == "fresh",
        statement.seed or 0,
        statement,
    )


def _check_tokens(
    captured: Captured,
    plan: Plan,
    name: str,
    statement: Experts,
    values: Mapping[str, tuple[Node, Node]],
) -> None:
    """Raises `PlanError` for a module that does not take tokens, or not each alone."""
    if name not in values:
        raise plan.error(
            "P501",
            f"`{name}` takes no tensor, so it cannot become experts",
            statement,
            help="name a feed-forward module that the model calls",
        )
    value = values[name][1]
    if not value.tensor.dtype.is_floating_point:
        raise plan.error(
            "P501",
            f"`{name}` takes whole numbers, not features of tokens, so it cannot become experts",
            statement,
            help="name a feed-forward module",
        )
    culprit = mixing(captured.graph, name, value)
    if culprit is not None:
        raise plan.error(
            "P501",
            f"`{name}` does not treat each token alone, as an expert must",
            statement,
            subject=f"{culprit.op} at {culprit.origin.source}".removesuffix(" at "),
            help="name the feed-forward part of a block",
        )


def _check_parameters(
    model: nn.Module, captured: Captured, plan: Plan, name: str, statement: Experts
) -> None:
    """Raises `PlanError` for a module without parameters, or with tied ones."""
    region = model.get_submodule(name)
    own = {f"{name}.{each}" for each, _ in region.named_parameters(remove_duplicate=False)}
    if not own:
        raise plan.error(
            "P501",
            f"`{name}` has no parameters, so it cannot become experts",
            statement,
            help="name a feed-forward module that the model calls",
        )
    first = {captured.aliases[each] for each in own}
    tied = [alias for alias, each in captured.aliases.items() if each in first]
    outside = next((alias for alias in tied if alias not in own), None)
    if outside is not None:
        raise plan.error(
            "P501",
            f"`{outside}` is also a parameter of `{name}`, which is to become experts",
            statement,
            help="name a module whose parameters are its own",
        )
    if len(own) != len({id(p) for p in region.parameters()}):
        raise plan.error(
            "P501",
            f"parameters of `{name}`, which is to become experts, are tied to each other",
            statement,
            help="name a module whose parameters are not tied",
        )


def _check_apart(plan: Plan, wanted: Mapping[str, Experts]) -> None:
    """Raises `PlanError` for a module that is to become experts inside of another."""
    for name, statement in wanted.items():
        outer = next((each for each in wanted if name.startswith(f"{each}.")), None)
        if outer is not None:
            raise plan.error(
                "P501",
                f"`{name}` is inside of `{outer}`, and both are to become experts",
                dict.fromkeys((wanted[outer], statement)),
                help=f"name one of them: an expert of `{outer}` has `{name}` in it",
            )


def _sharing_tensors(model: nn.Module) -> nn.Module:
    """A copy of a model with the same tensors."""
    held = [value for module in model.modules() for value in vars(module).values()]
    tensors = [*model.parameters(), *model.buffers(), *(v for v in held if isinstance(v, Tensor))]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is old and module is not new:
                module._modules[key] = new
