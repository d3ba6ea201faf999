"""Dynamic loss scaling for float16: skip an update that overflows, and find the scale by trying.

The scale begins at 65536, halves where a gradient overflows, and doubles after 2000 updates without
an overflow, as in torch's `GradScaler`. Ranks agree on overflows first, so all skip alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from meshwright.runtime.errors import NonFiniteError
from meshwright.runtime.rank import RankState

_GROWTH, _BACKOFF, _INTERVAL, _LEAST = 2.0, 0.5, 2000, 1.0


class LossScaler:
    """The loss scale of a run, and the number of updates that were skipped. Unless gradients are
    `scaled`, the scale is 1 and none are skipped."""

    def __init__(self, states: Sequence[RankState], scaled: bool) -> None:
        self._states, self.scaled = states, scaled
        self._hidden: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def value(self) -> float:
        """The scale now."""
        return self._states[0].loss_scale.value if self.scaled else 1.0

    @property
    def num_skipped(self) -> int:
        """The number of updates skipped so far."""
        return self._states[0].loss_scale.num_skipped

    def adapt(self, *, overflowed: bool) -> None:
        """Count an update, and change the scale. Raises `NonFiniteError` below a scale of 1."""
        if not self.scaled:
            return
        if overflowed and self.value * _BACKOFF < _LEAST:
            raise NonFiniteError(
                f"gradients overflow in float16 at a loss scale of {self.value:g}",
                help="use `precision bf16`, or lower the learning rate; nothing was updated",
            )
        for scale in (state.loss_scale for state in self._states):
            scale.num_clean = 0 if overflowed else scale.num_clean + 1
            scale.num_skipped += overflowed
            if overflowed:
                scale.value *= _BACKOFF
            elif scale.num_clean >= _INTERVAL:
                scale.value, scale.num_clean = scale.value * _GROWTH, 0

    def hide(self, optimizer: Optimizer) -> None:
        """Let an optimizer find no gradients, so that its step changes nothing."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._hidden.append((parameter, parameter.grad))
                    parameter.grad = None

    def show(self) -> bool:
        """Put hidden gradients back, and return whether there were any."""
        hidden, self._hidden = self._hidden, []
        for parameter, gradient in hidden:
            parameter.grad = gradient
        return bool(hidden)
