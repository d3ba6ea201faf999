"""Replace attributes of torch and of Python for the thread that captures, and for no other.

A patch of a class or a module is seen by all threads: one that trains while another captures would
have its hooks refused and its writes to `.data` lost. So what stands in an attribute's place checks
the thread first. It does so when the attribute is read, and not in a call of its own, so that a
replacement finds its caller one frame up; a property, which is read inside the check, finds it two
frames up.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

ALONE = threading.RLock()
"""Held while a model is captured or compiled: tracing keeps state of the whole process, so that a
second thread waits."""


@contextmanager
def replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """While this is open, `owner.name`, which may be inherited, is `replacement` in this thread."""
    own = name in owner.__dict__
    found = owner.__dict__.get(name)
    if isinstance(owner, type):
        original = inspect.getattr_static(owner, name)
        kind = _WrittenAttribute if hasattr(type(original), "__set__") else _Attribute
        setattr(owner, name, kind(original, replacement))
    else:
        setattr(owner, name, _function(getattr(owner, name), replacement))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, found)
        else:
            delattr(owner, name)


class OfThread:
    """An object that acts as `own` in this thread, and as `other` in all others."""

    def __init__(self, own: Any, other: Any) -> None:
        self._own, self._other, self._thread = own, other, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        here = threading.get_ident() == self._thread
        return getattr(self._own if here else self._other, name)


class _Attribute:
    """An attribute of a class that is `replacement` in this thread."""

    def __init__(self, original: Any, replacement: Any) -> None:
        self._original, self._replacement = original, replacement
        self._thread = threading.get_ident()

    def _chosen(self) -> Any:
        here = threading.get_ident() == self._thread
        return self._replacement if here else self._original

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        chosen = self._chosen()
        bind = getattr(type(chosen), "__get__", None)
        return chosen if bind is None else bind(chosen, instance, owner)


class _WrittenAttribute(_Attribute):
    def __set__(self, instance: Any, value: Any) -> None:
        self._chosen().__set__(instance, value)


def _function(original: Any, replacement: Any) -> Any:
    """A stand-in for a module's function, whose call is an attribute of its class."""
    call = _Attribute(staticmethod(original), staticmethod(replacement))
    return update_wrapper(type("Function", (), {"__call__": call})(), original)
