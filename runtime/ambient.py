"""Keep what a caller has set for all of torch out of a run.

Under `torch.inference_mode()` tensors are made that nothing can train later, under a default device
they are made elsewhere, and autocast changes the types that a graph has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def apart_from_caller(device: str) -> Iterator[None]:
    """Leave the caller's inference mode, default device, and autocast on `device`, for a while."""
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
