"""Run by every process of a test: mixtures of experts train, report, infer and delink.

Takes the number of ranks.
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn

import meshwright as mw
from tests.equivalence import Comparison, check_trained
from tests.layers import tied
from tests.passes.experts.dense import Dense, Model, batch, dense

MIXED = "experts blocks.*.mlp over {} count=4 capacity=1 {}\n"
PLANS = {
    2: {
        "data axis": "mesh ep=2\ndata x, labels over ep\ncheckpoint blocks.*\n"
        + MIXED.format("ep", "route=expert_choice"),
        "by count": "mesh ep=2\ndata x, labels over ep\naccumulate 2\nexperts blocks.*.mlp over ep "
        "count=4 dropless=true balance=bias rate=0.05\n",
        "own axis": "mesh ep=2\nallow replicate **\n"
        + MIXED.format("ep", "route=switch weight=0.1"),
    },
    4: {
        "data axis": "mesh dp=4\ndata x, labels over dp\nzero 1 over dp\n" + MIXED.format("dp", ""),
        "part of data": "mesh dp=2, ep=2\ndata x, labels over (dp, ep)\nzero 3 over dp\n"
        "checkpoint blocks.*\n" + MIXED.format("ep", "route=prototype weight=0.1"),
        "own axis": "mesh dp=2, ep=2\ndata x, labels over dp\nzero 2 over (dp, ep)\n"
        "accumulate 2\n" + MIXED.format("ep", "groups=4 weight=0.1"),
    },
}
DELINKED = "mesh ep=2\ndata x, labels over ep\nzero 2 over ep\nshare blocks.*\n" + MIXED.format(
    "ep", ""
)
Batch = tuple[Tensor, Tensor]
Updates = torch.optim.Optimizer


def compiled(plan: str, num_blocks: int = 1) -> tuple[mw.Program, list[Batch]]:
    torch.manual_seed(0)
    model, batches = Model(num_blocks).double(), [batch(8, 6) for _ in range(2)]
    return mw.compile(model, mw.Plan.parse(plan), example=batches[0]), batches


def check(plan: str) -> None:
    """Train, report and infer."""
    program, batches = compiled(plan)
    reference, compare = dense(program.model), Comparison(1e-10)
    check_trained(program, copy.deepcopy(reference), batches, compare=compare)
    with program.launch() as run:
        run.step(*batches[0])
        metrics, inferred = run.metrics(), run.forward(*batches[0])
    reference(*batches[0])
    for name, each in reference.named_modules():
        for key in ("load", "dropped", "entropy") if isinstance(each, Dense) else ():
            compare(f"{key} of {name}", metrics[name][key], each.found[key])
    compare("inferred", inferred, reference.eval()(*batches[0]))
    compare.report()


def train(run: mw.Run, optimizer: Updates, reference: nn.Module, other: Updates) -> Comparison:
    """Two steps of a run and of its reference, and how their parameters then differ."""
    compare = Comparison(1e-10)
    for each in (batch(8, 6) for _ in range(2)):
        compare("loss", run.step(*each), loss := reference(*each))
        loss.backward()
        for updates in (optimizer, other):
            updates.step()
            updates.zero_grad()
    named = dict(reference.named_parameters(remove_duplicate=False))
    for name, value in run.state_dict().items():
        compare(name, value, named[name])
    return compare


def check_delinked() -> None:
    """Train layers that share experts and a router, and then a copy of them for each."""
    program, _ = compiled(DELINKED, 2)
    pseudo = tied(dense(program.model), program.captured.aliases)
    run, first = program.launch(), torch.optim.AdamW(pseudo.parameters())
    optimizer = run.optimizer(torch.optim.AdamW)
    train(run, optimizer, pseudo, first).report()
    real = dense(program.model)
    real.load_state_dict(pseudo.state_dict())
    second = torch.optim.AdamW(real.parameters())
    shared = dict(pseudo.named_parameters(remove_duplicate=False))
    for name, value in real.named_parameters():
        second.state[value] = copy.deepcopy(first.state[shared[name]])
    run, optimizer = run.delink(optimizer)
    train(run, optimizer, real, second).report()
    run.check(optimizer)
    run.close()


def main(num_ranks: int) -> None:
    for name, plan in PLANS[num_ranks].items():
        check(plan)
        print(f"{name} done")
    if num_ranks == 2:
        check_delinked()
        print("delinked")


if __name__ == "__main__":
    main(int(sys.argv[1]))
