"""Any differentiable function of a parameter may meet split data, whatever its adjoint needs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from tests.equivalence import check_equal
from tests.models import real

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "weight norm": lambda w: torch._weight_norm(w, w[:, :1].square() + 1, 0),
    "matrix exponential": lambda w: torch.matrix_exp(w - w.T),
    "cholesky": lambda w: torch.linalg.cholesky(_positive(w)),
    "cholesky inverse": lambda w: torch.cholesky_inverse(torch.linalg.cholesky(_positive(w))),
    "determinant": lambda w: torch.det(w),
    "log-determinant": lambda w: torch.slogdet(_positive(w))[1],
    "inverse": lambda w: torch.inverse(_positive(w)),
    "solve": lambda w: torch.linalg.solve(_positive(w), w),
    "triangular solve": lambda w: torch.linalg.solve_triangular(_lower(w), w, upper=False),
    "eigenvalues": lambda w: torch.linalg.eigh(w + w.T)[0],
    "orthogonal factor": lambda w: torch.linalg.qr(_positive(w))[0],
    "singular values": lambda w: torch.linalg.svdvals(w),
    "pairwise distances": lambda w: torch.cdist(w, w.flip(0)),
    "distances": lambda w: F.pdist(w).sum(),
    "glu": lambda w: F.glu(w.view(2, 8)).view(2, 4).sum(0),
    "cross product": lambda w: torch.linalg.cross(w[:, :3], w[:, 1:]).sum(),
    "reflecting pad": lambda w: F.pad(w, (1, 1), mode="reflect")[:, :4],
    "replicating pad": lambda w: F.pad(w, (1, 1), mode="replicate")[:, 2:],
    "soft shrinking": lambda w: F.softshrink(w),
    "cumulative log-sum": lambda w: w.logcumsumexp(0),
    "cumulative product": lambda w: w.cumprod(1),
    "sort": lambda w: w.sort(0)[0],
    "largest": lambda w: w.topk(4, 1)[0] + w.max(0)[0],
    "median": lambda w: w.median(0)[0],
    "resampling": lambda w: F.interpolate(w[None], size=8, mode="linear")[0][:, ::2],
    "sampling": lambda w: F.grid_sample(
        w[None, None], w.view(1, 2, 4, 2).tanh(), align_corners=True
    ).view(2, 4)[0],
    "unfolding": lambda w: F.unfold(w[None, None], 2).view(4, 9)[:, :4],
    "group norm": lambda w: F.group_norm(w[None], 2)[0],
}


def _lower(w: Tensor) -> Tensor:
    return w.tril() + 4 * torch.eye(4, dtype=w.dtype)


def _positive(w: Tensor) -> Tensor:
    return w @ w.T + 4 * torch.eye(4, dtype=w.dtype)


class Transformed(nn.Module):
    """Each function of a parameter of its own scales and shifts one split activation."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names, self.mid = names, nn.Linear(4, 4)
        self.weights = nn.ParameterList(torch.randn(4, 4) for _ in names)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(x)
        made = [
            torch.tanh(FUNCTIONS[name](w)) for name, w in zip(self.names, self.weights, strict=True)
        ]
        total = sum((h.cos() * m.sum(0, keepdim=True)).square().mean() for m in made if m.dim())
        scales = sum((h * m).tanh().sum() for m in made if not m.dim())
        return torch.as_tensor(total + scales)


PLANS = {
    "data": "mesh dp=3\ndata x over dp\n",
    "data and tensor": "mesh dp=2, tp=2\ndata x over dp\ncolumns mid over tp\n",
    "split parameters": "mesh dp=2, tp=2\ndata x over dp\nshard weights.* [n@tp, m]\n",
}


@pytest.mark.parametrize("plan", PLANS)
def test_functions_of_parameters_meet_split_data(plan: str) -> None:
    torch.manual_seed(0)
    check_equal(Transformed(list(FUNCTIONS)), lambda: (real(6, 4),), PLANS[plan], tolerance=1e-9)


