"""The error for a wrong plan: an exception that carries data, a table of codes, a renderer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from meshwright.dsl.characters import width
from meshwright.dsl.source import Span

CODES = {
    "P100": "a word or character that the language does not expect there",
    "P101": "a verb that does not exist",
    "P102": "a statement that stops too early",
    "P103": "a bracket that is never closed",
    "P104": "a trailing comma before an unrelated line, or before nothing",
    "P105": "a keyword where a name is expected",
    "P106": "a number is expected, or this one cannot be used here",
    "P107": "a product written without its `*`",
    "P108": "a text too long or nested too deeply",
    "P109": "a selector that cannot be read",
    "P110": "an option that the verb does not have",
    "P111": "a value that the option does not take",
    "P112": "an option or a part that is missing",
    "P113": "a plan file that cannot be read",
    "P114": "a statement that cannot stand in a module's `__plan__`",
    "P115": "an argument that is not text, or not a path",
    "P120": "a name that no `let` binds",
    "P121": "`let` names defined by each other",
    "P122": "a division by zero",
    "P201": "an axis that the mesh does not have",
    "P202": "an axis used twice",
    "P203": "a size that does not divide over its axes",
    "P204": "sizes that are not determined",
    "P205": "sizes that contradict the tensor's shape",
    "P206": "a layout with the wrong number of dimensions",
    "P207": "a composite that names no factor to split",
    "P301": "two statements that contradict each other",
    "P302": "a name bound twice",
    "P303": "gradient accumulation requested twice",
    "P304": "a number of stages that does not fit the mesh",
    "P305": "two selectors, neither more specific, for one name",
    "P306": "a schedule that does not fit the stages, the ranks or the microbatches",
    "P307": "a schedule in a file that cannot be read or carried out",
    "P401": "a selector that matches nothing",
    "P501": "a statement that cannot be carried out for this model",
    "P502": "a contract that the compiled program breaks",
    "P503": "an axis of the mesh that nothing is split over",
    "P504": "a budget that cannot be kept",
}
"""Every code and its meaning. Codes are stable: new ones are added, none is reused."""

_LONGEST_LINE = 160
_MOST_CHOICES = 12


class MeshwrightError(Exception):
    """The base of every error that Meshwright raises on purpose; never raised itself."""


class PlanError(MeshwrightError):
    """The plan is wrong, in itself or for this model. `str(error)` is the rendered text.

    Raised where a plan is read or built, by `compile`, and wherever else a name of the model is
    looked up. `code` is stable ([all of them](plan-language.md#when-it-is-wrong)), `message` the
    first line, `spans` are the places at fault, the first one the culprit, `subject` are lines
    that say what of the model is involved, and `help` begins with a verb and works when followed.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        spans: Iterable[Span | None] = (),
        subject: str | Iterable[str] = (),
        help: str = "",
    ) -> None:
        assert code in CODES, code
        super().__init__(message)
        self.code = code
        self.message = message
        self.spans = tuple(span for span in spans if span is not None)
        self.subject = (subject,) if isinstance(subject, str) else tuple(subject)
        self.help = help

    def __str__(self) -> str:
        return render(self)

    def about(self, *subject: str) -> PlanError:
        """The same error with more lines of `subject`."""
        return PlanError(
            self.code,
            self.message,
            spans=self.spans,
            subject=self.subject + subject,
            help=self.help,
        )


def render(error: PlanError) -> str:
    """The text of an error: message, places with carets, subject lines, help."""
    lines = [f"error[{error.code}]: {printable(error.message)}"]
    margin = max((len(str(span.line)) for span in error.spans), default=1)
    for span in error.spans:
        lines += _excerpt(span, margin)
    lines += [f"  {printable(line)}" for line in error.subject if line]
    if error.help:
        lines.append(f"  help: {printable(error.help)}")
    return "\n".join(lines)


def _excerpt(span: Span, margin: int) -> list[str]:
    text = printable(span.source.line(span.line))
    first = max(0, span.column - _LONGEST_LINE // 2) if len(text) > _LONGEST_LINE else 0
    shown = text[first : first + _LONGEST_LINE]
    start = span.column - 1 - first
    carets = "^" * max(1, width(shown[start : start + span.end - span.column]))
    return [
        f"  --> {printable(span.place)}",
        f"  {span.line:>{margin}} | {shown}".rstrip(),
        f"  {'':>{margin}} | {' ' * width(shown[:start])}{carets}",
    ]


def printable(text: str) -> str:
    """`text` with every character that a terminal cannot show replaced."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _stand_in(char) for char in text)


def _stand_in(char: str) -> str:
    return " " if char.isspace() else "\N{REPLACEMENT CHARACTER}"


def quoted(text: str, longest: int = 40) -> str:
    """`text` in backticks, cut when it is long."""
    text = printable(text)
    return f"`{text}`" if len(text) <= longest else f"`{text[: longest - 3]}...`"


def spelled(value: object, longest: int = 40) -> str:
    """A value as an error names it: short, on one line, without the contents of a large one."""
    kind = type(value).__name__
    if value is None or isinstance(value, (bool, int, float)):
        try:
            return quoted(repr(value), longest)
        except ValueError:  # an integer of too many digits to write
            return f"an `{kind}` of {value.bit_length()} bits"  # type: ignore[union-attr]
    if isinstance(value, str):
        return quoted(repr(value[: longest + 1]), longest) if value else "an empty text"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{_article(kind)} `{kind}` of shape `{list(shape)}`"
    if isinstance(value, (list, tuple, dict, set, frozenset, bytes, bytearray)):
        return f"{_article(kind)} `{kind}` of {len(value)}"
    return f"{_article(kind)} `{kind}`"


def one_line(text: str, longest: int = 400) -> str:
    """A text from elsewhere on one line, cut when it is long."""
    line = " ".join(text[: 4 * longest].split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def _article(word: str) -> str:
    return "an" if word[:1].lower() in "aeiou" else "a"


def nearest(word: str, choices: Iterable[str], count: int = 1) -> list[str]:
    """The choices that look most like `word`, best first; empty if none is close."""
    by_form: dict[str, list[str]] = {}
    for choice in choices:
        by_form.setdefault(choice.lower(), []).append(choice)
    close = difflib.get_close_matches(word[:80].lower(), by_form, n=count, cutoff=0.6)
    return [choice for form in close for choice in by_form[form]][:count]


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A help line for a misspelt word: the nearest choice, or all of them."""
    choices = list(choices)
    close = nearest(word, choices)
    if close:
        return f"write `{close[0]}`"
    more = len(choices) - _MOST_CHOICES
    if more > 1:
        return f"use {either(choices[:_MOST_CHOICES], ',')} or one of {more} more"
    return f"use {either(choices)}"


def either(words: Iterable[str], last: str = "or") -> str:
    """Words in backticks, as a list: `a`, `b` or `c`."""
    names = [f"`{word}`" for word in words]
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def plural(count: int, noun: str) -> str:
    """`1 rank`, `2 ranks`, `2 microbatches`."""
    ending = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{count} {noun}" + ("" if count == 1 else ending)
