"""The statement `summa`: both matrices of every product in blocks."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import meshwright
from meshwright import PlanError
from meshwright.compiler.codegen.instructions import Exchange, Free, Start
from meshwright.compiler.codegen.lowering import lowered
from meshwright.compiler.codegen.overlap import overlap
from meshwright.compiler.composites import panels as panels_module
from meshwright.compiler.composites import product_3d as product_3d_module
from meshwright.compiler.composites import summa as summa_module
from meshwright.compiler.composites import summa_embedding as embedding_module
from meshwright.compiler.graph.ir import OutputKind, Phase
from meshwright.compiler.graph.transfers import moves
from meshwright.compiler.public import Program
from meshwright.passes.statements.blocks import summa
from tests.equivalence import check_equal
from tests.models import Gpt, Mlp, real, rows, tokens
from tests.passes.stages import check_documented, shown, stages

GRID = "mesh row=2, col=2\nsumma ** over (row, col)\n"
FUSED = "summa blocks.*.qkv over (row, col) as (3 heads hd)\n"
CUBE = "summa ** over (x, y, z)\nsumma blocks.*.qkv over (x, y, z) as (3 heads hd)\n"
DATA = "data tokens, targets over dp\n"


def compiled(model: nn.Module, plan: str, example: object) -> Program:
    return meshwright.compile(model, meshwright.Plan.parse(plan), example)


def gpt_plan(row: int, col: int, more: str = "", mesh: str = "") -> str:
    return f"mesh {mesh}row={row}, col={col}\nsumma ** over (row, col)\n{FUSED}{more}"


@pytest.fixture
def in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is small: panels come one after the other, also where there are two."""
    monkeypatch.setattr(panels_module, "SMALL_BYTES", 0)


@pytest.mark.usefixtures("in_steps")
def test_the_docstrings_show_a_linear_before_and_after() -> None:
    found = stages(Mlp(), (real(8, 16).float(),), GRID)
    weights = "up_weight", "up_bias"
    check_documented(
        summa,
        shown(found["normalise"], *weights, "linear"),
        shown(
            found["partition"], *weights, "slice", "summa", "all_gather_replicated", "vary", "add"
        ),
    )
    panels = [f"broadcast{i}" for i in ("", "_1", "_2", "_3")]
    steps = shown(found["lower"], *panels, "panel_product", "add_panel_product")
    check_documented(summa_module, shown(found["differentiate"], "summa"), steps)


@pytest.mark.usefixtures("in_steps")
def test_the_docstring_shows_a_lookup_before_and_after() -> None:
    found = stages(Gpt(d=32), tokens(), gpt_plan(2, 2))
    check_documented(
        embedding_module,
        shown(found["differentiate"], "embedding"),
        shown(found["lower"], "broadcast", "broadcast_1", "block_lookup", "add_block_lookup"),
    )


def test_the_docstring_shows_a_product_over_three_axes_before_and_after() -> None:
    found = stages(Mlp(), (real(8, 16).float(),), "mesh x=2, y=2, z=2\nsumma ** over (x, y, z)\n")
    check_documented(
        product_3d_module,
        shown(found["differentiate"], "product_3d"),
        shown(found["lower"], "all_gather_replicated_1", "panel_product", "reduce_scatter"),
    )


@pytest.mark.parametrize(
    ("row", "col"),
    [
        (2, 2),
        (1, 4),
        pytest.param(4, 2, marks=pytest.mark.slow),
        pytest.param(3, 3, marks=pytest.mark.slow),
        pytest.param(2, 3, marks=pytest.mark.slow),
        pytest.param(4, 4, marks=pytest.mark.slow),
        pytest.param(8, 8, marks=pytest.mark.slow),
    ],
)
def test_a_gpt_trains_in_blocks_as_on_one_device(row: int, col: int) -> None:
    """Its head is the table, 47 rows that no grid divides; panels are parts of blocks where the
    sides of the grid differ."""
    heads = 12 if 3 in (row, col) else max(4, col)
    model = Gpt(vocab=47, d=2 * heads * (1 if 3 in (row, col) else 2), heads=heads)
    batch = 12 if 3 in (row, col) else 8
    check_equal(model, lambda: tokens(47, batch), gpt_plan(row, col), steps=2)


@pytest.mark.parametrize(("row", "col"), [(2, 4), (3, 2), (4, 1)])
def test_a_grid_need_not_be_square(row: int, col: int) -> None:
    """Panels and sums are then parts of blocks, of the side that is shorter."""
    plan = f"mesh row={row}, col={col}\nsumma ** over (row, col)\n"
    check_equal(Mlp(12, 24), lambda: rows(12, 12), plan, steps=1)


