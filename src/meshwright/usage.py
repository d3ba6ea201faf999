"""The words of a command line: which is the model, the plan, or an argument of the script."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from meshwright.dsl.errors import did_you_mean, nearest
from meshwright.launcher.job import GRACE, Job
from meshwright.models import CommandError, UsageError

_WANTED = {
    "MODEL": "a model",
    "PLAN": "a plan",
    "NAME": "the name of a module, parameter or input",
    "FOLDER": "the folder of a checkpoint",
    "SRC": "the folder of a checkpoint",
    "DST": "the folder to write into",
    "FILE": "the file to write",
}
_FOLDERS = ("FOLDER", "SRC", "DST", "FILE")
"""Words that are known by their place alone, before any others."""


def is_model(word: str) -> bool:
    """Whether a word has the form `file.py:function` or `package.module:function`."""
    where, colon, name = word.rpartition(":")
    written = bool(colon) and (name.isidentifier() or where.endswith(".py"))
    return (written or word.endswith(".py")) and not (colon and os.path.isfile(word))


def is_plan(word: str) -> bool:
    """Whether a word ends in `.plan`, or is a file that is not a model's."""
    return not is_model(word) and (word.endswith(".plan") or os.path.isfile(word))


def assign(command: str, words: Sequence[str], wanted: Sequence[str]) -> dict[str, str]:
    """The words by what they are, `wanted` being `MODEL`, `PLAN` and so on in their usual order.

    A model and a plan are recognised by their form, in any order; a word of neither form is taken
    by its place. Raises `UsageError` for missing words and for too many.
    """
    if "" in words[:2]:
        raise UsageError(
            f"a word of `{command}` is empty", help="write a path; a shell's variable may be unset"
        )
    first = sum(what in _FOLDERS for what in wanted)
    found = dict(zip(wanted[:first], words, strict=False))
    rest = list(words[first:])
    for what, fits in (("MODEL", is_model), ("PLAN", is_plan)):
        fitting = [word for word in rest if fits(word)]
        if fitting and what in wanted:
            found[what] = fitting[0]
            rest.remove(fitting[0])
    open_places = [what for what in wanted if what not in found]
    if len(rest) > len(open_places):
        raise _too_many(command, rest[len(open_places)], found, wanted)
    placed = dict(zip(open_places, rest, strict=False))
    if len(rest) < len(open_places):
        missing = " and ".join(_WANTED[what] for what in open_places[len(rest) :])
        help = _usage(command, wanted, found | placed)
        raise UsageError(f"`{command}` is missing {missing}", help=help)
    _check_kinds(command, placed, found, wanted)
    return found | placed


def _check_kinds(
    command: str, placed: dict[str, str], found: dict[str, str], wanted: Sequence[str]
) -> None:
    """Refuse two models, and two plans."""
    for what, kind, other, fits in (
        ("PLAN", "models", "MODEL", is_model),
        ("MODEL", "plans", "PLAN", is_plan),
    ):
        if what in placed and other in found and fits(placed[what]):
            raise UsageError(
                f"`{found[other]}` and `{placed[what]}` are both {kind}",
                help=_usage(command, wanted, {other: found[other]}),
            )


def _too_many(command: str, word: str, found: dict[str, str], wanted: Sequence[str]) -> UsageError:
    takes = " and ".join(_WANTED[what] for what in wanted) or "no words"
    return UsageError(
        f"`{word}` is one word too many: `{command}` takes {takes}",
        help=_usage(command, wanted, found),
    )


def _usage(command: str, wanted: Sequence[str], written: dict[str, str]) -> str:
    examples = {
        "MODEL": "path/to/file.py:function",
        "PLAN": "path/to/a.plan",
        "NAME": "blocks.0",
        "FOLDER": "checkpoints",
        "SRC": "checkpoints",
        "DST": "resharded",
        "FILE": "model.safetensors",
    }
    words = ["meshwright", command, *(written.get(what, examples[what]) for what in wanted)]
    return f"write `{' '.join(words)}`"


def whole_number(option: str, least: int = 1) -> Callable[[str], int]:
    """A reader of an option's value, which raises `UsageError` unless it is `least` or more."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) < least:
            raise UsageError(
                f"`{option}` is `{text}`, not a whole number from {least} on",
                help=f"write `{option} {max(least, 4)}`",
            )
        return int(text)

    return read


def one_of(option: str, choices: Sequence[str]) -> Callable[[str], str]:
    """A reader of an option's value, which raises `UsageError` unless it is one of `choices`."""

    def read(text: str) -> str:
        if text not in choices:
            either = " or ".join(f"`{option} {choice}`" for choice in choices)
            raise UsageError(f"`{option}` is `{text}`", help=f"write {either}")
        return text

    return read


def names(text: str) -> dict[str, str | int]:
    """The names that `--names` gives: layouts by tensor, and numbers."""
    found: dict[str, str | int] = {}
    for each in filter(None, map(str.strip, text.split(";"))):
        what, equals, value = (part.strip() for part in each.partition("="))
        if not (what and equals and value):
            raise UsageError(
                f"`{each}` in `--names` names nothing",
                help='write `--names "wte=[v, h]; blocks.*.up=[f, h]; heads=4"`',
            )
        found[what] = int(value) if value.isdecimal() else value
    return found


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UsageError(
            f"`--grace` is `{text}`, not a number of seconds", help=f"write `--grace {GRACE:g}`"
        )
    return seconds


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(
            f"`--rendezvous` is `{text}`, not a host and a port",
            help="write `--rendezvous HOST:29500`, HOST being node 0's name or address",
        )
    return host.strip("[]"), int(port)


