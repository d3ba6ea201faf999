"""What lies between two exchanges, compiled by Inductor: the same numbers, and clear errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import compile_fx, cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torch.nn import functional as F

import meshwright as mw
from meshwright.compiler.kernels import blocks
from meshwright.runtime import inductor
from meshwright.runtime.state.start import executable_digest
from tests.compiler.codegen.test_segments import PLANS, TENSOR, X, batch, compiled, difference
from tests.runtime.processes import finish, start


def text_of(error: pytest.ExceptionInfo[mw.RunError]) -> str:
    return str(error.value)


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(mw.RunError) as error:
        compiled(TENSOR).launch(backend="triton")
    assert text_of(error) == (
        '`backend` is `\'triton\'`\n  help: write `backend="eager"` or `backend="inductor"`'
    )


def test_a_machine_without_a_compiler_is_an_error_at_the_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(mw.RunError) as error:
        compiled(TENSOR).launch(backend="inductor")
    assert text_of(error) == (
        "Inductor finds no C++ compiler on this machine\n"
        "  help: install g++ or clang++, name one in the variable `CXX`, or launch with "
        '`backend="eager"`'
    )


def test_what_inductor_cannot_compile_is_named_and_the_run_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise AssertionError("no such lowering\nand more")

    monkeypatch.setattr(compile_fx, "compile_fx_inner", broken)
    monkeypatch.setattr(inductor, "_compiled", {})
    run = compiled(TENSOR).launch(backend="inductor")
    with pytest.raises(mw.RunError) as error:
        run.step(X)
    message, *_, help = text_of(error).splitlines()
    assert message.startswith("Inductor cannot compile what begins with `")
    assert message.endswith("in `layers.0.norm`: no such lowering")
    assert help == '  help: launch with `backend="eager"`'
    assert run.states[0].random.step == 0


def test_what_the_model_itself_fails_on_is_said_to_fail_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inductor, "_compiled", {})
    x = torch.randn(4, 6, dtype=torch.float64)
    plan = mw.Plan.parse("mesh dp=2\ndata input over dp")
    run = mw.compile(nn.Linear(6, 3), plan, (x,), loss=torch.sum).launch(backend="inductor")
    with pytest.raises(mw.RunError, match="`linear` in the model failed: mat1 and mat2 must have"):
        run.step(x)


def test_a_kernel_that_fails_as_it_runs_names_the_operators_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(inputs: list[Tensor]) -> list[Tensor]:
        raise RuntimeError("ZeroDivisionError\nand more")

    monkeypatch.setattr(inductor, "_fused", lambda function, given: failing)
    monkeypatch.setattr(inductor, "_compiled", {})
    with pytest.raises(mw.RunError) as error:
        compiled(TENSOR).launch(backend="inductor").step(X)
    assert text_of(error).splitlines()[0] == (
        "one of 6 operators from `mesh::norm` to `linear` in `layers.0.norm` failed: "
        "ZeroDivisionError"
    )


def test_results_share_memory_only_where_those_of_the_calls_do() -> None:
    x = torch.ones(3)

    def kernel(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        (given,) = inputs
        both = given + 1
        return [given, both, both]

    with torch.no_grad():
        given, first, second = inductor._apart(kernel, [x], [x, x.clone(), x + 1, x + 1])([x])
    assert given is not x
    assert given.data_ptr() != x.data_ptr()
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)


def test_ranks_with_unlike_backends_have_unlike_digests() -> None:
    program = compiled(TENSOR)
    assert executable_digest(program, "eager") != executable_digest(program, "inductor")


@pytest.mark.parametrize(
    ("op", "taken"),
    [
        (torch.ops.aten.gelu.default, True),
        (torch.ops.aten.linear.default, True),
        (torch.ops.aten.bernoulli.p, False),
        (torch.ops.aten.nonzero.default, False),
        (torch.ops.aten.embedding.default, False),
        (torch.ops.aten.add_.Tensor, False),
        (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, False),
    ],
)
def test_operators_that_draw_look_or_write_are_left_alone(
    op: torch._ops.OpOverload, taken: bool
) -> None:
    assert inductor.is_lowered(op) is taken


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(2 * x)).sin().square().mean()


def interpreted(module: torch.fx.GraphModule, fakes: Sequence[Tensor]) -> inductor.Compiled:
    """Stands for Inductor: runs what was traced node by node."""

    def run(inputs: list[Tensor]) -> list[Tensor]:
        given = list(inputs)
        inputs.clear()
        return list(torch.fx.Interpreter(module).run(*given))

    return run


@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [
        (torch.float64, "", 1e-10),
        (torch.float32, "", 1e-6),
        (torch.float32, "precision bf16\n", 1e-2),
        (torch.bfloat16, "", 1e-2),
    ],
)
def test_a_kernel_that_runs_in_blocks_is_compiled_for_all_of_them(
    dtype: torch.dtype, precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without data a kernel runs on its first two blocks alone, and a trace has no data."""
    monkeypatch.setattr(blocks, "CPU_BLOCK", 16)
    monkeypatch.setattr(compile_fx, "compile_fx_inner", interpreted)
    monkeypatch.setattr(inductor, "_compiled", {})
    x = torch.randn(4, 32, 8, dtype=dtype)
    plan = mw.Plan.parse(f"mesh dp=2\ndata x over dp\n{precision}")
    program = mw.compile(Scaled().to(dtype), plan, (x,))
    assert "= _norm" not in "".join(code.source for code in inductor.fused_codes(program))
    found = []
    for backend in ("eager", "inductor"):
        with program.launch(backend=backend) as run:
            found.append({"loss": run.step(x), **run.gradients()})
    assert inductor._compiled
    assert difference(found[0], found[1]) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_inductor_computes_what_eager_computes(plan: str) -> None:
    program = compiled(plan)
    found = []
    for backend in ("eager", "inductor"):
        with program.launch(backend=backend, seed=3) as run:
            optimizer = run.optimizer(torch.optim.SGD, lr=0.1)
            losses = []
            for _ in range(3):
                losses.append(run.step(batch(plan)))
                optimizer.step()
            found.append({"loss": torch.stack(losses), **run.gradients()})
    assert difference(found[0], found[1]) < (0.02 if "bf16" in plan else 1e-10)


@pytest.mark.slow
def test_processes_compute_what_one_process_computes() -> None:
    script = Path(__file__).with_name("inductor_ranks.py")
    assert finish(start(script, 2), 900) == ["same\n", "same\n"]
