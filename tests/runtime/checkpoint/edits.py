"""Manifests that somebody else wrote, or edited with the checksum made right again.

A value is replaced by one of another kind or out of range, a key is left out, renamed or given
another's value. What a person may mean (another learning rate, another seed) is left alone. An edit
after which the same is loaded as before is not damage: see `test_corruptions.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.runtime.checkpoint.corruptions import Damage, Scene
from tests.runtime.checkpoint.damage import sealed, with_digest
from tests.runtime.checkpoint.shard_bytes import ShardBytes
from tests.runtime.checkpoint.states import shards
from tests.runtime.checkpoint.tensor_changes import TensorChange

Edit = Callable[[dict[str, Any], Scene], list[str]]
"""Changes the parsed manifest, and gives the names of the tensors that this is about, if any."""
EDITS: dict[str, Edit] = {}
DEEP = "a list in lists"


def edit(function: Edit) -> Edit:
    EDITS[function.__name__.replace("_", " ")] = function
    return function


def edited(scene: Scene, change: Edit) -> Damage:
    """Make the edit, with the checksum of the manifest that it then has."""
    manifest = json.loads(scene.manifest.read_text())
    manifest.pop("sha256", None)
    tensors = change(manifest, scene)
    if DEEP in json.dumps(manifest):
        tensors = []  # there is no tensor to name in what cannot be parsed
    write(scene.manifest, manifest)
    files = [scene.folder, scene.manifest, *shards(scene.folder)]
    return Damage(files, tensors)


def write(file: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the digest of its own text, as its writer would."""
    text = sealed(manifest)
    if json.dumps(DEEP) in text:
        lines = text.splitlines(keepends=True)[:-2]
        text = with_digest("".join(lines).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000))
    file.write_text(text)


def rechained(scene: Scene, change: TensorChange) -> Damage:
    """Change a shard, with the digests of its header and of the manifest made right again."""
    file = scene.shard()
    rank = shards(scene.folder).index(file)
    found = ShardBytes.read(file)
    tensor = change(found, scene.dice)
    found.write(file)
    raw = file.read_bytes()
    manifest = json.loads(scene.manifest.read_text())
    header = raw[: 8 + int.from_bytes(raw[:8], "little")]
    digests = [hashlib.sha256(part).hexdigest() for part in (header, raw)]
    manifest["shards"][rank] = [len(raw), *digests]
    write(scene.manifest, manifest)
    return Damage([file], [tensor] if tensor else [])


Place = tuple[Any, Any, tuple[Any, ...]]
"""A container, a key or index of it, and the path there."""


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[Place]:
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key, (*path, key)
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key], (*path, key))


def _tensor(path: tuple[Any, ...]) -> list[str]:
    return [path[1]] if path[0] == "tensors" and len(path) > 1 else []


_WORDS = [5, None, [], {}, 1.5, "", "x" * 1_000_000, "\0", "../../manifest.json", DEEP]
_SIZES = [-1, 0, 10**18, 2**63, 10**400, 1.5, "3", None, [], {}, float("nan"), 1e300, DEEP]
_RATES = ["0.01", "text", None, [], {}, float("nan"), True, DEEP, [0.1, 0.2]]
_FLAGS = ["text", 3, 0.5, [], {}, float("nan"), DEEP]
_GROUPS = [None, 3, "text", True, 1e300, DEEP]


def _wrong(value: Any, path: tuple[Any, ...], scene: Scene) -> Any:
    """A value that cannot stand where `value` does."""
    if isinstance(value, bool) or value is None:
        return scene.dice.choice(_FLAGS)
    if isinstance(value, str):
        return scene.dice.choice([*_WORDS, value + "x", value.swapcase()])
    if isinstance(value, float):
        return scene.dice.choice(_RATES)
    if isinstance(value, int):
        near = [value + 1, value * 2] if path[0] == "tensors" else []
        return scene.dice.choice([wrong for wrong in [*_SIZES, *near] if wrong != value])
    return scene.dice.choice([*_GROUPS, {} if isinstance(value, list) else []])


@edit
def a_wrong_value(manifest: dict[str, Any], scene: Scene) -> list[str]:
    container, key, path = scene.dice.choice(list(_places(manifest)))
    container[key] = _wrong(container[key], path, scene)
    return _tensor(path)


