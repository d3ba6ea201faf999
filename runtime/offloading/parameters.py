"""Parameters of which the device has a copy, and how it is known that somebody has written one."""

from __future__ import annotations

from torch import Tensor, nn


class HostParameter(nn.Parameter):
    """A parameter that is updated away from the device.

    Torch's `data` hides writes: `p.data.mul_(0.5)` leaves `p._version` as it was. Here it is
    `p.detach()`, the same memory, through which they count.
    """

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        nn.Parameter.data.__set__(self, value)  # type: ignore[attr-defined]
