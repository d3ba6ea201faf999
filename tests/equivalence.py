"""Train a model twice, compiled under a plan and in eager mode, and compare all that it gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import meshwright
from meshwright.compiler.public import Program

Example = tuple[Any, ...] | dict[str, Any]

Update = tuple[type[torch.optim.Optimizer], dict[str, float]]

ADAM: Update = (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.01})


def check_equal(
    model: nn.Module,
    example: Example | Callable[[], Example],
    plan: str,
    *,
    tolerance: float = 1e-10,
    steps: int = 3,
    outputs: Sequence[str] = (),
    loss: Any = None,
    accumulate: int = 1,
    dtype: torch.dtype = torch.float64,
    copied: Callable[[nn.Module], nn.Module] = copy.deepcopy,
    floor: float | None = None,
    update: Update = ADAM,
) -> Program:
    """Assert that loss, outputs, every gradient, parameters and buffers equal eager's.

    `example` is a batch, or a function that makes one for each step. `loss` and `outputs` are as
    in `meshwright.compile`; gradients of `accumulate` batches are summed before each of `steps`
    `update`s. `copied` makes the model that runs eagerly. The programs run on the virtual mesh, and
    every rank's copies of what is replicated are compared, after each step and at the end.
    Differences are absolute or, with `floor`, relative to the larger of `floor` and a tensor's
    largest entry. Returns the compiled program.
    """
    model = model.to(dtype)
    count = steps * accumulate
    batches = [example() if callable(example) else example for _ in range(count)]
    program = meshwright.compile(
        model, meshwright.Plan.parse(plan), example=batches[0], loss=loss, outputs=outputs
    )
    check_trained(
        program,
        copied(model),
        batches,
        outputs=outputs,
        loss=loss,
        accumulate=accumulate,
        update=update,
        compare=Comparison(tolerance, floor),
    )
    return program


def check_trained(
    program: Program,
    reference: nn.Module,
    batches: Sequence[Example],
    *,
    outputs: Sequence[str] = (),
    loss: Any = None,
    accumulate: int = 1,
    update: Update = ADAM,
    compare: Comparison,
) -> None:
    """The same for a program of a model of which `reference` is a copy, a step for each batch."""
    run = program.launch()
    kind, settings = update
    optimizer = run.optimizer(kind, **settings)
    expected_optimizer = kind([p for p in reference.parameters() if p.requires_grad], **settings)
    for number, batch in enumerate(batches):
        found = run.step(**batch) if isinstance(batch, dict) else run.step(*batch)
        results = found if isinstance(found, tuple) else (found,)
        run.check(optimizer)
        wanted = expected_results(reference, batch, loss, outputs)
        wanted[0].backward()
        for name, ours, theirs in zip(("loss", *outputs), results, wanted, strict=True):
            compare(f"{name} of step {number}", ours, theirs)
        if (number + 1) % accumulate == 0:
            compare.gradients(run.gradients(), reference, f"step {number}")
            for each in (optimizer, expected_optimizer):
                each.step()
                each.zero_grad()
    run.check(optimizer)
    state = run.state_dict()
    assert set(state) == set(reference.state_dict())
    for name, value in reference.state_dict().items():
        compare(f"{name} after {len(batches) // accumulate} steps", state[name], value)
    compare.report()


def without_grouped(model: nn.Module) -> nn.Module:
    """A copy that multiplies row by row, since torch's grouped product does not take float64."""
    model = copy.deepcopy(model)
    model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    return model


class Comparison:
    """Collects the differences, so that a failure names them all."""

    def __init__(self, tolerance: float, floor: float | None = None) -> None:
        self.tolerance = tolerance
        self.floor = floor
        self.wrong: list[str] = []

    def __call__(self, name: str, ours: Tensor, theirs: Tensor) -> None:
        if tuple(ours.shape) != tuple(theirs.shape):
            self.wrong.append(f"{name}: {tuple(ours.shape)}, not {tuple(theirs.shape)}")
            return
        if theirs.numel() == 0:
            return
        difference = (ours.detach().double() - theirs.detach().double()).abs().max().item()
        if self.floor is not None:
            difference /= max(theirs.detach().abs().max().item(), self.floor)
        both_nan = ours.isnan().any() and ours.isnan().equal(theirs.isnan())
        if not difference <= self.tolerance and not both_nan:
            self.wrong.append(f"{name}: differs by {difference:.1e}")

    def gradients(self, ours: Mapping[str, Tensor], reference: nn.Module, when: str) -> None:
        """Compare gradients by every name of each parameter; both sides have the same ones."""
        named = dict(reference.named_parameters(remove_duplicate=False))
        theirs = {name: p.grad for name, p in named.items() if p.grad is not None}
        if set(ours) != set(theirs):
            self.wrong.append(f"gradients of {sorted(set(ours) ^ set(theirs))} on one side only")
        for name in set(ours) & set(theirs):
            self(f"gradient of {name}, {when}", ours[name], theirs[name])

    def report(self) -> None:
        __tracebackhide__ = True
        assert not self.wrong, "\n".join(self.wrong[:20])


def expected_results(
    reference: nn.Module, batch: Example, loss: Any, outputs: Sequence[str]
) -> list[Tensor]:
    """The loss and each of the outputs in eager mode."""
    output = reference(**batch) if isinstance(batch, dict) else reference(*batch)
    if callable(loss):
        scalar = loss(output)
    elif isinstance(output, Tensor):
        scalar = output
    else:
        scalar = _at(output, loss or "loss")
    return [scalar, *(_at(output, path) for path in outputs)]


def _at(output: Any, path: str) -> Any:
    for part in path.split("."):
        if isinstance(output, Mapping):
            output = output[part]
        elif part.isdigit():
            output = output[int(part)]
        else:
            output = getattr(output, part)
    return output


def implicit_gathers(program: Program) -> list[str]:
    """A line for each gather that no statement of the plan asked for."""
    return [
        f"{m.value.name}: {m.collective.source} -> {m.collective.target} "
        f"for {m.user} in {m.node.origin.module}"
        for m in program.movements
        if m.implicit
    ]
