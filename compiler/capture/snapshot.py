"""Everything that a forward can change in Python, as it was before capture ran it.

Reached from the model: the attributes of its modules and of the objects that they hold, containers,
the closures and defaults of functions, its classes, and the data among the globals of the files
that those are written in. What was rebound or changed in place is put back; what a cached function
keeps of a trace is dropped.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_LARGEST = 10_000
"""Containers with more items than this are copied, but not looked into."""
_PLAIN = (Tensor, str, bytes, int, float, complex, bool, type(None), type)
_CONTAINERS = (dict, list, set, deque)


class Snapshot:
    """The Python state behind `model`; `put_back` restores it."""

    def __init__(self, model: nn.Module) -> None:
        self._kept: dict[int, tuple[Any, Any]] = {}
        """By id: a container, a cell or a class, and what was in it; both stay alive."""
        self._cached: dict[int, tuple[Any, int]] = {}
        """By id: a cached function, and how often it had to compute."""
        self._ours = {id(value) for names in _our_globals() for value in names.values()}
        classes: dict[type, None] = {}
        for module in model.modules():
            self._visit(module)
            classes |= dict.fromkeys(type(module).__mro__)
        files = {}
        for each in classes:
            if not _is_foreign(each):
                self._keep_class(each)
                files[each.__module__] = vars(sys.modules.get(each.__module__, each))
        for names in files.values():
            self._keep_globals(names)

    def put_back(self) -> None:
        """Restore what has changed, and touch nothing else."""
        for held, before in self._kept.values():
            if isinstance(held, CellType):
                held.cell_contents = before
            elif isinstance(held, type):
                _restore_class(held, before)
            elif not _same(held, before):
                _refill(held, before)
        for function, misses in self._cached.values():
            if function.cache_info().misses != misses:
                function.cache_clear()

    def _visit(self, start: Any) -> None:
        stack = [start]
        while stack:
            value = stack.pop()
            known = id(value) in self._kept or id(value) in self._ours
            if not known and not isinstance(value, _PLAIN):
                stack += self._parts(value)

    def _parts(self, value: Any) -> Iterator[Any]:
        """Keep what is in `value` if it can change; what to look into next."""
        if isinstance(value, _CONTAINERS):
            self._kept[id(value)] = value, _items(value)
            if len(value) <= _LARGEST:
                yield from dict.values(value) if isinstance(value, dict) else _items(value)
        elif isinstance(value, tuple):
            yield from value if len(value) <= _LARGEST else ()
        elif isinstance(value, CellType):
            yield from self._cell(value)
        elif isinstance(value, MethodType):
            yield from (value.__self__, value.__func__)
        elif isinstance(value, functools._lru_cache_wrapper):
            self._cached[id(value)] = value, value.cache_info().misses
        elif isinstance(value, (FunctionType, functools.partial)):
            yield from _function_parts(value)
        elif isinstance(value, nn.Module) or not _is_foreign(type(value)):
            yield getattr(value, "__dict__", None)

    def _cell(self, cell: CellType) -> Iterator[Any]:
        try:
            held = cell.cell_contents
        except ValueError:  # still empty
            return
        self._kept[id(cell)] = cell, held
        yield held

    def _keep_class(self, each: type) -> None:
        own = {name: value for name, value in vars(each).items() if not name.startswith("__")}
        self._kept[id(each)] = each, own
        for value in own.values():
            self._visit(value)

    def _keep_globals(self, names: dict[str, Any]) -> None:
        """The data among the globals of a file, and its cached functions."""
        data = {n: v for n, v in names.items() if isinstance(v, (int, float, *_CONTAINERS))}
        rest = [v for v in names.values() if isinstance(v, functools._lru_cache_wrapper)]
        for value in (*data.values(), *rest):
            self._visit(value)
        self._kept[id(names)] = _Globals(names), data


class _Globals:
    """The globals of a file, of which only data is put back: imports and definitions may stay."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names


def _function_parts(function: Any) -> Iterator[Any]:
    if isinstance(function, functools.partial):
        yield from (function.func, function.args, function.keywords)
        return
    yield from function.__closure__ or ()
    yield from (function.__defaults__, function.__kwdefaults__, function.__dict__)


def _is_foreign(kind: type) -> bool:
    """Whether a class is torch's, ours or of the standard library."""
    package = kind.__module__.partition(".")[0]
    return package in ("torch", "meshwright") or package in sys.stdlib_module_names


def _our_globals() -> Iterator[dict[str, Any]]:
    """The globals of our own files: what they register is theirs to keep."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "meshwright" and module is not None:
            yield vars(module)


def _items(value: Any) -> list[Any]:
    if isinstance(value, OrderedDict):
        return list(OrderedDict.items(value))
    if isinstance(value, dict):
        return list(dict.items(value))
    return list(_kind(value).__iter__(value))


def _kind(value: Any) -> Any:
    """The container type beneath a value's class, which may forbid what is done here."""
    return next(kind for kind in (list, set, deque) if isinstance(value, kind))


def _same(held: Any, before: Any) -> bool:
    if isinstance(held, _Globals):
        return all(held.names.get(name) is value for name, value in before.items())
    now = _items(held)
    if len(now) != len(before):
        return False
    if isinstance(held, dict):
        return all(a is c and b is d for (a, b), (c, d) in zip(now, before, strict=True))
    return all(a is b for a, b in zip(now, before, strict=True))


def _refill(held: Any, before: Any) -> None:
    if isinstance(held, _Globals):
        held.names.update(before)
        return
    if isinstance(held, dict):
        kind: Any = OrderedDict if isinstance(held, OrderedDict) else dict
        kind.clear(held)
        for key, value in before:
            kind.__setitem__(held, key, value)
    else:
        kind = _kind(held)
        kind.clear(held)
        (kind.update if kind is set else kind.extend)(held, before)


def _restore_class(each: type, before: dict[str, Any]) -> None:
    for name in [name for name in vars(each) if not name.startswith("__") and name not in before]:
        delattr(each, name)
    for name, value in before.items():
        if vars(each).get(name) is not value:
            setattr(each, name, value)
