"""Weights in safetensors files, as Hugging Face keeps them: read in part, and refused in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

import meshwright as mw
from meshwright.runtime.rank import RankState
from meshwright.runtime.state.start import _sample, checksum
from meshwright.runtime.state.weights import values_of
from tests.runtime.checkpoint.pretrained_ranks import WIDE, Wide, resident
from tests.runtime.forked import Forked
from tests.runtime.models import PLANS, batch, make


def in_files(folder: Path, tensors: dict[str, Tensor], count: int = 2) -> Path:
    """Write tensors as Hugging Face does: into numbered files, and an index of them."""
    folder.mkdir(exist_ok=True)
    places = {}
    for number in range(count):
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        names = list(tensors)[number::count]
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def weights() -> dict[str, Tensor]:
    """Those of the small model, as Hugging Face would keep them: a tied one under one name."""
    found = make(seed=5).state_dict()
    del found["head.weight"]
    return found


@pytest.mark.parametrize("max_shard_size", ["10KB", "5GB"])
def test_a_model_of_hugging_face_starts_from_its_folder(
    tmp_path: Path, max_shard_size: str
) -> None:
    config = GPT2Config(
        vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=1
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or max_shard_size == "5GB"
    torch.manual_seed(1)
    other = GPT2LMHeadModel(config)
    tokens = torch.randint(23, (4, 8))
    plan = mw.Plan.parse("mesh dp=4\ndata input_ids, labels over dp\nzero 3 over dp")
    program = mw.compile(other, plan, {"input_ids": tokens, "labels": tokens})
    with program.launch(state_dict=mw.read_state_dict(tmp_path)) as run:
        found = run.state_dict()
        expected = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_file_and_an_index_are_read_by_their_own_names_too(tmp_path: Path) -> None:
    expected = weights()
    in_files(tmp_path, expected, 3)
    save_file({"a": torch.ones(2)}, tmp_path / "adapter.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        found = mw.read_state_dict(path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert mw.read_state_dict(str(tmp_path / "adapter.safetensors"))["a"].tolist() == [1, 1]


def test_a_run_takes_mapped_tensors_over_and_files_stay_as_they_are(tmp_path: Path) -> None:
    in_files(tmp_path, weights())
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    found = mw.read_state_dict(tmp_path)
    run = mw.compile(make(), mw.Plan.parse(PLANS["both"]), example=batch()).launch()
    run.load_state_dict({**found, "head.weight": found["wte.weight"]})
    taken = run.state_dict()
    assert all(torch.equal(taken[name], value) for name, value in weights().items())
    found["wte.weight"].zero_()
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_types_and_shapes_are_those_of_the_library_aligned_or_not(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(2, 3, dtype=torch.float64),
        "c": torch.tensor(True), "d": torch.empty(0, 4, dtype=torch.bfloat16),
        "e": torch.tensor(2.5, dtype=torch.float16), "f": torch.randn(5).to(torch.float8_e4m3fn),
    }  # fmt: skip
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    text = json.dumps(header).encode()
    odd = tmp_path / "odd.safetensors"
    text += b" " * (3 - len(text) % 8)
    data = file.read_bytes()[8 + int.from_bytes(file.read_bytes()[:8], "little") :]
    odd.write_bytes(len(text).to_bytes(8, "little") + text + data)
    for path in (file, odd):
        expected, found = load_file(path), mw.read_state_dict(path)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
            assert found[name].flatten().view(torch.uint8).equal(value.flatten().view(torch.uint8))


def test_a_rank_reads_the_bytes_that_it_holds(tmp_path: Path) -> None:
    file, width = tmp_path / "model.safetensors", 2 * WIDE
    save_file(Wide(width).state_dict(), file)
    with torch.device("meta"):
        model = Wide(width)
    for plan, least, most in (("zero 3 over dp", 0.12, 0.3), ("", 0.9, 1.1)):
        text = f"mesh dp=8\ndata x over dp\n{plan}"
        program = mw.compile(model, mw.Plan.parse(text), (torch.ones(8, width),))
        found = mw.read_state_dict(tmp_path)
        assert resident(file) < 0.01
        RankState(program, 1, values_of(program, found))
        assert least < resident(file) < most  # the system may map 2 MiB at once
        del found


def test_a_sample_stands_for_all_of_a_tensor() -> None:
    """A difference in the middle is seen as one at an end is; a small tensor is read whole."""
    for size, width in ((1 << 16, 1), (1 << 20, 1 << 17)):
        weights = torch.randn(size)
        own = checksum(_sample(weights))
        for begin in range(0, size - width + 1, (size - width) // 9):
            other = weights.clone()
            other[begin : begin + width] += 1
            assert checksum(_sample(other)) != own, (size, begin)
    assert len(_sample(torch.randn(1 << 20))) == 16 * 512


class Largest(TorchDispatchMode):
    """The most bytes that an operator has made, in memory of its own."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.most = max(self.most, out.untyped_storage().nbytes())
        return out


