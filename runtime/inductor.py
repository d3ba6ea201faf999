"""Compile what lies between two exchanges: each segment is one kernel of Inductor, or a few.

A segment is traced and compiled where it is first run, for the strides that its inputs have there;
equal segments, of equal layers or of all ranks of this process, share what was compiled. Torch
keeps the kernels on the disk, so that another process only loads them.

Inductor is called below `torch.compile`: what is compiled is straight code on tensors of known
sizes, in which nothing is left for Dynamo to find out or to guard, and a list of inputs that the
kernels empty lets go of each where it was last read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from meshwright.compiler.codegen.functions import CONTIGUOUS
from meshwright.compiler.codegen.instructions import Call, Segment
from meshwright.compiler.codegen.linking import RankContext
from meshwright.compiler.codegen.printing import Code, printed
from meshwright.compiler.codegen.segments import (
    CallError,
    function_of,
    segment_key,
    segmented,
)
from meshwright.compiler.graph.ir import MeshOp, Node
from meshwright.compiler.graph.text import op_text
from meshwright.compiler.kernels.blocks import in_one_block
from meshwright.compiler.placing.composite import composite_of
from meshwright.compiler.public import Program
from meshwright.dsl.errors import one_line, spelled
from meshwright.runtime.errors import RunError, failed

BACKENDS = ("eager", "inductor")
Compiled: TypeAlias = Callable[[list[Tensor]], Sequence[Tensor]]
"""A function of the list of a segment's inputs, which it empties."""
_Form: TypeAlias = tuple[tuple[int, ...], ...]
"""The strides of a segment's inputs."""

_compiled: dict[Any, Compiled] = {}
"""What was compiled in this process, by segment and the forms of its inputs."""


def check_backend(backend: object, device: torch.device) -> str:
    """The backend that `launch` was asked for; by default the one that is faster on the device.

    Raises `RunError` for one that is unknown, or that cannot compile here.
    """
    if backend is None:
        return "eager"
    if not (isinstance(backend, str) and backend in BACKENDS):
        raise RunError(
            f"`backend` is {spelled(backend)}",
            help='write `backend="eager"` or `backend="inductor"`',
        )
    if backend == "inductor":
        check_compiler(device)
    return backend


def check_compiler(device: torch.device) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RunError(
            "Inductor finds no C++ compiler on this machine",
            help="install g++ or clang++, name one in the variable `CXX`, or launch with "
            '`backend="eager"`',
        ) from error
    if device.type == "cuda" and not torch.utils._triton.has_triton():
        raise RunError(
            "Inductor finds no Triton on this machine, and compiles kernels of CUDA with it",
            help='install `triton`, or launch with `backend="eager"`',
        )


def fused_codes(program: Program) -> list[Code]:
    """The code of a program's graphs, with what can be fused in segments."""
    return [printed(segmented(each, is_fused, linked)) for each in program.instructions]


def is_fused(node: Node) -> bool:
    """Whether Inductor takes a node: it makes code of its own for the operator, which looks at no
    values, draws no random numbers, and depends on nothing but the operands."""
    if isinstance(node.op, MeshOp):
        known = composite_of(node.op)
        return known is not None and known.fuses(node)
    if node.op in CONTIGUOUS or not is_lowered(node.op):
        return False
    types = [type for type, _ in node.results if type is not None]
    types += [operand.tensor for operand in node.operands()]
    return not any(type.dtype.is_complex for type in types)


