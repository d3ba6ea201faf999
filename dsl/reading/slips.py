"""Common slips: lines that the grammar rejects, and how the language says the same.

    COLUMNS up on tp            columns up over tp
    mesh 2x2                    mesh dp=2, tp=2
    rows layers[0].wi over tp   rows layers.0.wi over tp

Each slip is a rewrite of one line, for a group of verbs. A line is suggested only if the grammar
accepts it, so that following the advice works.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from meshwright.dsl.characters import plain
from meshwright.dsl.errors import nearest
from meshwright.dsl.statements import DTYPES, METRICS, STATEMENTS, Spread, Targeted, option_name

_OTHER_WORDS = {
    "columns": "column cols col colwise columnwise colparallel columnparallel colwiseparallel "
    "columnparallellinear",
    "rows": "row rowwise rowparallel rowwiseparallel rowparallellinear",
    "data": "batch batches inputs input dataparallel",
    "data **": "ddp distributeddataparallel",
    "zero 1": "zero1",
    "zero 2": "zero2 deepspeed",
    "zero 3": "zero3 fsdp fsdp2 fullyshard fullyshardeddataparallel",
    "stages": "stage pipeline pp pipelineparallel",
    "vocab": "embedding embeddings embed vocabparallelembedding",
    "sequence": "seq sp sequenceparallel",
    "context": "cp ring ulysses ringattention contextparallel",
    "experts": "expert ep moe expertparallel",
    "shard": "split layout placement partition distribute",
    "checkpoint": "recompute remat activationcheckpointing gradientcheckpointing",
    "accumulate": "gradaccum gradaccumulation gradientaccumulation",
    "precision": "dtype amp autocast mixedprecision",
    "let": "set define var const size",
    "expect": "assert require check",
    "mesh": "devices grid devicemesh world topology",
    "axes": "group groups",
    "allow replicate": "replicate",
    "allow local": "local",
    "allow": "permit",
    "share": "tie",
}
"""Verbs, and what other systems and people call them, in lower case without `_` and `-`."""

_ADVICE = {
    "write `columns blocks.*.up over tp` and `rows blocks.*.down over tp`": "tp tensorparallel "
    "tensormodelparallel modelparallel mp megatron",
    "remove the line: `run.optimizer` makes the optimizer": "optimizer optim adam adamw sgd lr",
    "remove the line: `compile` takes the device": "device backend cuda nccl gloo",
    "copy the statements: a plan is one text": "include source load",
    "write one statement per line, such as `mesh dp=2, tp=2`: a plan is not Python": "import from "
    "def class with if for return print",
    **{f"write `precision {dtype}`": dtype for dtype in DTYPES},
}
"""What to do about words that begin a line and are not verbs."""


def _by_word(table: dict[str, str]) -> dict[str, str]:
    return {word: meaning for meaning, words in table.items() for word in words.split()}


_VERB_OF, _ADVICE_FOR = _by_word(_OTHER_WORDS), _by_word(_ADVICE)

EXAMPLES = {
    "mesh": "mesh dp=2, tp=2",
    "axes": "axes model = (dp, tp)",
    "let": "let d = 768, f = 4*d",
    "precision": "precision bf16",
    "memory": "memory budget=60GiB",
    "accumulate": "accumulate 4",
    "data": "data tokens, targets over dp",
    "shard": "shard blocks.*.up.weight [f@tp, d]",
    "columns": "columns blocks.*.up over tp",
    "rows": "rows blocks.*.down over tp",
    "vocab": "vocab wte, head over tp",
    "sequence": "sequence blocks.* over tp",
    "context": "context blocks.*.attn over cp",
    "summa": "summa blocks.* over (row, col)",
    "experts": "experts blocks.*.mlp over ep",
    "zero": "zero 2 over dp",
    "stages": "stages at blocks.6 over pp",
    "checkpoint": "checkpoint blocks.*",
    "offload": "offload optimizer",
    "share": "share blocks.*",
    "expect": "expect all_reduce[tp] == 0 per blocks.*",
    "allow": "allow replicate blocks.*",
}
"""A statement of each verb, to show how it is written."""

_LONGEST = 120
_AXES = ("dp", "tp", "pp", "cp", "ep")
_Edit: TypeAlias = "str | Callable[[re.Match[str]], str]"


def repaired(line: str, reads: Callable[[str], bool]) -> str:
    """The line as it was probably meant, if the grammar accepts that; else empty."""
    if len(line) > _LONGEST:
        return ""
    original, line = line.strip(), plain(line).strip()
    for attempt in (_each_alone(line), _all_in_turn(line)):
        for candidate in attempt:
            if candidate and candidate != original and reads(candidate):
                return candidate
    return ""


def verb_for(word: str) -> str:
    """The verb that was probably meant by a word that is not one; empty if none is likely."""
    known = _VERB_OF.get(_bare(word))
    return known or (
        "" if _bare(word) in _ADVICE_FOR else next(iter(nearest(word, STATEMENTS)), "")
    )


def advice(word: str) -> str:
    """What to do about a word that begins a line and is not a verb; empty if unknown."""
    return _ADVICE_FOR.get(_bare(word), "")


def example(verb: str) -> str:
    """A statement of a verb, which may have its first words already: `zero 3`."""
    name, *more = verb.split()
    return f"{verb} over dp" if more and name in _SPREAD else EXAMPLES.get(name, "")


def _bare(word: str) -> str:
    return re.sub(r"[-_]", "", word).lower()


def _each_alone(line: str) -> Iterator[str]:
    for slip in _SLIPS:
        yield _mended(line, slip)


def _all_in_turn(line: str) -> Iterator[str]:
    for slip in _SLIPS:
        line = _mended(line, slip)
        yield line


def _mended(line: str, slip: tuple[Iterable[str], str, _Edit]) -> str:
    verbs, pattern, edit = slip
    code, mark, comment = line.partition("#")
    verb = code.split(maxsplit=1)[0] if code.strip() else ""
    if verbs and verb not in verbs:
        return line
    code = re.sub(pattern, edit, code.rstrip()).rstrip()
    return (code + (f"  {mark}{comment}" if mark else "")).strip()


def _axis_sizes(found: re.Match[str]) -> str:
    sizes = re.findall(r"\d+", found[0])
    if len(sizes) > len(_AXES):
        return found[0]
    return "mesh " + ", ".join(f"{axis}={size}" for axis, size in zip(_AXES, sizes, strict=False))


def _verb(found: re.Match[str]) -> str:
    return found[0] if found[0] in STATEMENTS else verb_for(found[0]) or found[0]


def _call(found: re.Match[str]) -> str:
    """`columns("up", over="tp")` as a statement."""
    verb, *parts = found[1], *(part.strip() for part in found[2].split(","))
    words = [re.sub(r"^over\s*=\s*", "over ", part).replace('"', "") for part in parts]
    if verb in _SPREAD and len(words) > 1 and not words[-1].startswith("over "):
        words[-1] = f"over {words[-1]}"
    return f"{verb} " + ", ".join(words).replace(", over ", " over ")


def _inclusive(found: re.Match[str]) -> str:
    return f".[{found[1]}:{int(found[2]) + 1}]"


def _grouped(found: re.Match[str]) -> str:
    axes = re.findall(r"\w+", found[1])
    return f"over ({', '.join(axes)})"


def _factors(found: re.Match[str]) -> str:
    factors = re.sub(r"[,*\s]+", " ", found[1]).strip()
    return f"as ({factors})"


def _layout(found: re.Match[str]) -> str:
    """A layout with brackets around each dim that is a product."""
    dims = (dim.strip() for dim in found[1].split(","))
    written = (f"({dim})" if re.fullmatch(r"\w+(@\w+)?(\s+\w+(@\w+)?)+", dim) else dim
               for dim in dims if dim)  # fmt: skip
    return f"[{', '.join(written)}]"


def _bytes(found: re.Match[str]) -> str:
    unit = found[2].upper().removesuffix("B").removesuffix("I")
    binary = "" if found[2].upper() == f"{unit}B" else "i"
    return f"{found[1]}{unit}{binary}B"


_SPREAD = tuple(verb for verb, each in STATEMENTS.items() if issubclass(each, Spread))
_TARGETED = tuple(verb for verb, each in STATEMENTS.items() if issubclass(each, Targeted))
_SIZED = ("mesh", "let")
_VERBS = "|".join(STATEMENTS)
_OPTIONS = "|".join(
    sorted({option_name(f) for each in STATEMENTS.values() for f in each.options()})
)
_OVER = r"over|ovr|on|across|by|along|in|using|with|for|via|OVER|Over|per|through"

_SLIPS: tuple[tuple[Iterable[str], str, _Edit], ...] = (
    # Comments, lists and fences
    ((), r"^(?://+|--+|/\*+|%+|;+|\"\"\"|\brem\b|\bREM\b|<!--)\s*(.*?)\s*(?:\*/|\"\"\"|-->)?$",
     r"# \1"),
    ((), r"\s(?://|--)\s+(?=[^\W\d])(.*)$", r"  # \1"),
    ((), r"^(?:[-*>]|\d+[.)])\s+(?=\w)", ""),
    ((), r"^\w+\s*=\s*(?=[a-z]+\s+\w)", ""),
    ((), r"^(?=(?:dp|tp|pp|cp|ep)\s*=\s*\d)", "mesh "),
    ((), rf"^(?!(?:{_VERBS})\b)(?=[^\W\d]\w*\s*=\s*[\w(])", "let "),
    ((), r"\s*;\s*(?=\w+\s*=)", ", "),
    ((), r"\s*[;,.]$", ""),
    # The verb
    ((), r"^[^\W\d][\w-]*", _verb),
    ((), r"^(\w+)\s*(?::|=(?!=))\s*", r"\1 "),
    ((), r"^(\w+)\s*\(((?:\s*(?:over\s*=\s*)?\"[^\",]*\"\s*,?)+)\)$", _call),
    ((), r"^(mesh|let)\s*[(\[{](.*)[)\]}]$", r"\1 \2"),
    (("allow",), r"^allow\s+(?!(?:replicate|local)$)(?=\S+$)", "allow replicate "),
    (("zero",), r"^zero\s+(?:stage|level)?\s*=?\s*(\d)", r"zero \1"),
    (("accumulate",), r"^accumulate\s+(?:\w+\s*=\s*)?(\d+)(?:\s+\w+)?$", r"accumulate \1"),
    (("memory",), r"^memory\s+(?:budget\s*)?(?=\d)", "memory budget="),
    (("stages",), r"^stages\s+(over\s+(?:\w+|\([^()]*\)))\s+(at\s+\S+(?:(?<=,)\s+\S+)*)",
     r"stages \2 \1"),
    (("stages",), r"^stages\s+(?!at\b)(?=[^\W\d])", "stages at "),
    (("stages",), r"^stages\s+\d+\s+(?=at\b)", "stages "),
    (("stages",), r"\bschedule=([\w/-]*[./][\w./-]*)", r'schedule="\1"'),
    (("offload",), r"\bpath=([\w./~-]+)", r'path="\1"'),
    (("precision", "checkpoint", "offload"), r"^(\w+)\s+\w+\s*=\s*(?=\w+$)", r"\1 "),
    # Axes and sizes
    (("mesh",), r"^mesh\s+\d+(?:\s*[xX*,]\s*\d+|\s+\d+)*$", _axis_sizes),
    (_SIZED, r"\"(\w+)\"", r"\1"),
    (_SIZED, r"(?<=\d)[,_](?=\d{3}\b)", ""),
    (_SIZED, r"\s*(?:==+|:=|:)\s*(?=[\w(.+-])", "="),
    (("mesh",), r"\b(\d+)([^\W\d]+)\b", r"\2=\1"),
    (("mesh",), r"\b([^\W\d]+)(\d+)\b(?!\s*=)", r"\1=\2"),
    (_SIZED, r"\b([^\W\d]\w*)\s+(?=\d+\b)(?<!mesh\s)(?<!let\s)", r"\1="),
    (_SIZED, r"(=\s*[^\s,=]+)\s+(?=[^\W\d]\w*\s*=)", r"\1, "),
    (_SIZED, r",(?:\s*,)+", ","),
    (("let",), r"(?<![\w.])\.(?=\d)", "0."),
    (("let",), r"=\s*\+\s*", "= "),
    (("let",), r"(?<==)\s*(\w+)\s*(?:\^|\*\*)\s*2\b", r" \1*\1"),
    (("axes",), r"^axes\s+(\w+)\s*=?\s*[(\[{]?\s*([\w\s,]+?)\s*[)\]}]?$", r"axes \1 = (\2)"),
    # Selectors
    (_TARGETED, r"'([^'\"]*)'", r'"\1"'),
    (_TARGETED, r"(?<=\w)\[(\d+)\]", r".\1"),
    (_TARGETED, r"\.\[(\d+)\]", r".\1"),
    (_TARGETED, r"(?<=\w)\.?\[\*?\]", ".*"),
    (_TARGETED, r"(?<=\w)(?=\[\d*:\d*\])", "."),
    (_TARGETED, r"\.?\[(\d+(?:\s*,\s*\d+)+)\]", r".{\1}"),
    (_TARGETED, r"\.\{?(\d+)(?:-|\.\.|:)(\d+)\}?(?=\.|\s)", _inclusive),
    (_TARGETED, r"(?<=[\w*])[/:](?=[\w*])(?!\w*=)", "."),
    (_TARGETED, r"\.(?:\?|#|\\d[+*]?|N|\$\w+|<\w+>)(?=\.|\s)", ".*"),
    (_TARGETED, r"(?<=\s)[\^./]+(?=\w)|\$(?=\s)|\.(?=\s)(?<!\.\.\.)", ""),
    (_TARGETED, r"(?<=\w)\.\.(?=\w)", "."),
    (_TARGETED, r"(?<=[.\s])(\w+(?:\|\w+)+)(?=[.\s])",
     lambda found: "{" + found[1].replace("|", ",") + "}"),
    (_TARGETED, r"^(\w+)\s+([\w.*{}:\[\]]*?-[\w-]+)", lambda found: found[1] + " " + ".".join(
        f'"{part}"' if "-" in part else part for part in found[2].split("."))),
    (_TARGETED, r"^(\w+)\s+[(\[]\s*([^()\[\]@]*?)\s*[)\]](?=\s+over\b)", r"\1 \2"),
    (_TARGETED, r"\s+(?:and|&)\s+", ", "),
    # Where
    (_SPREAD, r",\s*(?=over\b)", " "),
    (_SPREAD, rf"\s(?:{_OVER})\s*[=:]?\s+\"?((?!over)[\w(\[{{][\w, )\]}}]*?)\"?$", r" over \1"),
    (_SPREAD, r"\sover\s*[=:]\s*", " over "),
    (_SPREAD, r"\sover\s+[\"@]?(\w+)\"?\s*(?:=+\s*\w+)?$", r" over \1"),
    (_SPREAD, r"\s@(?=\w+$)", " over "),
    (_SPREAD, r"\bover\s+([\[{(]?\s*\w+(?:(?:\s*,\s*|\s+)(?!as\b|\w+=)\w+)+\s*[)\]}]?)(?=\s\w+=|$)",
     _grouped),
    (_SPREAD, r"^(\w+\s.*?)((?:\s+\w+=\S+)+)\s+(over\s+(?:\w+|\([^()]*\)))", r"\1 \3\2"),
    (_SPREAD, r"\bover\s+[\[{(]?\s*(\w+)\s*[)\]}]?$", r"over \1"),
    (_SPREAD, r"^(\w+\s+[\w.*{},\[\]:\"]+?)\s*[=:]\s*(?=[^\W\d]\w*$)", r"\1 over "),
    (_SPREAD, r"^(?!.*\sover\b)(\w+\s+\S+)\s+(\w+)$", r"\1 over \2"),
    (_SPREAD, r"(?<=[\w*}\]\"])\s+(?=[\w*{][\w.*{}]*\s+over\b)(?<!^\w)", ", "),
    (("columns",), r"^(columns)\s*,\s*", r"\1 "),
    (_SPREAD, r"^(\w+),\s", r"\1 "),
    # Options and factors
    (_TARGETED, rf",?\s*\(?(?:--)?\b({_OPTIONS})\s*[=:]?\s+(?=[\w-]+\)?)", r" \1="),
    (_TARGETED, rf"[,\s]\s*\(?(?:--)?\b({_OPTIONS})\s*=\s*([\w.-]+)\)?", r" \1=\2"),
    (("columns",), r"\s(as\s*\(.*?\))\s+(over\s+\S+)", r" \2 \1"),
    (("columns",), r"\s(?:as\s*)?[(\[]([^()\[\]]*)[)\]]$", lambda found: " " + _factors(found)),
    (("columns",), r"\bas\s+([^()\[\]]+)$", _factors),
    # Layouts
    (("shard",), r"\s*(?:=+>|--+>)\s*", " -> "),
    (("shard",), r"\s+(\[[^\]]*\])\s*(->|<-)$", r" \2 \1"),
    (("shard",), r"\s+\(([^()]*@[^()]*)\)$", r" [\1]"),
    (("shard",), r"^(shard\s+\S+)\s+([^\[\]()]*@[^\[\]()]*)$", r"\1 [\2]"),
    (("shard",), r"(?<=\w)/(?=\w+\s*[,\])])", "@"),
    (("shard",), r"@\[([^\]]*)\]", r"@(\1)"),
    (("shard",), r"@(\w+)@(\w+)", r"@(\1, \2)"),
    (("shard",), r"(?<=[\[,])(\s*)@", r"\1d0@"),
    (("shard",), r"(?<=[\[,])(\s*)\.\.(?=\s*[,\]])", r"\1..."),
    (("shard",), r"(?<=[\[,])(\s*)[:*-](?=\s*[,\]])", r"\1_"),
    (("shard",), r"(?<=[\[,])(\s*)\*(?=@)", r"\1d0"),
    (("shard",), r"\[([^\[\]]*)\]", _layout),
    (("shard",), r"(\[[^\]]*\])\s+over\s+\w+$", r"\1"),
    (("shard",), r"\bpartial\s+(\w+)$", r"partial(\1)"),
    # Contracts
    (("expect",), r"^expect\s+no\s+(\S+)$", r"expect \1 == 0"),
    (("expect",), r"^expect\s+(\d\S*)\s*([=!<>]+)\s*(\S+)$", r"expect \3 \2 \1"),
    (("expect",), r"\b(all|reduce)-(reduce|gather|scatter|to)\b(?:-(all))?",
     lambda found: "_".join(filter(None, found.groups()))),
    (("expect",), rf"^expect\s+({'|'.join(METRICS)})\s*\(([^()]*)\)", r"expect \1[\2]"),
    (("expect",), r"===+|(?<![<>=!])=(?!=|<|>)", "=="),
    (("expect",), r"=<", "<="),
    (("expect",), r"=>", ">="),
    (("expect",), r"<>", "!="),
    (("expect",), r"([\w\]])\s+(?=\d\w*(?:\s|$))", r"\1 == "),
    (("expect",), r"\s(?:on|for|in|under|inside|each|of|over)\s+(?=\S+$)", " per "),
    (("expect", "memory", "checkpoint", "offload"),
     r"(\d)\s*([kmgtKMGT](?:[iI]?[bB])?|[kmgtKMGT][iI])\b", _bytes),
)  # fmt: skip
"""The verbs of each slip (none for all), its pattern and its replacement; tried in order."""
