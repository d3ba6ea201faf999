"""A new kind of collective is one row, and a new kind of wire is another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from meshwright.compiler.errors import PassError
from meshwright.compiler.graph.ir import MeshOp, rewrite
from meshwright.compiler.layout.collectives import COLLECTIVES
from meshwright.compiler.layout.layout import replicated
from meshwright.compiler.layout.wires import WIRES
from meshwright.compiler.placing.check import check
from meshwright.passes import driver
from tests.runtime.transports import mirror


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(driver, "PASSES", driver.PASSES)
    mirror.register()
    yield
    del COLLECTIVES["mirror"], WIRES["mirror"]


@pytest.mark.usefixtures("registered")
def test_a_program_with_a_new_kind_is_checked_differentiated_counted_and_run() -> None:
    program = mirror.compiled()
    text = str(program.graph("stage0.forward"))
    assert "mirror(weight, tp)" in text
    assert program.comm().counts()["mirror[tp]"] == 2
    assert {moved.bytes for moved in program.comm() if moved.kind == "mirror"} == {16}
    with program.launch() as run:
        mirror.check_run(run)


@pytest.mark.usefixtures("registered")
def test_a_new_kind_between_states_that_its_row_does_not_name_is_refused() -> None:
    graph = mirror.compiled().graphs()["stage0.forward"]
    (node,) = (node for node in graph.nodes if node.op == MeshOp("mirror"))

    def whole(builder, each, mapping):
        layout = replicated(node.tensor.shape) if each is node else each.layout
        return builder.copy(each, mapping, layout=layout)

    with pytest.raises(PassError, match="`mirror` over `tp` goes from split to split"):
        check(rewrite(graph, whole), "a pass")
