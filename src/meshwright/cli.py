"""The command line: what each command takes. What it does is in `commands.py`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence

from meshwright import commands as functions
from meshwright.dsl.errors import MeshwrightError, PlanError
from meshwright.models import UsageError

_MODEL = "`path/to/file.py:function` or `package.module:function`; it returns (model, example)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for what is wrong, 2 for a wrong command."""
    arguments = parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        code = command(arguments)
        sys.stdout.flush()
    except MeshwrightError as error:
        _report(error, as_json=getattr(arguments, "json", False))
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="meshwright",
        description="Compile a PyTorch model and a plan into what each device of a mesh runs.",
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    _check(_command(commands, "check", "read a plan; with a model, compile it too"))
    _show(_command(commands, "show", "mesh, layouts, collectives, bytes and memory"))
    _graph(_command(commands, "graph", "the rewritten graphs as typed text"))
    _explain(_command(commands, "explain", "why one module is laid out as it is"))
    _fmt(_command(commands, "fmt", "print plans in canonical form"))
    _run(_command(commands, "run", "start a script in several processes of this machine"))
    _demo(_command(commands, "demo", "train a small GPT on a mesh, beside one process"))
    return top


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help: str
) -> argparse.ArgumentParser:
    added = commands.add_parser(name, help=help, description=help)
    added.set_defaults(command=getattr(functions, name))
    return added


def _compiles(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help=_MODEL)
    command.add_argument("plan", metavar="PLAN", help="a plan file")
    _options(command)


def _options(command: argparse.ArgumentParser) -> None:
    modes = ("train", "infer")
    command.add_argument("--mode", choices=modes, default="train", help="compile for this")
    command.add_argument(
        "--device", help="the device type to compile for (default: this machine's)"
    )
    _json(command)


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


def _check(command: argparse.ArgumentParser) -> None:
    command.add_argument("plan", metavar="PLAN", help="a plan file")
    command.add_argument("model", metavar="MODEL", nargs="?", help=_MODEL)
    _options(command)


def _show(command: argparse.ArgumentParser) -> None:
    _compiles(command)
    command.add_argument("--local", action="store_true", help="the shapes that one rank holds")


def _graph(command: argparse.ArgumentParser) -> None:
    _compiles(command)
    command.add_argument("--name", help="one graph, such as `stage0.forward` (default: all)")
    command.add_argument("--module", help="only the nodes of this module, such as `blocks.0`")
    command.add_argument("--full", action="store_true", help="every one of equal layers")
    command.add_argument("--local", action="store_true", help="the shapes that one rank holds")


def _explain(command: argparse.ArgumentParser) -> None:
    _compiles(command)
    command.add_argument("name", metavar="NAME", help="a module, parameter or input")


def _fmt(command: argparse.ArgumentParser) -> None:
    command.add_argument("plans", metavar="PLAN", nargs="+", help="plan files")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="only say which would change: exit 1")
    how.add_argument("--write", action="store_true", help="write the canonical form back")
    _json(command)


def _run(command: argparse.ArgumentParser) -> None:
    command.usage = "meshwright run SCRIPT [ARGUMENT ...] --processes N"
    command.add_argument(
        "script",
        metavar="SCRIPT",
        nargs=argparse.REMAINDER,
        help="a Python file and its arguments, `--processes N` anywhere among them",
    )
    command.add_argument("--processes", metavar="N", help="how many, one for each rank of the mesh")


def _demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("--steps", type=int, default=0, help="optimizer steps")
    one_each = "a process for each of the 4 ranks, instead of all in this one"
    command.add_argument("--processes", type=int, choices=[4], help=one_each)
    _json(command)


def _report(error: MeshwrightError, *, as_json: bool) -> None:
    """The text of an error, on stderr; with --json, its data on stdout."""
    if not as_json:
        print(error, file=sys.stderr)
        return
    data: dict[str, object] = {"type": type(error).__name__, "text": str(error)}
    data["code"] = getattr(error, "code", "")
    data["help"] = getattr(error, "help", "")
    if isinstance(error, PlanError):
        data["places"] = [
            {"plan": span.source.name, "line": span.line, "column": span.column, "end": span.end}
            for span in error.spans
        ]
    print(json.dumps({"error": data}, indent=2))
