"""The command line: texts, JSON, exit codes, and no tracebacks."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import meshwright
from meshwright.cli import main
from meshwright.models import UsageError
from meshwright.usage import job

PLAN = """\
mesh dp=2, tp=2
data x, y over dp   # the batch
columns up over tp
rows down over tp
"""

MODEL = '''\
import torch
from torch import nn
from torch.nn import functional as F


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, y):
        return ((self.down(F.relu(self.up(x))) - y) ** 2).mean()


def build():
    return Model(), (torch.zeros(4, 8), torch.zeros(4, 8))


def nothing():
    """Returns None."""


def broken():
    return Model(9)
'''

FILES = {
    "a.plan": PLAN,
    "pipeline.plan": "mesh pp=2\ndata x, y\nstages at down over pp microbatches=2\n",
    "model.py": MODEL,
    "there.toml": "",
    "opt.py": "from torch.optim import SGD\nclass Own(SGD): pass\n",
    "broken.py": "import not_installed_anywhere\n",
    "syntax.py": "x = = 1\n",
    "exits.py": "import sys\nsys.exit(2)\n",
    "binary.plan": "\x80\x81\xff",
}

SCRIPT = """\
import os, sys
line = " ".join([os.environ["RANK"], os.environ["WORLD_SIZE"], *sys.argv[1:]])
os.write(1, f"{line}\\n".encode())  # in one call: the processes share the pipe
sys.exit(int(sys.argv[-1]))
"""

COST = ["cost", "model.py:build", "a.plan"]
MEMORY = ["memory", "model.py:build", "a.plan"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in a folder that has a plan, a model and a script."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, text in {**FILES, "script.py": SCRIPT}.items():
        Path(name).write_text(text, encoding="latin-1")
    Path("folder").mkdir()

    def command(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            code = main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return command


def test_check_reads_a_plan_and_compiles_a_model_under_it(
    run: Run, golden: Callable[[str, str], None]
) -> None:
    alone, with_model = run("check", "a.plan"), run("check", "model.py:build", "a.plan")
    assert (alone[0], with_model[0]) == (0, 0)
    golden("check", alone[1] + with_model[1])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("show", ["show", "model.py:build", "a.plan"]),
        ("show_json", ["show", "model.py:build", "a.plan", "--json"]),
        ("graph", ["graph", "model.py:build", "a.plan", "--name=stage0.forward"]),
        ("graph_local", ["graph", "model.py:build", "a.plan", "--name=stage0.forward", "--local"]),
        ("graph_module_json", ["graph", "model:build", "a.plan", "--module=down", "--json"]),
        ("timeline", ["timeline", "model.py:build", "a.plan"]),
        ("timeline_json", ["timeline", "model.py:build", "a.plan", "--json", "--mode=infer"]),
        ("schedule", ["schedule", "model.py:build", "pipeline.plan"]),
        (
            "schedule_asked",
            ["schedule", "model.py:build", "pipeline.plan", "--schedule=zbv", "--ranks", "2"],
        ),
        ("schedule_json", ["schedule", "model.py:build", "pipeline.plan", "--json"]),
        ("memory", ["memory", "model.py:build", "a.plan"]),
        (
            "memory_optimizer",
            ["memory", "model.py:build", "a.plan", "--optimizer", "SGD(lr=0.1, momentum=0.9)"],
        ),
        ("memory_places", ["memory", "model.py:build", "pipeline.plan", "--optimizer=SGD"]),
        (
            "memory_timeline",
            ["memory", "model:build", "pipeline.plan", "--place", "pp=0", "--timeline"],
        ),
        ("memory_json", ["memory", "model.py:build", "a.plan", "--optimizer=opt.py:Own", "--json"]),
        ("cost", ["cost", "model.py:build", "a.plan", "--names", "up=[f, h]", "--device=cpu"]),
        ("cost_json", ["cost", "model.py:build", "a.plan", "--json", "--convention=tree"]),
        ("cost_cluster", ["cost", "model:build", "a.plan", "--cluster=laptop", "--device=cpu"]),
        (
            "schedule_cluster",
            ["schedule", "model:build", "pipeline.plan", "--cluster=laptop", "--device=cpu"],
        ),
        ("explain", ["explain", "model.py:build", "a.plan", "down"]),
        ("check_json", ["check", "model.py:build", "a.plan", "--json"]),
        ("infer", ["graph", "model.py:build", "a.plan", "--mode=infer"]),
        ("help", ["help"]),
        ("help_run", ["help", "run"]),
        ("help_explain", ["explain", "model.py:build", "--help"]),
        ("help_cost", ["help", "cost"]),
        ("help_calibrate", ["help", "calibrate"]),
    ],
)
def test_a_command_prints_its_golden_text(
    name: str, words: list[str], run: Run, golden: Callable[[str, str], None]
) -> None:
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    golden(name, out)


def test_fmt_prints_checks_and_writes_the_canonical_form(
    run: Run, golden: Callable[[str, str], None]
) -> None:
    code, text, _ = run("fmt", "a.plan")
    assert code == 0
    golden("fmt", text)
    assert run("fmt", "--check", "a.plan")[:2] == (1, "a.plan: not in canonical form\n")
    assert run("fmt", "--write", "a.plan")[:2] == (0, "a.plan: written\n")
    assert Path("a.plan").read_text(encoding="utf-8") == text
    assert run("fmt", "--check", "a.plan")[:2] == (0, "")
    assert json.loads(run("fmt", "--json", "a.plan")[1]) == [
        {"plan": "a.plan", "changed": False, "text": text}
    ]


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("error_no_plan", 1, ["check", "b.plan"]),
        ("error_no_plan_json", 1, ["check", "b.plan", "--json"]),
        ("error_no_file", 1, ["show", "other.py:build", "a.plan"]),
        ("error_no_module", 1, ["show", "nowhere.at.all:build", "a.plan"]),
        ("error_no_function", 1, ["show", "model.py:biuld", "a.plan"]),
        ("error_returns_nothing", 1, ["show", "model.py:nothing", "a.plan"]),
        ("error_no_graph", 1, ["graph", "model.py:build", "a.plan", "--name=stage0.fwd"]),
        ("error_no_module_of_the_model", 1, ["graph", "model.py:build", "a.plan", "--module=u"]),
        ("error_nothing_to_explain", 1, ["explain", "model.py:build", "a.plan", "upp"]),
        ("error_no_optimizer", 1, [*MEMORY, "--optimizer", "Adan"]),
        ("error_no_optimizer_in_a_file", 1, [*MEMORY, "--optimizer", "opt.py:Lion"]),
        ("error_no_optimizer_like_that", 1, [*MEMORY, "--optimizer", "model.py:Model"]),
        ("error_no_option_of_an_optimizer", 1, [*MEMORY, "--optimizer", "SGD(momentums=1)"]),
        ("error_no_place", 1, [*MEMORY, "--place", "pp=1"]),
        ("usage_optimizer", 2, [*MEMORY, "--optimizer", "SGD(0.1)"]),
        ("usage_optimizer_options", 2, [*MEMORY, "--optimizer", "SGD(lr=rate)"]),
        ("usage_optimizer_without_value", 2, [*MEMORY, "--optimizer"]),
        ("error_no_cluster", 1, [*COST, "--cluster", "9xh100"]),
        ("error_cluster_of_other_devices", 1, [*COST, "--cluster=8xh100", "--device=cpu"]),
        ("error_file_for_a_cluster", 1, ["calibrate", "there.toml"]),
        ("usage_names", 2, [*COST, "--names", "wte"]),
        ("usage_names_and_cluster", 2, [*COST, "--names", "h=8", "--cluster=laptop"]),
        ("usage_convention", 2, [*COST, "--convention=star"]),
        ("usage_calibrate", 2, ["calibrate", "own"]),
        ("usage_calibrate_two", 2, ["calibrate", "own.toml", "two.toml"]),
        ("error_no_script", 1, ["run", "other.py", "--processes", "2"]),
        ("error_no_script_near", 1, ["run", "scrip.py", "--processes", "2"]),
        ("error_script_is_a_folder", 1, ["run", "folder", "--processes", "2"]),
        ("error_plan_is_a_folder", 1, ["check", "folder"]),
        ("error_plan_is_binary", 1, ["check", "model.py:build", "binary.plan"]),
        ("error_plan_is_a_folder_with_a_model", 1, ["show", "model.py:build", "folder"]),
        ("error_import", 1, ["show", "broken.py:build", "a.plan"]),
        ("error_import_json", 1, ["show", "broken.py:build", "a.plan", "--json"]),
        ("error_import_of_a_module", 1, ["show", "broken:build", "a.plan"]),
        ("error_call", 1, ["show", "model.py:broken", "a.plan"]),
        ("error_syntax", 1, ["show", "syntax.py:build", "a.plan"]),
        ("error_exit", 1, ["show", "exits.py:build", "a.plan"]),
        ("error_long_word", 1, ["show", "model.py:build", "x" * 300]),
        ("error_long_script", 1, ["run", "x" * 300, "--processes", "2"]),
        ("usage_command", 2, ["shwo"]),
        ("usage_help_misspelt", 2, ["hlep"]),
        ("usage_version_misspelt", 2, ["--versoin"]),
        ("usage_empty_word", 2, ["show", "model.py:build", ""]),
        ("usage_two_colons", 2, ["show", "model.py::build", "a.plan"]),
        ("usage_processes_after_dashes", 2, ["run", "--", "script.py", "--processes", "2"]),
        ("error_no_function_at_all", 1, ["show", "folder:build", "a.plan"]),
        ("error_no_module_to_run", 1, ["run", "-m", "nowhere.at_all", "--processes", "2"]),
        ("error_script_in_quotes", 1, ["run", "script.py --lr 3", "--processes", "2"]),
        ("error_script_is_a_device", 1, ["run", "/dev/null", "--processes", "2"]),
        ("usage_command_json", 2, ["shwo", "--json"]),
        ("usage_help_of_no_command", 2, ["help", "exlpain"]),
        ("usage_option_first", 2, ["--json", "show"]),
        ("usage_nothing", 2, []),
        ("usage_model", 2, ["show", "model.py", "a.plan"]),
        ("usage_no_model", 2, ["show", "a.plan"]),
        ("usage_no_plan", 2, ["graph", "model.py:build", "--local"]),
        ("usage_neither", 2, ["show"]),
        ("usage_check_nothing", 2, ["check"]),
        ("usage_check_no_plan", 2, ["check", "model.py:build"]),
        ("usage_two_plans", 2, ["check", "a.plan", "a.plan"]),
        ("usage_two_models", 2, ["show", "model.py:build", "model:build"]),
        ("usage_too_many", 2, ["show", "a.plan", "model.py:build", "down"]),
        ("usage_no_name", 2, ["explain", "a.plan", "model.py:build"]),
        ("usage_fmt_nothing", 2, ["fmt"]),
        ("usage_fmt_both", 2, ["fmt", "a.plan", "--check", "--write"]),
        ("usage_option", 2, ["show", "model.py:build", "a.plan", "--locla"]),
        ("usage_option_without_value", 2, ["graph", "model.py:build", "a.plan", "--name"]),
        ("usage_option_with_value", 2, ["show", "model.py:build", "a.plan", "--json=yes"]),
        ("usage_mode", 2, ["show", "model.py:build", "a.plan", "--mode", "training"]),
        ("usage_steps", 2, ["demo", "--steps", "x"]),
        ("usage_steps_negative", 2, ["demo", "--steps", "-1"]),
        ("usage_demo_processes", 2, ["demo", "--processes", "2"]),
        ("usage_demo_word", 2, ["demo", "now"]),
        ("usage_no_processes", 2, ["run", "script.py"]),
        ("usage_processes", 2, ["run", "script.py", "--processes", "many"]),
        ("usage_processes_zero", 2, ["run", "script.py", "--processes", "0"]),
        ("usage_processes_negative", 2, ["run", "script.py", "--processes=-1"]),
        ("usage_processes_fraction", 2, ["run", "script.py", "--processes", "2.5"]),
        ("usage_processes_alone", 2, ["run", "script.py", "--processes"]),
        ("usage_processes_twice", 2, ["run", "--processes", "2", "script.py", "--processes=4"]),
        ("usage_no_script", 2, ["run", "--processes", "2"]),
        ("usage_no_module", 2, ["run", "--processes", "2", "-m"]),
        ("usage_run_option", 2, ["run", "--proceses", "2", "script.py"]),
        ("usage_grace", 2, ["run", "--processes=2", "script.py", "--grace", "soon"]),
        ("usage_nodes", 2, ["run", "--processes=2", "script.py", "--nodes", "2"]),
        ("usage_node_rank", 2, ["run", "--processes=2", "script.py", "--node-rank", "1"]),
        ("usage_rendezvous", 2, ["run", "--processes=2", "script.py", "--rendezvous", "here"]),
    ],
)
def test_what_is_wrong_is_said_in_words(
    name: str, code: int, words: list[str], run: Run, golden: Callable[[str, str], None]
) -> None:
    found, out, err = run(*words)
    assert found == code
    said = "".join(line for line in (out + err).splitlines(keepends=True) if line.strip(" ^~\n"))
    golden(name, said.replace(f"{Path.cwd()}/", ""))


@pytest.mark.parametrize(
    "words",
    [
        ["show", "a.plan", "model.py:build"],
        ["graph", "a.plan", "model:build", "--name=stage0.forward"],
        ["explain", "a.plan", "model.py:build", "down"],
        ["explain", "down", "--mode", "train", "a.plan", "model.py:build"],
        ["check", "a.plan", "model.py:build"],
    ],
)
def test_model_and_plan_are_understood_in_either_order(words: list[str], run: Run) -> None:
    usual = sorted(words[1:], key=lambda word: (":" not in word, "plan" not in word))
    assert run(*words) == run(words[0], *usual)
    assert run(*words)[0] == 0


def test_a_plan_may_be_called_like_a_function_of_a_module(run: Run) -> None:
    Path("gpt:v2").write_text(PLAN, encoding="utf-8")
    assert run("check", "gpt:v2", "model.py:build")[0] == 0


@pytest.mark.usefixtures("run")
def test_values_of_options_are_read_up_to_their_bounds() -> None:
    words = ["script.py", "--processes=999999999", "--rendezvous=[::1]:65535", "--grace=0"]
    found = job(words)
    assert (found.rendezvous, found.grace) == (("::1", 65535), 0.0)
    assert found.processes == 999_999_999
    for word in (
        "--rendezvous=host:65536",
        "--rendezvous=host:0",
        "--grace=inf",
        "--grace=nan",
        "--grace=-1",
        "--nodes=1000000000",
    ):
        with pytest.raises(UsageError, match=f"`{word.split('=')[0]}` is `"):
            job([*words[:2], word])


def test_the_version_is_that_of_the_package(run: Run) -> None:
    assert run("--version") == (0, f"meshwright {meshwright.__version__}\n", "")


def test_a_plan_that_does_not_fit_the_model_is_shown_with_its_caret(
    run: Run, golden: Callable[[str, str], None]
) -> None:
    Path("a.plan").write_text(PLAN.replace("columns up", "columns upp"), encoding="utf-8")
    code, out, err = run("check", "a.plan", "model.py:build")
    assert (code, out) == (1, "")
    golden("error_selector", err)
    code, out, err = run("check", "a.plan", "model.py:build", "--json")
    assert (code, err) == (1, "")
    assert json.loads(out)["error"]["places"] == [
        {"plan": "a.plan", "line": 3, "column": 9, "end": 12}
    ]


def test_run_starts_one_process_a_rank_and_returns_their_exit_code(run: Run) -> None:
    code, out, _ = run("run", "script.py", "--lr", "3", "--processes", "2", "0")
    assert code == 0
    assert sorted(out.splitlines()) == ["0 2 --lr 3 0", "[rank 1] 1 2 --lr 3 0"]
    assert run("run", "--processes=1", "script.py", "1")[0] == 1


def test_the_module_runs_as_a_command_and_a_closed_pipe_is_quiet(run: Run) -> None:
    command = f"{sys.executable} -m meshwright graph model.py:build a.plan | head -1"
    environment = {**os.environ, "PYTHONPATH": str(Path(meshwright.__file__).parents[1])}
    found = subprocess.run(
        command, shell=True, env=environment, capture_output=True, text=True, check=False
    )
    assert found.stdout == "graph stage0.forward  mesh dp=2, tp=2\n"
    assert found.stderr == ""


def test_output_that_cannot_be_written_is_said_in_words(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert run("help") == (1, "", "cannot write the output: No space left on device\n")


def test_a_plan_that_cannot_be_written_is_said_in_words(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str, encoding: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    code, _, err = run("fmt", "--write", "a.plan")
    assert (code, err.partition("\n")[0]) == (1, "cannot write `a.plan`: Read-only file system")


@pytest.mark.slow
def test_what_calibrate_writes_is_a_cluster(run: Run) -> None:
    assert run("calibrate", "own.toml", "--device=cpu") == (0, "own.toml: written\n", "")
    found = meshwright.Cluster.load("own.toml")
    assert found.device == "cpu"
    assert found.rates["float32"] > 1e8
    assert 0 < found.node.latency < 1
    assert found.node.bandwidth > 1e6
    if found.devices >= 4:
        assert run(*COST, "--cluster=own.toml", "--device=cpu")[0] == 0


def test_the_demo_ends_in_the_largest_difference(run: Run) -> None:
    code, out, _ = run("demo", "--steps", "2")
    assert code == 0
    assert "Largest" in out.splitlines()[-2] + out.splitlines()[-1]
    assert "all_reduce(" in out
    code, out, _ = run("demo", "--steps", "2", "--json")
    assert code == 0
    assert json.loads(out)["largest_difference"] < 1e-5


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_commands_print_on_a_stream_without_unicode(
    encoding: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Path("a.plan").read_text(encoding="utf-8")
    Path("model.py").write_text(MODEL.replace("Model", "Größe"), encoding="utf-8")
    Path("größe→.plan").write_text(f"# größe → …\n{plan}", encoding="utf-8")
    assert run("check", "größe→.plan")[0] == 0
    for words in (["check"], ["show"], ["graph"], ["fmt"], ["show", "--json"], ["fmt", "--check"]):
        command, *options = words
        model = [] if command == "fmt" else ["model.py:build"]
        data = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(data, encoding))
        assert main([command, *model, "größe→.plan", *options]) in (0, 1)
        sys.stdout.flush()
        assert data.getvalue()