RUN_OPTIONS: dict[str, Callable[[str], Any]] = {
    "--processes": whole_number("--processes"),
    "--logs": Path,
    "--grace": _seconds,
    "--nodes": whole_number("--nodes"),
    "--node-rank": whole_number("--node-rank", least=0),
    "--rendezvous": _address,
}
"""The options of `run` itself, anywhere before a `--`, and their readers."""
_EXAMPLES = {
    "--mode": "infer",
    "--device": "cpu",
    "--name": "stage0.forward",
    "--module": "blocks.0",
    "--optimizer": "AdamW",
    "--place": "pp=0",
    "--logs": "logs",
    "--grace": f"{GRACE:g}",
    "--rendezvous": "HOST:29500",
}


def missing_value(option: str) -> UsageError:
    """The error for an option without its value."""
    help = f"write `{option} {_EXAMPLES.get(option, '4')}`"
    return UsageError(f"`{option}` is missing its value", help=help)


def job(words: Sequence[str]) -> Job:
    """The job that the words of `meshwright run` describe.

    Raises `UsageError` for a wrong command line, and `CommandError` for a script that does not
    exist.
    """
    script, options = _split(words)
    if not script or script == ["-m"]:
        what = "module" if script else "script"
        raise UsageError(
            f"there is no {what} to run",
            help=f"write `meshwright run {'-m package.module' if script else 'train.py'} "
            "--processes 4`",
        )
    if "--processes" not in options:
        where = ", before the `--`" if "--" in words else ""
        raise UsageError(
            "`--processes` is missing", help=f"write `--processes 4` for four ranks{where}"
        )
    if script[0] == "-m":
        _check_module(script[1])
    else:
        _check_script(script[0])
    read = {name: RUN_OPTIONS[name](text) for name, text in options.items()}
    nodes, node = read.get("--nodes", 1), read.get("--node-rank", 0)
    _check_nodes(nodes, node, options)
    return Job(
        tuple(script),
        read["--processes"],
        logs=read.get("--logs"),
        grace=read.get("--grace", GRACE),
        nodes=nodes,
        node=node,
        rendezvous=read.get("--rendezvous"),
    )


def _split(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The script with its own arguments, and the options of `run`, wherever they are."""
    script: list[str] = []
    options: dict[str, str] = {}
    rest: Iterator[str] = iter(words)
    for word in rest:
        name, equals, text = word.partition("=")
        if word == "--":
            script += rest
        elif name in RUN_OPTIONS:
            text = text if equals else next(rest, "")
            _check_option(name, text, options)
            options[name] = text
        elif not script and word.startswith("-") and word != "-m":
            known = [*RUN_OPTIONS, "-m"]
            raise UsageError(f"`run` has no option `{name}`", help=did_you_mean(name, known))
        else:
            script.append(word)
    return script, options


def _check_option(name: str, text: str, options: dict[str, str]) -> None:
    if not text or text in RUN_OPTIONS:
        raise missing_value(name)
    if name in options:
        raise UsageError(
            f"`{name}` is given twice, as `{options[name]}` and as `{text}`",
            help="write it once; what is meant for the script goes after `--`",
        )


def _check_nodes(nodes: int, node: int, options: dict[str, str]) -> None:
    if node >= nodes:
        raise UsageError(
            f"`--node-rank` is {node}, and `--nodes` is {nodes}",
            help=f"write `--nodes {node + 1}`"
            if nodes == 1
            else f"write a number from 0 to {nodes - 1}",
        )
    missing = [name for name in ("--node-rank", "--rendezvous") if name not in options]
    if nodes > 1 and missing:
        raise UsageError(
            f"with `--nodes {nodes}`, `{missing[0]}` is missing",
            help=f"write `--nodes {nodes} --node-rank {node} --rendezvous HOST:29500`, "
            "HOST being node 0's name or address",
        )


def _check_module(name: str) -> None:
    package = name.partition(".")[0]
    if PathFinder.find_spec(package, [os.getcwd(), *sys.path]) is None:
        raise CommandError(
            f"there is no module `{package}`",
            help="check its name, and run where it is: in this folder, or installed",
        )


def _check_script(script: str) -> None:
    path = Path(script)
    if os.path.isfile(path):
        return
    if os.path.exists(path):
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise CommandError(
            f"`{script}` is {what}, not a script", help="write the path of a Python file"
        )
    if os.path.isfile(script.partition(" ")[0]):
        raise CommandError(
            f"there is no file `{script}`", help="write the script's arguments without quotes"
        )
    close = nearest(path.stem, [each.stem for each in path.parent.glob("*.py")])
    raise CommandError(
        f"there is no file `{script}`",
        help=f"write `{path.with_name(close[0])}.py`" if close else "check the path of the script",
    )
