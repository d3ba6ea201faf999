"""The first steps of a rank: run the script as `python script.py` would, and report its error.

Started by its path and never imported, with the standard library alone: the script finds its
process as Python would have made it (`sys.argv`, `sys.path`, `__main__`, environment), and torch is
imported when the script imports it.

An exception that ends the script goes through a pipe to the launcher, which prints it once for all
ranks. If the launcher is gone, or the script has an `excepthook`, it is printed here.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import os
import runpy
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType

_LONGEST = 50_000
"""Characters of a traceback; a pipe that nobody reads must not fill up."""

_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


def main() -> None:
    """Read the launcher's words before the script's: its process, and where to report."""
    launcher, report, piped, *script = sys.argv[1:]
    if os.getppid() != int(launcher):
        sys.exit("the launcher of this rank is gone")
    os.set_inheritable(int(report), False)
    if piped == "piped" and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    own = os.getpid()
    try:
        _run(script)
    except SystemExit as stop:
        if own == os.getpid() and isinstance(stop.code, str):
            _send(int(report), {**_about(stop, None), "text": stop.code, "printed": True})
        raise
    except BaseException:
        if own == os.getpid():
            sys.excepthook = _reporting(sys.excepthook, int(report))
        raise


def _run(script: list[str]) -> None:
    """Run a script, or `-m` and a module, in a `__main__` of its own."""
    module = sys.modules["__main__"] = ModuleType("__main__")
    vars(module).update(__builtins__=builtins)
    if "__annotations__" in globals():  # Python gives a script one, up to some version
        vars(module).update(__annotations__={})
    sys.argv = script
    is_module = script[0] == "-m"
    if not sys.flags.safe_path:
        folder = os.getcwd() if is_module else os.path.dirname(os.path.realpath(script[0]))
        sys.path[0] = folder
    if is_module:
        sys.argv = ["-m", *script[2:]]
        runpy._run_module_as_main(script[1])  # type: ignore[attr-defined]  # what `python -m` calls
        return
    path = os.path.abspath(script[0])
    with io.open_code(path) as file:
        text = file.read()
    module.__file__ = path
    module.__loader__ = SourceFileLoader("__main__", path)
    vars(module).update(__cached__=None)
    exec(compile(text, path, "exec", dont_inherit=True), vars(module))


def _reporting(before: _Hook, report: int) -> _Hook:
    """An `excepthook` without this file's frames: it reports, and prints only if it must."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        while trace is not None and _is_own(trace):
            trace = trace.tb_next
        error.__traceback__ = trace
        own_hook = before is not sys.__excepthook__
        sent = _send(report, {**_about(error, trace), "printed": own_hook})
        if own_hook or not sent:
            before(kind, error, trace)

    return hook


def _is_own(trace: TracebackType) -> bool:
    return trace.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>")


def _about(error: BaseException, trace: TracebackType | None) -> dict[str, object]:
    """What the launcher is told about an error."""
    kind = type(error)
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        sys.__excepthook__(kind, error, trace)
    return {
        "kind": kind.__name__,
        "text": _text(error),
        "place": _place(trace, error),
        "ours": _is_any(kind, "meshwright.dsl.errors", "MeshwrightError"),
        "consequence": any(
            _is_any(type(each), "meshwright.runtime.errors", "PeerError") for each in _chain(error)
        ),
        "traceback": printed.getvalue()[-_LONGEST:],
        "time": time.monotonic(),
    }


def _text(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return str(error.msg)
    # Unlike `str`, this does not raise for an error whose text cannot be made.
    return traceback.format_exception_only(error)[0].partition(": ")[2].strip()[:_LONGEST]


def _is_any(kind: type, module: str, name: str) -> bool:
    """Whether a class derives from the named one, without importing its module."""
    known = getattr(sys.modules.get(module), name, None)
    return isinstance(known, type) and issubclass(kind, known)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def _place(trace: TracebackType | None, error: BaseException) -> str:
    """`file:line` of the innermost frame of the user's own code, if there is one."""
    if isinstance(error, SyntaxError) and error.filename and trace is None:
        return f"{_short(error.filename)}:{error.lineno}"
    libraries = {
        sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
    }
    libraries.add(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    found = ""
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if os.path.isfile(path) and not any(path.startswith(each + os.sep) for each in libraries):
            found = f"{_short(path)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _short(path: str) -> str:
    """A path relative to the working folder, if it is inside."""
    try:
        relative = os.path.relpath(path)
    except (OSError, ValueError):
        return path
    return path if relative.startswith(os.pardir) else relative


def _send(report: int, about: dict[str, object]) -> bool:
    line = json.dumps(about).encode() + b"\n"
    try:
        while line:
            line = line[os.write(report, line) :]
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
