"""Which placement is chosen, and what rules make of composite dims."""

from __future__ import annotations

import pytest
import torch

from meshwright.compiler.codegen.local import local_args
from meshwright.compiler.errors import LayoutError
from meshwright.compiler.graph import custom
from meshwright.compiler.graph.fragment import Fragment, FragmentCall
from meshwright.compiler.graph.ir import MeshOp, TensorType
from meshwright.compiler.graph.slots import Slot
from meshwright.compiler.layout.factors import Factor
from meshwright.compiler.layout.layout import Layout, replicated
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.allowed import allowed
from meshwright.compiler.placing.fragments import Given, placements
from meshwright.compiler.placing.rules.factories import makes_zeros
from meshwright.compiler.placing.rules.lookup import has_rule, rule_for
from meshwright.compiler.placing.rules.notation import Call, Operand, Placement, Row, Spec
from tests.compiler.layouts import product, split

aten = torch.ops.aten
MESH = Mesh((("dp", 2), ("tp", 2)))
X, W = Slot(0), Slot(1)


def operand(layout: Layout, *, trained: bool = False, pinned: bool = False) -> Given:
    kind = TensorType(layout.shape, torch.float32)
    return Given(kind, layout, requires_grad=trained, written=pinned)


def make_call(op, args, operands, *shapes) -> Call:
    results = tuple(TensorType(shape, torch.float32) for shape in shapes)
    seen = tuple(Operand(each.type, each.layout, each.requires_grad) for each in operands)
    return Call(op, args, (), seen, results, MESH)


def place(op, args, operands, *shapes, wanted: Layout | None = None) -> Placement:
    """The cheapest placement of one call."""
    types = tuple(TensorType(shape, torch.float32) for shape in shapes)
    call = FragmentCall(op, args, (), types if len(types) > 1 else types[0])
    fragment = Fragment((call,), (len(operands),))
    (found,) = placements(fragment, tuple(operands), (wanted,), MESH, "cpu")
    assert found is not None
    return found


def shown(placement: Placement) -> str:
    sides = [", ".join(map(str, side)) for side in (placement.operands, placement.results)]
    return " -> ".join(sides)


def test_a_column_split_linear_varies_its_input() -> None:
    x = operand(split((8, 16, 32), {0: "dp"}), trained=True)
    w = operand(split((64, 32), {0: "tp"}), trained=True, pinned=True)
    found = place(aten.linear.default, (X, W), (x, w), (8, 16, 64))
    assert shown(found) == (
        "[8@dp, 16, 32] varying(tp), [64@tp, 32] varying(dp) -> [8@dp, 16, 64@tp]"
    )


def test_a_row_split_linear_leaves_a_pending_sum() -> None:
    x = operand(split((8, 16, 32), {0: "dp", 2: "tp"}), trained=True)
    w = operand(split((64, 32), {1: "tp"}), trained=True, pinned=True)
    found = place(aten.linear.default, (X, W), (x, w), (8, 16, 64))
    assert shown(found) == (
        "[8@dp, 16, 32@tp], [64, 32@tp] varying(dp) -> [8@dp, 16, 64] partial(tp)"
    )


def test_a_bias_is_not_added_once_per_rank() -> None:
    x, w = operand(split((8, 32), {1: "tp"})), operand(split((64, 32), {1: "tp"}))
    bias = operand(replicated((64,)))
    asked = make_call(aten.linear.default, (X, W, Slot(2)), (x, w, bias), (8, 64))
    assert all("32@tp" not in shown(found) for found in allowed(asked))


def test_frozen_operands_and_integers_are_not_varied() -> None:
    x = operand(split((8, 32), {0: "dp"}))
    w = operand(replicated((64, 32)))
    found = place(aten.linear.default, (X, W), (x, w), (8, 64))
    assert shown(found) == "[8@dp, 32], [64, 32] -> [8@dp, 64]"


def test_a_value_that_varies_already_stays_so_where_nothing_is_differentiated() -> None:
    x = operand(replicated((8, 32)).add_varying(["tp"]))
    grad = operand(split((64, 8), {0: "tp"}))
    found = place(aten.mm.default, (X, W), (grad, x), (64, 32))
    assert shown(found) == "[64@tp, 8], [8, 32] varying(tp) -> [64@tp, 32]"


def test_a_pending_sum_passes_an_addition_of_two_and_not_of_a_number() -> None:
    x = operand(replicated((8,)).add_partial(["tp"]))
    found = place(aten.add.Tensor, (X, W), (x, x), (8,))
    assert shown(found) == "[8] partial(tp), [8] partial(tp) -> [8] partial(tp)"
    found = place(aten.add.Tensor, (X, 1.0), (x,), (8,))
    assert shown(found) == "[8] -> [8]"


def test_zeros_are_a_pending_sum_as_they_are() -> None:
    x = operand(replicated((8,)).add_partial(["tp"]))
    zero = Given(TensorType((), torch.float32), replicated(()), number=0.0)
    mask = operand(replicated((8,)))
    args = (Slot(0), Slot(1), Slot(2))
    found = place(aten.where.self, args, (mask, x, zero), (8,))
    assert found.results[0] == x.layout


def test_what_makes_zeros_is_known() -> None:
    assert makes_zeros(aten.new_zeros.default, (X, (2, 3)))
    assert makes_zeros(aten.full.default, ((2, 3), 0.0))
    assert not makes_zeros(aten.full.default, ((2, 3), 1.0))
    assert not makes_zeros(MeshOp("norm"), (X,))


QKV = Layout(
    (
        *replicated((2,)).dims,
        ((Factor(16, ("tp",)),), (Factor(4, ("tp",)),), (Factor(4, ("tp",)),)),
    )
)


