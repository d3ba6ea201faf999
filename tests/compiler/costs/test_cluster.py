"""Descriptions of clusters: what they say, and what is wrong with others."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import sympy

from meshwright.compiler.costs.cluster import Cluster, ClusterError, Link, names
from meshwright.compiler.costs.volume import CONVENTIONS, log2, share_sent
from meshwright.compiler.errors import CompilerError
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.layout.wires import WIRES, Wire

Golden = Callable[[str, str], None]
TEXT = """\
name = "two boxes"
[device]
memory = 1e9
bandwidth = 1e9
[device.rates]
float32 = 1e12
[node]
devices = 4
latency = 1e-6
bandwidth = 1e9
[network]
latency = 1e-5
bandwidth = 1e8
"""
MESH = Mesh((("dp", 2), ("tp", 4)))
WRONG = {
    "unknown-table": TEXT.replace("[network]", "[networks]"),
    "unknown-key": TEXT.replace("latency = 1e-6", "latencies = 1e-6"),
    "missing-key": TEXT.replace("memory = 1e9\n", ""),
    "missing-table": TEXT.partition("[node]")[0],
    "no-number": TEXT.replace("memory = 1e9", 'memory = "80 GB"'),
    "negative": TEXT.replace("latency = 1e-6", "latency = -1"),
    "no-bandwidth": TEXT.replace("bandwidth = 1e8", "bandwidth = 0"),
    "part-of-a-device": TEXT.replace("devices = 4", "devices = 2.5"),
    "no-devices": TEXT.replace("devices = 4\n", ""),
    "unknown-dtype": TEXT.replace("float32", "int8"),
    "no-table": TEXT.partition("[network]")[0].replace('name = "two boxes"', "network = 3"),
    "rates": TEXT.replace("[device.rates]\nfloat32 = 1e12", "rates = 3"),
    "axes": f'{TEXT}[axes]\ntp = "rack"\n',
    "no-toml": "[device",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_description_is_an_error_in_words(name: str, golden: Golden) -> None:
    with pytest.raises(ClusterError) as error:
        Cluster.parse(WRONG[name], "mine.toml")
    golden(f"cluster-{name}", str(error.value))


@pytest.mark.parametrize("source", ["9xh100", "nowhere.toml"])
def test_a_cluster_that_is_not_there_is_an_error_in_words(source: str, golden: Golden) -> None:
    with pytest.raises(ClusterError) as error:
        Cluster.load(source)
    golden(f"cluster-{source.partition('.')[0]}", str(error.value))


@pytest.mark.parametrize("name", names())
def test_a_description_that_comes_with_the_package_survives_its_own_text(
    name: str, tmp_path: Path
) -> None:
    cluster = Cluster.load(name)
    (tmp_path / "own.toml").write_text(cluster.text())
    assert Cluster.load(tmp_path / "own.toml") == cluster


def test_axes_take_the_slowest_link_that_their_groups_span() -> None:
    cluster = Cluster.parse(TEXT)
    assert cluster.link(("tp",), MESH) == Link(1e-6, 1e9)
    assert cluster.link(("dp",), MESH) == cluster.link(("dp", "tp"), MESH) == Link(1e-5, 1e8)
    assert cluster.link(("b",), Mesh((("a", 2), ("b", 2)))) == cluster.node


def test_a_description_may_say_what_an_axis_spans() -> None:
    cluster = Cluster.parse(f'{TEXT}[axes]\ndp = "node"\ntp = "network"\n')
    assert cluster.link(("dp",), MESH) == cluster.node
    assert cluster.link(("tp",), MESH) == cluster.link(("dp", "tp"), MESH) == cluster.network


def test_more_ranks_than_one_node_has_need_a_network(golden: Golden) -> None:
    with pytest.raises(ClusterError) as error:
        Cluster.parse(TEXT.partition("[network]")[0]).link(("dp",), MESH)
    golden("cluster-one-node", str(error.value))


def test_a_rate_that_is_not_known_is_an_error(golden: Golden) -> None:
    with pytest.raises(ClusterError) as error:
        Cluster.parse(TEXT).rate("bfloat16")
    golden("cluster-no-rate", str(error.value))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("kind", WIRES)
def test_a_symbol_gives_the_share_that_its_number_gives(kind: str, convention: str) -> None:
    wire, n = Wire(kind, ("x",), shift=1), sympy.Symbol("n", positive=True, integer=True)
    formula = sympy.sympify(share_sent(wire, n, convention))
    for size in (2, 3, 4, 7, 16):
        assert formula.subs(n, size) == sympy.Rational(share_sent(wire, Fraction(size), convention))


def test_a_matrix_moves_in_rounds_of_broadcasts_as_the_conventions_say() -> None:
    """Of S elements in q rounds of S/q^2: (log2 q / q) S by trees, ((q-1)/q) S by rings, and
    ((q-1)/q^2) S pipelined (Optimus, arXiv 2104.05343)."""
    q = sympy.Symbol("q", positive=True, integer=True)
    shares = {c: q * share_sent(Wire("broadcast", ("q",)), q, c) / q**2 for c in CONVENTIONS}
    expected = {"tree": log2(q) / q, "ring": (q - 1) / q, "pipelined": (q - 1) / q**2}
    assert all(sympy.simplify(shares[c] - expected[c]) == 0 for c in CONVENTIONS)


def test_an_unknown_convention_is_an_error(golden: Golden) -> None:
    from meshwright.compiler.costs.volume import check_convention

    with pytest.raises(CompilerError) as error:
        check_convention("rings")
    golden("convention", str(error.value))
