"""Values of the caller's own in a checkpoint, such as an epoch or the state of a scheduler.

They are plain, so that nothing has to be executed to read them, and they come back equal: tuples
and keys that are not text, which JSON lacks, are written as a dictionary with one key.
"""

from __future__ import annotations

import json
from typing import Any

from meshwright.runtime.errors import RunError, check_kind

_TUPLE, _ITEMS = "()", "{}"
_MOST_BYTES, _MOST_DEPTH, _MOST_BITS = 16 << 20, 100, 10_000
_PLAIN = (
    "pass numbers, texts, `None`, and lists, tuples and dictionaries of them "
    "(`tolist()` makes them of a tensor)"
)


def written_extra(extra: Any) -> Any:
    """The values as JSON has them. Raises a `RunError` that names a value that is not plain."""
    if extra is None:
        return None
    check_kind(extra, dict, "`extra`", 'pass a dictionary: `extra={"epoch": epoch}`')
    found = _written(extra, "extra", 0)
    if (size := len(json.dumps(found))) > _MOST_BYTES:
        raise RunError(
            f"`extra` has {size >> 20} MiB as text; a checkpoint holds at most {_MOST_BYTES >> 20}",
            help="keep what is that large in a file of your own beside the checkpoint",
        )
    return found


def read_extra(found: Any) -> dict[str, Any]:
    """The values that `written_extra` made JSON of. Raises `RunError` for what it does not make."""
    try:
        extra = {} if found is None else _read(found)
    except (TypeError, ValueError, RecursionError):
        extra = None
    if not isinstance(extra, dict):
        raise RunError(
            "the checkpoint's `extra` cannot be read",
            help="load another checkpoint: this one is damaged",
        )
    return extra


def _written(value: Any, place: str, depth: int) -> Any:
    if depth > _MOST_DEPTH:
        raise RunError(f"`{place[:80]}...` is nested too deeply, or in itself", help=_PLAIN)
    if value is None or isinstance(value, (bool, int, float, str)):
        return _written_scalar(value, place)
    if isinstance(value, (list, tuple)):
        items = [_written(item, f"{place}[{i}]", depth + 1) for i, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise RunError(f"`{place}` is a `{kind}`, which a checkpoint cannot hold", help=_PLAIN)
    pairs = []
    for key, item in value.items():
        if key is not None and not isinstance(key, (bool, int, float, str)):
            kind = type(key).__name__
            raise RunError(f"a key of `{place}` is a `{kind}`, which a checkpoint cannot hold",
                           help=_PLAIN)  # fmt: skip
        own = _written_scalar(key, f"a key of {place}")
        pairs.append([own, _written(item, f"{place}[{key!r}]", depth + 1)])
    keys = [key for key, _ in pairs]
    if all(isinstance(key, str) for key in keys) and keys not in ([_TUPLE], [_ITEMS]):
        return dict(pairs)
    return {_ITEMS: pairs}


def _written_scalar(value: Any, place: str) -> Any:
    """A scalar of Python's own type, for one of a subclass too."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise RunError(f"`{place}` is a number of {value.bit_length()} bits", help=_PLAIN)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    return int.__int__(value) if isinstance(value, int) else float.__float__(value)


def _read(found: Any) -> Any:
    if isinstance(found, list):
        return [_read(item) for item in found]
    if not isinstance(found, dict):
        return found
    if list(found) == [_TUPLE]:
        return tuple(_read(item) for item in found[_TUPLE])
    if list(found) == [_ITEMS]:
        return {key: _read(item) for key, item in found[_ITEMS]}
    return {key: _read(item) for key, item in found.items()}