@edit
def a_wrong_value_on_top(manifest: dict[str, Any], scene: Scene) -> list[str]:
    key = scene.dice.choice(list(manifest))
    manifest[key] = _wrong(manifest[key], (key,), scene)
    return []


def _tensor_row(manifest: dict[str, Any], scene: Scene) -> tuple[str, dict[str, Any]]:
    name = scene.dice.choice(list(manifest["tensors"]))
    return name, manifest["tensors"][name]


@edit
def a_wrong_value_of_a_tensor(manifest: dict[str, Any], scene: Scene) -> list[str]:
    name, row = _tensor_row(manifest, scene)
    container, key, path = scene.dice.choice(list(_places(row, ("tensors", name))))
    container[key] = _wrong(container[key], path, scene)
    return [name]


@edit
def a_wrong_option_of_the_optimizer(manifest: dict[str, Any], scene: Scene) -> list[str]:
    places = _places(manifest["optimizer"], ("optimizer",))
    container, key, path = scene.dice.choice(list(places))
    container[key] = _wrong(container[key], path, scene)
    return []


@edit
def text_for_a_learning_rate(manifest: dict[str, Any], scene: Scene) -> list[str]:
    places = [place for place in _places(manifest["optimizer"]) if place[1] == "lr"]
    container, key, _ = scene.dice.choice(places)
    container[key] = scene.dice.choice(_RATES)
    return []


@edit
def a_key_missing(manifest: dict[str, Any], scene: Scene) -> list[str]:
    container, key, path = scene.dice.choice(list(_places(manifest)))
    del container[key]
    return _tensor(path)


@edit
def a_tensor_missing_in_the_manifest(manifest: dict[str, Any], scene: Scene) -> list[str]:
    name, _ = _tensor_row(manifest, scene)
    del manifest["tensors"][name]
    return [name]


@edit
def a_key_renamed(manifest: dict[str, Any], scene: Scene) -> list[str]:
    places = [place for place in _places(manifest) if isinstance(place[0], dict)]
    container, key, path = scene.dice.choice(places)
    renamed = scene.dice.choice([key + "x", key.upper(), ""])
    container[renamed] = container.pop(key)
    names = _tensor(path)
    return [*names, f"`{renamed}`"] if names == [key] else names


@edit
def two_values_swapped(manifest: dict[str, Any], scene: Scene) -> list[str]:
    """Swap values of two tensors."""
    one, row = _tensor_row(manifest, scene)
    tensors = manifest["tensors"]
    other = scene.dice.choice([name for name in tensors if tensors[name] != row])
    theirs = tensors[other]
    key = scene.dice.choice([key for key in row if row[key] != theirs.get(key)])
    row[key], theirs[key] = theirs[key], row[key]
    return [one, other]


@edit
def two_tensors_swapped(manifest: dict[str, Any], scene: Scene) -> list[str]:
    tensors = manifest["tensors"]
    one, other = scene.dice.sample(list(tensors), 2)
    tensors[one], tensors[other] = tensors[other], tensors[one]
    return []


@edit
def an_alias_of_another_tensor(manifest: dict[str, Any], scene: Scene) -> list[str]:
    aliases = manifest["aliases"]
    one, other = scene.dice.sample(list(aliases), 2)
    aliases[one] = aliases[other]
    return []


@edit
def two_aliases_swapped(manifest: dict[str, Any], scene: Scene) -> list[str]:
    aliases = manifest["aliases"]
    alike = [[n for n in aliases if f".{end}" in n] for end in ("ln.", "up.bias", "down.weight")]
    one, other = scene.dice.sample(scene.dice.choice(alike), 2)
    aliases[one], aliases[other] = aliases[other], aliases[one]
    return [one, other]


@edit
def a_shape_turned(manifest: dict[str, Any], scene: Scene) -> list[str]:
    """A shape as `[inputs, outputs]`, with as many bytes as before."""
    matrices = [
        (name, row)
        for name, row in manifest["tensors"].items()
        if len(row["shape"]) == 2 and len(set(row["shape"])) == 2
    ]
    name, row = scene.dice.choice(matrices)
    row["shape"].reverse()
    if scene.dice.random() < 0.5:
        row["dims"].reverse()
    return [name]


