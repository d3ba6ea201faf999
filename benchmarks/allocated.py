"""The most bytes of tensors that a process holds during one training step.

They are counted by the events of torch's allocator, as its profiler records them from before there
is any tensor: so what operators take inside themselves, and storages that are resized, count too.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.peers import Peer

_MEASURED = "the step that is measured"


def peak(
    build: Callable[[], Peer], warm: Callable[[Peer], object], step: Callable[[Peer], object]
) -> int:
    """The bytes of `step` of the peer that `build` makes, after `warm`.

    Not counted is what the peer has elsewhere: memory that would be the host's if the device were
    another.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        peer = build()
        warm(peer)
        elsewhere = sum(each.untyped_storage().nbytes() for each in peer.elsewhere())
        with record_function(_MEASURED):
            step(peer)
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    (measured,) = (each for each in events if each.name() == _MEASURED)
    sizes = [(each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]"]
    alive = most = 0
    for time, size in sorted(sizes):
        alive += size
        if measured.start_ns() <= time <= measured.end_ns():
            most = max(most, alive)
    return most - elsewhere