def test_a_fused_projection_is_split_into_its_three_parts() -> None:
    fused = Layout((*replicated((2,)).dims, product(Factor(3), Factor(4, ("tp",)), Factor(8))))
    op, given = aten.split.Tensor, (X, 32, 1)
    found = place(op, given, [operand(fused)], (2, 32), (2, 32), (2, 32))
    assert {str(layout) for layout in found.results} == {"[2, 32@tp]"}
    args, _ = local_args(op, given, {}, found.operands, found.results, MESH)
    assert args == (X, 16, 1)


def test_a_grouped_query_projection_is_cut_at_its_segments_and_joined_again() -> None:
    parts = [(2, 16), (2, 4), (2, 4)]
    sizes = (X, (16, 4, 4), 1)
    found = place(aten.split_with_sizes.default, sizes, [operand(QKV)], *parts)
    assert [str(layout) for layout in found.results] == ["[2, 16@tp]", "[2, 4@tp]", "[2, 4@tp]"]
    pieces = [operand(layout) for layout in found.results if layout is not None]
    slots = tuple(Slot(i) for i in range(3))
    joined = place(aten.cat.default, (slots, 1), pieces, (2, 24))
    assert joined.results[0] == QKV.canonical(MESH)


def test_the_backward_of_a_slice_is_split_as_its_operand_was() -> None:
    grad = operand(split((2, 4), {1: "tp"}))
    op, args = aten.slice_backward.default, (X, (2, 24), 1, 16, 20, 1)
    found = place(op, args, [grad], (2, 24), wanted=QKV)
    assert found.results[0] is not None
    assert found.results[0].canonical(MESH) == QKV.canonical(MESH)
    local, _ = local_args(op, args, {}, found.operands, found.results, MESH)
    assert local == (X, [2, 12], 1, 8, 10, 1)


def test_one_head_of_keys_and_values_is_used_by_all_ranks() -> None:
    q = operand(split((2, 4, 6, 8), {1: "tp"}), trained=True, pinned=True)
    kv = operand(replicated((2, 1, 6, 8)), trained=True)
    args = (Slot(0), Slot(1), Slot(2), None, True, None, 0.0, 0)
    found = place(MeshOp("attention"), args, (q, kv, kv), (2, 4, 6, 8), (2, 4, 6))
    assert shown(found) == (
        "[2, 4@tp, 6, 8], [2, 1, 6, 8] varying(tp), [2, 1, 6, 8] varying(tp)"
        " -> [2, 4@tp, 6, 8], [2, 4@tp, 6]"
    )


def test_the_gradient_of_a_table_is_split_as_the_table_that_it_does_not_take() -> None:
    grad = operand(split((2, 3, 4), {0: "dp"}).add_varying(["tp"]))
    index = operand(split((2, 3), {0: "dp"}))
    args, wanted = (X, W, 8, -1), split((8, 4), {0: "tp"}).add_partial(["dp"])
    found = place(MeshOp("embedding_backward"), args, (grad, index), (8, 4), wanted=wanted)
    assert shown(found) == ("[2@dp, 3, 4] varying(tp), [2@dp, 3] -> [8@tp, 4] partial(dp)")


def test_a_view_that_cuts_a_split_factor_gathers_it() -> None:
    x = operand(split((384,), {0: "tp"}))
    found = place(aten.view.default, (X, (3, 128)), [x], (3, 128))
    assert shown(found) == "[384] -> [3, 128]"


def test_a_dim_whose_segments_are_not_all_split_is_gathered() -> None:
    uneven = Layout((((Factor(16, ("tp",)),), (Factor(4),)),))
    found = place(aten.exp.default, (X,), [operand(uneven)], (20,))
    assert shown(found) == "[20] -> [20]"


def test_an_operator_without_a_rule_runs_whole_and_says_so() -> None:
    assert not has_rule(aten.linalg_inv.default)
    x = operand(split((8, 4, 4), {0: "dp"}))
    found = place(aten.linalg_inv.default, (X,), [x], (8, 4, 4))
    assert shown(found) == "[8, 4, 4] -> [8, 4, 4]"


def test_operators_that_draw_random_numbers_have_no_rule() -> None:
    assert not has_rule(aten.native_dropout.default)
    assert not has_rule(aten.bernoulli.default)


def test_a_registered_operator_has_the_rule_that_it_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = custom.CustomOp("inv", "... n! m! -> ... n m", lambda *_: None)
    monkeypatch.setitem(custom.REGISTRY, aten.linalg_inv.default, known)
    x = operand(split((8, 2, 2), {0: "dp"}))
    found = place(aten.linalg_inv.default, (X,), [x], (8, 2, 2))
    assert shown(found) == "[8@dp, 2, 2] -> [8@dp, 2, 2]"


def test_a_rule_for_other_dims_is_an_error() -> None:
    asked = make_call(aten.exp.default, (X,), [operand(replicated((2, 3)))], (2, 3))
    with pytest.raises(LayoutError) as caught:
        Row("m -> m")(asked)
    assert str(caught.value).splitlines() == [
        "the rule of `aten.exp.default` names other dims than [2, 3]",
        "  help: write one letter for each dim of each tensor in the operator's rule",
    ]


def test_rules_in_letters_can_be_read() -> None:
    asked = make_call(aten.mm.default, (X, W), [operand(replicated((2, 3)))] * 2, (2, 3))
    found = rule_for(aten.mm.default)(asked)
    assert isinstance(found, Spec)
    assert (found.operands, found.results) == ((("m", "k"), ("k", "n")), (("m", "n"),))