class Mixed(nn.Module):
    """Operators without a rule that take a split activation and a parameter at once."""

    def __init__(self) -> None:
        super().__init__()
        self.mid, self.slope = nn.Linear(4, 4), nn.Parameter(torch.rand(4))
        self.bilinear, self.centres = nn.Bilinear(4, 4, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = F.prelu(self.mid(x), self.slope)
        h = h + self.bilinear(h, x)
        away = torch.cdist(h, self.centres).square().mean()
        across = torch.linalg.cross(h[:, :3], self.centres[:1, 1:]).tanh().sum()
        return away + across + torch.linalg.vector_norm(h - self.slope, 3)


@pytest.mark.parametrize("plan", ["data", "data and tensor"])
def test_operators_without_a_rule_take_activations_and_parameters(plan: str) -> None:
    torch.manual_seed(0)
    check_equal(Mixed(), lambda: (real(6, 4),), PLANS[plan])


class Mixture(nn.Module):
    """Gaussians by their Cholesky factors, behind a flow by a triangular solve."""

    def __init__(self) -> None:
        super().__init__()
        self.mid, self.lower = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4) / 4)
        self.scales, self.means = (
            nn.Parameter(torch.randn(3, 4, 4)),
            nn.Parameter(torch.randn(3, 4)),
        )

    def forward(self, x: Tensor) -> Tensor:
        eye = torch.eye(4, dtype=x.dtype)
        h = torch.linalg.solve_triangular(self.lower.tril(-1) + eye, self.mid(x).T, upper=False).T
        factor = torch.linalg.cholesky(self.scales @ self.scales.mT + eye)
        away = (h[:, None] - self.means)[..., None]
        factors = factor[None].expand(len(x), -1, -1, -1)
        away = torch.linalg.solve_triangular(factors, away, upper=False)
        spread = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (away.square().sum((-1, -2)) / 2 + spread).neg().logsumexp(-1).neg().mean()


@pytest.mark.parametrize("plan", ["data", "data and tensor"])
def test_densities_by_triangular_solves(plan: str) -> None:
    torch.manual_seed(0)
    check_equal(Mixture(), lambda: (real(6, 4),), PLANS[plan])


class Namesake(nn.Module):
    """Takes arguments that are called as its parameter and its buffer are."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.out = nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 4)
        self.register_buffer("y", torch.randn(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.out(x * self.x.mean(0)) * y * self.y).square().mean()


def test_an_argument_may_be_called_as_a_parameter_is() -> None:
    batch = (real(6, 4), real(6, 4))
    program = check_equal(Namesake(), lambda: batch, "mesh dp=2\ndata x, y over dp\n")
    assert str(program.parameters["x"].layout) == "[6, 4]"
    plan = meshwright.Plan.parse("mesh dp=2\ndata x, y over dp\nshard x [n@dp, d]\n")
    with pytest.raises(meshwright.PlanError, match="names an input of the model and a parameter"):
        meshwright.compile(Namesake().double(), plan, example=batch)


class Interleaved(nn.Module):
    """A table and a head whose classes a plan may cut into parts that are no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(12, 4, padding_idx=2), nn.Linear(4, 12, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores = self.head(self.table(y) * x)
        return F.cross_entropy(scores.transpose(1, 2), y, ignore_index=3, label_smoothing=0.1)


@pytest.mark.parametrize(
    "classes", ["(3 v@(tp, dp))", "(2@tp 3 2)", "(2@dp 3 2@tp)", "(2@tp 2@dp 3)"]
)
def test_classes_that_are_not_split_in_blocks_keep_their_numbers(classes: str) -> None:
    torch.manual_seed(0)
    plan = f"mesh dp=2, tp=2\ndata x, y over dp\nshard *.weight [{classes}, d]\nallow replicate **"
    check_equal(Interleaved(), lambda: (real(6, 4, 4), torch.randint(0, 12, (6, 4))), plan)
