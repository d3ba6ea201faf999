"""The command line: what each command takes. `commands.py` has what it does."""

from __future__ import annotations

import argparse
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import meshwright
from meshwright import ckpt, commands
from meshwright.dsl.errors import MeshwrightError, PlanError, did_you_mean, nearest
from meshwright.launcher.job import GRACE
from meshwright.models import ModelError, UsageError
from meshwright.usage import assign, is_model, job, missing_value, names, one_of, whole_number

_ABOUT = "Compile a PyTorch model and a plan into what each device of a mesh runs."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for an error, 2 for a wrong command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    _open_closed_streams()
    try:
        code = _dispatch(words)
        sys.stdout.flush()
    except MeshwrightError as error:
        _report(error, as_json="--json" in words and words[0] != "run")
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        if error.filename is not None:  # not of the output
            raise
        # Without this, Python complains again as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"cannot write the output: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def _open_closed_streams() -> None:
    """Open standard streams that were closed as `/dev/null`.

    The next file opened would take the number of one, and what is printed would go there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def _dispatch(words: Sequence[str]) -> int:
    name, *rest = words or [""]
    if name == "help" and rest:
        name, *rest = [*rest, "--help"]
    if name in ("", "help", "-h", "--help"):
        print(_overview(), end="", file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name in ("-V", "--version"):
        print(f"meshwright {meshwright.__version__}")
        return 0
    if name == "ckpt" and rest[:1] in (["--help"], ["-h"]):
        print(_overview("ckpt "), end="")
        return 0
    if name == "ckpt":
        name, rest = _of_checkpoints(rest)
    if name not in _COMMANDS:
        raise _no_command(name)
    asked = rest[:1] if name == "run" else rest
    if "--help" in asked or "-h" in asked:
        print(_COMMANDS[name].help(name), end="")
        return 0
    module = ckpt if name.startswith("ckpt ") else commands
    function: Callable[[Namespace], int] = getattr(module, name.removeprefix("ckpt "))
    return function(_arguments(name, rest))


def _of_checkpoints(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command of the form `ckpt ls`, and the words after it."""
    name = " ".join(["ckpt", *words[:1]])
    if name in _COMMANDS:
        return name, list(words[1:])
    known = [each for each in _COMMANDS if each.startswith("ckpt ")]
    if not words or words[0].startswith("-"):
        raise UsageError(
            "`ckpt` is missing what to do", help=f"write `meshwright {known[0]} checkpoints`"
        )
    raise UsageError(f"unknown command `{name}`", help=did_you_mean(name, known))


def _no_command(name: str) -> UsageError:
    if name[0] != "-":
        choices = [*_COMMANDS, "ckpt", "help", "--version"]
        return UsageError(f"unknown command `{name}`", help=did_you_mean(name, choices))
    if close := nearest(name.strip("-"), ["version", "help"]):
        return UsageError(f"unknown option `{name}`", help=f"write `--{close[0]}`")
    return UsageError(
        f"`{name}` comes before the command",
        help="write the command first, such as `meshwright show`, and its options after it",
    )


_Options = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Command:
    """One command: the words that it takes, in their usual order, and its options."""

    about: str
    usage: str
    words: dict[str, str]
    options: _Options
    notes: str = ""

    def help(self, name: str) -> str:
        """What `meshwright NAME --help` prints."""
        parser = argparse.ArgumentParser(
            prog=f"meshwright {name}",
            usage=f"meshwright {name} {self.usage}",
            description=f"{self.about[0].upper()}{self.about[1:]}.",
            epilog=self.notes,
            formatter_class=partial(argparse.HelpFormatter, width=80),
        )
        for word, meaning in self.words.items():
            parser.add_argument(word, help=meaning)
        for option, settings in self.options.items():
            parser.add_argument(option, **settings)
        return parser.format_help()

    def read(self, name: str, words: Sequence[str]) -> Namespace:
        """The arguments for the command's function; raises `UsageError`."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("words", nargs="*")
        for option, settings in self.options.items():
            parser.add_argument(option, **settings)
        try:
            arguments, unknown = parser.parse_known_intermixed_args(words)
        except argparse.ArgumentError as error:
            raise self._in_words(error) from None
        if unknown:
            option = unknown[0].partition("=")[0]
            raise UsageError(
                f"`{name}` has no option `{option}`", help=did_you_mean(option, self.options)
            )
        return arguments

    def _in_words(self, error: argparse.ArgumentError) -> UsageError:
        """The error for an option whose value is missing, or that takes none."""
        option = error.argument_name or ""
        if "action" in self.options[option]:
            return UsageError(f"`{option}` takes no value", help=f"write `{option}` alone")
        return missing_value(option)


def _arguments(name: str, words: Sequence[str]) -> Namespace:
    """A command's arguments; raises `UsageError`."""
    command = _COMMANDS[name]
    if name == "run":
        return Namespace(job=job(words))
    arguments = command.read(name, words)
    given = arguments.words
    if name == "fmt":
        if arguments.check and arguments.write:
            raise UsageError("`--check` and `--write` exclude each other", help="write one of them")
        if not given:
            raise UsageError(
                "`fmt` is missing a plan", help="write `meshwright fmt path/to/a.plan`"
            )
        arguments.plans = given
        return arguments
    wanted = list(command.words)
    if name == "calibrate" and not given:
        wanted, arguments.file = [], None
    if name == "ckpt reshard":
        arguments.mode, arguments.device = "train", "cpu"
        if arguments.parts:
            wanted = wanted[:2]
    if name == "check" and not any(is_model(word) for word in given) and len(given) < 2:
        wanted, arguments.model = ["PLAN"], None
    for what, word in assign(name, given, wanted).items():
        setattr(arguments, what.lower(), word)
    return arguments


