"""From a functional exported program to a `Graph`: names, types, origins, gradients."""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.export.graph_signature import OutputKind as ExportedKind

from meshwright.compiler.capture.aliases import NamedTensors
from meshwright.compiler.capture.exported.exact import is_exact
from meshwright.compiler.capture.inputs import InputSpec
from meshwright.compiler.capture.origin import origin_of
from meshwright.compiler.capture.outputs import Mode, OutputKey
from meshwright.compiler.capture.simplify import CAST, simplify
from meshwright.compiler.capture.tracing.values import picked_by_a_mask
from meshwright.compiler.errors import CaptureError
from meshwright.compiler.graph.ir import (
    GETITEM,
    INPUT,
    Builder,
    Graph,
    Node,
    NodeType,
    Output,
    OutputKind,
    TensorType,
)
from meshwright.compiler.graph.slots import call_operands
from meshwright.compiler.layout.mesh import Mesh
from meshwright.compiler.placing.emit import FIRST_ONLY

_aten = torch.ops.aten

_STOPS = {
    _aten.detach.default,
    *(getattr(_aten, name).default for name in ("zeros_like", "ones_like", "empty_like")),
    *(getattr(_aten, name).default for name in ("full_like", "rand_like", "randn_like")),
    *(getattr(_aten.randint_like, name) for name in ("default", "Tensor", "low_dtype")),
    *(_aten.binomial.default, _aten.bernoulli.p),
    *(getattr(_aten, name).default for name in ("new_zeros", "new_ones", "new_full", "new_empty")),
}
"""Operators whose result does not depend on their operand's values, or that stop gradients."""
_STRIDED = {
    getattr(_aten, name).default for name in ("as_strided", "as_strided_copy", "as_strided_scatter")
}


