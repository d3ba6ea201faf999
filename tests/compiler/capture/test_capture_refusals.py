"""What cannot be captured is refused by name, with the line and a way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshwright.compiler.capture.capture import capture
from meshwright.compiler.errors import CaptureError
from tests.compiler.interpreter import output_labels


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.from_numpy(grad.numpy())


class Model(nn.Module):
    """A linear layer whose forward ends in `then`."""

    def __init__(self, then: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.then = nn.Linear(4, 4), then
        self.state = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, self.a(x)).sum()


def hook(model: Model, h: Tensor) -> Tensor:
    h.register_hook(lambda grad: grad * 2)
    return h


def branch(model: Model, h: Tensor) -> Tensor:
    return h if h.sum() > 0 else -h


def item(model: Model, h: Tensor) -> Tensor:
    return h * h.max().item()


def select(model: Model, h: Tensor) -> Tensor:
    return h[h[:, 0] > 0]


def expert_rows(model: Model, h: Tensor) -> Tensor:
    out, expert = torch.zeros_like(h), h.argmax(-1)
    for e in range(2):
        rows = torch.where(expert == e)[0]
        out.index_add_(0, rows, h[rows] * e)
    return out


def numpy(model: Model, h: Tensor) -> Tensor:
    return torch.from_numpy(h.numpy())


def hidden_write(model: Model, h: Tensor) -> Tensor:
    with torch.no_grad():
        h.view(-1).clamp_(min=0)
    return h


def late_data_write(model: Model, h: Tensor) -> Tensor:
    squares = h * h
    h.data[0] = 0.0
    return squares


def caught(model: Model, h: Tensor) -> Tensor:
    try:
        assert h.max() > 0
    except AssertionError:
        return -h
    return h


def address(model: Model, h: Tensor) -> Tensor:
    return h * h.data_ptr()


def data_write(model: Model, h: Tensor) -> Tensor:
    h.data = torch.zeros(2, 4)
    return h


def clamped_weight(model: Model, h: Tensor) -> Tensor:
    with torch.no_grad():
        model.a.weight.clamp_(-1, 1)
    return h


def autocast(model: Model, h: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model.a(h)


def gradient(model: Model, h: Tensor) -> Tensor:
    return torch.autograd.grad(h.sum(), model.a.weight, create_graph=True)[0]


def assigned(model: Model, h: Tensor) -> Tensor:
    model.state = model.state + h.mean(0)
    return h * model.state


def written(model: Model, h: Tensor) -> Tensor:
    return h * model.state.add_(1)


def ctc(model: Model, h: Tensor) -> Tensor:
    lengths = torch.tensor([2, 2])
    scores = h.view(2, 2, 2).log_softmax(-1)
    return nn.functional.ctc_loss(
        scores, torch.ones(2, 1, dtype=torch.int64), lengths, lengths // 2
    )


def packed(model: Model, h: Tensor) -> Tensor:
    rows = nn.utils.rnn.pack_padded_sequence(h[..., None], torch.tensor([4, 2]), batch_first=True)
    return rows.data


def vmap(model: Model, h: Tensor) -> Tensor:
    return torch.vmap(torch.sin)(h)


def mixed_branch(model: Model, h: Tensor) -> Tensor:
    if h.max() > 0:
        h = -h
        raise ValueError("positive")
    if h.min() > 0:
        return -h
    return h


def wrong(model: Model, h: Tensor) -> Tensor:
    raise KeyError("no such head")


def compared(model: Model, h: Tensor) -> Tensor:
    return torch.cov(h)


def sized_by_values(model: Model, h: Tensor) -> Tensor:
    return torch.linalg.lstsq(h, h).residuals


def sparse(model: Model, h: Tensor) -> Tensor:
    return torch.sparse.mm(h.to_sparse(), h.T)


def nested(model: Model, h: Tensor) -> Tensor:
    return torch.histogramdd(h.detach(), bins=[2] * 4)[0]


CASES = {
    "custom function": lambda model, h: Round.apply(h),
    **{
        function.__name__.replace("_", " "): function
        for function in (
            hook, branch, item, select, expert_rows, numpy, hidden_write, late_data_write,
            caught, address, data_write,
            clamped_weight, autocast, gradient, assigned, written, ctc, packed, vmap, mixed_branch,
            wrong,
            compared, sized_by_values, sparse, nested,
        )
    },
}  # fmt: skip


def refusal(model: nn.Module, example: Any = None, **options: Any) -> str:
    with pytest.raises(CaptureError) as caught:
        capture(model, example or (torch.randn(2, 4),), **options)
    return re.sub(r"(test_capture_\w+\.py):\d+", r"\1:LINE", str(caught.value))


def test_each_refusal_names_the_cause_the_line_and_what_to_do(
    golden: Callable[[str, str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    texts = [f"# {name}\n{refusal(Model(then))}" for name, then in CASES.items()]
    golden("capture_refusals", "\n\n".join(texts))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("numpy is needed to read this"), "ValueError: numpy is needed to read this"),
        (RuntimeError("Could not guard the meta device"), "RuntimeError: Could not guard the meta"),
        (KeyError("numpy"), "KeyError: 'numpy'"),
    ],
)
def test_an_error_of_the_model_is_told_as_its_own_whatever_words_it_has(
    error: Exception, text: str
) -> None:
    class Raising(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    with pytest.raises(CaptureError, match=f"the forward raised `{text}"):
        capture(Raising(), (torch.ones(2),))


@pytest.mark.parametrize("name", ["branch", "custom function", "numpy"])
def test_a_refusal_points_at_the_users_line(name: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Model(CASES[name]), (torch.randn(2, 4),))
    file, _, line = caught.value.culprit.partition(":")
    assert file == "test_capture_refusals.py"
    assert int(line) > 0


@pytest.mark.parametrize(
    "add",
    [
        lambda model: model.a.register_full_backward_hook(lambda *_: None),
        lambda model: model.a.register_full_backward_pre_hook(lambda *_: None),
        lambda model: model.a.weight.register_hook(lambda grad: grad),
        lambda model: model.a.weight.register_post_accumulate_grad_hook(lambda p: None),
    ],
)
def test_hooks_that_wait_for_the_backward_are_refused(add: Callable[[Model], Any]) -> None:
    model = Model(lambda model, h: h)
    add(model)
    assert "`a" in refusal(model)
    assert "hook" in refusal(model)


@pytest.mark.parametrize("file", ["<stdin>", "<string>", "<ipython-input-1-0>"])
def test_a_model_that_is_typed_in_is_the_users_too(file: str) -> None:
    names: dict[str, Any] = {}
    exec(compile("def write(model, h):\n h.data = h * 2\n return h", file, "exec"), names)
    assert f"at: {file}:2" in refusal(Model(names["write"]))


def test_hooks_and_custom_functions_do_not_matter_without_gradients() -> None:
    model = Model(CASES["custom function"])
    model.a.weight.register_hook(lambda grad: grad)
    captured = capture(model, (torch.randn(2, 4),), mode="infer")
    assert output_labels(captured) == ("output",)


def test_a_refused_model_is_as_it_was() -> None:
    model = Model(assigned)
    state, weight = model.state, model.a.weight
    refusal(model)
    assert model.state is state
    assert model.a.weight is weight
    assert model(torch.zeros(2, 4)).isfinite()
