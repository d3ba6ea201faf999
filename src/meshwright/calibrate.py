"""Measure the machine at hand as a cluster: what one rank computes while another does the same, and
what the two send each other. `meshwright calibrate` starts this in two processes.

It takes some seconds. Rates are those of large products; what is reached with small ones is less.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from meshwright.compiler.costs.cluster import Cluster, Link

_SECONDS = 0.4
"""How long each measurement is repeated."""
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
"""The size of a tensor that no cache holds."""
_SIDES = {"cpu": 768, "cuda": 8192}
"""The rows and columns of a product."""
_MESSAGE = 1 << 24
"""The bytes of a message for which latency does not matter."""


def main(device: str, path: str) -> None:
    """Measure in this process, one of two, and write the description where rank 0 is."""
    links = "nccl" if device == "cuda" and torch.cuda.device_count() > 1 else "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group(links)
    # On a machine with one GPU, this measures it alone.
    if links == "nccl" or device == "cpu" or dist.get_rank() == 0:
        cluster = measured(device)
    dist.barrier()
    link = _link(device if links == "nccl" else "cpu")
    if dist.get_rank() == 0:
        found = Cluster(**{**vars(cluster), "node": link})
        Path(path).write_text(found.text(), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measured(device: str) -> Cluster:
    """What one device of this machine is; the link of its node is still to be measured."""
    rates = {str(dtype).removeprefix("torch."): _rate(device, dtype) for dtype in _DTYPES}
    if device == "cuda":
        name, devices = torch.cuda.get_device_name(), torch.cuda.device_count()
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        name, devices = platform.node() or "this machine", os.cpu_count() or 1
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    return Cluster(
        name=name,
        device=device,
        memory=memory,
        bandwidth=_bandwidth(device),
        overhead=_overhead(device),
        rates=rates,
        devices=devices,
        node=Link(0.0, 1.0),
        host=_host_link(device),
    )


def _rate(device: str, dtype: torch.dtype) -> float:
    """The floating-point operations per second of a product."""
    side = _SIDES[device]
    a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _seconds(device, lambda: torch.mm(a, b))


def _bandwidth(device: str) -> float:
    """The bytes per second that are read and written."""
    source = torch.ones(_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _BYTES[device] / _seconds(device, lambda: torch.add(source, 1, out=target))


def _overhead(device: str) -> float:
    """The seconds of an operator that has next to nothing to do."""
    x = torch.ones(8, device=device)

    def hundred() -> None:
        for _ in range(100):
            torch.add(x, 1, out=x)

    return _seconds(device, hundred) / 100


def _host_link(device: str) -> Link | None:
    """What joins a device and its host; none where they are one."""
    if device == "cpu":
        return None
    there = torch.empty(_BYTES["cpu"], dtype=torch.uint8, pin_memory=True)
    here, small = torch.empty_like(there, device=device), torch.empty(1, device=device)
    latency = _seconds(device, lambda: small.cpu())
    seconds = _seconds(device, lambda: here.copy_(there))
    return Link(latency, _BYTES["cpu"] / max(seconds - latency, 1e-9))


def _link(device: str) -> Link:
    """What joins the two processes, by all-reduces, of which each sends as much as it holds."""
    small, large = (torch.zeros(size // 4, device=device) for size in (8, _MESSAGE))
    latency = _seconds(device, lambda: dist.all_reduce(small), times=200)
    seconds = _seconds(device, lambda: dist.all_reduce(large), times=20)
    return Link(latency, _MESSAGE / max(seconds - latency, 1e-9))


def _seconds(device: str, function: Callable[[], object], times: int = 0) -> float:
    """The median of the seconds of a call, of so many or for a while; the first is slower."""
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < times + 2 or (not times and time.perf_counter() - begin < _SECONDS):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


if __name__ == "__main__":
    main(*sys.argv[1:])
