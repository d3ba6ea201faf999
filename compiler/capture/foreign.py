"""Turn what a model or `torch.export` raises into one error with the user's line and a way out."""

from __future__ import annotations

import io
import linecache
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress

from meshwright.compiler.capture.origin import line_of, raised_by_statement, raised_by_user
from meshwright.compiler.capture.tracing.patches import OfThread
from meshwright.compiler.errors import CaptureError
from meshwright.dsl.errors import MeshwrightError, one_line

_CHATTY = (
    "torch.export",
    "torch._export",
    "torch.fx.experimental.symbolic_shapes",
    "torch._subclasses.fake_tensor",
)

_KNOWN = (
    (
        ("DataDependentOutputException: aten.equal", "DataDependentOutputException: aten.allclose"),
        "compares values",
        (
            "the forward decides by comparing the values of tensors, as `torch.equal`, "
            "`torch.allclose`, `torch.cov` and `torch.corrcoef` do"
        ),
        "decide outside of the model, and write a covariance as `x.T @ x` of centred rows",
    ),
    (
        (
            "GuardOnDataDependentSymNode",
            "data-dependent",
            "Could not guard",
            "DataDependentOutput",
        ),
        "data dependent",
        "the forward decides by the value of a tensor",
        "use torch.where or a mask, or decide outside of the model",
    ),
    (
        ("_ctc_loss",),
        "data dependent",
        "`ctc_loss` keeps a table for its backward whose size depends on the values of its lengths",
        "wrap it in a `torch.library.custom_op` with `register_fake` and `register_autograd`",
    ),
    (
        ("DynamicOutputShapeException",),
        "data dependent",
        "the size of what `{operator}` returns depends on the values of a tensor",
        "keep sizes fixed: use torch.where, a mask or a capacity instead",
    ),
    (
        ("is mutated in the forward method",),
        "assignment",
        "the forward writes to a tensor that is neither an input nor a buffer",
        "register it as a buffer",
    ),
    (
        ("Can't call numpy() on", "RuntimeError: .numpy() is not supported"),
        "numpy",
        "the forward leaves torch for numpy",
        "write it with torch operators",
    ),
    (
        ("PendingUnbackedSymbol",),
        "data dependent",
        "the forward gives tensors whose sizes depend on the values of others, such as `nonzero`",
        (
            "keep every row and use torch.where or a mask, count with `F.one_hot(x, n).sum(0)`; "
            "sort rows by group for grouped_mm"
        ),
    ),
    (
        ("Cannot copy out of meta tensor", "meta device"),
        "meta",
        "the forward reads a tensor that has no memory",
        "make it a buffer or a parameter, or build it on the device of the inputs",
    ),
    (
        ("Expected all tensors to be on the same device", "Unhandled FakeTensor Device"),
        "device",
        "the forward names a device of its own",
        "take the device from a tensor: `device=x.device`",
    ),
)
"""Signs in the text or type of an error, then our code, problem and help; `{operator}` is the
operator that torch names."""


@contextmanager
def only_capture_errors() -> Iterator[None]:
    """Turn each exception that is not Meshwright's own into a `CaptureError` while this is open."""
    try:
        yield
    except MeshwrightError:
        raise
    except Exception as error:
        raise _translated(error) from error


def _translated(error: Exception) -> CaptureError:
    text = f"{type(error).__name__}: {_first_line(error)}"
    # An error that the model itself raises may be worded like one of torch's.
    for signs, code, problem, help in () if raised_by_statement(error) else _KNOWN:
        if any(sign in text for sign in signs):
            problem = problem.format(operator=getattr(error, "func", "an operator"))
            return CaptureError(problem, code=code, culprit=line_of(error), help=help)
    if raised_by_user(error):
        return CaptureError(
            f"the forward raised `{text}`",
            code="raised",
            culprit=line_of(error),
            help="make the model run on the example in eager mode first",
        )
    return CaptureError(
        f"the forward cannot be traced: {text}",
        code="export",
        culprit=line_of(error),
        help="check that the model runs on the example, and that this line needs only torch",
    )


def _first_line(error: Exception) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return one_line(line, 300)


@contextmanager
def sources_forgotten() -> Iterator[None]:
    """Let go of the source files that are read meanwhile, for the stack of every operator: Python
    keeps them for good, line by line, and reads them again where it needs them."""
    known = set(linecache.cache)
    try:
        yield
    finally:
        for name, entry in list(linecache.cache.items()):
            # What is not a file, such as a cell of a notebook, could not be read again.
            if name not in known and len(entry) > 1 and entry[1] is not None:
                linecache.cache.pop(name, None)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep export from printing half-made graphs; what the model itself prints is shown."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    said = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with redirect_stderr(OfThread(said, sys.stderr)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assigned during export")
            yield
        # A stderr that is closed is not a reason to refuse the model.
        if sys.stderr is not None:
            with suppress(OSError):
                sys.stderr.write(said.getvalue())
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
