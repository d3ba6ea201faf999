"""Times, memory and profiles of training steps on one device, without a process group."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], Any]
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def wait(device: str) -> None:
    """Wait for all that the device was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(
    steps: Mapping[str, Step], device: str, rounds: int, each: int
) -> Iterator[dict[str, list[float]]]:
    """Milliseconds per step of each peer in each round so far, of `each` steps, in an order that
    rotates by one per round. On a CPU, those of this process on all its cores: other processes
    take none of them."""
    now = time.perf_counter if device == "cuda" else time.process_time
    found: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds):
        start = number % max(len(names), 1)
        for name in (*names[start:], *names[:start]):
            steps[name]()  # its memory and caches are cold after the others' turns
            wait(device)
            begin = now()
            for _ in range(each):
                steps[name]()
            wait(device)
            found[name].append((now() - begin) * 1e3 / each)
        yield found


def times(found: Mapping[str, list[float]], reference: str = "") -> dict[str, Any]:
    """Medians, and the ratio to a peer (the first if it is not said) round by round, with its
    least and most."""
    shown: dict[str, Any] = {}
    reference = reference or next(iter(found), "")
    for name, taken in found.items():
        ratios = [a / b for a, b in zip(taken, found[reference], strict=True)]
        spread = [statistics.median(ratios), min(ratios), max(ratios)]
        shown[name] = {"ms": statistics.median(taken), f"to {reference}": spread}
    return shown


class Held:
    """The bytes that tensors on the device take from here on; none on a CPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.before = self._now()

    def _now(self) -> int:
        if self.device != "cuda":
            return 0
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def bytes(self) -> int:
        """What is there now and was not before."""
        return self._now() - self.before

    def peak(self, step: Step) -> int:
        """The most that a step adds to what was there before."""
        if self.device != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.before


def profiled(step: Step, device: str) -> dict[str, Any]:
    """How often a step waits for the device, how long the device works, and the share of copies
    between host and device during which it computes as well; {} on a CPU."""
    if device != "cuda":
        return {}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = list(found.profiler.kineto_results.events())  # type: ignore[union-attr]
    on_device = [e for e in events if e.device_type() == torch.autograd.DeviceType.CUDA]
    spans = {
        kind: _joined((e.start_ns(), e.end_ns()) for e in on_device if kind == _kind(e.name()))
        for kind in ("copy", "kernel")
    }
    copied = sum(b - a for a, b in spans["copy"])
    hidden = sum(_overlap(span, spans["kernel"]) for span in spans["copy"])
    waits = sum(e.name() in _WAITS for e in events)
    return {
        "waits": max(0, waits - 1),  # the last one is this function's
        "kernels": sum(_kind(e.name()) == "kernel" for e in on_device),
        "computing ms": sum(b - a for a, b in spans["kernel"]) / 1e6,
        "copying ms": copied / 1e6,
        "hidden share of copies": hidden / copied if copied else None,
    }


def _kind(name: str) -> str:
    if name.startswith("Memcpy"):
        return "copy" if "DtoH" in name or "HtoD" in name else "other"
    return "other" if name.startswith("Memset") else "kernel"


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The times in any of these spans, as spans apart from one another."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def _overlap(span: tuple[int, int], others: Iterable[tuple[int, int]]) -> int:
    return sum(max(0, min(span[1], b) - max(span[0], a)) for a, b in others)
