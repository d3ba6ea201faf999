"""Find what a command names: a model as `path/to/file.py:function` or `package.module:function`, an
optimizer as `SGD(momentum=0.9)`."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from meshwright.compiler.errors import CompilerError
from meshwright.dsl.errors import MeshwrightError, did_you_mean


class CommandError(CompilerError):
    """A command cannot do what it was asked."""


class UsageError(CommandError):
    """A command line is wrong."""


class ModelError(CommandError):
    """The user's own code failed; `traceback` is its traceback, without what called it."""

    def __init__(self, problem: str, *, traceback: str, help: str) -> None:
        super().__init__(problem, help=help)
        self.traceback = traceback


def load_model(spec: str) -> tuple[nn.Module, Any]:
    """The model and its example: what the function named by `spec` returns.

    Raises `UsageError` for a `spec` of another form, `CommandError` for a file, module or function
    that does not exist and for a function that returns anything else, and `ModelError` for what the
    user's own code raises.
    """
    where, _, name = spec.rpartition(":")
    if not where or where.endswith(":") or not name.isidentifier():
        raise UsageError(
            f"`{spec}` does not name a function",
            help="write `path/to/file.py:function` for the model",
        )
    with _user_code(where, "is imported"):
        module = _module(where)
    function = _function(module, name, where)
    with _user_code(spec, "is called"):
        returned = function()
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise CommandError(
            f"`{spec}` returns {_kind(returned)}, not a model and its example",
            help="return `(model, example)`, the example being a tuple or a dict of inputs",
        )
    model, example = returned
    if not isinstance(model, nn.Module):
        raise CommandError(
            f"`{spec}` returns {_kind(model)} where the model should be",
            help="return an `nn.Module`",
        )
    return model, example


def load_optimizer(spec: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """An optimizer's class and options: `SGD(lr=0.1, momentum=0.9)` for one of torch's, or with
    `path/to/file.py:Class` or `package.module:Class` before the options.

    Raises `UsageError` for options of another form, and what `load_model` raises.
    """
    name, bracket, _ = spec.partition("(")
    where, colon, kind = name.rpartition(":")
    options = _options(spec) if bracket else {}
    if not colon:
        return _torch_optimizer(name.removeprefix("torch.optim.")), options
    with _user_code(where, "is imported"):
        module = _module(where)
    return _function(module, kind, where, "class"), options


def _torch_optimizer(name: str) -> Callable[..., Any]:
    kinds = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    if name not in kinds:
        raise CommandError(f"torch has no optimizer `{name}`", help=did_you_mean(name, kinds))
    return kinds[name]


def _options(spec: str) -> dict[str, Any]:
    """What `SGD(lr=0.1, betas=(0.9, 0.95))` has in its brackets."""
    try:
        call = ast.parse(f"_({spec.partition('(')[2]}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise ValueError
        return {_named(each): ast.literal_eval(each.value) for each in call.keywords}
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        raise UsageError(
            f"`{spec}` is not an optimizer with its options",
            help="write `SGD(lr=0.1, momentum=0.9)`, in quotes",
        ) from None


def _named(option: ast.keyword) -> str:
    if option.arg is None:  # of **options
        raise ValueError
    return option.arg


@contextlib.contextmanager
def _user_code(what: str, when: str) -> Iterator[None]:
    """Turn what the user's own code raises into a `ModelError`; our own errors pass."""
    try:
        yield
    except MeshwrightError:
        raise
    except SystemExit:
        raise CommandError(
            f"`{what}` calls `sys.exit` as it {when}",
            help='put what is meant for a script under `if __name__ == "__main__":`',
        ) from None
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        first = f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(": ")
        raise ModelError(
            f"`{what}` failed as it {when}: {first}",
            traceback=_own_traceback(error),
            help=f"install `{missing}`, or run where Python finds it"
            if missing
            else "fix the code at the end of the traceback above",
        ) from None


def _own_traceback(error: Exception) -> str:
    """The traceback from the first line of the user's own code on, if one was reached."""
    trace = error.__traceback__
    while trace is not None and _is_above(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    if trace is None:
        return "".join(traceback.format_exception_only(error))
    return "".join(traceback.format_exception(type(error), error, trace))


def _is_above(file: str) -> bool:
    return file in (__file__, importlib.__file__) or file.startswith("<frozen importlib")


def _module(where: str) -> ModuleType:
    return _from_file(Path(where)) if where.endswith(".py") else _from_package(where)


def _function(
    module: ModuleType, name: str, where: str, what: str = "function"
) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if callable(found):
        function: Callable[..., Any] = found
        return function
    own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
    help = did_you_mean(name, own) if own else "write the path of a file that has one"
    raise CommandError(f"`{where}` has no {what} `{name}`", help=help)


def _from_file(path: Path) -> ModuleType:
    if not os.path.isfile(path):
        raise CommandError(f"there is no file `{path}`", help="check the path of the model")
    name = f"meshwright_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up, and a script may import what is beside it.
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def _from_package(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise CommandError(
            f"there is no module `{name}`", help="check its name, or write the path of a file"
        ) from None


def _kind(value: object) -> str:
    return "nothing" if value is None else f"`{type(value).__name__}`"
