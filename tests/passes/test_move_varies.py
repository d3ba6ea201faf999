"""The pass `move_varies`: the all-reduce that a `vary` becomes is where it is cheapest."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshwright.compiler.graph.ir import MeshOp
from meshwright.passes import move_varies
from tests.equivalence import check_equal
from tests.models import real
from tests.passes.examples import Places, sequences
from tests.passes.stages import check_documented, shown, stages


def test_the_docstring_shows_a_position_embedding_before_and_after() -> None:
    found = stages(Places(repeated=False), sequences(64), "mesh dp=2\ndata x over dp\n")
    names = "embedding", "vary", "mul"
    check_documented(
        move_varies, shown(found["partition"], *names), shown(found["move_varies"], *names)
    )


class Grouped(nn.Module):
    """A split and a whole linear of one input, as queries and one head of keys are."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k = self.q(x).unflatten(-1, (4, 8)), torch.tanh(self.k(x))
        return (q * k[:, None]).square().mean()


def test_a_whole_linear_beside_a_split_one_varies_with_its_input() -> None:
    program = check_equal(
        Grouped(), lambda: (real(8, 16),), "mesh tp=2\ncolumns q over tp as (h 8)\n"
    )
    assert program.comm().counts() == {"all_reduce[tp]": 3}
    backward = [each.type for each in program.comm() if each.phase == "backward"]
    assert backward == ["f64[136] partial(tp)", "f64[8, 16] partial(tp)"]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.matmul(self.w).square().sum() + y.matmul(self.w).tanh().sum()


def test_one_parameter_may_vary_over_nested_axes() -> None:
    plan = "mesh a=2, b=2\nshard x [n@a, d]\nshard y [n@(a, b), d]\n"
    program = check_equal(Twice(), lambda: (real(8, 16), real(8, 16)), plan)
    backward = [each for each in program.comm() if each.phase == "backward"]
    assert sorted(each.axes for each in backward) == [("a",), ("b",)]


class Covariance(nn.Module):
    """A covariance by its Cholesky factor, and a weight whose gain is learnt apart."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.weight = nn.Parameter(torch.eye(4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.linalg.cholesky(self.factor @ self.factor.T) * 2
        return ((x @ whole).tanh() @ F.softshrink(self.weight)).square().mean()


def test_an_adjoint_that_needs_the_whole_cotangent_stays_before_the_vary() -> None:
    program = check_equal(Covariance(), lambda: (real(8, 4),), "mesh dp=2\ndata x over dp\n")
    nodes = program.stages[0].forward.nodes
    varied = {str(node.args[0].op) for node in nodes if node.op == MeshOp("vary")}
    assert varied == {"aten.linalg_cholesky.default", "mesh::input"}
    backward = [each.type for each in program.comm() if each.phase == "backward"]
    assert sorted(backward) == ["f64[16] partial(dp)", "f64[4, 4] partial(dp)"]
