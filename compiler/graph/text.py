"""Nodes as text: the type with `@axis`, the operator and the arguments, exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    MOVES,
    SAVED,
    TRANSFER,
    WAIT,
    Graph,
    MeshOp,
    Node,
    Op,
    TensorType,
    op_stem,
)
from meshwright.compiler.layout.collectives import COLLECTIVES
from meshwright.compiler.layout.layout import Layout, replicated

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


_PLAIN_OPS = (INPUT, SAVED, *MOVES, WAIT)
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def dtype_text(dtype: torch.dtype) -> str:
    """`f32` for `torch.float32`."""
    return _DTYPES.get(dtype) or str(dtype).removeprefix("torch.")


def type_text(type: TensorType, layout: Layout | None, graph: Graph, *, local: bool = False) -> str:
    """`f32[8@dp, 16] partial(tp)`, or what one rank holds: `f32[4, 16] partial(tp)`."""
    layout = layout or replicated(type.shape)
    if local:
        layout = replicated(layout.local_shape(graph.mesh)).add_partial(layout.partial_axes)
    return f"{dtype_text(type.dtype)}{layout}"


def node_type_text(node: Node, graph: Graph, *, local: bool = False) -> str:
    """The type of a node, or of each result of a node that has multiple."""
    if isinstance(node.type, TensorType):
        layout = node.layout
        assert not isinstance(layout, tuple)
        return type_text(node.type, layout, graph, local=local)
    if isinstance(node.type, tuple):
        layouts = node.layout if isinstance(node.layout, tuple) else (None,) * len(node.type)
        parts = (
            "-" if type is None else type_text(type, layout, graph, local=local)
            for type, layout in zip(node.type, layouts, strict=True)
        )
        return f"({', '.join(parts)})"
    return "()"


def op_text(op: Op) -> str:
    """The operator as it is printed: torch's own without a prefix."""
    plain = not isinstance(op, MeshOp) or op.name in COLLECTIVES or op in _PLAIN_OPS
    return op_stem(op) if plain else str(op)


def call_text(node: Node) -> str:
    """The right-hand side of a node's line."""
    if node.op == INPUT:
        return f"input({node.args[0]} {node.args[1]})"
    if node.op == GETITEM:
        return f"{node.args[0].name}[{node.args[1]}]"
    if node.op == TRANSFER:
        return f"transfer({node.args[0].name}, to stage {node.stage})"
    return f"{op_text(node.op)}({', '.join(arg_texts(node, arg_text))})"


def arg_texts(node: Node, spell: Callable[[Any], str]) -> list[str]:
    """The arguments of a call as they are printed, each spelt by `spell`; axes have no name."""
    parts = [spell(arg) for arg in node.args]
    for key, value in node.kwargs.items():
        if isinstance(node.op, MeshOp) and key == "axes":
            parts += value
        elif key not in ("device", "pin_memory", "layout"):
            parts.append(f"{key}={spell(value)}")
    return parts


def arg_text(arg: Any) -> str:
    """An argument as it is printed: nodes by name."""
    if isinstance(arg, Node):
        return arg.name
    if isinstance(arg, (tuple, list)):
        return f"[{', '.join(map(arg_text, arg))}]"
    if isinstance(arg, torch.dtype):
        return dtype_text(arg)
    if isinstance(arg, float) and math.isfinite(arg) and arg == int(arg) and abs(arg) < 1e15:
        return f"{arg:.1f}"
    return str(arg)


def size_text(num_bytes: int) -> str:
    """`768 B`, `1.5 KiB`, `12 MiB`."""
    size, unit = float(num_bytes), _UNITS[0]
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{size:.1f} {unit}" if unit != "B" and size < 100 else f"{size:.0f} {unit}"


def size_written(size: int, *, up: bool = False) -> str:
    """A size as a plan has it: to the byte or, rounded `up`, of three digits or more."""
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
    unit = next((unit for unit, each in units.items() if up and size >= 100 * each), "B")
    return f"{-(-size // units.get(unit, 1))}{unit}"


_PLAIN = str.maketrans({"…": "...", "·": "*", "│": "|", "┌": "+", "└": "+"})


def spelt(text: str, encoding: str | None) -> str:
    """The text in characters that `encoding` has: `...` for `…`, `3*64` for `3·64`, `|` for `│`."""
    encoding = encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        plain = text.translate(_PLAIN)
        return plain.encode(encoding, "backslashreplace").decode(encoding)
    return text


def exact_text(graph: Graph) -> str:
    """The whole graph, one line per node, to compare programs by: nothing is rounded."""
    nodes = (
        f"{node.name}: {node_type_text(node, graph)} = {call_text(node)}  # {node.origin.module}"
        for node in graph.nodes
    )
    outputs = [f"return {output.label} = {output.node.name}" for output in graph.outputs]
    return "\n".join((f"graph {graph.name} mesh {graph.mesh}", *nodes, *outputs))