class Converter:
    """One conversion; `convert` is its only entry."""

    def __init__(
        self,
        program: ExportedProgram,
        named: NamedTensors,
        inputs: InputSpec,
        device: torch.device,
        mode: Mode,
        *,
        writes_parameters: bool = False,
    ) -> None:
        self.program, self.named, self.inputs = program, named, inputs
        self.device, self.differentiable = device, mode == "train"
        self.writes_parameters = writes_parameters
        self.builder = Builder("model", Mesh(()))
        self.env: dict[fx.Node, Node] = {}
        self.by_target: dict[tuple[str, str], Node] = {}
        self.constants: dict[str, Tensor] = {}

    def convert(self, returned: Sequence[OutputKey]) -> Graph:
        """The graph, whose outputs are `returned`."""
        live = _live(self.program.graph)
        self._inputs()
        for node in self.program.graph.nodes:
            if node.op == "call_function" and node in live:
                self.env[node] = self._call(node)
        return self._without_unused_constants(self.builder.graph(self._outputs(returned)))

    def _without_unused_constants(self, graph: Graph) -> Graph:
        """Simplifying leaves some behind: the empty tensors that caches start with."""
        used = {operand for node in graph.nodes for operand in node.operands()}
        used |= graph.returned
        idle = {n for n in graph.inputs if n.args[0] == "constant" and n not in used}
        for node in idle:
            del self.constants[node.args[1]]
        return replace(graph, nodes=tuple(node for node in graph.nodes if node not in idle))

    def _inputs(self) -> None:
        for name, tensor in self.named.parameters.items():
            wanted = self.differentiable and tensor.requires_grad
            self._input("parameter", name, TensorType.of(tensor), requires_grad=wanted)
        for name, tensor in self.named.buffers.items():
            self._input("buffer", name, TensorType.of(tensor))
        for name, type in self.inputs.types.items():
            self._input("argument", name, type)
        placeholders = self.program.graph.find_nodes(op="placeholder")
        arguments = iter(self.inputs.types)
        for node, spec in zip(placeholders, self.program.graph_signature.input_specs, strict=True):
            self.env[node] = self._placeholder(node, spec, arguments)

    def _placeholder(self, node: fx.Node, spec: Any, arguments: Any) -> Node:
        if spec.kind is InputKind.USER_INPUT:
            return self.by_target["argument", next(arguments)]
        if spec.kind is InputKind.CONSTANT_TENSOR:
            return self._constant(node, spec.target)
        name = self.named.aliases[spec.target.removeprefix("model.")]
        kind = "parameter" if name in self.named.parameters else "buffer"
        return self.by_target[kind, name]

    def _constant(self, node: fx.Node, target: str) -> Node:
        name = target.removeprefix("model.")
        tensor = self.program.constants[target]
        if isinstance(tensor, FakeTensor):
            _refuse_untraced(node)
        self.constants[name] = tensor.detach()
        return self._input("constant", name, TensorType.of(self.constants[name]))

    def _input(
        self, kind: str, name: str, type: TensorType, *, requires_grad: bool = False
    ) -> Node:
        node = self.builder.emit(
            INPUT, (kind, name), type=type, requires_grad=requires_grad, name=_identifier(name)
        )
        self.by_target[kind, name] = node
        return node

    def _call(self, node: fx.Node) -> Node:
        type = _type(node)
        args = self._arguments(node.args)
        kwargs = {key: self._arguments(value) for key, value in node.kwargs.items()}
        origin = replace(origin_of(node), exact=is_exact(node))
        if node.target in _STRIDED:
            _check_strided(node)
        if node.target is operator.getitem:
            if args[0].op is _aten.dropout.default:
                dropped: Node = args[0]
                return dropped
            op: Any = GETITEM
        elif _is_whole_dropout(node):
            op, type = _aten.dropout.default, args[0].type
        elif isinstance(node.target, torch._ops.OpOverload):
            simpler = simplify(node.target, args, kwargs, type)
            if isinstance(simpler, Node):
                return simpler
            op, args, kwargs = simpler
        else:
            _refuse_dynamic(node)
        grad = _is_differentiable(op, args, type) and any(
            operand.requires_grad for operand in call_operands(args, kwargs)
        )
        return self.builder.emit(
            op, args, kwargs, type=type, origin=origin, requires_grad=grad, name=_stem(node, op)
        )

    def _arguments(self, value: Any) -> Any:
        """Arguments with our nodes, plain containers and the device that is compiled for."""
        if isinstance(value, fx.Node):
            return self.env[value]
        if isinstance(value, tuple):
            return tuple(self._arguments(item) for item in value)
        if isinstance(value, list):
            return [self._arguments(item) for item in value]
        if isinstance(value, torch.device):
            return self.device
        return value

    def _outputs(self, returned: Sequence[OutputKey]) -> list[Output]:
        values: Any = self.program.graph.output_node().args[0]
        remaining = iter(returned)
        found: list[Output] = []
        updates: list[Output] = []
        specs = self.program.graph_signature.output_specs
        for node, spec in zip(values, specs, strict=True):
            if spec.kind is ExportedKind.USER_OUTPUT:
                found.append(Output(*next(remaining), self.env[node]))
            elif spec.kind in (ExportedKind.BUFFER_MUTATION, ExportedKind.PARAMETER_MUTATION):
                target = str(spec.target).removeprefix("model.")
                if spec.kind is ExportedKind.PARAMETER_MUTATION and not self.writes_parameters:
                    _refuse_parameter_write(target, node)
                name = self.named.aliases[target]
                if (OutputKind.BUFFER, name) not in returned:  # written, then assigned anew
                    updates.append(Output(OutputKind.BUFFER, name, self._written(node, name)))
        return found + updates

    def _written(self, node: fx.Node, name: str) -> Node:
        """What is written to a tensor, in its type: export may give the operand of a `copy_`."""
        kind = "parameter" if name in self.named.parameters else "buffer"
        value, type = self.env[node], self.by_target[kind, name].tensor
        for op, target, own in (
            (CAST, type.dtype, TensorType(value.tensor.shape, type.dtype)),
            (_aten.expand.default, list(type.shape), type),
        ):
            if value.type != own:
                value = self.builder.emit(op, (value, target), type=own, origin=value.origin)
        return value


