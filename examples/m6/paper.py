"""What was published of M6-T (arXiv 2105.15082) and M6-10T (arXiv 2110.03888)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Parameters of all experts, and the time of training where it is in the abstract."""

    in_experts: float
    note: str = ""


PUBLISHED = {
    "100B": Published(103.1e9),
    "1T": Published(1.003e12, "480 V100-32GB"),
    "10T": Published(10.05e12, "512 GPUs, 10 days, with offloading"),
}
