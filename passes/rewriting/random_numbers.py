"""The rewrites of `normalise` for operators that draw random numbers.

Before:  rand_like: f32[8, 16] = rand_like(linear)
         mul: f32[8, 16]       = mul(linear, rand_like)
After:   random: f32[8, 16] = mesh::random(linear, [8, 16], uniform, f32, 1)
         mul: f32[8, 16]    = mul(linear, random)

A rank's own generator would draw other numbers under every layout, and copies of one value would
drift apart. Each number is a function of the run's seed, the step, the operator's place in the
model and the element's global index instead; distributions are made of uniform and normal numbers.
Any other operator that draws numbers is refused.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from meshwright.compiler.composites.dropout import Dropout
from meshwright.compiler.composites.sampling import Binomial, Dirichlet, Poisson, StandardGamma
from meshwright.compiler.errors import CaptureError
from meshwright.compiler.graph.ir import GETITEM, Arg, MeshOp, Node, Op
from meshwright.passes.rewriting.rewriter import Rewriter, rewrites, to_dtype

aten = torch.ops.aten

_HALF = (torch.float16, torch.bfloat16)


def is_random(op: Op) -> bool:
    """Whether torch says that an operator draws random numbers, or it can be given a generator."""
    if isinstance(op, MeshOp):
        return False
    given = any("Generator" in str(argument.type) for argument in op._schema.arguments)
    return given or torch.Tag.nondeterministic_seeded in op.tags


def refuse_random(node: Node) -> None:
    """Raises `CaptureError` for an operator that would draw different numbers on each rank."""
    if not is_random(node.op) or (node.op in _RECURRENT and not _drops(node)):
        return
    help = (
        "make the numbers of `torch.rand` or `torch.randn`, or pass them to the model as an input"
    )
    if node.op in _RECURRENT:
        help = "stack networks of one layer and `dropout=0`, with an `nn.Dropout` between them"
    raise CaptureError(
        f"`{node.op}` draws random numbers that would differ between ranks",
        code="random",
        culprit=node.origin.source,
        help=help,
    )


_RECURRENT: dict[Op, int] = {
    aten.lstm.input: 5,
    aten.gru.input: 5,
    aten.rnn_tanh.input: 5,
    aten.rnn_relu.input: 5,
}
_RECURRENT |= {aten.lstm.data: 6, aten.gru.data: 6, aten.rnn_tanh.data: 6, aten.rnn_relu.data: 6}
"""Recurrent networks that drop out between their layers, and the position of `dropout`."""


def _drops(node: Node) -> bool:
    dropout, train = node.args[_RECURRENT[node.op] :][:2]
    return bool(dropout and train)


def _own(rewriter: Rewriter, kind: str, like: Node | None = None) -> Node:
    """Numbers of the shape of the current node, in its type or that of their computation."""
    type = rewriter.node.tensor
    return rewriter.draw(kind, like, type.shape, _computed(type.dtype))


def _computed(dtype: torch.dtype) -> torch.dtype:
    """The floating type in which numbers of a type are computed."""
    if dtype in _HALF or not dtype.is_floating_point:
        return torch.float32
    return dtype


def _sampled(rewriter: Rewriter, value: Node, *sources: Arg) -> Node:
    """The value in the type of the current node; the sources' gradients are zeros, as torch's."""
    dtype = rewriter.node.tensor.dtype
    value = to_dtype(rewriter, value, dtype)
    if not rewriter.node.requires_grad:
        return value
    for source in sources:
        if isinstance(source, Node) and source.requires_grad:
            if source.tensor.shape != value.tensor.shape:
                source = rewriter.call(aten.expand.default, source, value.tensor.shape)
            value = rewriter.call(aten.copy.default, to_dtype(rewriter, source, dtype), value)
    return value


# -- numbers of one distribution ---------------------------------------------------------------


def _filled(rewriter: Rewriter) -> Node | None:
    """The operand that is filled, if there is one; its values do not count."""
    first = rewriter.args[0] if rewriter.args else None
    return first if isinstance(first, Node) else None


@rewrites(aten.rand.default, aten.rand.generator, aten.rand_like.default, aten.rand_like.generator)
def _rand(rewriter: Rewriter) -> Node:
    return _plain(rewriter, "uniform")


@rewrites(
    aten.randn.default, aten.randn.generator, aten.randn_like.default, aten.randn_like.generator
)
def _randn(rewriter: Rewriter) -> Node:
    return _plain(rewriter, "normal")


def _plain(rewriter: Rewriter, kind: str) -> Node:
    type, like = rewriter.node.tensor, _filled(rewriter)
    if not type.dtype.is_complex:
        return rewriter.draw(kind, like, type.shape, type.dtype)
    part = type.dtype.to_real()
    real, imaginary = (rewriter.draw(kind, like, type.shape, part) for _ in range(2))
    if kind == "normal":
        real, imaginary = (
            rewriter.call(aten.mul.Tensor, each, math.sqrt(0.5)) for each in (real, imaginary)
        )
    return rewriter.call(aten.complex.default, real, imaginary)


@rewrites(aten.uniform.default)
def _uniform(rewriter: Rewriter) -> Node:
    x, low, high = rewriter.args[0], rewriter.option(1, "from", 0.0), rewriter.option(2, "to", 1.0)
    number = _scaled(rewriter, _own(rewriter, "uniform", x), high - low, low)
    return _sampled(rewriter, number, x)


@rewrites(aten.normal_functional.default)
def _normal(rewriter: Rewriter) -> Node:
    x = rewriter.args[0]
    return _sampled(rewriter, _gaussian(rewriter, 1), x)


@rewrites(aten.log_normal.default)
def _log_normal(rewriter: Rewriter) -> Node:
    x, mean, std = rewriter.args[0], rewriter.option(1, "mean", 1.0), rewriter.option(2, "std", 2.0)
    exponent = _scaled(rewriter, _own(rewriter, "normal", x), std, mean)
    return _sampled(rewriter, rewriter.call(aten.exp.default, exponent), x)


def _gaussian(rewriter: Rewriter, first: int) -> Node:
    """Normal numbers whose mean and standard deviation are the arguments from `first` on."""
    mean, std = rewriter.option(first, "mean", 0.0), rewriter.option(first + 1, "std", 1.0)
    return _scaled(rewriter, _own(rewriter, "normal", _filled(rewriter)), std, mean)


def _scaled(rewriter: Rewriter, x: Node, scale: Arg, shift: Arg) -> Node:
    if not isinstance(scale, float) or scale != 1.0:
        x = rewriter.call(aten.mul.Tensor, x, scale)
    if isinstance(shift, Node) or shift:
        x = rewriter.call(aten.add.Tensor, x, shift)
    return x


@rewrites(aten.normal.float_float)
def _normal_of_numbers(rewriter: Rewriter) -> Node:
    mean, std = rewriter.args[:2]
    return _sampled(rewriter, _scaled(rewriter, _own(rewriter, "normal"), std, mean))


@rewrites(aten.normal.Tensor_float, aten.normal.float_Tensor, aten.normal.Tensor_Tensor)
def _normal_of_tensors(rewriter: Rewriter) -> Node:
    """The result is a constant to autograd: the gradients of mean and deviation are zeros."""
    mean, std = rewriter.option(0, "mean"), rewriter.option(1, "std", 1.0)
    shape = rewriter.node.tensor.shape
    like = next((x for x in (mean, std) if isinstance(x, Node) and x.tensor.shape == shape), None)
    number = _own(rewriter, "normal", like)
    number = _scaled(rewriter, number, rewriter.stopped(std), rewriter.stopped(mean))
    return _sampled(rewriter, number, mean, std)


@rewrites(aten.exponential.default)
def _exponential(rewriter: Rewriter) -> Node:
    x, rate = rewriter.args[0], rewriter.option(1, "lambd", 1.0)
    number = _standard_exponential(rewriter, _own(rewriter, "uniform", x))
    return _sampled(rewriter, _scaled(rewriter, number, 1 / rate, 0.0), x)


def _standard_exponential(rewriter: Rewriter, uniform: Node) -> Node:
    return rewriter.call(aten.neg.default, rewriter.call(aten.log.default, uniform))


@rewrites(aten.cauchy.default)
def _cauchy(rewriter: Rewriter) -> Node:
    x, median = rewriter.args[0], rewriter.option(1, "median", 0.0)
    angle = _scaled(rewriter, _own(rewriter, "uniform", x), math.pi, -math.pi / 2)
    number = rewriter.call(aten.tan.default, angle)
    return _sampled(
        rewriter, _scaled(rewriter, number, rewriter.option(2, "sigma", 1.0), median), x
    )


@rewrites(aten.geometric.default)
def _geometric(rewriter: Rewriter) -> Node:
    """How often a coin is tossed up to and including its first head."""
    x, p = rewriter.args[:2]
    number = rewriter.call(aten.log.default, _own(rewriter, "uniform", x))
    number = rewriter.call(aten.mul.Tensor, number, 1 / math.log1p(-p))
    tosses = rewriter.call(aten.ceil.default, number)
    return _sampled(rewriter, rewriter.call(aten.clamp.default, tosses, 1), x)


# -- coins and dropout -------------------------------------------------------------------------


@rewrites(aten.bernoulli.default)
def _bernoulli(rewriter: Rewriter) -> Node:
    p = rewriter.args[0]
    return _sampled(rewriter, _below(rewriter, p, p), p)


@rewrites(aten.bernoulli.p)
def _bernoulli_number(rewriter: Rewriter) -> Node:
    x, p = rewriter.args[0], rewriter.option(1, "p", 0.5)
    return to_dtype(rewriter, _below(rewriter, x, p), rewriter.node.tensor.dtype)


@rewrites(aten.bernoulli.Tensor)
def _bernoulli_tensor(rewriter: Rewriter) -> Node:
    x, p = rewriter.args[:2]
    return _sampled(rewriter, _below(rewriter, x, p), x, p)


def _below(rewriter: Rewriter, like: Node, p: Arg) -> Node:
    """True with probability `p`, in the shape of the current node."""
    dtype = p.tensor.dtype if isinstance(p, Node) else like.tensor.dtype
    shape = rewriter.node.tensor.shape
    number = rewriter.draw("uniform", like, shape, _computed(dtype))
    op = aten.lt.Tensor if isinstance(p, Node) else aten.lt.Scalar
    return rewriter.call(op, number, rewriter.stopped(p))


@rewrites(aten.dropout.default)
def _dropout(rewriter: Rewriter) -> Node:
    x: Node
    x, p, train = rewriter.args[:3]
    if not train or p == 0:
        return x
    return rewriter.call(Dropout.op, x, float(p), rewriter.random_id())


@rewrites(aten.native_dropout.default)
def _native_dropout(rewriter: Rewriter) -> Node:
    """The mask is the dropout of ones."""
    x, p, train = rewriter.args[:3]
    ones = rewriter.call(aten.ones_like.default, rewriter.stopped(x))
    if train:
        number = rewriter.random_id()
        y, kept = (rewriter.call(Dropout.op, each, float(p), number) for each in (x, ones))
    else:
        y, kept = x, ones
    rewriter.items[rewriter.node] = (y, rewriter.call(aten.ne.Scalar, kept, 0))
    return y


@rewrites(aten.feature_dropout.default)
def _feature_dropout(rewriter: Rewriter) -> Node:
    """Whole channels are dropped: one number for each row and channel."""
    x: Node
    x, p, train = rewriter.args[:3]
    if not train or p == 0:
        return x
    ones = rewriter.call(aten.full.default, _channels(x.tensor.shape), 1.0, dtype=x.tensor.dtype)
    kept = rewriter.call(Dropout.op, ones, float(p), rewriter.random_id())
    return rewriter.call(aten.mul.Tensor, x, kept)


def _channels(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:2], *(1 for _ in shape[2:]))


@rewrites(aten.alpha_dropout.default, aten.feature_alpha_dropout.default)
def _alpha_dropout(rewriter: Rewriter) -> Node:
    """What is dropped takes the value that self-normalising networks saturate to."""
    x: Node
    x, p, train = rewriter.args[:3]
    if not train or p == 0:
        return x
    if p == 1:
        return rewriter.call(aten.mul.Tensor, x, 0.0)
    alpha = 1.7580993408473766
    scale = 1 / math.sqrt((alpha**2 * p + 1) * (1 - p))
    whole = rewriter.node.op == aten.alpha_dropout.default
    shape = x.tensor.shape if whole else _channels(x.tensor.shape)
    dtype = x.tensor.dtype
    number = rewriter.draw("uniform", x if whole else None, shape, _computed(dtype))
    kept = to_dtype(rewriter, rewriter.call(aten.ge.Scalar, number, p), dtype)
    shift = _scaled(rewriter, kept, alpha * scale, alpha * scale * (p - 1))
    kept = rewriter.call(aten.mul.Tensor, kept, scale)
    return rewriter.call(aten.add.Tensor, rewriter.call(aten.mul.Tensor, x, kept), shift)


@rewrites(aten.rrelu.default)
def _rrelu(rewriter: Rewriter) -> Node:
    lower, upper = rewriter.option(1, "lower", 0.125), rewriter.option(2, "upper", 1 / 3)
    return _leaky(rewriter, lower, upper, rewriter.option(3, "training", False))[0]


@rewrites(aten.rrelu_with_noise_functional.default)
def _rrelu_with_noise(rewriter: Rewriter) -> Node:
    lower, upper = rewriter.option(2, "lower", 0.125), rewriter.option(3, "upper", 1 / 3)
    training = rewriter.option(4, "training", False)
    rewriter.items[rewriter.node] = _leaky(rewriter, lower, upper, training)
    return rewriter.items[rewriter.node][0]


def _leaky(rewriter: Rewriter, lower: float, upper: float, training: bool) -> tuple[Node, Node]:
    """A leaky rectifier whose slopes are random while it trains, and the slopes."""
    x = rewriter.args[0]
    dtype = x.tensor.dtype
    slope: Any = (lower + upper) / 2
    if training:
        slope = rewriter.draw("uniform", x, x.tensor.shape, _computed(dtype))
        slope = to_dtype(rewriter, _scaled(rewriter, slope, upper - lower, lower), dtype)
    else:
        slope = rewriter.call(aten.full_like.default, rewriter.stopped(x), slope)
    below = rewriter.call(aten.le.Scalar, rewriter.stopped(x), 0)
    ones = rewriter.call(aten.ones_like.default, slope)
    noise = rewriter.call(aten.where.self, below, slope, ones)
    return rewriter.call(aten.mul.Tensor, x, noise), noise


# -- whole numbers and choices -----------------------------------------------------------------


@rewrites(aten.randint.default, aten.randint.generator)
def _randint(rewriter: Rewriter) -> Node:
    return _integers(rewriter, None, 0, rewriter.args[0])


@rewrites(aten.randint.low, aten.randint.low_generator)
def _randint_low(rewriter: Rewriter) -> Node:
    return _integers(rewriter, None, *rewriter.args[:2])


@rewrites(
    aten.randint_like.default,
    aten.randint_like.generator,
    aten.randint_like.Tensor,
    aten.randint_like.Tensor_generator,
    aten.random.to,
)
def _randint_like(rewriter: Rewriter) -> Node:
    return _integers(rewriter, rewriter.args[0], 0, rewriter.args[1])


@rewrites(aten.randint_like.low_dtype, aten.randint_like.low_generator_dtype)
def _randint_like_low(rewriter: Rewriter) -> Node:
    return _integers(rewriter, *rewriter.args[:3])


@rewrites(aten.random.default)
def _random(rewriter: Rewriter) -> Node:
    """From 0 to the largest integer up to which the type has them all, as torch draws."""
    dtype = rewriter.node.tensor.dtype
    if dtype.is_floating_point:
        return _integers(rewriter, rewriter.args[0], 0, int(2 / torch.finfo(dtype).eps) + 1)
    largest = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    return _integers(rewriter, rewriter.args[0], 0, largest + 1)


def _integers(rewriter: Rewriter, like: Node | None, low: int, high: Arg) -> Node:
    """Whole numbers from `low` up to but not including `high`."""
    bits = rewriter.draw("bits", like, rewriter.node.tensor.shape, torch.int64)
    if isinstance(high, Node):
        number = rewriter.call(aten.remainder.Tensor, bits, high)
    elif high - low < 1 << 63:
        number = rewriter.call(aten.remainder.Scalar, bits, high - low)
    else:
        number = bits
    return _sampled(rewriter, _scaled(rewriter, number, 1.0, low), like)


@rewrites(aten.randperm.default, aten.randperm.generator)
def _randperm(rewriter: Rewriter) -> Node:
    """The order of random numbers."""
    (size,) = rewriter.node.tensor.shape
    bits = rewriter.draw("bits", None, (size,), torch.int64)
    order = rewriter.call(aten.argsort.stable, bits, stable=True, dim=0)
    return to_dtype(rewriter, order, rewriter.node.tensor.dtype)


@rewrites(aten.multinomial.default)
def _multinomial(rewriter: Rewriter) -> Node:
    """Draws of one row exclude each other where the first `n` of a race are taken: each class has
    a time of its own, the sooner the likelier (Efraimidis and Spirakis, 2006)."""
    p = rewriter.stopped(rewriter.args[0])
    count, again = rewriter.args[1], rewriter.option(2, "replacement", False)
    if again and count > 1:
        return _drawn_again(rewriter, p)
    kind = _computed(p.tensor.dtype)
    uniform = rewriter.draw("uniform", p, p.tensor.shape, kind)
    times = _standard_exponential(rewriter, uniform)
    order = rewriter.call(aten.div.Tensor, to_dtype(rewriter, p, kind), times)
    best = rewriter.call(aten.topk.default, order, count, -1)
    return rewriter.call(GETITEM, best, 1, type=rewriter.node.type)


def _drawn_again(rewriter: Rewriter, p: Node) -> Node:
    """For each uniform number of a row, how many running sums but the last are not above it."""
    sums = rewriter.call(aten.cumsum.default, to_dtype(rewriter, p, torch.float64), -1)
    last, size = len(p.tensor.shape) - 1, p.tensor.shape[-1]
    total = rewriter.call(aten.slice.Tensor, sums, last, size - 1, size)
    number = rewriter.draw("uniform", None, rewriter.node.tensor.shape, torch.float64)
    number = rewriter.call(aten.mul.Tensor, number, total)
    sums = rewriter.call(aten.slice.Tensor, sums, last, 0, size - 1)
    passed = rewriter.call(
        aten.le.Tensor,
        rewriter.call(aten.unsqueeze.default, sums, last),
        rewriter.call(aten.unsqueeze.default, number, last + 1),
    )
    return rewriter.call(aten.sum.dim_IntList, passed, (-1,))


# -- distributions that one number does not make -------------------------------------------------


@rewrites(aten._standard_gamma.default, aten._sample_dirichlet.default)
def _differentiable(rewriter: Rewriter) -> Node:
    """Samples that move with their parameters."""
    gamma = rewriter.node.op == aten._standard_gamma.default
    x, op = rewriter.args[0], StandardGamma.op if gamma else Dirichlet.op
    return rewriter.call(op, x, x.tensor.shape, rewriter.random_id())


@rewrites(aten.poisson.default)
def _poisson(rewriter: Rewriter) -> Node:
    rate = rewriter.args[0]
    number = rewriter.call(
        Poisson.op, rewriter.stopped(rate), rate.tensor.shape, rewriter.random_id()
    )
    return _sampled(rewriter, number, rate)


@rewrites(aten.binomial.default)
def _binomial(rewriter: Rewriter) -> Node:
    count, p = (rewriter.stopped(x) for x in rewriter.args[:2])
    shape = rewriter.node.tensor.shape
    number = rewriter.call(Binomial.op, count, p, shape, rewriter.random_id())
    return to_dtype(rewriter, number, rewriter.node.tensor.dtype)
