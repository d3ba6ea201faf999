"""The manifest by itself: what was changed is found, and what makes no sense is refused at once."""

from __future__ import annotations

import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

import meshwright as mw
from meshwright.compiler.codegen.linking import LossScale
from meshwright.compiler.layout.extents import Extent, Padding
from meshwright.compiler.layout.mesh import Mesh
from meshwright.runtime.checkpoint.manifest import (
    Head,
    Manifest,
    SavedTensor,
    head_of,
    manifest_text,
    parse_manifest,
    shard_sizes,
)
from meshwright.runtime.checkpoint.shards import Shard
from tests.compiler.layouts import split
from tests.runtime.checkpoint.damage import sealed

SAVE = "0123456789abcdef" * 2
PADDING = Padding(0, (Extent(1, 3, 4, 1),))


@functools.cache
def small() -> Manifest:
    return Manifest(
        save=SAVE,
        mesh=Mesh((("tp", 2),)),
        plan="mesh tp=2\n",
        random={"seed": -3, "step": 7, "num_updates": 6},
        aliases={"w": "w", "head.ä": "w"},
        tensors={"w": SavedTensor((3, 2), "float32", split((4, 2), {0: "tp"}), (0, 1), (PADDING,))},
        optimizer=None,
        shards=(Shard(100, "a" * 64, "c" * 64), Shard(200, "b" * 64, "d" * 64)),
        number=4,
        loss_scale=LossScale(1024.0, 5, 1),
    )


def read(folder: Path) -> Manifest:
    return parse_manifest(folder, manifest_text(folder))


def test_a_manifest_says_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(small().to_text())
    assert read(tmp_path) == small()
    assert head_of(tmp_path) == Head(SAVE, 4)
    assert shard_sizes(manifest_text(tmp_path)) == [100, 200]


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    file, data = tmp_path / "manifest.json", small().to_text().encode()
    for place in range(len(data)):
        for bit in (0, 5, 7):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            file.write_bytes(changed)
            with pytest.raises(mw.RunError, match="is not a manifest that can be read"):
                manifest_text(tmp_path)


def test_every_cut_and_every_addition_is_found(tmp_path: Path) -> None:
    file, data = tmp_path / "manifest.json", small().to_text().encode()
    for changed in [*(data[:end] for end in range(len(data))), data + b"\n", b" " + data]:
        file.write_bytes(changed)
        with pytest.raises(mw.RunError, match="is not a manifest that can be read"):
            manifest_text(tmp_path)


def content(**changes: Any) -> dict[str, Any]:
    return {**json.loads(small().to_text()), **changes}


def tensor(**changes: Any) -> dict[str, Any]:
    row = json.loads(small().to_text())["tensors"]["w"]
    return content(tensors={"w": {**row, **changes}})


MANY = 100_000
REFUSED = {
    "an axis twice": content(mesh=[["tp", 2], ["dp", 1], ["dp", 1]]),
    "a million axes": content(mesh=[["tp", 2], *([f"a{i}", 1] for i in range(1_000_000))]),
    "more ranks than shards": content(mesh=[["tp", 2], ["dp", 2]]),
    "a huge axis": content(mesh=[["tp", 2**62]], shards=[[1, "a" * 64, "b" * 64]]),
    "an axis without ranks": content(mesh=[["tp", 0]]),
    "an axis that is a number": content(mesh=[[2, 2]]),
    "another mesh": content(mesh=[["dp", 2]]),
    "a shard without a digest": content(shards=[[100], [200]]),
    "a shard of no bytes": content(shards=[[0, "a" * 64, "c" * 64], [0, "b" * 64, "d" * 64]]),
    "a shard without the digest of its file": content(shards=[[100, "a" * 64]] * 2),
    "a plan that is a number": content(plan=3),
    "a number that is text": content(number="4"),
    "no save": content(save=""),
    "a save elsewhere": content(save="../" + SAVE[3:]),
    "a save in capitals": content(save=SAVE.upper()),
    "a step before the first": content(random={"seed": 0, "step": -1, "num_updates": 0}),
    "a seed that is text": content(random={"seed": "0", "step": 1, "num_updates": 0}),
    "a step that is true": content(random={"seed": 0, "step": True, "num_updates": 0}),
    "updates that are a fraction": content(random={"seed": 0, "step": 1, "num_updates": 0.5}),
    "no shape": tensor(shape=None),
    "a shape of another rank": tensor(shape=[3]),
    "a size that is NaN": tensor(shape=[float("nan"), 2]),
    "a size that is a fraction": tensor(shape=[3.0, 2]),
    "a huge size": tensor(shape=[10**4000, 2]),
    "a million dims": tensor(shape=[1] * MANY, dims=[[[[1]]]] * MANY),
    "a million factors": tensor(dims=[[[[1]] * MANY], [[[2]]]]),
    "a million segments": tensor(dims=[[[]] * MANY, [[[2]]]]),
    "an axis twice in a tensor": tensor(dims=[[[[4, "tp"]]], [[[2, "tp"]]]], ranks=[0, 1]),
    "an axis that the mesh lacks": tensor(dims=[[[[4, "pp"]]], [[[2]]]]),
    "a shape shorter than its padding": tensor(shape=[2, 2]),
    "more padding than parts": tensor(shape=[2, 2], padding=[[0, [[1, 2, 4, 1]]]]),
    "padding of a dim that is not there": tensor(padding=[[2, [[1, 3, 4, 1]]]]),
    "padding of nothing": tensor(padding=[[0, []]]),
    "padding that is negative": tensor(padding=[[0, [[1, 4, 3, 1]]]]),
    "padding in blocks of other sizes": tensor(padding=[[0, [[2, 2, 2, 1]]]]),
    "a part too many": tensor(ranks=[0, 1, 0]),
    "a rank that is not there": tensor(ranks=[0, 2]),
    "a rank that is not there for a whole": tensor(
        shape=[4, 2], dims=[[[[4]]], [[[2]]]], ranks=[2]
    ),
    "parts in another order": tensor(ranks=[1, 0]),
    "one part twice": tensor(ranks=[0, 0]),
    "a type that is a number": tensor(dtype=4),
    "tensors that are a list": content(tensors=[]),
    "an optimizer that is a list": content(optimizer=[]),
    "a name that leads to another tensor": content(aliases={"w": "v", "v": "w"}),
    "aliases that are numbers": content(aliases={"w": 3}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_at_once(tmp_path: Path, case: str) -> None:
    (tmp_path / "manifest.json").write_text(sealed(REFUSED[case]))
    begun = time.process_time()
    with pytest.raises(mw.RunError, match="is not a manifest that can be read") as caught:
        read(tmp_path)
    assert time.process_time() - begun < 3
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "value": (0.5, 3.0, -2.0, 0.0, 2, True, "2.0", None, float("nan"), float("inf")),
        "num_clean": (-1, 1.0, None, 10**40),
        "num_skipped": (-1, "1", False),
    }.items(),
)
def test_a_loss_scale_that_makes_no_sense_is_named(
    tmp_path: Path, key: str, values: tuple[Any, ...]
) -> None:
    scale = content()["loss_scale"]
    rest = {name: value for name, value in scale.items() if name != key}
    for changed in (rest, *({**scale, key: value} for value in values), 3.0, []):
        with pytest.raises(mw.RunError, match="can be read: `loss_scale`: "):
            parse_manifest(tmp_path, json.dumps(content(loss_scale=changed)))


