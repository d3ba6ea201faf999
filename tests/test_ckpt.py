"""`meshwright ckpt`: texts, JSON, exit codes, and files that other tools read."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model
from transformers import GPT2Config, GPT2LMHeadModel

import meshwright as mw
from meshwright.cli import main
from tests.runtime.models import PLANS, batch, make

MODEL = """\
from tests.runtime.models import Block, batch, make


def build():
    return make(), batch()


def other():
    model = make()
    model.blocks.append(Block().double())
    return model, batch()
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints of a small model, saved under dp=2, tp=2."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with mw.compile(make(), mw.Plan.parse(PLANS["both"]), example=batch()).launch() as run:
        optimizer = run.optimizer(torch.optim.AdamW, lr=0.01)
        for number in range(2):
            run.step(*batch(number))
            optimizer.step()
            optimizer.zero_grad()
            run.save(folder, optimizer, extra={"epoch": number})
    return folder


@pytest.fixture
def run(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """Run a command in a folder with a copy of the checkpoints, a model and plans."""
    monkeypatch.chdir(tmp_path)
    # Another test may have imported a module of this name.
    monkeypatch.delitem(sys.modules, "model", raising=False)
    shutil.copytree(saved, "checkpoints")
    Path("model.py").write_text(MODEL)
    for name, text in PLANS.items():
        Path(f"{name}.plan").write_text(text)

    def command(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["ckpt", *words])
        out, err = capfd.readouterr()
        return code, out, err

    return command


def unsized(text: str) -> str:
    """Without the sizes of files, of which this is not about."""
    return re.sub(r'1\d\d KiB|(?<="bytes": )\d+', "#", text)


def dated() -> None:
    """Give every manifest one date."""
    for file in Path.cwd().rglob("manifest.json"):
        os.utime(file, (1_600_000_000, 1_600_000_000))


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


@pytest.mark.usefixtures("utc")
def test_ls_says_what_a_folder_has(run: Run, golden: Callable[[str, str], None]) -> None:
    Path("checkpoints/saving-" + "0" * 32).mkdir()
    os.utime("checkpoints/saving-" + "0" * 32, (1_600_000_000, 1_600_000_000))
    shutil.copytree("checkpoints/step-1", "checkpoints/step-3")
    next(Path("checkpoints/step-3").glob("00001*")).unlink()
    (Path("checkpoints/step-2") / "manifest.json").write_text("{}")
    dated()
    texts = [run("ls", "checkpoints"), run("ls", "checkpoints/step-1", "--tensors")]
    assert [code for code, _, _ in texts] == [0, 0]
    golden("ckpt_ls", unsized("\n".join(out for _, out, _ in texts)))
    golden("ckpt_ls_json", unsized(run("ls", "checkpoints", "--json")[1]))
    tensors = json.loads(run("ls", "checkpoints/step-1", "--json", "--tensors")[1])[0]["tensors"]
    assert tensors["wte.weight"] == {
        "shape": [23, 16], "dtype": "float64", "bytes": 23 * 16 * 8, "layout": "[24@tp, 16]"
    }  # fmt: skip


def test_verify_names_what_is_damaged_and_exits_with_1(
    run: Run, golden: Callable[[str, str], None]
) -> None:
    assert run("verify", "checkpoints")[0] == 0
    file = Path("checkpoints/step-2/00001.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.truncate("checkpoints/step-2/00003.safetensors", 100)
    shutil.copytree("checkpoints/step-1", "checkpoints/step-5")
    Path("checkpoints/step-5/manifest.json").unlink()
    Path("checkpoints/saving-" + "0" * 32).mkdir()
    code, out, err = run("verify", "checkpoints")
    assert (code, err) == (1, "")
    golden("ckpt_verify", unsized(out))
    data = json.loads(run("verify", "checkpoints", "--json")[1])
    assert [each["complete"] for each in data] == [False, True, False]
    assert run("verify", "checkpoints/step-1")[0] == 0
    shutil.rmtree("checkpoints")
    Path("checkpoints/saving-" + "0" * 32).mkdir(parents=True)
    assert run("verify", "checkpoints")[0] == 1


@pytest.mark.usefixtures("utc")
def test_reshard_cuts_for_a_plan_and_into_files(
    run: Run, golden: Callable[[str, str], None]
) -> None:
    for words in (
        ["--parts", "3"],
        ["model.py:build", "tensor.plan"],
        ["data.plan", "model:build"],
    ):
        code, _, err = run("reshard", "checkpoints", "cut", *words)
        assert (code, err) == (0, "")
    dated()
    golden("ckpt_reshard", unsized(run("ls", "cut")[1]))
    assert run("verify", "cut")[0] == 0
    assert json.loads(run("reshard", "cut", "cut", "--parts", "1", "--json")[1])["files"] == 1
    listed = json.loads(run("ls", "cut", "--json")[1])
    assert [each["plan"] for each in listed] == [
        "mesh parts=1\n", PLANS["data"], PLANS["tensor"], "mesh parts=3\n"
    ]  # fmt: skip


def test_export_writes_a_file_that_the_library_loads(run: Run) -> None:
    code, out, err = run("export", "checkpoints", "model.safetensors")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"model\.safetensors: 16 tensors, [\d.]+ KiB\n", out)
    state = mw.read_state_dict("checkpoints")
    model = make(seed=7)
    assert load_model(model, "model.safetensors") == (set(), [])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with safe_open("model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "wte.weight"}
    assert mw.read_state_dict("model.safetensors").keys() == state.keys() - {
        "head.weight",
        "scratch",
    }
    code, out, _ = run("export", "checkpoints/step-1", "one.safetensors", "--json")
    assert json.loads(out) == {
        "file": "one.safetensors", "bytes": Path("one.safetensors").stat().st_size, "tensors": 16
    }  # fmt: skip


def test_hugging_face_loads_what_is_exported(run: Run) -> None:
    config = GPT2Config(
        vocab_size=23, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=1
    )
    model = GPT2LMHeadModel(config)
    tokens = torch.randint(23, (4, 8))
    plan = mw.Plan.parse("mesh dp=2\ndata input_ids, labels over dp\nzero 3 over dp")
    program = mw.compile(model, plan, {"input_ids": tokens, "labels": tokens})
    with program.launch() as launched:
        launched.save("gpt2")
        expected = launched.state_dict()
    config.save_pretrained("hub")
    assert run("export", "gpt2", "hub/model.safetensors")[0] == 0
    found = GPT2LMHeadModel.from_pretrained("hub")
    assert found.lm_head.weight is found.transformer.wte.weight
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("nothing", 2, []),
        ("command", 2, ["lss"]),
        ("help", 0, ["--help"]),
        ("help_reshard", 0, ["reshard", "--help"]),
        ("help_delink", 0, ["delink", "--help"]),
        ("nothing_shared", 1, ["delink", "checkpoints", "cut"]),
        ("no_folder", 2, ["ls"]),
        ("no_file", 2, ["export", "checkpoints"]),
        ("too_many", 2, ["reshard", "checkpoints", "cut", "--parts", "2", "a.plan"]),
        ("no_plan", 2, ["reshard", "checkpoints", "cut", "model.py:build"]),
        ("neither", 2, ["reshard", "checkpoints", "cut"]),
        ("no_parts", 2, ["reshard", "checkpoints", "cut", "--parts", "0"]),
        ("option", 2, ["ls", "checkpoints", "--tensor"]),
        ("nowhere", 1, ["ls", "nowhere"]),
        ("not_a_folder", 1, ["verify", "model.py"]),
        ("no_checkpoint", 1, ["export", ".", "a.safetensors"]),
        ("other_model", 1, ["reshard", "checkpoints", "cut", "model.py:other", "data.plan"]),
        ("into_a_checkpoint", 1, ["reshard", "checkpoints", "checkpoints/step-1", "--parts=2"]),
        ("into_a_file", 1, ["reshard", "checkpoints", "model.py", "--parts=2"]),
        ("name", 1, ["export", "checkpoints", "model.bin"]),
        ("into_no_folder", 1, ["export", "checkpoints", "none/a.safetensors"]),
        ("folder_for_a_file", 1, ["export", "checkpoints", "checkpoints"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_words(
    name: str, code: int, words: list[str], run: Run, golden: Callable[[str, str], None]
) -> None:
    found, out, err = run(*words)
    assert found == code
    golden(f"ckpt_{name}", out + err)
    assert not Path("cut").exists() or not list(Path("cut").iterdir())


def test_a_file_that_is_there_and_one_half_written_are_left_as_they_were(
    run: Run,
) -> None:
    Path("a.safetensors").write_text("kept")
    code, _, err = run("export", "checkpoints", "a.safetensors")
    assert (code, err.splitlines()[0]) == (1, "`a.safetensors` is there already")
    assert Path("a.safetensors").read_text() == "kept"
    file = Path("checkpoints/step-2/00000.safetensors")
    data = bytearray(file.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1  # of the first tensor, a parameter
    file.write_bytes(data)
    before = sorted(Path.cwd().iterdir())
    code, _, err = run("export", "checkpoints", "b.safetensors")
    assert (code, "is damaged" in err) == (1, True)
    assert sorted(Path.cwd().iterdir()) == before
