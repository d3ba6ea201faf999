"""The time of a step on a cluster: what it is made of, against sums by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

import meshwright as mw
from meshwright.compiler.costs.cluster import Cluster, ClusterError, Link
from meshwright.compiler.costs.prices import Prices
from meshwright.compiler.report.assumed import operations
from tests.models import GPT_DATA, GPT_TENSOR, Gpt, tokens

Golden = Callable[[str, str], None]
CLUSTER = Cluster(
    "a small cluster", "cpu", 1e6, 1e8, 1e-6, {"float32": 1e9}, 2, Link(1e-5, 1e9), Link(1e-4, 1e8)
)
PLANS = {
    "tensor": f"mesh dp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}",
    "zero": f"mesh dp=2, tp=2\n{GPT_DATA}{GPT_TENSOR}zero 3 over dp\naccumulate 2\n",
    "stages": f"mesh dp=2, pp=2\n{GPT_DATA}stages at blocks.1 over pp microbatches=4\n",
}


@cache
def program(name: str) -> mw.Program:
    torch.manual_seed(0)
    return mw.compile(Gpt(), mw.Plan.parse(PLANS[name]), tokens(), device="cpu")


@pytest.mark.parametrize("name", PLANS)
def test_the_time_of_a_step_has_a_golden_text(name: str, golden: Golden) -> None:
    time = program(name).cost(CLUSTER)
    golden(f"step-{name}", f"{time}\n\n{time!r}")


@pytest.mark.parametrize("name", ["tensor", "zero"])
def test_links_carry_what_the_ledger_counts(name: str) -> None:
    found = program(name)
    expected = Counter[str]()
    for each in found.comm():
        link = CLUSTER.link(each.axes, found.mesh)
        expected[", ".join(each.axes)] += each.times * link.seconds(each.bytes)
    assert found.cost(CLUSTER).sending == pytest.approx(expected)


@pytest.mark.parametrize("name", PLANS)
def test_with_nothing_to_send_a_step_is_what_ranks_compute(name: str) -> None:
    at_once = Link(0.0, 1e30)
    time = program(name).cost(replace(CLUSTER, node=at_once, network=at_once))
    assert time.waiting + time.tail == pytest.approx(0, abs=1e-12)
    assert time.seconds == pytest.approx(time.computing + time.idle + time.update)
    assert (time.idle > 0) == (name == "stages")


@pytest.mark.parametrize("name", ["tensor", "zero"])
def test_with_nothing_to_compute_a_step_waits_for_one_message_after_another(name: str) -> None:
    """But for the loss, which is under way while the backward begins."""
    free = replace(CLUSTER, overhead=0.0, bandwidth=1e30, rates={"float32": 1e30}, devices=4)
    time = program(name).cost(free)
    loss = program(name).table.microbatches * time.graphs["stage0.forward"].left
    assert time.seconds == pytest.approx(sum(time.sending.values()) - loss)


def test_what_overlaps_is_hidden() -> None:
    time = program("zero").cost(CLUSTER)
    assert 0 < time.waiting + time.tail < 0.9 * sum(time.sending.values())


def test_an_operator_takes_its_operations_or_its_bytes_whichever_is_more() -> None:
    graph = program("tensor").graph("stage0.forward").graph
    linear = next(node for node in graph.nodes if node.name == "linear")
    size = 4 * (4 * 8 * 24 + 36 * 24 + 36 + 4 * 8 * 36)
    slow, fast = (replace(CLUSTER, rates={"float32": rate}) for rate in (1e6, 1e12))
    assert Prices(slow, graph.mesh).operator(linear) == 1e-6 + 2 * 4 * 8 * 24 * 36 / 1e6
    assert Prices(fast, graph.mesh).operator(linear) == 1e-6 + size / 1e8
    view = next(node for node in graph.nodes if node.name == "view")
    assert Prices(slow, graph.mesh).operator(view) == 0


def test_a_pipeline_is_simulated_with_the_same_times() -> None:
    found = program("stages")
    time, schedule = found.cost(CLUSTER), found.schedule(cluster=CLUSTER)
    assert time.seconds == pytest.approx(schedule.step_time + time.tail + time.update)
    assert schedule.assumed.unit == "seconds"
    last = time.graphs["stage1.backward"]
    assert schedule.assumed.costs.backward[1] == last.seconds > last.computing / 2 > 0


def test_the_operations_of_a_step_are_those_of_its_graphs() -> None:
    found = program("tensor")
    (stage,) = found.stages
    assert found.cost(CLUSTER).flops == sum(operations(stage, phase) for phase in stage.graphs)


def test_a_step_that_does_not_fit_says_so() -> None:
    time = program("tensor").cost(replace(CLUSTER, memory=1e3))
    assert not time.fits
    assert "which is more than its 1000 B" in str(time)


def test_a_convention_is_named_and_changes_what_all_reduces_take() -> None:
    by_rank, tree = (program("tensor").cost(CLUSTER, convention=c) for c in ("ring", "tree"))
    assert tree.sending["tp"] > by_rank.sending["tp"]
    assert "collectives tree" in str(tree)
    with pytest.raises(mw.MeshwrightError, match="unknown convention"):
        program("tensor").cost(CLUSTER, convention="star")


def test_a_cluster_of_other_devices_is_refused(golden: Golden) -> None:
    with pytest.raises(ClusterError) as error:
        program("tensor").cost("8xh100")
    golden("step-device", str(error.value))


def test_values_that_leave_the_device_need_a_link_to_the_host(golden: Golden) -> None:
    text = f"mesh dp=2\n{GPT_DATA}offload activations blocks.* to=host\n"
    found = mw.compile(Gpt(), mw.Plan.parse(text), tokens(), device="cpu")
    with pytest.raises(ClusterError) as error:
        found.cost(CLUSTER)
    golden("step-host", str(error.value))
    assert found.cost(replace(CLUSTER, host=Link(1e-5, 1e8))).sending["host"] > 0
