"""What parts of a model report beside its outputs, as a run keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from meshwright.compiler.graph.ir import Output, OutputKind
from meshwright.runtime.rank import Results


class Reporting:
    """The part of a run that keeps what the last call reported."""

    _metrics: Mapping[Output, Tensor] = MappingProxyType({})

    def metrics(self) -> dict[str, dict[str, Tensor]]:
        """Metrics that the mixtures of experts reported in the last call, by name.

        Of each: `load`, the share of the choices that each expert was given before any was dropped,
        `dropped`, the share of the choices that no expert had room for (of `expert_choice`, of the
        tokens that no expert took), and `entropy`, the mean entropy of the router in nats. Global,
        and the same on every rank; empty where the model has no mixture. Does not wait for the
        device.
        """
        return {
            output.name: {"load": value[:-2], "dropped": value[-2], "entropy": value[-1]}
            for output, value in self._metrics.items()
        }

    def _forget(self) -> None:
        """Make room for what the next call reports."""
        self._metrics = {}

    def _reported(self, found: Results) -> Results:
        """The results of a call without what is reported, which is kept."""
        self._metrics = {o: v for o, v in found.items() if o.kind is OutputKind.METRIC}
        return {o: v for o, v in found.items() if o not in self._metrics}


def returned(found: Results) -> Any:
    """What a step returns."""
    loss, *outputs = found.values()
    return (loss, *outputs) if outputs else loss
