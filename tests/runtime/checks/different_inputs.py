"""Run by both processes of a test: rank 1 is given other inputs, or holds other values."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright as mw

TENSOR = "mesh tp=2\ncolumns up over tp\nrows down over tp\n"
DATA = "mesh dp=2\ndata x, y over dp\n"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.ln = nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.down(F.gelu(self.up(self.ln(x)))), y)


class Drawn(Model):
    """A model with weights, and with numbers that each rank draws for itself."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.noise, self.factor = torch.randn(8), factor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + self.noise, y) * self.factor


def batch(seed: int, rows: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 8, generator=generator), torch.randn(rows, 8, generator=generator)


PROGRAMS = {
    name: mw.compile(Model(), mw.Plan.parse(plan), batch(0))
    for name, plan in {"tensor": TENSOR, "data": DATA}.items()
}


def this_rank() -> int:
    return int(os.environ["RANK"])


def shuffled(run: mw.Run) -> None:
    """The mistake: a loader without a common seed."""
    run.step(*batch(this_rank()))


def own_rows(run: mw.Run) -> None:
    """The mistake: each rank's own rows given to `step`."""
    x, y = batch(0)
    run.step(x + this_rank(), y)


def sampled_by_rank(run: mw.Run) -> None:
    """The mistake: ranks of one tensor-parallel group that sample as if each had its own rows."""
    run.step_local(*batch(this_rank()))


def evaluated_apart(run: mw.Run) -> None:
    run.step(*batch(0))
    run.evaluate(*batch(this_rank()))


def later(run: mw.Run) -> None:
    """Inputs that are equal at first: call 2 is compared when call 3 begins."""
    for call in range(1, 5):
        print("call", call)
        run.step(*batch(this_rank() if call > 1 else 0))


def at_the_end(run: mw.Run) -> None:
    run.step(*batch(0))
    run.step(*batch(this_rank()))
    print("two steps")
    run.close()


def at_the_interval(run: mw.Run) -> None:
    for call in range(1, 9):
        run.step(*batch(this_rank() if call in (5, 6) else 0))
    print("eight steps")


def saved(run: mw.Run) -> None:
    run.step(*batch(0))
    run.step(*batch(this_rank()))
    run.state_dict()


def drifted(run: mw.Run) -> None:
    """A weight that one rank wrote to, and what an optimizer then keeps."""
    optimizer = run.optimizer(torch.optim.AdamW, lr=1e-2)
    run.step(*batch(0))
    optimizer.step()
    run.check(optimizer)
    if this_rank():
        with torch.no_grad():
            dict(run.named_parameters())["ln.weight"][2] += 0.25
        optimizer.param_groups[0]["lr"] = 0.1
    run.check(optimizer, tolerance=1.0)
    run.check(optimizer, tolerance=0.1)


def loaded(run: mw.Run) -> None:
    """States of their own: every rank takes that of rank 0, also of what is split."""
    torch.manual_seed(this_rank())
    run.load_state_dict(Model().state_dict())
    run.check()
    torch.manual_seed(0)
    wanted = Model().state_dict()
    same = all(torch.equal(wanted[name], value) for name, value in run.state_dict().items())
    print("as rank 0 has it" if same else "mixed")


def constants(run: mw.Run) -> None:
    """Tensors of the model that are neither parameters nor buffers: those of rank 0 count."""
    torch.manual_seed(0)
    wanted = Drawn()(*batch(0))
    found = (run.step(*batch(0)), run.evaluate(*batch(0)))
    print("as rank 0 has it" if all(torch.allclose(wanted, loss) for loss in found) else "mixed")


def same_rows(run: mw.Run) -> None:
    """Nothing is wrong with the sums, but half of the batch is another half's copy."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.step_local(*batch(0, rows=2))
    print(*(warning.message for warning in caught))


def right(run: mw.Run) -> None:
    for number in range(9):
        run.step(*batch(number))
        rows = run.data_slice(4)
        run.step_local(*(tensor[rows] for tensor in batch(number)))
        run.evaluate(*batch(number))
    run.check()
    print("equal")


def unchecked(run: mw.Run) -> None:
    for _ in range(3):
        run.step(*batch(this_rank()))
    print("not compared")


def main() -> None:
    plan, programs = mw.Plan.parse(TENSOR), dict(PROGRAMS)
    torch.manual_seed(this_rank())
    programs["drawn"] = mw.compile(Drawn(), plan, batch(0))
    programs["factors"] = mw.compile(Drawn(this_rank() + 2.0), plan, batch(0))
    cases: list[tuple[Callable[[mw.Run], None], str, bool | int]] = [
        *((case, "tensor", True) for case in (shuffled, own_rows, sampled_by_rank)),
        *((case, "tensor", True) for case in (evaluated_apart, later, at_the_end, saved, drifted)),
        *((at_the_interval, "tensor", interval) for interval in (3, 4)),
        *((shuffled, "data", 1), (same_rows, "data", True), (right, "data", 2)),
        *((right, "tensor", 2), (unchecked, "tensor", False), (loaded, "tensor", True)),
        *((constants, "drawn", True), (constants, "factors", True)),
    ]
    for case, program, check_inputs in cases:
        print(f"# {case.__name__} {program} {check_inputs}")
        try:
            with programs[program].launch(check_inputs=check_inputs) as run:
                case(run)
        except mw.RunError as error:
            print("\n".join(line for line in str(error).splitlines() if "digest" not in line))
