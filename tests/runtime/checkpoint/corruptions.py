"""Ways to damage a checkpoint: each a function that does it once, as a seed says, and names what.

They find files by walking the folder and know of the format that a manifest is JSON and that
tensors are in files of safetensors. What changes nothing (a bit flipped twice, a shard swapped for
its equal) is drawn again.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.runtime.checkpoint.shard_bytes import ShardBytes
from tests.runtime.checkpoint.states import shards
from tests.runtime.checkpoint.tensor_changes import TENSOR_CHANGES, TensorChange

MANIFEST = "manifest.json"


@dataclass
class Scene:
    """A copy of a checkpoint to damage, others to take from, and the dice."""

    folder: Path
    others: dict[str, Path]
    dice: random.Random

    @property
    def manifest(self) -> Path:
        return self.folder / MANIFEST

    def shard(self) -> Path:
        return self.dice.choice(shards(self.folder))

    def two(self) -> tuple[Path, Path]:
        one, other = self.dice.sample(shards(self.folder), 2)
        return one, other


@dataclass
class Damage:
    """What was damaged: an error names one of the files, and one of the tensors if there are."""

    files: list[Path]
    tensors: list[str] = field(default_factory=list)

    def is_named_in(self, message: str) -> bool:
        files = any(file.name in message for file in self.files)
        return files and (not self.tensors or any(name in message for name in self.tensors))


Corruption = Callable[[Scene], Damage]
CORRUPTIONS: dict[str, Corruption] = {}


def corruption(function: Corruption) -> Corruption:
    CORRUPTIONS[function.__name__.replace("_", " ")] = function
    return function


# -- bytes ------------------------------------------------------------------------------------


def _flip(file: Path, place: int, bit: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1 << bit
    file.write_bytes(raw)


def _header_size(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@corruption
def a_bit_in_a_tensor(scene: Scene) -> Damage:
    file = scene.shard()
    found = ShardBytes.read(file)
    name = scene.dice.choice(list(found.tensors))
    begin, end = found.header[name]["data_offsets"]
    place = scene.dice.randrange(begin, end)
    _flip(file, _header_size(file) + place, scene.dice.randrange(8))
    return Damage([file], [name])


@corruption
def a_bit_in_a_header(scene: Scene) -> Damage:
    file = scene.shard()
    _flip(file, scene.dice.randrange(8, _header_size(file)), scene.dice.randrange(8))
    return Damage([file])


@corruption
def a_bit_in_the_size_of_a_header(scene: Scene) -> Damage:
    file = scene.shard()
    _flip(file, scene.dice.randrange(8), scene.dice.randrange(8))
    return Damage([file])


@corruption
def a_bit_in_the_manifest(scene: Scene) -> Damage:
    size = scene.manifest.stat().st_size
    _flip(scene.manifest, scene.dice.randrange(size), scene.dice.randrange(8))
    return Damage([scene.manifest])


@corruption
def a_digit_in_the_manifest(scene: Scene) -> Damage:
    text = scene.manifest.read_text()
    place = scene.dice.choice([i for i, letter in enumerate(text) if letter.isdigit()])
    digit = scene.dice.choice([d for d in "123456789" if d != text[place]])
    scene.manifest.write_text(text[:place] + digit + text[place + 1 :])
    return Damage([scene.manifest])


def _file(scene: Scene) -> Path:
    return scene.dice.choice([scene.manifest, *shards(scene.folder)])


@corruption
def a_file_cut(scene: Scene) -> Damage:
    file = _file(scene)
    size = file.stat().st_size
    os.truncate(file, scene.dice.choice([0, 1, 8, size - 1, size // 2, scene.dice.randrange(size)]))
    return Damage([file])


@corruption
def a_file_extended(scene: Scene) -> Damage:
    file = _file(scene)
    more = scene.dice.choice([1, 8, 4096])
    with file.open("ab") as end:
        end.write(scene.dice.choice([bytes(more), b"}" * more, scene.dice.randbytes(more)]))
    return Damage([file])


@corruption
def a_file_of_a_terabyte(scene: Scene) -> Damage:
    file = _file(scene)
    os.truncate(file, 1 << 40)
    return Damage([file])


@corruption
def a_page_of_zeros(scene: Scene) -> Damage:
    file = scene.shard()
    raw = bytearray(file.read_bytes())
    first = 512 * scene.dice.randrange(len(raw) // 512)
    raw[first : first + 512] = bytes(min(512, len(raw) - first))
    file.write_bytes(raw)
    return Damage([file])


@corruption
def a_page_of_another_place(scene: Scene) -> Damage:
    file = scene.shard()
    raw = bytearray(file.read_bytes())
    one, other = scene.dice.sample(range(len(raw) // 512), 2)
    raw[512 * one : 512 * one + 512] = raw[512 * other : 512 * other + 512]
    file.write_bytes(raw)
    return Damage([file])


@corruption
def a_file_of_zeros(scene: Scene) -> Damage:
    file = _file(scene)
    file.write_bytes(bytes(file.stat().st_size))
    return Damage([file])


@corruption
def a_file_of_noise(scene: Scene) -> Damage:
    file = _file(scene)
    file.write_bytes(scene.dice.randbytes(file.stat().st_size))
    return Damage([file])


# -- tensors ----------------------------------------------------------------------------------


def _data_of(scene: Scene, replace: Callable[[ShardBytes, str], bytes]) -> Damage:
    """Put other bytes for those of a tensor, where they differ."""
    file = scene.shard()
    raw, found = bytearray(file.read_bytes()), ShardBytes.read(file)
    name = scene.dice.choice([n for n in found.tensors if replace(found, n) != found.bytes_of(n)])
    begin = _header_size(file) + found.header[name]["data_offsets"][0]
    data = replace(found, name)
    raw[begin : begin + len(data)] = data
    file.write_bytes(raw)
    return Damage([file], [name])


@corruption
def a_tensor_of_zeros(scene: Scene) -> Damage:
    return _data_of(scene, lambda found, name: bytes(len(found.bytes_of(name))))


@corruption
def a_tensor_shifted_by_a_byte(scene: Scene) -> Damage:
    return _data_of(scene, lambda found, name: b"\1" + found.bytes_of(name)[:-1])


@corruption
def a_tensor_of_another_save(scene: Scene) -> Damage:
    """Into a shard whose metadata stay those of its save."""
    others = [ShardBytes.read(file) for file in shards(scene.others["other weights"])]

    def replace(found: ShardBytes, name: str) -> bytes:
        data = next(other.bytes_of(name) for other in others if name in other.tensors)
        return data[: len(found.bytes_of(name))]

    return _data_of(scene, replace)


def _header_of(scene: Scene, change: TensorChange) -> Damage:
    """Write a shard anew as somebody would who knows safetensors, and nothing of digests."""
    file = scene.shard()
    found = ShardBytes.read(file)
    change(found, scene.dice)
    found.write(file)
    return Damage([file])


for _name, _change in TENSOR_CHANGES.items():
    CORRUPTIONS[_name] = functools.partial(_header_of, change=_change)


# -- files ------------------------------------------------------------------------------------


@corruption
def the_files_of_two_ranks_swapped(scene: Scene) -> Damage:
    one, other = scene.two()
    aside = scene.folder / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return Damage([one, other])


@corruption
def the_file_of_one_rank_twice(scene: Scene) -> Damage:
    one, other = scene.two()
    shutil.copyfile(one, other)
    return Damage([other])


def _replaced(scene: Scene, source: str) -> Damage:
    """A shard replaced by the one in its place of another checkpoint."""
    place = scene.dice.randrange(min(len(shards(scene.others[source])), len(shards(scene.folder))))
    file = shards(scene.folder)[place]
    shutil.copyfile(shards(scene.others[source])[place], file)
    return Damage([file])


@corruption
def a_shard_of_other_weights(scene: Scene) -> Damage:
    return _replaced(scene, "other weights")


@corruption
def a_shard_of_the_next_save(scene: Scene) -> Damage:
    return _replaced(scene, "next save")


@corruption
def a_shard_of_another_plan(scene: Scene) -> Damage:
    return _replaced(scene, "other plan")


@corruption
def a_shard_of_a_save_without_optimizer(scene: Scene) -> Damage:
    return _replaced(scene, "no optimizer")


@corruption
def the_manifest_of_another_save(scene: Scene) -> Damage:
    """Whose names of files are made those of this one, as by somebody who copies them over."""
    source = scene.others[scene.dice.choice(sorted(scene.others))]
    shutil.copyfile(source / MANIFEST, scene.manifest)
    return Damage([scene.manifest, *shards(scene.folder), *shards(source)])


@corruption
def all_shards_of_another_save(scene: Scene) -> Damage:
    files, others = shards(scene.folder), shards(scene.others["other weights"])
    for file, other in zip(files, others, strict=True):
        shutil.copyfile(other, file)
    return Damage([scene.manifest, *files])


@corruption
def a_file_missing(scene: Scene) -> Damage:
    file = _file(scene)
    file.unlink()
    return Damage([file])


@corruption
def a_file_renamed(scene: Scene) -> Damage:
    file = _file(scene)
    file.rename(file.with_name(file.name + scene.dice.choice([".bak", " (1)", "~"])))
    return Damage([file])


def _instead(scene: Scene, put: Callable[[Path], None]) -> Damage:
    file = _file(scene)
    file.unlink()
    put(file)
    return Damage([file])


@corruption
def a_folder_for_a_file(scene: Scene) -> Damage:
    return _instead(scene, Path.mkdir)


@corruption
def a_pipe_for_a_file(scene: Scene) -> Damage:
    return _instead(scene, os.mkfifo)


@corruption
def a_socket_for_a_file(scene: Scene) -> Damage:
    return _instead(scene, lambda file: os.mknod(file, stat.S_IFSOCK | 0o600))


@corruption
def a_link_to_itself_for_a_file(scene: Scene) -> Damage:
    return _instead(scene, lambda file: file.symlink_to(file.name))


@corruption
def a_link_to_a_device_for_a_file(scene: Scene) -> Damage:
    device = scene.dice.choice(["/dev/null", "/dev/zero", "/dev/urandom", "/dev/full", "/dev/tty"])
    return _instead(scene, lambda file: file.symlink_to(device))


@corruption
def a_link_to_nowhere_for_a_file(scene: Scene) -> Damage:
    return _instead(scene, lambda file: file.symlink_to("nowhere"))


@corruption
def a_file_that_says_it_is_text_of_another_encoding(scene: Scene) -> Damage:
    encoding = scene.dice.choice(["utf-16", "utf-32", "utf-8-sig"])
    scene.manifest.write_text(scene.manifest.read_text(), encoding=encoding)
    return Damage([scene.manifest])


@corruption
def a_manifest_of_something_else(scene: Scene) -> Damage:
    something = scene.dice.choice(
        [None, 3, "text", [], {}, [[]], {"name": "app", "icons": []}, {"format": 1, "version": 1}]
    )
    scene.manifest.write_text(json.dumps(something))
    return Damage([scene.manifest])
