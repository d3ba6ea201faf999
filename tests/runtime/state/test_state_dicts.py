"""States that are taken over or given to a model: all of their tensors, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from tests.runtime.models import make
from tests.runtime.test_run import compiled


def expanded(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "spare": nn.Parameter(torch.zeros(1, dtype=torch.float64).expand(3))}


BAD_STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda state: list(state),
    "a number among tensors": lambda state: {**state, "spare": 3.0},
    "the last tensor missing": lambda state: {n: t for n, t in state.items() if n != "steps"},
    "an unknown tensor": lambda state: {**state, "more": torch.ones(1)},
    "another shape": lambda state: {**state, "spare": torch.ones(4)},
    "another kind of number": lambda state: {**state, "steps": torch.tensor(0.5)},
    "without values": lambda state: {**state, "spare": torch.ones(3, device="meta")},
    "sparse": lambda state: {**state, "spare": torch.ones(3).to_sparse()},
    "a subclass that is more than its values": lambda state: {
        **state, "spare": torch.ones(3).as_subclass(Odd),
    },
}  # fmt: skip


class Odd(Tensor):
    """Whatever is done to it fails."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise TypeError("odd")


def all_of(run: mw.Run) -> list[Tensor]:
    return [tensor.clone() for state in run.states for tensor in state.tensors.values()]


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_state_that_does_not_fit_changes_nothing(case: str) -> None:
    run = compiled().launch()
    before = all_of(run)
    state = make(seed=4).state_dict()
    with pytest.raises(mw.RunError):
        run.load_state_dict(BAD_STATES[case](state))
    assert all(map(torch.equal, all_of(run), before))
    run.load_state_dict(state)
    assert torch.equal(run.state_dict()["wte.weight"], state["wte.weight"])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)).sum()


def small() -> tuple[mw.Run, dict[str, Tensor]]:
    model = Small().half()
    run = mw.compile(model, mw.Plan.parse("mesh dp=1"), (torch.ones(2, 4).half(),)).launch()
    return run, model.state_dict()


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("seen", torch.tensor(300), "`seen` has values that `torch.uint8` cannot hold"),
        ("seen", torch.tensor(-1), "`seen` has values that `torch.uint8` cannot hold"),
        ("up.weight", torch.full((4, 4), 1e6), "`up.weight` has values that `torch.float16`"),
    ],
)
def test_values_that_the_models_type_cannot_hold_are_refused(
    name: str, value: Tensor, problem: str
) -> None:
    run, state = small()
    with pytest.raises(mw.RunError, match=problem):
        run.load_state_dict({**state, name: value})


def test_other_types_that_can_hold_the_values_are_taken() -> None:
    run, state = small()
    infinite = torch.full((4, 4), float("inf"), dtype=torch.float64)
    run.load_state_dict({**state, "seen": torch.tensor(200), "up.weight": infinite})
    assert run.state_dict()["seen"] == 200
    assert run.state_dict()["up.weight"].isinf().all()


def tied(model: Small) -> None:
    model.down.weight = model.up.weight


def whole_numbers(model: Small) -> None:
    model.up.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int64), requires_grad=False)


def expanded_weight(model: Small) -> None:
    model.down.weight = nn.Parameter(torch.zeros(4, 1).expand(4, 4))


def made_in_inference(model: Small) -> None:
    with torch.inference_mode():
        model.down.weight = nn.Parameter(torch.zeros(4, 4), requires_grad=False)


def smaller_kind(model: Small) -> None:
    model.seen = torch.zeros((), dtype=torch.bool)


@pytest.mark.parametrize(
    "spoil", [tied, whole_numbers, expanded_weight, made_in_inference, smaller_kind]
)
def test_a_model_that_cannot_hold_what_was_trained_is_left_as_it_was(
    spoil: Callable[[Small], None], golden: Callable[[str, str], None]
) -> None:
    run, state = small()
    run.load_state_dict({**state, "seen": torch.tensor(7)})
    model = Small()
    spoil(model)
    before = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    with pytest.raises(mw.RunError) as caught:
        run.copy_to(model)
    golden(f"copy_to_{spoil.__name__}", str(caught.value))
    assert all(map(torch.equal, (*model.parameters(), *model.buffers()), before))
