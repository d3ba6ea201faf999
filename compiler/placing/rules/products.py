"""Rules of products whose letters follow from the ranks of their operands, or from an equation."""

from __future__ import annotations

from dataclasses import replace

import torch

from meshwright.compiler.placing.rules.notation import (
    Call,
    Letters,
    Spec,
    broadcast,
    leading_letters,
)
from meshwright.compiler.placing.rules.registry import rule

aten = torch.ops.aten


@rule(aten.matmul.default)
def _matmul(call: Call) -> Spec:
    """Vectors, matrices or batches of matrices, the batches broadcast."""
    ranks = [len(operand.type.shape) for operand in call.operands]
    left = (*leading_letters(ranks[0] - 2), "m", "k")[-ranks[0] if ranks[0] > 1 else -1 :]
    right = (*leading_letters(ranks[1] - 2), "k", "n") if ranks[1] > 1 else ("k",)
    batch = leading_letters(max(ranks) - 2)
    result = (*batch, *(("m",) if ranks[0] > 1 else ()), *(("n",) if ranks[1] > 1 else ()))
    return _product(call, (left, right), result)


@rule(aten.addmm.default, aten.baddbmm.default)
def _added_product(call: Call) -> Spec:
    """`addmm(bias, x, y)`: with k split, the broadcast bias would be added once per rank."""
    batch = ("b",) if len(call.operands[1].type.shape) == 3 else ()
    result = (*batch, "m", "n")
    bias = result[len(result) - len(call.operands[0].type.shape) :]
    found = _product(call, (bias, (*batch, "m", "k"), (*batch, "k", "n")), result)
    return replace(found, whole=frozenset("k"), linear=(frozenset({0, 1}), frozenset({0, 2})))


@rule(aten.einsum.default)
def _einsum(call: Call) -> Spec:
    """The equation is the rule. A letter that one operand has twice is a diagonal, and whole."""
    left, arrow, right = call.arg(0).replace(" ", "").partition("->")
    if not arrow:
        once = (letter for letter in sorted(left) if letter.isalpha() and left.count(letter) == 1)
        right = "".join(("..." if "..." in left else "", *once))
    terms = left.split(",")
    ellipsis = [
        len(operand.type.shape) - len(term.replace("...", ""))
        for term, operand in zip(terms, call.operands, strict=True)
    ]
    operands = tuple(_term(term, count) for term, count in zip(terms, ellipsis, strict=True))
    found = _product(call, operands, _term(right, max(ellipsis)))
    twice = {letter for term in operands for letter in term if term.count(letter) > 1}
    return replace(found, whole=frozenset(twice))


def _term(term: str, ellipsis: int) -> Letters:
    head, dots, tail = term.partition("...")
    return (*head, *(leading_letters(ellipsis) if dots else ()), *tail)


def _product(call: Call, operands: tuple[Letters, ...], result: Letters) -> Spec:
    linear = tuple(frozenset({i}) for i in range(len(operands)))
    return Spec(broadcast(operands, call), (result,), linear=linear)
