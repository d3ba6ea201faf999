"""A pipeline that sends gradients as late as autograd does: after the whole backward.

Meshwright's tables send the gradient of an input before the weight gradients of the same backward.
"""

from __future__ import annotations

from dataclasses import replace

import meshwright as mw
from meshwright.compiler.graph.ir import Phase
from meshwright.compiler.schedules.actions import Action, Entry, Send


def late(program: mw.Program) -> mw.Program:
    """The program in which gradients are sent after the weight gradients of the same backward."""
    rows = []
    for row in program.table.rows:
        moved: dict[Entry, Entry] = {
            Action(Phase.WEIGHT, entry.link.source, entry.microbatch): entry
            for entry in row
            if isinstance(entry, Send) and entry.link.source_phase is Phase.BACKWARD
        }
        kept = [entry for entry in row if entry not in moved.values()]
        rows.append(tuple(e for entry in kept for e in (entry, moved.get(entry)) if e is not None))
    return replace(program, table=replace(program.table, rows=tuple(rows)))