@pytest.mark.parametrize(
    "plan",
    [
        gpt_plan(2, 2, DATA + "zero 3 over dp\ncheckpoint blocks.*\n", "dp=2, "),
        (
            "mesh depth=2, row=2, col=2\nsumma ** over (row, col) depth=depth\n"
            "summa blocks.*.qkv over (row, col) as (3 heads hd) depth=depth\n"
        ),
        "mesh x=2, y=2, z=2\n" + CUBE,
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (
                gpt_plan(2, 2, DATA + "zero 1 over dp\naccumulate 2\n", "dp=2, "),
                gpt_plan(2, 2, DATA.replace("dp", "(dp, row)"), "dp=2, "),
                gpt_plan(
                    *(2, 2, "data tokens, targets\nstages at blocks.1 over pp microbatches=4\n"),
                    mesh="pp=2, ",
                ),
                gpt_plan(2, 2, "offload activations\noffload optimizer\n"),
                "mesh dp=2, x=2, y=2, z=2\n"
                + CUBE
                + DATA
                + "zero 3 over dp\ncheckpoint blocks.*\n",
                "mesh x=1, y=2, z=4\n" + CUBE,
                "mesh dp=4, x=2, y=1, z=2\naccumulate 2\n" + CUBE + DATA,
                "mesh x=2, y=4, z=1\n" + CUBE,
            )
        ),
    ],
)
def test_blocks_go_with_the_other_statements(plan: str) -> None:
    check_equal(Gpt(), lambda: tokens(batch=16), plan, steps=2)


def test_other_statements_hold_inside_of_it() -> None:
    plan = "columns blocks.*.up over (row, col)\nrows blocks.*.down over (row, col)\n"
    plan += "shard blocks.*.proj.weight [o, d@col]\n"
    program = check_equal(Gpt(), tokens, gpt_plan(2, 2, plan + "allow replicate **\n"), steps=1)
    layouts = {name: str(each.layout) for name, each in program.parameters.items()}
    assert layouts["blocks.0.up.weight"] == "[96@(row, col), 24]"
    assert layouts["blocks.0.qkv.weight"] == "[3·24@col, 24@row]"
    assert layouts["blocks.0.proj.weight"] == "[24@row, 24@col]"


def test_a_list_of_modules_stands_for_what_is_in_it() -> None:
    plan = GRID.replace("**", "blocks") + "allow replicate **\n"
    program = compiled(Gpt(), plan, tokens())
    layouts = {name: str(each.layout) for name, each in program.parameters.items()}
    assert layouts["blocks.1.down.weight"] == "[24@col, 96@row]"
    assert layouts["wte.weight"] == "[48, 24]"


def test_layouts_of_activations_hold_inside_of_it() -> None:
    """Also of what enters a linear that is replaced by more than one node."""
    plan = "shard blocks.*.up -> [b@(row, col), s, f]\nshard blocks.*.down <- [b@row, s, f]\n"
    program = check_equal(Gpt(), tokens, gpt_plan(2, 2, plan + "allow replicate **\n"), steps=1)
    nodes = program.stages[0].forward.nodes
    gelu = [str(node.layout) for node in nodes if node.op == torch.ops.aten.gelu.default]
    assert gelu == ["[8@(row, col), 8, 96]"] * 2
    lines = [node.origin.plan_line for node in nodes if node.origin.module == "blocks.0.down"]
    assert [line for line in lines if line.endswith(":5")]


def pair(vocab: int, **options: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(vocab, 8, **options), nn.Linear(8, 4))


@pytest.mark.parametrize("row", [2, 4])
def test_a_row_of_padding_is_not_trained(row: int) -> None:
    plan = f"mesh row={row}, col=2\nsumma ** over (row, col)\n"
    program = check_equal(
        pair(13, padding_idx=9),
        lambda: (torch.randint(8, 11, (8, 6)),),
        plan,
        loss=lambda y: y.square().mean(),
        steps=1,
    )
    assert program.parameters["0.weight"].layout.shape[0] > 13


@pytest.mark.parametrize("row", [1, 2])
def test_an_index_beyond_the_table_is_an_error(row: int) -> None:
    """It would be a row that is padding, or of no rank."""
    plan = meshwright.Plan.parse(f"mesh row={row}, col=2\nsumma ** over (row, col)\n")
    good, bad = torch.randint(0, 13, (8, 6)), torch.full((8, 6), 13)
    run = meshwright.compile(pair(13), plan, (good,), loss=lambda y: y.square().mean()).launch()
    with pytest.raises(RuntimeError, match="index out of range: the table has 13 rows"):
        run.step(bad)


