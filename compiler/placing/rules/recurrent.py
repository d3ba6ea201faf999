"""Rules of recurrent networks: the batch may be split, and nothing else.

Each step in time needs all that the step before computed of a sample, and all weights.
"""

from __future__ import annotations

import torch

from meshwright.compiler.placing.rules.notation import Call, Letters, Spec
from meshwright.compiler.placing.rules.registry import rule

aten = torch.ops.aten


@rule(aten.lstm.input)
def _lstm(call: Call) -> Spec:
    """`lstm(x, (h, c), weights, has_biases, ..., batch_first) -> (out, h, c)`."""
    return _spec(call, num_states=2)


@rule(aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
def _rnn(call: Call) -> Spec:
    """`rnn(x, h, weights, has_biases, ..., batch_first) -> (out, h)`."""
    return _spec(call, num_states=1)


def _spec(call: Call, *, num_states: int) -> Spec:
    batch_first = call.arg(8)
    data, out = (("b", "t", each) if batch_first else ("t", "b", each) for each in ("i", "o"))
    states: tuple[Letters, ...] = tuple(("l", "b", f"s{i}") for i in range(num_states))
    weights: tuple[Letters, ...] = tuple(
        tuple(f"w{i}.{dim}" for dim in range(len(operand.type.shape)))
        for i, operand in enumerate(call.operands[1 + num_states :])
    )
    operands = (data, *states, *weights)
    letters = {letter for term in (*operands, out) for letter in term}
    return Spec(operands, (out, *states), whole=frozenset(letters - {"b"}))