@edit
def owners_in_another_order(manifest: dict[str, Any], scene: Scene) -> list[str]:
    split = [(n, row) for n, row in manifest["tensors"].items() if len(set(row["ranks"])) > 1]
    name, row = scene.dice.choice(split)
    row["ranks"].reverse()
    return [name]


@edit
def owners_all_one(manifest: dict[str, Any], scene: Scene) -> list[str]:
    split = [(n, row) for n, row in manifest["tensors"].items() if len(set(row["ranks"])) > 1]
    name, row = scene.dice.choice(split)
    row["ranks"] = [row["ranks"][0]] * len(row["ranks"])
    return [name]


@edit
def another_dtype(manifest: dict[str, Any], scene: Scene) -> list[str]:
    name, row = _tensor_row(manifest, scene)
    kinds = ["float32", "int64", "bfloat16", "float8_e4m3fn", "complex64", "qint8", "dtype", ""]
    row["dtype"] = scene.dice.choice([kind for kind in kinds if kind != row["dtype"]])
    return [name]


@edit
def a_million_axes(manifest: dict[str, Any], scene: Scene) -> list[str]:
    axes = [f"a{number}" for number in range(1_000_000)]
    if scene.dice.random() < 0.5:
        manifest["mesh"] += [[axis, 1] for axis in axes]
        return []
    name, row = _tensor_row(manifest, scene)
    row["dims"] = [[[[1, *axes]]]]
    return [name]


@edit
def a_million_dims(manifest: dict[str, Any], scene: Scene) -> list[str]:
    name, row = _tensor_row(manifest, scene)
    row["shape"] = [1] * 1_000_000
    row["dims"] = [[[[1]]]] * 1_000_000
    return [name]


@edit
def a_million_owners(manifest: dict[str, Any], scene: Scene) -> list[str]:
    """A million owners, of parts of a tensor that is huge, too."""
    manifest["mesh"].append(["many", 1_000_000])
    _, row = _tensor_row(manifest, scene)
    row["shape"], row["dims"] = [10**6], [[[[10**6, "many"]]]]
    row["ranks"] = list(range(10**6))
    return []


@edit
def a_mesh_of_huge_axes(manifest: dict[str, Any], scene: Scene) -> list[str]:
    manifest["mesh"] = [[name, 2**62] for name, _ in manifest["mesh"]]
    return []


@edit
def an_axis_twice(manifest: dict[str, Any], scene: Scene) -> list[str]:
    manifest["mesh"].append(scene.dice.choice(manifest["mesh"]))
    return []


@edit
def an_axis_twice_in_a_layout(manifest: dict[str, Any], scene: Scene) -> list[str]:
    split = [(n, row) for n, row in manifest["tensors"].items() if len(row["ranks"]) > 1]
    name, row = scene.dice.choice(split)
    factors = [factor for dim in row["dims"] for part in dim for factor in part]
    factor = next(factor for factor in factors if len(factor) > 1)
    if scene.dice.random() < 0.5:
        factor.append(factor[-1])
    else:
        next(f for f in [*factors[::-1], factor] if f is not factor or len(factors) == 1).append(
            factor[-1]
        )
    return [name]


@edit
def a_tensor_that_needs_a_petabyte(manifest: dict[str, Any], scene: Scene) -> list[str]:
    name, row = _tensor_row(manifest, scene)
    row["shape"] = [2**50]
    row["dims"] = [[[[2**50]]]]
    row["ranks"] = row["ranks"][:1]
    return [name]


@edit
def a_parameter_in_no_group(manifest: dict[str, Any], scene: Scene) -> list[str]:
    group = scene.dice.choice(manifest["optimizer"]["groups"])
    return [group["names"].pop()]


@edit
def a_group_missing(manifest: dict[str, Any], scene: Scene) -> list[str]:
    manifest["optimizer"]["groups"].pop(scene.dice.randrange(2))
    return []


@edit
def no_optimizer(manifest: dict[str, Any], scene: Scene) -> list[str]:
    manifest["optimizer"] = None
    return []


@edit
def an_option_missing(manifest: dict[str, Any], scene: Scene) -> list[str]:
    group = scene.dice.choice(manifest["optimizer"]["groups"])
    del group[scene.dice.choice([key for key in group if key != "names"])]
    return []
