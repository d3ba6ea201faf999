"""The kinds of value that options take: each reads what is written, and writes it back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from meshwright.dsl.errors import did_you_mean
from meshwright.dsl.values import (
    Items,
    Quoted,
    Sizes,
    Value,
    Word,
    evaluate,
    format_bytes,
    wrong_value,
)


class Kind(Protocol):
    """What an option takes. `read` raises `PlanError`; `write` gives text that reads back."""

    def read(self, value: Value, sizes: Sizes) -> Any: ...

    def write(self, value: Any) -> str: ...


@dataclass(frozen=True)
class Count:
    """A whole number, at least `low`."""

    low: int = 1

    def read(self, value: Value, sizes: Sizes) -> int:
        number = evaluate(value, sizes)
        if number.q != 1 or number < self.low:
            shown = "is" if value.text == str(number) else f"is {number}, which is"
            what = f"{shown} {'too small' if number.q == 1 else 'not a whole number'}"
            raise wrong_value(value, what, f"write a whole number, {self.low} or more")
        return int(number)

    def write(self, value: int) -> str:
        return str(value)


@dataclass(frozen=True)
class Ratio:
    """A number above `low`, up to `high`."""

    low: float = 0.0
    high: float = math.inf

    def read(self, value: Value, sizes: Sizes) -> float:
        number = float(evaluate(value, sizes))
        if not self.low < number <= self.high:
            limit = f" and at most {self.high:g}" if self.high < math.inf else ""
            raise wrong_value(value, "is out of range", f"write a number above {self.low:g}{limit}")
        return number

    def write(self, value: float) -> str:
        return repr(value)


@dataclass(frozen=True)
class ByteSize:
    """A number of bytes, written with a unit: `60GiB`; or `auto`, where that is allowed."""

    auto: bool = False

    def read(self, value: Value, sizes: Sizes) -> int | str:
        if self.auto and isinstance(value, Word) and value.text == "auto":
            return value.text
        number = evaluate(value, sizes)
        if number.q != 1 or number < 1:
            help = "write a size with a unit, such as `60GiB`"
            raise wrong_value(value, "is not a number of bytes", help)
        return int(number)

    def write(self, value: int | str) -> str:
        return value if isinstance(value, str) else format_bytes(value)


@dataclass(frozen=True)
class Choice:
    """One of `words` or, with `path`, a file name in quotes."""

    words: tuple[str, ...]
    path: bool = False

    def read(self, value: Value, sizes: Sizes) -> str:
        if isinstance(value, Word) and value.text in self.words:
            return value.text
        if self.path and isinstance(value, Quoted) and value.value:
            return value.text
        raise wrong_value(value, "is not one of the choices", did_you_mean(value.text, self.words))

    def write(self, value: str) -> str:
        return value


@dataclass(frozen=True)
class Folder:
    """The path of a folder, in quotes."""

    def read(self, value: Value, sizes: Sizes) -> str:
        if isinstance(value, Quoted) and value.value and "\0" not in value.value:
            return value.value
        raise wrong_value(value, "is not a folder", 'write its path in quotes: `"/scratch"`')

    def write(self, value: str) -> str:
        return f'"{value}"'


@dataclass(frozen=True)
class Flag:
    """`true` or `false`."""

    def read(self, value: Value, sizes: Sizes) -> bool:
        if isinstance(value, Word) and value.text in ("true", "false"):
            return value.text == "true"
        raise wrong_value(value, "is neither true nor false", "use `true` or `false`")

    def write(self, value: bool) -> str:
        return "true" if value else "false"


@dataclass(frozen=True)
class Words:
    """A list of words, `[sdpa, norm]`, from `choices` if there are any; one needs no brackets. With
    `quoted`, what is not a word can be written in quotes."""

    choices: tuple[str, ...] = ()
    quoted: bool = False

    def read(self, value: Value, sizes: Sizes) -> tuple[str, ...]:
        items = value.values if isinstance(value, Items) and not value.is_range else (value,)
        for item in items:
            if self.quoted and isinstance(item, Quoted) and item.value:
                continue
            if not isinstance(item, Word):
                help = "write a list of words, such as `[sdpa, norm]`"
                raise wrong_value(item, "is not a word", help)
            if self.choices and item.text not in self.choices:
                raise wrong_value(
                    item, "is not one of the choices", did_you_mean(item.text, self.choices)
                )
        return tuple(item.value if isinstance(item, Quoted) else item.text for item in items)

    def write(self, value: tuple[str, ...]) -> str:
        words = (each if each.isidentifier() else f'"{each}"' for each in value)
        return f"[{', '.join(words)}]"


@dataclass(frozen=True)
class AxisName:
    """The name of a mesh axis; the reader checks that the mesh has it."""

    def read(self, value: Value, sizes: Sizes) -> str:
        if isinstance(value, Word) and not value.text[0].isdigit():
            return value.text
        raise wrong_value(value, "is not an axis", "write the name of a mesh axis")

    def write(self, value: str) -> str:
        return value