def _overview(group: str = "") -> str:
    """What `meshwright help` prints, or `help` and the first word of some commands."""
    shown = {name: each for name, each in _COMMANDS.items() if name.startswith(group)}
    lines = [f"usage: meshwright {group}COMMAND ...", ""]
    lines += [] if group else [_ABOUT, ""]
    lines += [f"  {name:<13} {command.about}" for name, command in shown.items()]
    lines += ["  help          what one command takes", ""]
    lines += [f"  meshwright {name} {command.usage}" for name, command in shown.items()]
    return "\n".join([*lines, "  meshwright help COMMAND", ""])


_BOTH = {
    "MODEL": "`path/to/file.py:function` or `package.module:function`: it returns (model, example)",
    "PLAN": "a plan file; model and plan may come in either order",
}
_JSON: _Options = {"--json": {"action": "store_true", "help": "print JSON"}}
_COMPILED: _Options = {
    "--mode": {
        "type": one_of("--mode", ("train", "infer")),
        "default": "train",
        "help": "compile for this: train (the default) or infer",
    },
    "--device": {"help": "the device type to compile for (default: this machine's)"},
    **_JSON,
}
_CLUSTER: _Options = {
    "--cluster": {
        "metavar": "FILE",
        "help": "the time that it takes on this cluster: a TOML file, or `8xh100`, `4xv100` or "
        "`laptop`",
    }
}
_LOCAL: _Options = {"--local": {"action": "store_true", "help": "the shapes that one rank holds"}}
_COMMANDS = {
    "check": _Command(
        "read a plan; with a model, compile it too", "[MODEL] PLAN", _BOTH, _COMPILED
    ),
    "show": _Command(
        "mesh, layouts, collectives, bytes and memory", "MODEL PLAN", _BOTH, {**_COMPILED, **_LOCAL}
    ),
    "graph": _Command(
        "the rewritten graphs as typed text",
        "MODEL PLAN",
        _BOTH,
        {
            "--name": {"help": "one graph, such as `stage0.forward` (default: all)"},
            "--module": {"help": "only the nodes of this module, such as `blocks.0`"},
            "--full": {"action": "store_true", "help": "print each of multiple equal layers"},
            **_COMPILED,
            **_LOCAL,
        },
    ),
    "timeline": _Command(
        "what each rank does, in order, and during which collectives",
        "MODEL PLAN",
        _BOTH,
        _COMPILED,
    ),
    "memory": _Command(
        "what ranks hold and need, what is alive at the peak, and when",
        "MODEL PLAN",
        _BOTH,
        {
            "--optimizer": {
                "metavar": "CLASS",
                "default": "AdamW",
                "help": "that of the update: `AdamW` (the default), `SGD(momentum=0.9)`, or a "
                "class of your own as `file.py:Class` or `package.module:Class`",
            },
            "--place": {"help": "of these ranks, such as `pp=0` (default: where most is needed)"},
            "--timeline": {"action": "store_true", "help": "the bytes at each instruction"},
            **_COMPILED,
        },
    ),
    "cost": _Command(
        "what a step sends, computes and holds, as formulas, or its time on a cluster",
        "MODEL PLAN [--cluster FILE]",
        _BOTH,
        {
            **_CLUSTER,
            "--names": {
                "type": names,
                "help": "layouts that name sizes, and numbers of names: "
                '`"wte=[v, h]; blocks.*.up=[f, h]; heads=4"`',
            },
            "--convention": {
                "type": one_of("--convention", ("pipelined", "ring", "tree")),
                "default": "pipelined",
                "help": "how much collectives send: pipelined (the default), ring or tree",
            },
            **_COMPILED,
        },
    ),
    "schedule": _Command(
        "what each rank of a pipeline runs and sends, and when",
        "MODEL PLAN",
        _BOTH,
        {
            "--simulate": {
                "action": "store_true",
                "help": "measure what stages cost on this machine, or count their FLOPs where it "
                "has no such device (default: all the same)",
            },
            **_CLUSTER,
            "--schedule": {
                "metavar": "NAME",
                "help": "another schedule than the plan's: a name, or a file such as `own.csv`",
            },
            "--ranks": {
                "metavar": "N",
                "type": whole_number("--ranks"),
                "help": "as if the pipeline had N ranks, with the same work in all",
            },
            "--virtual": {
                "metavar": "N",
                "type": whole_number("--virtual"),
                "help": "as if each rank had N stages",
            },
            "--microbatches": {
                "metavar": "N",
                "type": whole_number("--microbatches"),
                "help": "as if a step had N microbatches, each as large as now",
            },
            **_COMPILED,
        },
    ),
    "explain": _Command(
        "why one module is laid out as it is",
        "MODEL PLAN NAME",
        {**_BOTH, "NAME": "a module, parameter or input"},
        _COMPILED,
    ),
    "fmt": _Command(
        "print plans in canonical form",
        "PLAN [PLAN ...]",
        {"PLAN": "plan files"},
        {
            "--check": {
                "action": "store_true",
                "help": "only list those that would change, and exit with 1",
            },
            "--write": {"action": "store_true", "help": "write the canonical form back"},
            **_JSON,
        },
    ),
    "run": _Command(
        "start a script in multiple processes on this machine",
        "SCRIPT [ARGUMENT ...] --processes N",
        {"SCRIPT": "a Python file and its arguments, or `-m` and a module with its own"},
        {
            "--processes": {
                "metavar": "N",
                "help": "how many processes, one per rank of this machine",
            },
            "--logs": {
                "metavar": "FOLDER",
                "help": "write the output of each rank to a file in it",
            },
            "--grace": {
                "metavar": "SECONDS",
                "help": f"how long ranks have to end when told to (default: {GRACE:g})",
            },
            "--nodes": {"metavar": "N", "help": "how many machines, each with `--processes` ranks"},
            "--node-rank": {"metavar": "I", "help": "which of them this is, from 0"},
            "--rendezvous": {"metavar": "HOST:PORT", "help": "where ranks meet, on node 0"},
        },
        "These options may stand anywhere; what follows `--` is the script's alone.",
    ),
    "calibrate": _Command(
        "measure this machine, and describe it as a cluster",
        "[FILE]",
        {"FILE": "a new TOML file to write it to (default: print it)"},
        {"--device": {"help": "the device type to measure (default: this machine's)"}},
    ),
    "ckpt ls": _Command(
        "list the checkpoints of a folder, the newest first",
        "FOLDER",
        {"FOLDER": "a checkpoint, or a folder of checkpoints"},
        {"--tensors": {"action": "store_true", "help": "list the tensors of each"}, **_JSON},
    ),
    "ckpt verify": _Command(
        "read every byte of checkpoints, and exit with 1 if any is damaged",
        "FOLDER",
        {"FOLDER": "a checkpoint, or a folder of checkpoints: all are read"},
        _JSON,
    ),
    "ckpt reshard": _Command(
        "write a checkpoint anew, cut for another plan or into so many files",
        "SRC DST [MODEL PLAN] [--parts N]",
        {
            "SRC": "a checkpoint, or a folder of checkpoints for the newest",
            "DST": "the folder to write the new one into, beside others that it may have",
            **_BOTH,
        },
        {
            "--parts": {
                "metavar": "N",
                "type": whole_number("--parts"),
                "help": "cut evenly into N files, without a model",
            },
            **_JSON,
        },
        "Any checkpoint loads under any plan. One that is cut for the plan it is loaded under is "
        "read fastest: each rank reads whole parts of its own.",
    ),
    "ckpt delink": _Command(
        "write a checkpoint anew, in which layers share no parameters",
        "SRC DST [--reset]",
        {
            "SRC": "a checkpoint that was saved under `share`, or a folder for the newest",
            "DST": "the folder to write the new one into, beside others that it may have",
        },
        {
            "--reset": {
                "action": "store_true",
                "help": "leave out what the optimizer keeps of parameters",
            },
            **_JSON,
        },
        "Every layer gets a copy of what it shared, and of what the optimizer keeps of that. The "
        "plan without `share` loads it, and so does any other.",
    ),
    "ckpt export": _Command(
        "write the weights of a checkpoint as one safetensors file",
        "SRC FILE",
        {
            "SRC": "a checkpoint, or a folder of checkpoints for the newest",
            "FILE": "a new file, such as `model.safetensors`",
        },
        _JSON,
    ),
    "demo": _Command(
        "train a small GPT on a mesh, beside one process",
        "[--steps N] [--processes 4]",
        {},
        {
            "--steps": {"type": whole_number("--steps"), "default": 0, "help": "optimizer steps"},
            "--processes": {
                "type": one_of("--processes", ("4",)),
                "help": "one process per rank, instead of all ranks in this one",
            },
            **_JSON,
        },
    ),
}


def _report(error: MeshwrightError, *, as_json: bool) -> None:
    """The text of an error, on stderr; with --json, its data on stdout."""
    traceback = error.traceback if isinstance(error, ModelError) else ""
    if not as_json:
        print(f"{traceback}\n{error}" if traceback else error, file=sys.stderr)
        return
    code, help = getattr(error, "code", ""), getattr(error, "help", "")
    data = {"type": type(error).__name__, "text": str(error), "code": code, "help": help}
    if traceback:
        data["traceback"] = traceback
    if isinstance(error, PlanError):
        data["places"] = [
            {"plan": span.source.name, "line": span.line, "column": span.column, "end": span.end}
            for span in error.spans
        ]
    print(json.dumps({"error": data}, indent=2))
