"""Integer programs, for HiGHS through SciPy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

Terms: TypeAlias = Mapping[int, float]
"""A sum of variables, by number, each times a coefficient."""

MOST_NODES, GAP = 2_000, 2e-3
"""Where the search for something better usually ends: after so many nodes, or so close to the
bound. A limit in seconds would let ranks decide apart."""
TOLERANCE = 1e-6
"""By how much HiGHS lets a sum be outside of what it is held between."""


@dataclass(frozen=True, slots=True)
class Solution:
    """The value of each variable, what they cost, and a cost below which there is no solution."""

    values: tuple[float, ...]
    cost: float
    bound: float


class IntegerProgram:
    """Variables from 0 up with costs, and what holds between them; `solve` finds the least cost."""

    def __init__(self) -> None:
        self._costs: list[float] = []
        self._uppers: list[float] = []
        self._integer: list[bool] = []
        self._rows: list[tuple[Terms, float, float]] = []

    def variable(self, cost: float = 0.0, upper: float = 1.0, *, integer: bool = False) -> int:
        """The number of a new variable."""
        self._costs.append(cost)
        self._uppers.append(upper)
        self._integer.append(integer)
        return len(self._costs) - 1

    def require(self, terms: Terms, least: float = -math.inf, most: float = math.inf) -> None:
        """Hold a sum between two numbers."""
        self._rows.append((terms, least, most))

    def copy(self) -> IntegerProgram:
        """The same, to be added to."""
        found = IntegerProgram()
        found._costs, found._uppers = [*self._costs], [*self._uppers]
        found._integer, found._rows = [*self._integer], [*self._rows]
        return found

    def solve(self, *, gap: float = GAP, most_nodes: int | None = MOST_NODES) -> Solution | None:
        """The cheapest solution, or one that is found within `most_nodes` or costs at most the
        share `gap` more than the bound; None if none is found."""
        # SciPy takes half a second to import, and few plans need it.
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        rows = [i for i, (terms, *_) in enumerate(self._rows) for _ in terms]
        columns = [column for terms, *_ in self._rows for column in terms]
        entries = [float(entry) for terms, *_ in self._rows for entry in terms.values()]
        matrix = csr_array((entries, (rows, columns)), (len(self._rows), len(self._costs)))
        _, least, most = zip(*self._rows, strict=True)
        found = milp(
            self._costs,
            integrality=[int(each) for each in self._integer],
            bounds=Bounds(0.0, self._uppers),
            constraints=LinearConstraint(matrix, least, most),
            options={"mip_rel_gap": gap} | ({"node_limit": most_nodes} if most_nodes else {}),
        )
        if found.x is None:
            return None
        bound = found.fun if found.mip_dual_bound is None else found.mip_dual_bound
        return Solution(tuple(map(float, found.x)), float(found.fun), float(bound))