@cache
def is_lowered(op: torch._ops.OpOverload) -> bool:
    """Whether Inductor makes code of its own for an operator, or takes it apart."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import fallbacks, lowerings

    apart = (
        torch.Tag.nondeterministic_seeded,
        torch.Tag.data_dependent_output,
        torch.Tag.dynamic_output_shape,
    )
    if op.namespace != "aten" or op._schema.is_mutable or not set(apart).isdisjoint(op.tags):
        return False
    if op in fallbacks or _takes_places(op):
        return False
    return op in lowerings or op in select_decomp_table() or op._can_decompose()


def _takes_places(op: torch._ops.OpOverload) -> bool:
    """Whether an operator takes places in another tensor, which may be outside of it: an error in
    eager mode, and the end of the process inside of a kernel."""
    names = {argument.name for argument in op._schema.arguments}
    return not names.isdisjoint(("index", "indices", "target"))


def linked(segment: Segment, context: RankContext) -> Compiled:
    """What a segment calls on one rank."""
    key = segment_key(segment, context)
    found: dict[_Form, Compiled] = {}

    def run(given: list[Tensor]) -> Sequence[Tensor]:
        form = tuple([tensor.stride() for tensor in given])
        if form not in found:
            found[form] = _shared(segment, context, key, given)
        try:
            return found[form](given)
        except Exception as error:
            raise failed(_spelled(segment), segment.node, error) from error

    return run


def _spelled(segment: Segment) -> str:
    """The operators of a segment, of which one failed."""
    nodes = [each.node for each in segment.body if isinstance(each, Call)]
    return (
        f"one of {len(nodes)} operators from `{op_text(nodes[0].op)}` to `{op_text(nodes[-1].op)}`"
    )


def _shared(segment: Segment, context: RankContext, key: Any, given: list[Tensor]) -> Compiled:
    """What was compiled for equal segments on inputs like these, or is now."""
    forms = tuple((each.shape, each.stride(), each.dtype, each.device) for each in given)
    if (key, forms) not in _compiled:
        try:
            _compiled[key, forms] = _fused(function_of(segment, context), given)
        except Exception as error:
            _check_calls(segment, context, given)
            raise _compile_error(segment, error) from error
    return _compiled[key, forms]


def _check_calls(segment: Segment, context: RankContext, given: list[Tensor]) -> None:
    """Raise `OperatorError` if the calls fail as well: then Inductor is not what is wrong."""
    try:
        with torch.no_grad():
            function_of(segment, context)(*given)
    except CallError as error:
        cause = error.__cause__ or error
        raise failed(f"`{op_text(error.node.op)}`", error.node, cause) from cause


def _fused(function: Callable[..., list[Any]], given: Sequence[Tensor]) -> Compiled:
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    mode = FakeTensorMode()
    fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in given]
    with mode, torch.no_grad(), in_one_block():
        plain = make_fx(function)(*fakes)
        module = make_fx(functionalize(plain), decomposition_table=select_decomp_table())(*fakes)
        expected = plain(*fakes)
    kernel = compile_fx_inner(module, fakes)
    return _apart(kernel, given, [*fakes, *expected])


def _apart(kernel: Compiled, given: Sequence[Tensor], expected: Sequence[Tensor]) -> Compiled:
    """The kernel with results that share memory only where those of the calls do: others may be
    written over, and are copied."""
    results = kernel(list(given))
    for result, each in zip(results, expected[len(given) :], strict=True):
        if (result.shape, result.dtype) != (each.shape, each.dtype):
            raise TypeError(f"a result is {result.dtype} {list(result.shape)} and not {each.dtype}")
    own, plain = _first_in_memory([*given, *results]), _first_in_memory(expected)
    shared = [
        place
        for place in range(len(results))
        if own[len(given) + place] not in (len(given) + place, plain[len(given) + place])
    ]
    if not shared:
        return kernel

    def run(inputs: list[Tensor]) -> Sequence[Tensor]:
        found = list(kernel(inputs))
        for place in shared:
            found[place] = found[place].clone()
        return found

    return run


def _first_in_memory(tensors: Sequence[Tensor]) -> list[int]:
    """For each tensor, the place of the first that shares its memory."""
    first: dict[int, int] = {}
    return [
        first.setdefault(int(tensor.untyped_storage()._cdata), place)
        for place, tensor in enumerate(tensors)
    ]


def _compile_error(segment: Segment, error: BaseException) -> RunError:
    node = segment.node
    error = error.__cause__ if isinstance(error, CallError) and error.__cause__ else error
    problem = one_line(str(error).strip().partition("\n")[0]) or type(error).__name__
    module = f"`{node.origin.module}`" if node.origin.module else "the model"
    return RunError(
        f"Inductor cannot compile what begins with `{op_text(node.op)}` in {module}: {problem}",
        where=filter(None, (node.origin.source,)),
        help='launch with `backend="eager"`',
    )
