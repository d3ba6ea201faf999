"""Large products by oneDNN: equal to torch's own, and taken only where they are faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from meshwright.compiler.graph.types import portable_operators
from meshwright.compiler.kernels import products
from tests.compiler.kernels.test_strides import check_strides

CPU = torch.device("cpu")
SIZES = [(64, 128, 256), (33, 257, 250), (3000, 40, 35)]


def _operands(rows: int, inner: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, inner), torch.randn(inner, columns), torch.randn(columns)


@pytest.mark.parametrize("sizes", SIZES)
def test_products_equal_those_of_torch(sizes: tuple[int, int, int]) -> None:
    a, b, bias = _operands(*sizes)
    exact = a.double() @ b.double()
    batched = a.expand(2, *a.shape)
    for found, expected in (
        (products.mm(a, b), exact),
        (products.mm(a, b, out=torch.full_like(exact, torch.nan).float()), exact),
        (products.matmul(batched, b), exact.expand(2, *exact.shape)),
        (products.bmm(batched, b.expand(2, *b.shape)), exact.expand(2, *exact.shape)),
        (products.addmm(bias, a, b), exact + bias),
        (products.linear(batched, b.t()), exact.expand(2, *exact.shape)),
        (products.linear(a, b.t(), bias), F.linear(a.double(), b.t().double(), bias.double())),
        (products.add_mm(bias.repeat(len(a), 1), a, b), exact + bias),
    ):
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("block", [products.BLOCK, 1 << 11])
def test_strides_of_operands_and_results_do_not_matter(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "BLOCK", block)
    a, b, bias = _operands(70, 48, 40)

    def run(a: Tensor, b: Tensor, bias: Tensor) -> Any:
        total = torch.ones(40, 70).t()
        found = [products.addmm(bias, a, b), products.mm(a, b), products.add_mm(total, a, b)]
        found.append(products.bmm(a.expand(3, *a.shape), b.unsqueeze(0).repeat(3, 1, 1)))
        return [*found, products.mm(a, b, out=torch.empty(140, 40)[::2])]

    check_strides(run, a, b, bias)


def test_a_matrix_whose_rows_overlap_is_copied() -> None:
    weight, x = torch.randn(200).unfold(0, 100, 1), torch.randn(64, 100)
    torch.testing.assert_close(products.linear(x, weight), x @ weight.t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "large"),
    [((256, 512, 2048), True), ((32, 64, 256), False), ((8, 4096, 4096), False)],
)
def test_only_long_products_are_large(sizes: tuple[int, int, int], large: bool) -> None:
    assert products.is_large(*sizes) is large


def test_onednn_is_taken_on_amd_with_avx512_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, bool] = {"avx512_f": True, "sse4a": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr(torch._C, "has_mkl", True)
    assert products.is_faster(CPU)
    assert not products.is_faster(torch.device("cuda"))
    with portable_operators():
        assert not products.is_faster(CPU)
    known["avx512_f"] = False
    assert not products.is_faster(CPU)
    known.update(avx512_f=True, sse4a=False)  # Intel's
    assert not products.is_faster(CPU)
    known.update(sse4a=True)
    with monkeypatch.context() as without:
        without.setattr(torch._C, "has_mkl", False)
        assert not products.is_faster(CPU)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not products.is_faster(CPU)