def test_a_checksum_needs_no_copy_of_the_weights_and_sees_where_each_value_is() -> None:
    weights = torch.randn((1 << 20) + 3)
    with Largest() as made:
        own = checksum(weights)
    assert 0 < made.most <= weights.nbytes / 8
    for i, j in ((0, 2), (5, 1 << 17), (1 << 19, (1 << 20) + 2)):
        other = weights.clone()
        other[i], other[j] = weights[j], weights[i]
        assert checksum(other) != own
    assert checksum(torch.cat([weights[:1], weights])[1:]) == own


def test_processes_read_their_parts_and_begin_with_the_weights_of_rank_0(
    tmp_path: Path, forked: Forked
) -> None:
    sums = []
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        model = Wide()
        (tmp_path / name).mkdir()
        save_file(model.state_dict(), tmp_path / name / "model.safetensors")
        sums.append(sum(int(checksum(value)) for value in model.state_dict().values()))
    # Then each node has a copy of its own, and they differ: what differs is rank 0's.
    module = "tests.runtime.checkpoint.pretrained_ranks"
    for output in forked.outputs(module, 2, tmp_path, "other", "one"):
        first, second = output.splitlines()
        assert first == f"{sums[0]} True"
        assert second.split()[0] == str(sums[1])


def _cut(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def _index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def _pickles(folder: Path) -> None:
    for file in list(folder.iterdir()):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def _own_shard(folder: Path) -> None:
    with mw.compile(
        torch.nn.Linear(2, 2), mw.Plan.parse("mesh dp=1"), (torch.ones(1, 2),), loss=torch.sum
    ).launch() as run:
        run.save(folder / "checkpoint")
    for file in list((folder / "checkpoint").rglob("*.safetensors")):
        file.rename(folder / "model.safetensors")


FIRST, INDEX = "model-00001-of-00002.safetensors", "model.safetensors.index.json"
REFUSED: dict[str, Callable[[Path], object]] = {
    "pickles": _pickles,
    "file cut": _cut,
    "file missing": lambda folder: (folder / FIRST).unlink(),
    "file of text": lambda folder: (folder / FIRST).write_text("version https://git-lfs...\n" * 5),
    "file empty": lambda folder: (folder / FIRST).write_bytes(b""),
    "file with another metadata": lambda folder: (folder / FIRST).write_bytes(
        (18).to_bytes(8, "little") + b'{"__metadata__":3}'
    ),
    "files without an index": lambda folder: (folder / INDEX).unlink(),
    "index of text": lambda folder: (folder / INDEX).write_text("x"),
    "index of a list": lambda folder: (folder / INDEX).write_text("[]"),
    "index without a map": lambda folder: (folder / INDEX).write_text("{}"),
    "index elsewhere": lambda folder: _index(folder, lambda m: m.update(a="../b.safetensors")),
    "index of a number": lambda folder: _index(folder, lambda m: m.update(a=3)),
    "tensor missing": lambda folder: _index(folder, lambda m: m.update(a=FIRST)),
    "part of a checkpoint": _own_shard,
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_words(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    in_files(Path("weights"), weights())
    REFUSED[case](Path("weights"))
    with pytest.raises(mw.RunError) as caught:
        mw.read_state_dict("weights")
    golden(f"pretrained_{case.replace(' ', '_')}", str(caught.value))