class Matrices(nn.Module):
    """Matrices `[k, n]`, the last of them read as `[n, k]` too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(real(16, 32)), nn.Parameter(real(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(torch.tanh(x @ self.a) @ self.b)
        return (x @ self.b.t()).square().mean()


@pytest.mark.parametrize(
    "plan",
    [
        'mesh row=2, col=2\nsumma "" over (row, col)\n',
        'mesh x=2, y=2, z=2\nsumma "" over (x, y, z)\n',
    ],
)
def test_a_matrix_may_be_stored_either_way(plan: str) -> None:
    check_equal(Matrices(), rows, plan, steps=1)


class Tied(nn.Module):
    """One weight for two linears, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x))).square().mean()


def test_a_weight_that_is_used_twice_changes_no_places(golden: Callable[[str, str], None]) -> None:
    plan = "mesh x=2, y=2, z=2\nsumma ** over (x, y, z)\n"
    with pytest.raises(PlanError) as caught:
        compiled(Tied(), plan, rows())
    golden("summa-tied", str(caught.value))
    check_equal(Tied(), rows, plan.replace("**", "a") + "allow replicate **\n", steps=1)
    each = GRID.replace("**", "a") + "summa b over (row, col)\n"
    check_equal(Tied(), rows, each, steps=1)


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=95, max_position_embeddings=32, **sizes, **heads)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [GRID + "vocab lm_head over col\n",
     "mesh dp=2, row=2, col=2\ndata input_ids, labels over dp\n"
     + GRID.partition("\n")[2] + "vocab lm_head over (row, col)\n",
     "mesh x=2, y=2, z=2\nsumma ** over (x, y, z)\nvocab lm_head over y\n"],
)  # fmt: skip
def test_an_unmodified_llama_trains_in_blocks(plan: str) -> None:
    """Its head is no table, and has 95 rows: `vocab` pads those."""
    ids = torch.randint(0, 95, (8, 8))
    # Its norms and its loss compute in float32.
    check_equal(llama(), {"input_ids": ids, "labels": ids}, plan, tolerance=5e-5)


def moved(program: Program, phase: str, *kinds: str) -> int:
    """The elements that a rank sends in the blocks, times the number of ranks."""
    found = (each for each in program.comm().moved if each.module.startswith("blocks."))
    sent = sum(each.bytes for each in found if each.phase == phase and each.kind in kinds)
    return sent * program.mesh.num_ranks // 4


@pytest.mark.usefixtures("in_steps")
@pytest.mark.parametrize(("q", "again"), [(2, False), (4, True), (8, False), (8, True)])
def test_what_panels_send_is_what_the_paper_counts(q: int, again: bool) -> None:
    """7 b s h of activations and 12 h^2 of weights in a layer's forward, and twice that in its
    backward; what is computed again leaves out the last product, whose result nothing takes. Of
    a block that goes round, q - 1 of q ranks send it on."""
    d, b, s = 64, 16, 8
    model, example = Gpt(d=d, heads=8), tokens(batch=b)
    program = compiled(model, gpt_plan(q, q, "checkpoint blocks.*\n" if again else ""), example)
    activations, weights, layers = b * s * d, d * d, 2
    forward = moved(program, "forward", "broadcast", "reduce")
    backward = moved(program, "backward", "broadcast", "reduce")
    assert forward == (q - 1) * layers * (7 * activations + 12 * weights)
    more = 3 * activations + 8 * weights if again else 0
    assert backward == (q - 1) * layers * (14 * activations + 24 * weights + more)


@pytest.mark.parametrize("more", ["", "checkpoint blocks.*\n"])
def test_two_small_panels_come_in_one_message(more: str, request: pytest.FixtureRequest) -> None:
    at_once = compiled(Gpt(), gpt_plan(2, 2, more), tokens())
    request.getfixturevalue("in_steps")
    in_steps = compiled(Gpt(), gpt_plan(2, 2, more), tokens())
    assert at_once.comm().total_bytes() == in_steps.comm().total_bytes()
    assert at_once.comm().times() < 0.6 * in_steps.comm().times()
    assert at_once.memory().activations == in_steps.memory().activations


def test_large_panels_come_in_steps_one_ahead() -> None:
    program = compiled(Mlp(16, 1 << 16), GRID, rows())
    kinds = {each.kind for each in program.comm().moved if each.module in ("up", "down")}
    assert {"broadcast", "reduce"} <= kinds


def test_three_axes_send_what_their_paper_counts() -> None:
    """Of an operand of S elements, q - 1 of q parts of what q^2 ranks hold, in every product."""
    d, b, s, q = 64, 16, 8, 2
    program = compiled(Gpt(d=d, heads=8), f"mesh x={q}, y={q}, z={q}\n{CUBE}", tokens(batch=b))
    own = [each for each in program.comm().moved if each.module in ("blocks.0.up", "blocks.0.down")]
    own = [each for each in own if each.phase == "forward" and len(each.axes) == 1]
    sent = sum(each.bytes for each in own) * q**3 // 4
    # Gathered inputs and scattered outputs, 1 and 4 of b s d each way.
    assert sent == (q - 1) * (10 * b * s * d)


