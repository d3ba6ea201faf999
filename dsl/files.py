"""The text of plan files, and errors for what is passed in place of a text or a path."""

from __future__ import annotations

from pathlib import Path

from meshwright.dsl.errors import PlanError, quoted, spelled
from meshwright.dsl.source import Source, make_span
from meshwright.dsl.statements import STATEMENTS

_LONGEST_PATH = 300
"""Characters of a path in an error, enough to tell which file it is."""
_OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def check_text(text: object, name: object) -> None:
    """Raise `PlanError` unless both are text."""
    if isinstance(text, str) and isinstance(name, str):
        return
    if not isinstance(text, str):
        what, help = f"a plan is text, not {spelled(text)}", "pass the text of a plan"
        if isinstance(text, bytes):
            help = "pass text: `Plan.parse(data.decode())`"
        elif isinstance(text, Path):
            help = "read a file with `Plan.load`"
        elif isinstance(text, list):
            help = 'join the lines: `Plan.parse("\\n".join(lines))`'
        elif hasattr(text, "statements"):
            what, help = "this is a plan already", "use it as it is"
    else:
        what = f"the name of a plan is text, not {spelled(name)}"
        help = "pass the name to use in errors, or leave it out"
    raise PlanError("P115", what, help=help)


def read_file(path: object) -> str:
    """The text of a plan file. Raises `PlanError` for what is not such a file."""
    if not isinstance(path, (str, Path)):
        raise PlanError(
            "P115", f"a path is text, not {spelled(path)}", help="pass the path of a plan file"
        )
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise _unreadable(str(path), error) from None
    return _decoded(data, Path(path))


def _unreadable(path: str, error: Exception) -> PlanError:
    words = path.split(maxsplit=1)
    help, longest = "check the path of the plan", _LONGEST_PATH
    if "\n" in path or (len(words) > 1 and words[0] in STATEMENTS):
        help, longest = "read a text with `Plan.parse`", 80
    reason = (isinstance(error, OSError) and error.strerror) or "it is not a path"
    return PlanError("P113", f"cannot read {quoted(path, longest)}: {reason}", help=help)


def _decoded(data: bytes, path: Path) -> str:
    name = quoted(str(path), _LONGEST_PATH)
    encoding = _OTHER_ENCODINGS.get(data[:2])
    if encoding is not None or b"\0" in data:
        what = f"it is {encoding} text" if encoding else "it is not text, or not in UTF-8"
        raise PlanError("P113", f"cannot read {name}: {what}", help="save it as UTF-8 text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        source = Source(path.name, data.decode("utf-8", errors="replace"))
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        raise PlanError(
            "P113",
            f"cannot read {name}: the byte 0x{data[error.start]:02X} is not UTF-8 text",
            spans=[make_span(source, (line, column), (line, column + 1))],
            help="save it as UTF-8 text",
        ) from None
