"""An axis of the mesh that nothing is split over, and what counts as use."""

from __future__ import annotations

import pytest

import meshwright
from meshwright.dsl.errors import PlanError
from tests.passes.examples import Mlp, rows

TENSOR = "columns up over {0}\nrows down over {0}\n"
USED = {
    "data": "mesh dp=2\ndata x over dp\n",
    "weights": "mesh tp=2\n" + TENSOR.format("tp"),
    "a group": "mesh row=2, col=2\naxes model = (row, col)\n" + TENSOR.format("model"),
    "one rank": "mesh dp=1, tp=2, pp=1\n" + TENSOR.format("tp"),
    "an input by hand": "mesh dp=2\nshard x [b@dp, d]\n",
    "a feature of an input": "mesh tp=2\nshard x [b, d@tp]\n",
    "a pending input": "mesh tp=2\nshard x [b, d] partial(tp)\n",
    "an activation": "mesh tp=2\nshard up -> [b, f@tp]\n",
    "repeated on purpose": "mesh dp=2, tp=2\nallow replicate **\n" + TENSOR.format("tp"),
    "repeated, the model by name": 'mesh dp=2\nallow replicate ""\n',
}


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("name", USED)
def test_an_axis_is_used_where_any_value_is_split_or_pending_over_it(name: str, mode: str) -> None:
    plan = meshwright.Plan.parse(USED[name])
    program = meshwright.compile(Mlp(), plan, example=rows(), mode=mode)
    assert program.mesh.num_ranks > 1


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("line", ["", "allow replicate up\n", "axes model = (tp, dp)\n"])
def test_an_axis_of_which_no_value_knows_is_told(line: str, mode: str) -> None:
    plan = meshwright.Plan.parse("mesh dp=2, tp=2\n" + line + TENSOR.format("tp"))
    with pytest.raises(PlanError) as caught:
        meshwright.compile(Mlp(), plan, example=rows(), mode=mode)
    assert caught.value.code == "P503"
    assert "write `data x over dp`" in caught.value.help


def test_another_batch_size_is_compiled_though_its_plan_leaves_an_axis_idle() -> None:
    """Only the first program is judged: what evaluation uses may be less."""
    plan = meshwright.Plan.parse("mesh dp=2\nshard up -> [b@dp, f]\n")
    run = meshwright.compile(Mlp(), plan, example=rows()).launch()
    assert run.evaluate(*rows()).isfinite()
