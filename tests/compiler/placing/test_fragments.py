"""Calls that are placed together."""

from __future__ import annotations

from dataclasses import replace

import torch

from meshwright.compiler.graph.fragment import Fragment, FragmentCall
from meshwright.compiler.graph.ir import Node, TensorType
from meshwright.compiler.graph.slots import Slot
from meshwright.compiler.layout.layout import Layout, replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.fragments import Given, fragment_of, placements
from tests.compiler.layouts import split

aten = torch.ops.aten
MESH = Mesh((("tp", 2),))
PENDING, SPLIT = replicated((8, 64)).add_partial(["tp"]), split((8, 64), {0: "tp"})


def given(layout: Layout, *, written: bool = False) -> Given:
    return Given(TensorType(layout.shape, torch.float32), layout, written=written)


def taken(fragment: Fragment, *values: Given, wanted: Layout) -> list[str]:
    """The layouts in which each call takes its operands."""
    found = placements(fragment, values, (wanted,), MESH, "cpu")
    return [", ".join(map(str, each.operands)) for each in found if each is not None]


def chain(*ops: torch._ops.OpOverload) -> Fragment:
    """Each operator on the result of the one before it."""
    kind = TensorType((8, 64), torch.float32)
    calls = (FragmentCall(op, (Slot(i),), (), kind) for i, op in enumerate(ops))
    return Fragment(tuple(calls), (len(ops),))


def test_what_is_wanted_of_the_last_call_says_how_the_first_one_reduces() -> None:
    fragment = chain(aten.exp.default, aten.sin.default)
    assert taken(fragment, given(PENDING), wanted=SPLIT) == ["[8@tp, 64]"] * 2
    assert taken(fragment, given(PENDING), wanted=replicated((8, 64))) == ["[8, 64]"] * 2
    assert taken(fragment, given(replicated((8, 64))), wanted=SPLIT) == ["[8@tp, 64]"] * 2


def test_a_sum_stays_pending_until_there_is_less_of_it() -> None:
    kind = TensorType((8,), torch.float32)
    total = FragmentCall(aten.sum.dim_IntList, (Slot(0), (1,)), (), kind)
    fragment = Fragment((total, FragmentCall(aten.exp.default, (Slot(1),), (), kind)), (2,))
    found = taken(fragment, given(PENDING), wanted=replicated((8,)))
    assert found == ["[8, 64] partial(tp)", "[8]"]


def test_splits_that_the_plan_wrote_stay_though_others_would_move_less() -> None:
    product = FragmentCall(
        aten.mm.default, (Slot(0), Slot(1)), (), TensorType((512, 4), torch.float32)
    )
    fragment = Fragment((product,), (2,))
    x, weight = given(replicated((512, 64))), split((64, 4), {0: "tp"})
    whole = replicated((512, 4))
    assert taken(fragment, x, given(weight), wanted=whole) == ["[512, 64], [64, 4]"]
    written = given(weight, written=True)
    assert taken(fragment, x, written, wanted=whole) == ["[512, 64@tp], [64@tp, 4]"]


def test_a_value_that_is_there_in_another_layout_is_taken_in_it() -> None:
    fragment, x, whole = chain(aten.exp.default), given(SPLIT), replicated((8, 64))
    assert taken(fragment, x, wanted=whole) == ["[8@tp, 64]"]
    assert taken(fragment, replace(x, elsewhere=frozenset({whole})), wanted=whole) == ["[8, 64]"]


def test_only_what_results_need_becomes_part_of_a_fragment() -> None:
    kind = TensorType((8, 64), torch.float32)
    x = Node("x", aten.exp.default, (), {}, kind, SPLIT)
    first = Node("", aten.exp.default, (x,), {}, kind)
    unused = Node("", aten.sin.default, (first,), {}, kind)
    second = Node("", aten.add.Tensor, (first, x), {}, kind)
    fragment, values = fragment_of([first, unused, second], [second, None, x])
    assert values == (x,)
    assert [call.op for call in fragment.calls] == [first.op, second.op]
    assert fragment.calls[1].args == (Slot(1), Slot(0))
    assert fragment.results == (2, None, 0)