@pytest.mark.parametrize("key", ["shape", "dtype", "dims", "ranks", "padding"])
@pytest.mark.parametrize("value", [None, 3, "text", [[1]], [-1, -1], {"a": 1}])
def test_the_tensor_that_makes_no_sense_is_named(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(mw.RunError, match="can be read: `w`: "):
        parse_manifest(tmp_path, json.dumps(tensor(**{key: value})))
    row = {name: value for name, value in tensor()["tensors"]["w"].items() if name != key}
    with pytest.raises(mw.RunError, match=f"`w`: `{key}` is missing"):
        parse_manifest(tmp_path, json.dumps(content(tensors={"w": row})))


TEXTS = {
    "a key twice": '{"mesh": [], "mesh": []}',
    "nested too deeply": "[" * MANY,
    "a number without end": '{"mesh": ' + "9" * MANY + "}",
    "not JSON": "{",
    "a list": "[]",
    "half a character": '"\udcc3"',
}


@pytest.mark.parametrize("case", TEXTS)
def test_json_that_is_no_manifest_is_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(mw.RunError, match="is not a manifest that can be read"):
        parse_manifest(tmp_path, TEXTS[case])


def make_odd(kind: str, file: Path) -> None:
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a folder":
        file.mkdir()
    elif kind == "a device":
        file.symlink_to("/dev/zero")
    elif kind == "a link to itself":
        file.symlink_to(file)
    else:
        with file.open("wb") as opened:
            opened.truncate(1 << 40)


@pytest.mark.parametrize(
    "kind", ["a pipe", "a folder", "a device", "a link to itself", "a terabyte"]
)
def test_what_is_not_a_file_of_text_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    make_odd(kind, tmp_path / "manifest.json")
    with pytest.raises(mw.RunError):
        manifest_text(tmp_path)
    with pytest.raises(mw.RunError, match=r"manifest\.json"):
        head_of(tmp_path)


def test_the_first_lines_of_a_manifest_are_those_of_one(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    with pytest.raises(mw.RunError, match=r"cannot read `.*manifest\.json`: No such file"):
        head_of(tmp_path)
    file.write_text(small().to_text()[:200])
    assert head_of(tmp_path) == Head(SAVE, 4)
    others = ("", '{"name": "an extension"}', sealed({"format": "meshwright checkpoint"}))
    for other in (*others, small().to_text()[:100]):
        file.write_text(other)
        with pytest.raises(mw.RunError, match="is not a manifest that can be read"):
            head_of(tmp_path)
    file.write_text('{\n  "format": "meshwright checkpoint",\n  "version": 1,\n  "number": 3,\n')
    with pytest.raises(mw.RunError, match="version 1 of the format, and this is version 4"):
        head_of(tmp_path)


@pytest.mark.parametrize("version", [1, 9])
def test_a_manifest_of_another_version_is_left_to_who_wrote_it(
    tmp_path: Path, version: int
) -> None:
    text = sealed({"format": "meshwright checkpoint", "version": version})
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(mw.RunError, match=r"(?s)it has version .* the version of Meshwright that"):
        manifest_text(tmp_path)


def test_an_entry_more_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(sealed(content(more={"written by": "another"})))
    assert read(tmp_path) == small()