def test_activations_shrink_as_ranks_grow() -> None:
    found = {}
    for q in (1, 2, 4):
        program = compiled(Gpt(d=32, layers=1), gpt_plan(q, q), tokens(batch=16))
        found[q] = program.memory().activations * q * q
    assert max(found.values()) < 1.1 * found[1]


def test_a_region_saves_what_enters_its_blocks_alone() -> None:
    program = compiled(Gpt(), gpt_plan(2, 2, "checkpoint blocks.*\n"), tokens())
    plain = compiled(Gpt(), gpt_plan(2, 2), tokens())
    names = [each.node.name for each in program.stages[0].forward.outputs if each.kind == "saved"]
    assert not [name for name in names if name.startswith(("broadcast", "gather"))]
    assert program.memory().activations < plain.memory().activations / 3


@pytest.mark.parametrize(
    ("word", "products"), [("linear", 0), ("matmul", 0), ('"up.linear"', 4), ("embedding", 6)]
)
def test_words_after_keep_name_operators_of_the_model(word: str, products: int) -> None:
    """The backward computes `qkv`, `proj` and `up` of two blocks again."""
    program = compiled(Gpt(), gpt_plan(2, 2, f"checkpoint blocks.* keep=[{word}]\n"), tokens())
    nodes = program.stages[0].graphs[Phase.BACKWARD].nodes
    again = [each for each in nodes if each.origin.region and "panel_product" in each.name]
    assert len(again) == products


def test_an_operator_of_no_product_is_not_kept() -> None:
    plan = gpt_plan(2, 2, "checkpoint blocks.* keep=[addmm]\n")
    with pytest.raises(PlanError, match="`keep=addmm` matches nothing"):
        compiled(Gpt(), plan, tokens())


def test_a_cube_saves_what_it_has_not_gathered_yet() -> None:
    program = compiled(Gpt(), "mesh x=2, y=2, z=2\n" + CUBE, tokens())
    saved = program.stages[0].forward.outputs_of(OutputKind.SAVED)
    assert not [each.node.name for each in saved if moves(each.node)]


def test_no_more_than_two_panels_of_an_operand_are_held() -> None:
    """Whatever the number of steps: the panels of the next are on their way, and no others."""
    plan = "mesh row=4, col=4\nsumma ** over (row, col)\n"
    program = compiled(Mlp(16, 32), plan, rows())
    body = overlap(lowered(program.stages[0].forward)).body
    alive, most = 0, 0
    for each in body:
        if isinstance(each, (Start, Exchange)):
            wire = each.exchange.wire if isinstance(each, Start) else each.wire
            alive += wire.kind == "broadcast"
        if isinstance(each, Free):
            alive -= sum(
                re.fullmatch(r"broadcast(_\d+)?", v.name) is not None for v in each.variables
            )
        most = max(most, alive)
    assert (most, alive) == (4, 0)


def test_what_the_model_itself_multiplies_is_in_blocks_under_two_stars() -> None:
    class Bare(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(super().forward(x) * x, self.up.weight).square().sum()

    program = check_equal(Bare(), rows(), GRID, steps=1)
    assert str(program.graph("stage0.forward")).count("mesh::panel_product") == 3


def test_evaluation_runs_in_blocks() -> None:
    model = Mlp().double()
    run = compiled(model, GRID, rows()).launch()
    (x,) = rows()
    torch.testing.assert_close(run.evaluate(x), model(x).detach())


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("summa-indivisible", "mesh row=5, col=2\nsumma ** over (row, col)\n"),
        ("summa-of-nothing", "mesh row=2, col=2\nsumma drop over (row, col)\n"),
        ("summa-shadowed", GRID + "summa blocks.1 over (col, row)\n"),
        ("summa-batch", "mesh row=16, col=1\nsumma blocks.*.up over (row, col)\n"),
        ("summa-cube", "mesh x=2, y=1, z=5\nsumma ** over (x, y, z)\n"),
    ],
)
def test_mistakes_are_explained(name: str, plan: str, golden: Callable[[str, str], None]) -> None:
    model = Gpt(d=48 if "batch" in name else 24)
    model.drop = nn.Dropout()
    with pytest.raises((PlanError, meshwright.LayoutError)) as caught:
        compiled(model, plan, tokens())
    golden(name, str(caught.value))


def test_a_linear_with_one_output_is_told_what_to_write(golden: Callable[[str, str], None]) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    with pytest.raises(PlanError) as caught:
        meshwright.compile(model.double(), meshwright.Plan.parse(GRID), rows(), loss=torch.sum)
    golden("summa-one-output", str(caught.value))
    check_equal(model, rows, GRID + 'rows "2" over col\n', loss=torch.sum, steps=1)
