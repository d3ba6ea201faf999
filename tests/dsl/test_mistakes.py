"""What a newcomer writes: the error has its place, and following its help literally works."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from meshwright.dsl import Plan, PlanError
from meshwright.dsl.characters import described
from meshwright.dsl.reading.slips import EXAMPLES
from meshwright.dsl.statements import STATEMENTS

MESH = "mesh dp=2, tp=2\n"
Golden = Callable[[str, str], None]


def error_of(text: object) -> PlanError:
    with pytest.raises(PlanError) as caught:
        Plan.parse(text, "gpt.plan")  # type: ignore[arg-type]  # other types are tried too
    return caught.value


def followed(text: str, error: PlanError) -> str:
    """`text` after doing what the help says, word for word.

    A statement in backticks takes the place of the line, another text that of what the caret shows.
    """
    span = error.spans[0]
    lines = text.removeprefix("\ufeff").split("\n")
    line, at = lines[span.line - 1], slice(span.column - 1, span.end - 1)
    quoted = re.findall(r"`([^`]+)`", error.help)
    new = re.search(r"as in `([^`]+)`", error.help)
    if new is not None:
        line = new[1]
    elif error.help.startswith(("remove the comma", "remove it")):
        line = line[: at.start] + line[at.stop :]
    elif error.help.startswith("remove the line"):
        line = ""
    elif error.help.startswith("add the missing"):
        end = error.spans[1].column - 1 if len(error.spans) > 1 else len(line)
        line = line[:end] + quoted[0] + line[end:]
    elif error.help.startswith("begin a new line"):
        line = line[: at.start] + "\n" + line[at.stop :].lstrip()
    elif error.help.startswith("use double quotes"):
        line = line.replace("'", '"')
    elif len(quoted[0].split()) > 1 and quoted[0].split()[0] in (*STATEMENTS, "#"):
        line = "\n".join(quoted)
    else:
        line = line[: at.start] + quoted[0] + line[at.stop :]
    return "\n".join([*lines[: span.line - 1], line, *lines[span.line :]])


C = "columns up "
MISTAKES = {
    # The mesh
    "mesh 2x2": "mesh dp=2, tp=2",
    "mesh 2 x 2 x 4": "mesh dp=2, tp=2, pp=4",
    "mesh 2x2x2x2": "mesh dp=2, tp=2, pp=2, cp=2",
    "mesh 2x2  # two by two": "mesh dp=2, tp=2  # two by two",
    "mesh 2 2": "mesh dp=2, tp=2",
    "mesh 4": "mesh dp=4",
    "mesh (2, 2)": "mesh dp=2, tp=2",
    "mesh dp 2": "mesh dp=2",
    "mesh: dp=2": "mesh dp=2",
    "mesh dp:2": "mesh dp=2",
    "mesh dp==2": "mesh dp=2",
    "mesh dp=2 tp=2": "mesh dp=2, tp=2",
    "mesh dp=2; tp=2": "mesh dp=2, tp=2",
    "mesh dp=2,,tp=2": "mesh dp=2,tp=2",
    "mesh (dp=2)": "mesh dp=2",
    "mesh [dp=2, tp=2]": "mesh dp=2, tp=2",
    "mesh {dp: 2}": "mesh dp=2",
    'mesh = {"dp": 2, "tp": 2}': "mesh dp=2, tp=2",
    'mesh dp="2"': "mesh dp=2",
    "mesh 2dp": "mesh dp=2",
    "mesh dp2": "mesh dp=2",
    "mesh(dp=2, tp=2)": "mesh dp=2, tp=2",
    "mesh=2": "mesh dp=2",
    "MESH dp=2": "mesh",
    "mesh dp=2,": "",
    "mesh": "mesh dp=2, tp=2",
    "mesh dp, tp": "mesh dp=2, tp=2",
    "devices dp=2": "mesh",
    "dp=2, tp=2": "mesh dp=2, tp=2",
    "plan = mesh dp=2": "mesh dp=2",
    "mesh dp=2, tp=2; columns up over tp": "",
    # Names
    MESH + "columns layers[0].wi over tp": "columns layers.0.wi over tp",
    MESH + "columns layers.[0].wi over tp": "columns layers.0.wi over tp",
    MESH + "columns layers[*].wi over tp": "columns layers.*.wi over tp",
    MESH + "columns layers[].wi over tp": "columns layers.*.wi over tp",
    MESH + "columns layers[0:2].wi over tp": "columns layers.[0:2].wi over tp",
    MESH + "columns layers.[0,1].wi over tp": "columns layers.{0,1}.wi over tp",
    MESH + "columns layers.0-3.wi over tp": "columns layers.[0:4].wi over tp",
    MESH + "columns layers.0..3.wi over tp": "columns layers.[0:4].wi over tp",
    MESH + "columns layers/0/wi over tp": "columns layers.0.wi over tp",
    MESH + "columns layers/*/wi over tp": "columns layers.*.wi over tp",
    MESH + "columns layers:0.wi over tp": "columns layers.0.wi over tp",
    MESH + "columns layers.?.wi over tp": "columns layers.*.wi over tp",
    MESH + r"columns layers.\d+.wi over tp": "columns layers.*.wi over tp",
    MESH + "columns ^layers.* over tp": "columns layers.* over tp",
    MESH + "columns layers.0|1.wi over tp": "columns layers.{0,1}.wi over tp",
    MESH + "columns .wi over tp": "columns wi over tp",
    MESH + "columns wi. over tp": "columns wi over tp",
    MESH + "columns layers..wi over tp": "columns layers.wi over tp",
    MESH + "columns layer-1.wi over tp": 'columns "layer-1".wi over tp',
    MESH + "columns (up, down) over tp": "columns up, down over tp",
    MESH + "columns [up, down] over tp": "columns up, down over tp",
    MESH + "columns up down over tp": "columns up, down over tp",
    MESH + "columns up and down over tp": "columns up, down over tp",
    MESH + "columns 'up' over tp": 'columns "up" over tp',
    MESH + "columns up, over tp": "columns up over tp",
    MESH + 'columns("up", "tp")': "columns up over tp",
    MESH + 'columns("up", over="tp")': "columns up over tp",
    MESH + 'data("x", "y", over="dp")': "data x, y over dp",
    # Verbs
    **{MESH + f"{word} up over tp": "columns"
       for word in ("COLUMNS", "Columns", "column", "cols", "colwise", "columnwise", "colums")},
    **{MESH + f"{word} up over tp": "rows" for word in ("ROWS", "Row", "row", "rowwise", "rwos")},
    MESH + "columns: up over tp": "columns up over tp",
    MESH + "column-parallel up over tp": "columns up over tp",
    MESH + "tensor_parallel up over tp": "columns blocks.*.up over tp",
    MESH + "fsdp over dp": "zero 3 over dp",
    MESH + "fsdp": "zero 3 over dp",
    MESH + "ddp": "data ** over dp",
    MESH + "ddp over dp": "data ** over dp",
    MESH + "zero3 over dp": "zero 3 over dp",
    MESH + "zero stage=3 over dp": "zero 3 over dp",
    MESH + "pipeline 2 over dp": "stages",
    MESH + "stages 2 balance=flops over dp": "stages 2 over dp balance=flops",
    MESH + "zero 2 every=step over dp": "zero 2 over dp every=step",
    MESH + "stages over dp at a": "stages at a over dp",
    MESH + "stages 2 at a over dp": "stages at a over dp",
    MESH + "stages at a over dp schedule=own.csv": 'stages at a over dp schedule="own.csv"',
    MESH + "stages 4 over dp, tp microbatches=2": "stages 4 over (dp, tp) microbatches=2",
    MESH + "colwise up": "columns blocks.*.up over tp",
    MESH + "batch x over dp": "data",
    MESH + "inputs x over dp": "data",
    MESH + "embedding wte over tp": "vocab",
    MESH + "sequence_parallel up over tp": "sequence",
    MESH + "activation_checkpointing blocks.*": "checkpoint",
    MESH + "remat blocks.*": "checkpoint",
    MESH + "gradient_accumulation 4": "accumulate",
    MESH + "amp bf16": "precision",
    MESH + "bf16": "precision bf16",
    MESH + "replicate up": "allow replicate up",
    MESH + "optimizer adamw": "",
    "x = 2": "let x = 2",
    "set x = 2": "let",
    # Axes
    **{MESH + C + f"{word} tp": C + "over tp"
       for word in ("on", "across", "by", "along", "with", "OVER", "ovr", "over:", "over =")},
    MESH + C + "over tp,": C + "over tp",
    MESH + C + "over tp;": C + "over tp",
    MESH + C + "over": "columns blocks.*.up over tp",
    MESH + C + "tp": C + "over tp",
    MESH + C + "@tp": C + "over tp",
    MESH + C + "over=tp": C + "over tp",
    MESH + C + 'over "tp"': C + "over tp",
    MESH + C + "over [tp]": C + "over tp",
    MESH + C + "over {tp}": C + "over tp",
    MESH + C + "over @tp": C + "over tp",
    MESH + C + "over tp=2": C + "over tp",
    MESH + C + "over tp == 2": C + "over tp",
    MESH + C + "over tp)": C + "over tp",
    MESH + C + "over (tp": ")",
    MESH + C + "over dp, tp": C + "over (dp, tp)",
    MESH + C + "over dp tp": C + "over (dp, tp)",
    MESH + C + "over [dp, tp]": C + "over (dp, tp)",
    MESH + C + "over TP": "tp",
    MESH + C + "= 2": "columns blocks.*.up over tp",
    MESH + C + "over 2": "columns blocks.*.up over tp",
    MESH + C: "columns blocks.*.up over tp",
    # Factors and options
    MESH + C + "over tp as 3 heads hd": C + "over tp as (3 heads hd)",
    MESH + C + "over tp as [3 heads hd]": C + "over tp as (3 heads hd)",
    MESH + C + "over tp as (3, heads, hd)": C + "over tp as (3 heads hd)",
    MESH + C + "over tp as (3*heads*hd)": C + "over tp as (3 heads hd)",
    MESH + C + "over tp as heads": C + "over tp as (heads)",
    MESH + C + "over tp (3 heads hd)": C + "over tp as (3 heads hd)",
    MESH + C + "as (3 heads hd) over tp": C + "over tp as (3 heads hd)",
    MESH + "data x over dp, dim=1": "data x over dp dim=1",
    MESH + "data x over dp (dim=1)": "data x over dp dim=1",
    MESH + "data x over dp --dim=1": "data x over dp dim=1",
    MESH + "data x over dp dim 1": "data x over dp dim=1",
    MESH + "data x over dp dimm=1": "dim",
    MESH + "data x=dp": "data x over dp",
    MESH + "data x: dp": "data x over dp",
    MESH + "allow up": "allow replicate up",
    "memory 60GiB": "memory budget=60GiB",
    "memory budget=60G": "60GiB",
    "precision=bf16": "precision bf16",
    "precision bfloat16": "bf16",
    "accumulate steps=4": "accumulate 4",
    # Comments, other languages
    MESH + "// hi": "# hi",
    MESH + "-- hi": "# hi",
    MESH + "/* hi */": "# hi",
    MESH + '"""hi"""': "# hi",
    MESH + "% hi": "# hi",
    MESH + C + "over tp // hi": C + "over tp  # hi",
    MESH + C + "over tp -- hi": C + "over tp  # hi",
    "- mesh dp=2": "mesh dp=2",
    "1. mesh dp=2": "mesh dp=2",
    "```\nmesh dp=2": "",
    # Numbers
    "let x: 2": "let x=2",
    "let x 2": "let x=2",
    "let x == 2": "let x=2",
    "let x = 2 y = 3": "let x = 2, y = 3",
    "let x = 1,000": "let x = 1000",
    "let x = 1_000": "1000",
    "let x = 0x10": "16",
    "let x = .5": "let x = 0.5",
    "let x = +2": "let x = 2",
    "let d = 2, x = 2d": "2*d",
    "let 2x = 2": "x2",
    "let x": "let d = 768, f = 4*d",
    # Layouts
    MESH + "shard w [d, 4 heads@tp hd]": "shard w [d, (4 heads@tp hd)]",
    MESH + "shard w [d, (4 heads@tp hd]": ")",
    MESH + "shard w [d@tp, e": "]",
    MESH + "shard w d@tp, e": "shard w [d@tp, e]",
    MESH + "shard w (d@tp, e)": "shard w [d@tp, e]",
    MESH + "shard w [d/tp, e]": "shard w [d@tp, e]",
    MESH + "shard w [@tp, e]": "shard w [d0@tp, e]",
    MESH + "shard w [d@tp, -]": "shard w [d@tp, _]",
    MESH + "shard w [d@tp, :]": "shard w [d@tp, _]",
    MESH + "shard w [d@tp, ..]": "shard w [d@tp, ...]",
    MESH + "shard w [d@dp@tp]": "shard w [d@(dp, tp)]",
    MESH + "shard w [d@[dp, tp]]": "shard w [d@(dp, tp)]",
    MESH + "shard w [d@tp,]": "shard w [d@tp]",
    MESH + "shard w [d@tp] partial dp": "shard w [d@tp] partial(dp)",
    MESH + "shard w => [d]": "shard w -> [d]",
    MESH + "shard w [d] ->": "shard w -> [d]",
    MESH + "shard w [d@tp, e] over tp": "shard w [d@tp, e]",
    MESH + "shard w over tp": "shard blocks.*.up.weight [f@tp, d]",
    MESH + "memory budget 60 GB": "memory budget=60GB",
    # Contracts
    MESH + "expect all_reduce[tp] = 0": "expect all_reduce[tp] == 0",
    MESH + "expect all_reduce[tp] =< 0": "expect all_reduce[tp] <= 0",
    MESH + "expect all_reduce[tp] <> 0": "expect all_reduce[tp] != 0",
    MESH + "expect all_reduce[tp] 0": "expect all_reduce[tp] == 0",
    MESH + "expect all_reduce(tp) == 0": "expect all_reduce[tp] == 0",
    MESH + "expect all-reduce[tp] == 0": "expect all_reduce[tp] == 0",
    MESH + "expect allreduce == 0": "all_reduce",
    MESH + "expect no all_reduce": "expect all_reduce == 0",
    MESH + "expect 0 == all_reduce": "expect all_reduce == 0",
    MESH + "expect all_reduce == 0 on up": "expect all_reduce == 0 per up",
    MESH + "expect peak_memory < 60 GB": "expect peak_memory < 60GB",
}  # fmt: skip
"""What is written, and what the help gives in its first (or, after `as in`, last) backticks."""

EXAMPLE_MESH = "\nmesh dp=2, tp=2, pp=2, cp=2, ep=2, row=2, col=2\n"


@pytest.mark.parametrize("text", MISTAKES)
def test_the_help_says_what_to_write_and_following_it_works(text: str) -> None:
    error = error_of(text)
    shown = re.findall(r"`([^`]+)`", error.help)
    if MISTAKES[text]:
        assert MISTAKES[text] in shown, error
    mended = followed(text, error)
    if "no mesh" in str(error_after(mended)):
        mended += EXAMPLE_MESH
    assert error_after(mended) is None, f"{error}\n{mended}"


def error_after(text: str) -> PlanError | None:
    try:
        Plan.parse(text)
    except PlanError as error:
        return error
    return None


def test_every_mistake_shows_its_line_and_a_caret_inside_it(golden: Golden) -> None:
    texts = []
    for text in MISTAKES:
        error = error_of(text)
        line = text.split("\n")[error.spans[0].line - 1]
        assert 1 <= error.spans[0].column <= len(line) + 1
        caret = str(error).split("\n")[3].partition("| ")[2]
        assert caret.strip("^ ") == "" and "^" in caret
        texts.append(f"{error}\n")
    golden("mistakes", "\n".join(texts))


@pytest.mark.parametrize("verb", STATEMENTS)
def test_the_example_of_every_verb_reads(verb: str) -> None:
    text = EXAMPLES[verb]
    assert text.split()[0] == verb
    assert Plan.parse(text + ("" if verb == "mesh" else EXAMPLE_MESH)).statements


LINE = "columns up over tp"


def test_a_byte_order_mark_and_the_line_ends_of_other_systems_are_read(tmp_path: Path) -> None:
    plain = Plan.parse(MESH + "# why\n\n" + LINE + "\n")
    text = "\ufeff" + plain.format().replace("\n", "\r\n")
    assert Plan.parse(text) == plain
    assert Plan.parse(text).format() == plain.format()
    assert Plan.parse(plain.format().replace("\n", "\r")).format() == plain.format()
    path = tmp_path / "gpt.plan"
    path.write_bytes(text.encode())
    assert Plan.load(path).format() == plain.format()


def test_carets_stand_right_after_a_byte_order_mark_and_windows_lines() -> None:
    error = error_of("\ufeffmesh dp=2\r\nrows\tup over\u00a0tq\r\n")
    assert error.spans[0].place == "gpt.plan:2:14"
    line, caret = str(error).split("\n")[2:4]
    assert line[caret.index("^") :] == "tq"
    first = error_of("\ufeffmesh dq")
    assert first.spans[0].place == "gpt.plan:1:6"


def test_carets_count_the_cells_of_wide_and_combining_characters() -> None:
    line, caret = str(error_of(MESH + "rows \u5c64.e\u0301, b over")).split("\n")[2:4]
    assert line.endswith("over")
    for name, cells in (("\u5c64\u5c64", 4), ('"\uff21"', 4)):
        caret = str(error_of(MESH + f"rows {name} over tq")).split("\n")[3]
        assert caret.index("^") == len("  2 | rows ") + cells + len(" over ")


@pytest.mark.parametrize("blank", "\t\v\f\u00a0\u2009\u202f\u3000")
def test_blanks_of_any_width_are_blanks(blank: str) -> None:
    plan = Plan.parse(f"mesh dp=2,{blank}tp{blank}=2\n{LINE.replace(' ', blank)}")
    assert plan.format() == Plan.parse(MESH + LINE).format()


def test_a_blank_is_not_what_is_wrong_with_a_line_whatever_its_width() -> None:
    assert error_of(MESH + "columns up on\u00a0tp").message == "`on` is not expected here"


def test_a_mesh_of_more_sizes_than_there_are_usual_axes_loses_none() -> None:
    assert "mesh" not in error_of("mesh 2x2x2x2x2x2").help


LOOK_ALIKES = {
    "\u200b": "columns up over\u200b tp",
    "\u200d": "columns u\u200dp over tp",
    "\u00ad": "columns u\u00adp over tp",
    "\ufeff": "columns up\ufeff over tp",
    "\u202e": "columns \u202eup over tp",
    "\x00": "columns up over tp\x00",
    "\x1b": "columns \x1bup over tp",
    "\x85": "columns up over tp\x85",
    "\u2028": "columns up over tp\u2028",
    "\u201c": "columns \u201cup\u201d over tp",
    "\u2018": "columns \u2018up\u2019 over tp",
    "\u2013": "columns layer\u20131.up over tp",
    "\u2212": "let x = 4 \u2212 2",
    "\uff1d": "let x \uff1d 4",
    "\uff0c": "data x\uff0cy over dp",
    "\uff08": "columns up over \uff08tp\uff09",
    "\uff14": "let x = \uff14",
    "\u2265": "expect all_reduce[tp] \u2265 4",
    "\u2192": "shard up \u2192 [d@tp]",
    "\u2026": "shard w [d@tp, \u2026]",
    "\u00d7": "let x = 4 \u00d7 2",
    "\u2022": "\u2022 columns up over tp",
}


@pytest.mark.parametrize("char", LOOK_ALIKES)
def test_an_invisible_or_look_alike_character_is_named_and_its_help_works(char: str) -> None:
    text = MESH + LOOK_ALIKES[char]
    error = error_of(text)
    assert described(char) in error.message
    span = error.spans[0]
    assert text.split("\n")[span.line - 1][span.column - 1] == char
    mended = followed(text, error)
    assert error_after(mended) is None, mended


def test_a_character_is_named_by_number_and_name() -> None:
    assert described("\u00a0") == "U+00A0 no-break space"
    assert described("\x00") == "U+0000 null"
    assert described("\x02") == "U+0002 unnamed character"


@pytest.mark.parametrize(
    "text", [MESH + "# \u201ccurly\u201d \u2013 fine \u200b", MESH + 'rows "a\u2013b" over tp']
)
def test_comments_and_quoted_names_may_hold_any_character(text: str) -> None:
    assert Plan.parse(Plan.parse(text).format()) == Plan.parse(text)


ENCODINGS = {
    "latin-1": MESH.encode() + "rows a over tp  # \u00e9t\u00e9".encode("latin-1"),
    "utf-16": MESH.encode("utf-16"),
    "utf-16 without a mark": MESH.encode("utf-16-le"),
    "binary": b"\x7fELF\x00\x01",
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_file_in_another_encoding_is_told_with_its_place(
    name: str, tmp_path: Path, golden: Golden
) -> None:
    path = tmp_path / "gpt.plan"
    path.write_bytes(ENCODINGS[name])
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    text = str(caught.value).replace(str(tmp_path), "folder")
    golden(f"encoding-{name.replace(' ', '-')}", text)


OTHERS: dict[str, Callable[[Path], object]] = {
    "no-text": lambda folder: Plan.parse(None),  # type: ignore[arg-type]
    "bytes": lambda folder: Plan.parse(b"mesh dp=2"),  # type: ignore[arg-type]
    "list-of-lines": lambda folder: Plan.parse(["mesh dp=2"] * 10**5),  # type: ignore[arg-type]
    "mesh-as-a-dict": lambda folder: Plan.parse({"dp": 2}),  # type: ignore[arg-type]
    "path-object": lambda folder: Plan.parse(folder / "gpt.plan"),  # type: ignore[arg-type]
    "path-as-text": lambda folder: Plan.parse("gpt.plan"),
    "path-in-a-folder": lambda folder: Plan.parse("plans/gpt.txt"),
    "text-as-a-path": lambda folder: Plan.load("mesh dp=2"),
    "lines-as-a-path": lambda folder: Plan.load("# a plan\nmesh dp=2\n" * 99),
    "no-path": lambda folder: Plan.load(None),  # type: ignore[arg-type]
    "no-file": lambda folder: Plan.load(Path("folder") / "absent.plan"),
    "null-in-a-path": lambda folder: Plan.load("a\0b"),
    "plan-as-a-plan": lambda folder: Plan.parse(Plan.parse("mesh dp=2")),  # type: ignore[arg-type]
    "name-of-another-type": lambda folder: Plan.parse("mesh", 3),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_plan_text_is_told(name: str, tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(PlanError) as caught:
        OTHERS[name](tmp_path)
    golden(f"argument-{name}", str(caught.value))


@pytest.mark.parametrize("text", ["", " \n\t\n", "# only a comment", "\ufeff"])
def test_an_empty_plan_reads_as_a_plan_that_says_nothing(text: str) -> None:
    assert Plan.parse(text).statements == ()
