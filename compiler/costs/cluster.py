"""A cluster as costs see it: devices, links and what they reach, read from a TOML file.

[device]              what one device is
type      = "cuda"
memory    = 80e9      bytes
bandwidth = 2.8e12    bytes per second to and from its memory
overhead  = 4e-6      seconds that an operator takes besides
[device.rates]        floating-point operations per second of products, by element type
bfloat16  = 6.5e14
[node]                devices that one link joins
devices   = 8
latency   = 1e-5      seconds before a collective begins to move anything
bandwidth = 3.6e11    bytes per second that each device sends
[network]             the same between nodes; left out where there is one node
[host]                the same between a device and its host's memory; for `offload`
[axes]                which link an axis of the mesh spans, where ranks do not fill nodes in order
dp        = "network"
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from meshwright.compiler.errors import CompilerError
from meshwright.compiler.layout.mesh import Mesh
from meshwright.dsl.errors import did_you_mean, either, spelled

FOLDER = Path(__file__).parent / "clusters"
"""The descriptions that come with the package."""
LINKS = ("node", "network")
"""What an axis may span, by name."""
_TABLES = {
    "device": ("type", "memory", "bandwidth", "overhead", "rates"),
    "node": ("devices", "latency", "bandwidth"),
    "network": ("latency", "bandwidth"),
    "host": ("latency", "bandwidth"),
    "axes": (),
}
_OPTIONAL = {"overhead": 0.0}
_DTYPES = ("float64", "float32", "bfloat16", "float16")


class ClusterError(CompilerError):
    """A cluster's description is wrong, or lacks what a program needs."""


@dataclass(frozen=True, slots=True)
class Link:
    """A link of devices: `latency` are the seconds before anything moves, and `bandwidth` the
    bytes per second that each device sends."""

    latency: float
    bandwidth: float

    def seconds(self, num_bytes: float) -> float:
        """How long a message of `num_bytes` takes."""
        return self.latency + num_bytes / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """A cluster: what one device computes, and what joins devices, nodes and hosts.

    `name` is what texts call it and `device` the type of its devices, as for `compile`. `rates` are
    floating-point operations per second by element type, `memory` is in bytes and `bandwidth` in
    bytes per second, `overhead` the seconds that an operator takes besides. `node` joins the
    `devices` of a node; `network` joins nodes, and `host` a device and its host, where there is
    one. `axes` has the link that an axis spans (`node` or `network`), where ranks do not fill one
    node after another.
    """

    name: str
    device: str
    memory: float
    bandwidth: float
    overhead: float
    rates: Mapping[str, float]
    devices: int
    node: Link
    network: Link | None = None
    host: Link | None = None
    axes: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def load(source: str | Path) -> Cluster:
        """The cluster of a TOML file at the path `source` or, by name, one that comes with the
        package (`8xh100`).

        Raises `CompilerError` for a file that cannot be read and a description that is wrong.
        """
        path = Path(source)
        if path.suffix != ".toml":
            return _named(str(source))
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ClusterError(
                f"cannot read the cluster `{source}`: {why}", help="check the path of the file"
            ) from None
        return Cluster.parse(text, str(source))

    @staticmethod
    def parse(text: str, name: str = "cluster") -> Cluster:
        """The cluster that a description says: `text` is TOML, and `name` what errors call it.

        Raises `CompilerError` for a description that is wrong.
        """
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ClusterError(
                f"`{name}` is not TOML: {error}", help="write `key = value`, one on each line"
            ) from None
        return _Reader(data, name).cluster()

    def link(self, axes: Iterable[str], mesh: Mesh) -> Link:
        """The slowest link that the groups over `axes` span. Raises `ClusterError` where that is
        between nodes and there is none."""
        if not self.spans_nodes(tuple(axes), mesh):
            return self.node
        if self.network is None:
            raise ClusterError(
                f"the mesh ({mesh.of_ranks}) needs {mesh.num_ranks} devices, and `{self.name}` "
                f"has one node of {self.devices}",
                help="add `[network]` with its `latency` and `bandwidth`, or more devices per node",
            )
        return self.network

    def spans_nodes(self, axes: tuple[str, ...], mesh: Mesh) -> bool:
        """Whether any group over `axes` has ranks on more than one node."""
        if any(self.axes.get(axis) == "network" for axis in axes):
            return True
        ranks = mesh.of_ranks
        nodes = np.arange(ranks.num_ranks).reshape([size for _, size in ranks.axes]) // self.devices
        along = tuple(
            i for i, name in enumerate(ranks.names) if name in axes and name not in self.axes
        )
        return bool((nodes.max(along) != nodes.min(along)).any()) if along else False

    def rate(self, dtype: str) -> float:
        """Floating-point operations per second on this element type. Raises `ClusterError` where
        it is not known."""
        if dtype not in self.rates:
            raise ClusterError(
                f"`{self.name}` has no rate for {dtype}",
                help=f"add `{dtype} = ...`, in operations per second, under `[device.rates]`",
            )
        return self.rates[dtype]

    def text(self) -> str:
        """The description as TOML, which `parse` reads."""
        lines = [f'name = "{self.name}"', "", "[device]", f'type = "{self.device}"']
        lines += [f"{key} = {getattr(self, key):.4g}" for key in ("memory", "bandwidth")]
        lines += [f"overhead = {self.overhead:.4g}", "", "[device.rates]"]
        lines += [f"{dtype} = {rate:.4g}" for dtype, rate in self.rates.items()]
        lines += ["", "[node]", f"devices = {self.devices}", *_link_lines(self.node)]
        for name in ("network", "host"):
            link = getattr(self, name)
            lines += ["", f"[{name}]", *_link_lines(link)] if link else []
        if self.axes:
            lines += ["", "[axes]", *(f'{axis} = "{link}"' for axis, link in self.axes.items())]
        return "\n".join(lines) + "\n"


