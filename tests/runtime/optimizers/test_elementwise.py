"""Optimizers that look at more than single elements are found wherever that matters."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.compiler.layout.factors import Factor, whole
from meshwright.compiler.layout.layout import Layout
from meshwright.compiler.layout.mesh import Mesh
from meshwright.runtime.optimizers.elementwise import same_on_parts
from tests.compiler.layouts import split
from tests.runtime.test_run import compiled

MESH = Mesh((("dp", 2), ("tp", 4)))
LAYOUTS = {
    "rows": split((512, 1024), {1: "tp"}),
    "columns": split((512, 1024), {0: "tp"}),
    "both": split((512, 64), {0: "dp", 1: "tp"}),
    "vector": split((64,), {0: "tp"}),
    "channels": split((16, 8, 3, 3), {1: "tp"}),
    "segment": Layout(((((Factor(8, ("tp",))),), (Factor(4),)), whole(6))),
    "large": split((65536, 4, 8192), {0: ("dp", "tp")}),
}


class Strange(torch.optim.Optimizer):
    """What strangers' optimizers have in common; each says what its update is."""

    def __init__(self, parameters: Any, lr: float = 0.1, bounded: bool = False) -> None:
        super().__init__(parameters, {"lr": lr, "bounded": bounded})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    change = self.update(parameter, parameter.grad, self.state[parameter], group)
                    parameter.sub_(group["lr"] * change)

    def update(self, value: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        raise NotImplementedError


class Lion(Strange):
    def update(self, value: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        return state.setdefault("average", torch.zeros_like(grad)).lerp_(grad, 0.1).sign()


class InFloat32(Strange):
    def update(self, value: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        average = state.setdefault("average", torch.zeros(grad.shape)).lerp_(grad.float(), 0.1)
        return average.tanh().exp()


class Signs(Strange):
    """Not a number where the gradient is 0."""

    def update(self, value: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        return grad / grad.abs()


class NormalisedRows(Strange):
    def update(self, value: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        return grad / (grad.norm(dim=-1, keepdim=True) + 1e-8) if grad.dim() > 1 else grad


class CentredColumns(Strange):
    def update(self, value: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        return grad - grad.mean(0) if grad.dim() > 1 else grad


class Trusting(Strange):
    """Scaled by norms of the tensor, as LARS and LAMB do."""

    def update(self, value: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        return grad * (value.norm() / (grad.norm() + 1e-8)).clamp(0, 10)


class Clipping(Strange):
    def update(self, value: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        return grad / max(1.0, grad.norm().item() / 1e4)


class Bounded(Strange):
    """Looks at whole tensors where its group says so."""

    def update(self, value: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        return grad / grad.abs().max() if group["bounded"] else grad


class LateNormalised(Strange):
    """Looks at whole tensors from its fourth step on."""

    def update(self, value: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        state["count"] = state.get("count", 0) + 1
        return grad / grad.norm() if state["count"] > 3 else grad


class LargeNormalised(Strange):
    """Looks at whole tensors if they have more than 32 elements."""

    def update(self, value: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        return grad / grad.norm() if grad.numel() > 32 else grad


class AllTogether(Strange):
    def update(self, value: Tensor, grad: Tensor, state: Any, group: Any) -> Tensor:
        return (
            grad
            / torch.stack([p.grad.norm() for p in group["params"] if p.grad is not None]).norm()
        )


ELEMENTWISE = (
    *(Lion, InFloat32, Signs),
    *(functools.partial(torch.optim.SGD, momentum=0.9), torch.optim.Adam),
)
WHOLE = (
    *(Trusting, Clipping, LateNormalised, LargeNormalised, AllTogether),
    *(torch.optim.Adafactor, torch.optim.LBFGS),
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [*ELEMENTWISE, *WHOLE])
def test_elementwise_optimizers_do_the_same_on_parts_and_others_do_not(
    kind: Any, layout: str
) -> None:
    # Without a rate, as before a schedule begins, nothing would change and all would seem alike.
    same = same_on_parts(functools.partial(kind, lr=0.0), LAYOUTS[layout], MESH)
    assert same == (kind in ELEMENTWISE)


def test_every_optimizer_does_the_same_on_parts_without_elements() -> None:
    empty = split((0, 8), {1: "tp"})
    assert all(same_on_parts(kind, empty, MESH) for kind in (Lion, NormalisedRows, Trusting))


@pytest.mark.parametrize(
    ("kind", "apart"),
    [(NormalisedRows, {"rows", "both"}), (CentredColumns, {"columns", "both", "segment", "large"})],
)
def test_an_optimizer_may_look_along_the_dims_that_are_whole(kind: Any, apart: set[str]) -> None:
    assert {name for name, each in LAYOUTS.items() if not same_on_parts(kind, each, MESH)} == apart


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh()).square().mean()


@functools.cache
def two(plan: str) -> mw.Program:
    return mw.compile(Two(), mw.Plan.parse(f"mesh tp=2\n{plan}"), (torch.ones(4, 8),))


@pytest.mark.parametrize(
    ("kind", "plan"),
    [(NormalisedRows, "columns up over tp"), (CentredColumns, "rows down over tp")],
)
def test_an_optimizer_of_rows_trains_under_columns_and_is_refused_under_rows(
    kind: Any, plan: str
) -> None:
    run, model, x = two(plan).launch(), Two(), torch.ones(4, 8)
    ours, theirs = run.optimizer(kind), kind(model.parameters())
    for _ in range(3):
        run.step(x)
        model(x).backward()
        for each in (ours, theirs):
            each.step()
            each.zero_grad()
    wanted = model.state_dict()
    assert all(torch.allclose(value, wanted[name]) for name, value in run.state_dict().items())
    both = two("columns up over tp\nrows down over tp").launch()
    with pytest.raises(mw.RunError, match="does not update elements one by one, and `") as caught:
        both.optimizer(kind)
    assert ("`down.weight` is split" if kind is NormalisedRows else "`up.weight`") in str(
        caught.value
    )


def test_the_options_of_groups_count_in_trials() -> None:
    run = two("columns up over tp").launch()
    assert run.optimizer(Bounded)
    assert run.optimizer(Bounded, groups=[{"params": ["down.*"], "bounded": True}])
    for groups, options in (([{"params": ["up.*"], "bounded": True}], {}), ((), {"bounded": True})):
        with pytest.raises(mw.RunError, match=r"`up\.weight` is split"):
            run.optimizer(Bounded, groups=groups, **options)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, AllTogether])
def test_an_optimizer_of_all_tensors_together_is_refused_where_it_has_those_of_several_ranks(
    kind: Any,
) -> None:
    with pytest.raises(mw.RunError, match="looks at all tensors together, and this process has"):
        compiled("data").launch().optimizer(kind)
    assert compiled("data").launch().optimizer(torch.optim.Adafactor)


@pytest.mark.parametrize("kind", [torch.optim.Muon, torch.optim.Adafactor, torch.optim.LBFGS])
def test_torchs_optimizers_of_whole_tensors_are_refused_where_one_is_split(kind: Any) -> None:
    with pytest.raises(mw.RunError, match="does not update elements one by one"):
        two("columns up over tp").launch().optimizer(kind, lr=0.1)


def test_an_optimizer_that_fails_where_it_is_tried_is_an_error_that_says_so() -> None:
    with pytest.raises(mw.RunError, match="`Strange` fails where it is tried out on a tensor like"):
        two("columns up over tp").launch().optimizer(Strange)