def _live(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that some output needs: no asserts, no profiler marks, no dead code."""
    live: set[fx.Node] = set()
    stack = [graph.output_node()]
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack.extend(node.all_input_nodes)
    return live


def _type(node: fx.Node) -> NodeType:
    """The type of what a node returns; data-dependent sizes are refused."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return _tensor_type(node, value)
    if isinstance(value, (tuple, list)):
        if any(isinstance(item, (tuple, list)) for item in value):
            _refuse_nested(node)
        return tuple(_tensor_type(node, v) if isinstance(v, Tensor) else None for v in value)
    return _refuse_dynamic(node)


def _refuse_nested(node: fx.Node) -> NoReturn:
    raise CaptureError(
        f"`{node.target}` returns a list of tensors among its results",
        code="nested results",
        culprit=origin_of(node).source,
        help="write it with operators that return tensors",
    )


def _tensor_type(node: fx.Node, value: Tensor) -> TensorType:
    if not all(isinstance(size, int) for size in value.shape):
        _refuse_dynamic(node)
    if value.layout is not torch.strided:
        raise CaptureError(
            f"`{node.target}` gives a sparse tensor",
            code="sparse",
            culprit=origin_of(node).source,
            help="keep it dense, with zeros where nothing is stored",
        )
    return TensorType.of(value)


def _refuse_dynamic(node: fx.Node) -> NoReturn:
    if not isinstance(node.target, torch._ops.OpOverload) and node.target is not operator.getitem:
        raise CaptureError(
            "the forward uses `torch.vmap` or another transform of `torch.func`, which leaves no "
            "operators behind",
            code="transform",
            culprit=origin_of(node).source,
            help="write it out: operators that take a batch, and the derivative as a formula",
        )
    if node.target in (_aten.index.Tensor, _aten.masked_select.default):
        raise picked_by_a_mask(origin_of(node).source)
    raise CaptureError(
        f"`{node.target}` turns the values of a tensor into a size or a number",
        code="data dependent",
        culprit=origin_of(node).source,
        help="keep sizes fixed: use torch.where, a mask or a capacity instead",
    )


def _check_strided(node: fx.Node) -> None:
    """Refuse `as_strided` unless its operand is contiguous: a graph knows values, not memory."""
    source: Any = node.args[0]
    if not isinstance(source, fx.Node):
        return
    value = source.meta.get("val")
    if isinstance(value, Tensor) and (not value.is_contiguous() or value.storage_offset()):
        raise CaptureError(
            "`as_strided` is called on a view of another tensor's memory",
            code="strides",
            culprit=origin_of(node).source,
            help="call `.clone(memory_format=torch.contiguous_format)` on its operand first, or "
            "index it instead",
        )


def _is_whole_dropout(node: fx.Node) -> bool:
    """Whether this is what functionalising makes of `dropout`: nobody uses its mask."""
    if node.target is not _aten.native_dropout.default:
        return False
    return all(user.args[1] == 0 for user in node.users if user.target is operator.getitem)


def _refuse_untraced(node: fx.Node) -> NoReturn:
    user = next(iter(node.users), node)
    raise CaptureError(
        f"`{user.target}` uses a tensor that was computed where export cannot see",
        code="untraced",
        culprit=origin_of(user).source,
        help="compute it with torch operators on the inputs, parameters and buffers",
    )


def _refuse_parameter_write(name: str, node: fx.Node) -> NoReturn:
    raise CaptureError(
        f"the forward writes to parameter `{name}`",
        code="parameter write",
        culprit=origin_of(node).source,
        help="update it after the step, or make it a buffer",
    )


def _is_differentiable(op: Any, args: tuple[Any, ...], type: NodeType) -> bool:
    if op in _STOPS:
        return False
    if op is GETITEM and args[0].op in FIRST_ONLY and args[1] > 0:
        return False
    types = type if isinstance(type, tuple) else (type,)
    return any(t and t.differentiable for t in types)


def _identifier(name: str) -> str:
    """`blocks_0_up_weight`: a name that generated code can use as it is."""
    stem = re.sub(r"\W", "_", name)
    return stem if stem.isidentifier() and not keyword.iskeyword(stem) else f"_{stem}"


def _stem(node: fx.Node, op: Any) -> str:
    """`split_0` for one of multiple results; empty where the operator's own name will do."""
    if op is not GETITEM:
        return ""
    source, index = node.args
    return f"{re.sub(r'_[0-9]+$', '', str(source))}_{index}"
