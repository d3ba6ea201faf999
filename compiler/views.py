"""Which operators give a view of their first operand: no memory and no work of their own."""

from __future__ import annotations

from functools import lru_cache

from meshwright.compiler.ir import MeshOp, Op


@lru_cache(maxsize=4096)
def is_view(op: Op) -> bool:
    """Whether the result aliases an operand without writing to it, by the operator's schema."""
    if isinstance(op, MeshOp):
        return op.name in ("slice", "narrow", "bucket_item")
    returns = op._schema.returns
    return bool(returns) and all(
        value.alias_info is not None and not value.alias_info.is_write for value in returns
    )