def _link_lines(link: Link) -> list[str]:
    return [f"latency = {link.latency:.4g}", f"bandwidth = {link.bandwidth:.4g}"]


def names() -> list[str]:
    """The names of the descriptions that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def _named(name: str) -> Cluster:
    if name not in names():
        raise ClusterError(
            f"no cluster is called `{name}`",
            help=f"write {either(names())}, or the path of a TOML file",
        )
    return Cluster.load(FOLDER / f"{name}.toml")


class _Reader:
    """Reads the tables of a description, and says what is wrong with them."""

    def __init__(self, data: dict[str, Any], name: str) -> None:
        self.data, self.name = data, name

    def cluster(self) -> Cluster:
        """All of it."""
        self._known("", self.data, ("name", *_TABLES))
        for table, keys in _TABLES.items():
            found = self.data.get(table, {})
            if not isinstance(found, dict):
                raise self._wrong(f"`{table}` is {spelled(found)}", f"write it as `[{table}]`")
            self._known(table, found, keys)
        device = self._table("device")
        rates = device.get("rates", {})
        self._known("device.rates", rates, _DTYPES)
        node = self._table("node")
        return Cluster(
            str(self.data.get("name", self.name)),
            str(device.get("type", "cuda")),
            memory=self._number("device", device, "memory"),
            bandwidth=self._number("device", device, "bandwidth"),
            overhead=self._number("device", device, "overhead"),
            rates={key: self._number("device.rates", rates, key) for key in rates},
            devices=self._devices(node),
            node=self._link("node"),
            network=self._link("network") if "network" in self.data else None,
            host=self._link("host") if "host" in self.data else None,
            axes=self._axes(),
        )

    def _table(self, name: str) -> dict[str, Any]:
        if name not in self.data:
            raise self._wrong(f"`[{name}]` is missing", f"add `[{name}]`")
        found: dict[str, Any] = self.data[name]
        return found

    def _known(self, table: str, found: Any, keys: tuple[str, ...]) -> None:
        if not isinstance(found, dict):
            raise self._wrong(f"`{table}` is {spelled(found)}", f"write it as `[{table}]`")
        for key in found if keys else ():
            if key not in keys:
                where = f"`[{table}]` has" if table else "it has"
                raise self._wrong(f"{where} the unknown key `{key}`", did_you_mean(key, keys))

    def _number(self, table: str, found: dict[str, Any], key: str) -> float:
        value = found.get(key, _OPTIONAL.get(key))
        if value is None:
            raise self._wrong(f"`[{table}]` is missing `{key}`", f"add `{key} = ...`")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        least = "at least 0" if key in ("overhead", "latency") else "above 0"
        if not number or not math.isfinite(value) or value < 0 or (value == 0 and "above" in least):
            raise self._wrong(
                f"`{key}` under `[{table}]` is {spelled(value)}", f"give a number {least}"
            )
        return float(value)

    def _devices(self, node: dict[str, Any]) -> int:
        value = node.get("devices")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            what = "is missing" if value is None else f"is {spelled(value)}"
            raise self._wrong(f"`devices` under `[node]` {what}", "give a whole number above 0")
        return value

    def _link(self, table: str) -> Link:
        found = self._table(table)
        return Link(*(self._number(table, found, key) for key in ("latency", "bandwidth")))

    def _axes(self) -> dict[str, str]:
        axes: dict[str, str] = self.data.get("axes", {})
        for axis, link in axes.items():
            if link not in LINKS:
                raise self._wrong(
                    f"axis `{axis}` spans {spelled(link)}", 'write `"node"` or `"network"`'
                )
        return axes

    def _wrong(self, what: str, help: str) -> ClusterError:
        return ClusterError(f"the cluster `{self.name}` is wrong: {what}", help=help)
