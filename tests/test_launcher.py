"""`meshwright run`: what is left of a launch that fails or is ended, what it says, and its logs."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from meshwright.cli import main
from meshwright.launcher import store
from meshwright.launcher.verdict import End, culprit
from tests.runtime.processes import environment, free_port

SCRIPT = """\
import os, signal, subprocess, sys, threading, time

RANK = int(os.environ["RANK"])


def act(name):
    if name == "raises":
        raise ValueError("no such label")
    if name == "is misspelt":
        time.sleep(2 * RANK)  # rank 0 is the first to say so
        mistaken(name)
    if name == "says why":
        sys.exit("the data is not there")
    if name == "is parsed":
        compile("x = (", "labels.py", "exec")
    if name == "lingers":
        threading.Thread(target=time.sleep, args=(600,)).start()
        raise ValueError("no such label")
    if name == "leaves as if":
        sys.exit(128 + signal.SIGTERM)
    if name == "leaves":
        sys.exit(3)
    if name == "sleeps":
        time.sleep(600)
    if name == "ignores it":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ready()
        time.sleep(600)
    if name == "saves":
        signal.signal(signal.SIGTERM, save)
        ready()
        time.sleep(600)
    if name == "waits":
        ready()
        time.sleep(600)
    if name == "has a hook":
        sys.excepthook = lambda kind, error, trace: print("its own hook:", error, file=sys.stderr)
        raise ValueError("no such label")
    if name.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, name))


def ready():
    child = subprocess.Popen(["sleep", "600"])
    with open(f"{RANK}.part", "w") as file:
        print(os.getpid(), child.pid, file=file)
    os.rename(f"{RANK}.part", f"{RANK}.pids")


def save(number, frame):
    time.sleep(0.3)
    open(f"{RANK}.saved", "w").close()
    sys.exit(0)


names = sys.argv[1:]
act(names[RANK % len(names)])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the script, which is the current one."""
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(SCRIPT, encoding="utf-8")
    return tmp_path


Launched = Callable[..., tuple[int, str, str]]
MARKS = re.compile(r"(\[rank \d\])? *[~^]+$")
"""What Python writes under a line of a traceback, each version in its own way."""


def plain(text: str) -> str:
    """What ranks printed, the same in every folder and under every Python."""
    lines = [line for line in text.split("\n") if not MARKS.match(line)]
    return "\n".join(lines).replace(f"{Path.cwd()}/", "").replace("\r", "<CR>")


@pytest.fixture
def launched(folder: Path, capfd: pytest.CaptureFixture[str]) -> Launched:
    """Launch in this process; the exit code, the output and the errors."""

    def launch(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(["run", *words])
        out, err = capfd.readouterr()
        return code, out, plain(err)

    return launch


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("raises", 1, ["sleeps", "raises"]),
        ("raises_on_all", 1, ["is misspelt"]),
        ("raises_two_errors", 1, ["raises", "is misspelt"]),
        ("syntax_error", 1, ["is parsed", "sleeps"]),
        ("says_why", 1, ["sleeps", "says why"]),
        ("exit_code", 3, ["sleeps", "leaves"]),
        ("hook", 1, ["has a hook", "sleeps"]),
        ("lingers", 1, ["sleeps", "lingers"]),
        ("killed", 137, ["sleeps", "SIGKILL"]),
        ("segfault", 139, ["sleeps", "SIGSEGV"]),
        ("terminated", 143, ["SIGTERM", "sleeps"]),
        ("warned", 138, ["sleeps", "SIGUSR1"]),
        ("terminated_in_order", 143, ["sleeps", "leaves as if"]),
    ],
)
def test_a_failed_launch_ends_in_one_paragraph(
    name: str,
    code: int,
    words: list[str],
    launched: Launched,
    golden: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patience = 60.0 if "is misspelt" in words else 0.5
    monkeypatch.setattr("meshwright.launcher.launch._SECONDS_TO_NOTICE", patience)
    found, out, err = launched("script.py", *words, "--processes", "2")
    assert (found, out) == (code, "")
    golden(f"launch_{name}", err)


def test_a_rank_that_was_killed_is_the_culprit_though_a_peer_was_seen_to_end_first() -> None:
    peer, killed, later = (
        End(rank, code, time, told=False, log=None)
        for rank, code, time in ((0, 1, 10.0), (1, -9, 10.5), (1, -9, 11.5))
    )
    assert culprit([peer, killed]) is killed
    assert culprit([peer, later]) is peer


def agent(*words: str) -> subprocess.Popen[str]:
    """A launch in a process and a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "meshwright", "run", "script.py", *words, "--processes", "2"],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def pids(seconds: float = 60.0) -> list[int]:
    """The processes of both ranks and of what they have started, once all of them run."""
    end = time.monotonic() + seconds
    files = [Path(f"{rank}.pids") for rank in (0, 1)]
    while not all(file.exists() for file in files):
        assert time.monotonic() < end, "the ranks did not start"
        time.sleep(0.05)
    return [int(pid) for file in files for pid in file.read_text().split()]


def runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_gone(processes: list[int], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while left := [pid for pid in processes if runs(pid)]:
        assert time.monotonic() < end, f"{len(left)} of {len(processes)} processes are left"
        time.sleep(0.05)


@pytest.fixture
def swept() -> Iterator[list[int]]:
    """Processes that the test itself ends where the launch has left them."""
    processes: list[int] = []
    yield processes
    for pid in filter(runs, processes):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "words", "code", "said"),
    [
        (signal.SIGTERM, ["waits"], 143, "stopped by SIGTERM: every rank has ended"),
        pytest.param(
            *(signal.SIGHUP, ["waits"], 129, "stopped by SIGHUP: every rank has ended"),
            marks=pytest.mark.slow,
        ),
        (signal.SIGKILL, ["waits"], -9, ""),
        (
            signal.SIGTERM,
            ["waits", "ignores it", "--grace=1"],
            143,
            (
                "stopped by SIGTERM: rank 1 was killed after 1 s\n"
                "  help: give ranks longer to end, such as `--grace 30`"
            ),
        ),
        (signal.SIGTERM, ["saves"], 143, "stopped by SIGTERM: every rank has ended"),
    ],
    ids=["SIGTERM", "SIGHUP", "SIGKILL", "SIGTERM that is ignored", "SIGTERM that is used"],
)
def test_a_launch_that_is_ended_leaves_no_process(
    number: signal.Signals, words: list[str], code: int, said: str, folder: Path, swept: list[int]
) -> None:
    launch = agent(*words)
    swept += [launch.pid, *(processes := pids())]
    launch.send_signal(number)
    if number == signal.SIGKILL:  # what it started may still hold its error for a moment
        launch.wait(20)
        assert_gone(processes)
    err = launch.communicate(timeout=20)[1]
    assert launch.returncode == code, err
    assert err.strip() == said
    assert_gone(processes)
    saved = ["0.saved", "1.saved"] if words == ["saves"] else []
    assert sorted(file.name for file in folder.glob("*.saved")) == saved


def test_a_second_ctrl_c_ends_at_once(folder: Path, swept: list[int]) -> None:
    """Both are keys of a terminal, which tells the processes in its foreground alone."""
    leader, terminal = pty.openpty()
    script = Path("script.py")
    script.write_text(
        SCRIPT.replace("signal.SIGTERM, signal.SIG_IGN", "signal.SIGINT, lambda *_: 0")
    )
    script.write_text(
        script.read_text().replace("time.sleep(600)", "[time.sleep(9) for _ in range(9)]")
    )
    words = ["run", "script.py", "ignores it", "--processes", "2", "--grace", "60"]
    launch = subprocess.Popen(
        ["setsid", "--ctty", "--wait", sys.executable, "-m", "meshwright", *words],
        env=environment(),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    swept += [launch.pid, *(processes := pids())]
    for _ in range(2):
        os.write(leader, b"\x03")
        time.sleep(1.0)
    assert launch.wait(20) == 130
    assert_gone(processes)
    said = os.read(leader, 4096).decode()
    assert "stopped by Ctrl-C (SIGINT), twice: ranks 0 and 1 were killed" in said
    assert "Traceback" not in said
    os.close(leader)
    os.close(terminal)


def test_a_rank_finds_what_python_gives_a_script(launched: Launched, folder: Path) -> None:
    """Both ways of naming it, against `python` itself, in what a script can see."""
    (folder / "package").mkdir()
    source = (
        "import json, os, sys, __main__\n"
        "class Here: ...\n"
        "spec = __spec__ and __spec__.name\n"
        "seen = [sys.argv, sys.path, __file__, __name__, __package__, spec]\n"
        "seen += [sorted(vars(__main__))]\n"
        "seen += [Here.__module__, 'torch' in sys.modules, 'meshwright' in sys.modules]\n"
        "seen += [type(__loader__).__name__, type(__builtins__).__name__, __doc__]\n"
        "print(json.dumps(seen))\n"
    )
    for name in ("seen.py", "package/__init__.py", "package/seen.py"):
        (folder / name).write_text(source if name.endswith("seen.py") else "", encoding="utf-8")
    for words in (["package/seen.py", "a", "--b"], ["-m", "package.seen", "a", "--b"]):
        plain = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
        code, out, _ = launched("--processes=1", *words)
        assert code == 0
        assert json.loads(out) == json.loads(plain.stdout)


def test_output_is_in_whole_lines_with_the_rank_and_logs_keep_it(
    launched: Launched, folder: Path, golden: Callable[[str, str], None]
) -> None:
    (folder / "says.py").write_text(
        "import os, sys, time\n"
        "rank = int(os.environ['RANK'])\n"
        "said = 'said-' + os.environ['MASTER_PORT']\n"
        "while rank and not os.path.exists(said):\n"
        "    time.sleep(0.01)\n"
        "print('its input:', repr(sys.stdin.read()), flush=True)\n"
        "print('half a', end=' ', flush=True)\n"
        "print('step 1\\rstep 2\\rstep 3\\nwarned', file=sys.stderr, flush=True)\n"
        "print('line', flush=True)\n"
        "print(sys.argv[1:], os.environ['LOCAL_RANK'], end='', flush=True)\n"
        "open(said, 'w').close()\n"
        "assert rank == 0, 'an odd rank'\n",
        encoding="utf-8",
    )
    words = ("says.py", "--processes", "2", "--", "--logs", "x")
    code, out, err = launched(*words)
    assert code == 1
    code, out_logged, err_logged = launched("--logs", "logs/new", *words)
    assert code == 1
    kept = (folder / "logs/new/rank-1.log").read_text()
    text = "\n".join(["== out", out, "== err", err, "== out, logged", out_logged])
    text += "\n".join(["", "== err, logged", err_logged, "== rank-1.log", kept])
    golden("launch_output", plain(text))
    # Two pipes: which of them is read first is not known.
    kept = (folder / "logs/new/rank-0.log").read_text()
    assert sorted(kept) == sorted(out_logged + "step 1\nstep 2\nstep 3\nwarned\n")
    Path("logs/new/rank-1.log").write_text("the second", encoding="utf-8")
    for _ in range(2):
        launched("--logs", "logs/new", *words)
    assert sorted(file.name for file in folder.glob("logs/new/*")) == [
        f"rank-{rank}.log{number}" for rank in (0, 1) for number in ("", ".1", ".2")
    ]
    assert Path("logs/new/rank-1.log.1").read_text(encoding="utf-8") == "the second"


def test_logs_that_cannot_be_written_are_refused_in_words(launched: Launched) -> None:
    code, out, err = launched("script.py", "leaves", "--processes=2", "--logs=script.py/logs")
    assert (code, out) == (1, "")
    assert err == (
        "cannot write logs to the folder `script.py/logs`: not a directory\n"
        "  help: choose a folder that you can write to, such as `--logs logs`\n"
    )


MISHAP = Path(__file__).parent / "runtime" / "mishap.py"


@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        (
            "dies",
            "rank 1 of 2 was killed by the system (SIGKILL); out of memory is the usual cause",
        ),
        pytest.param(
            *("fails", "rank 1 of 2 failed: ZeroDivisionError: the loss scale is 0"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_follows_from_another_rank_is_one_line(
    scenario: str, said: str, launched: Launched
) -> None:
    code, _, err = launched(str(MISHAP), "1", scenario, "--processes", "2")
    assert code == (137 if scenario == "dies" else 1)
    above, _, paragraph = err.rpartition("\n\n")
    assert paragraph.startswith(said)
    assert len(re.findall("PeerError", above)) == 1, err
    assert "[rank 1] PeerError" not in above
    assert above.count("Traceback") == (scenario == "fails")


@pytest.mark.parametrize(
    ("refused", "what"),
    [("subprocess.Popen", "the warden of the ranks"), ("os.dup", "rank 1")],
)
def test_a_process_that_cannot_be_started_is_said_in_words(
    refused: str, what: str, launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: object, **settings: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    with monkeypatch.context() as refusing:
        refusing.setattr(f"meshwright.launcher.launch.{refused}", refuse)
        code, _, err = launched("script.py", "--processes", "2")
    assert (code, err.partition(":")[0]) == (1, f"cannot start {what}")


def test_a_launcher_that_fails_does_not_wait_for_other_machines(
    launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_SECONDS_AFTER_FAILURE", 0.0)
    monkeypatch.setattr(store, "_SECONDS_TO_END", 30.0)
    started = time.monotonic()
    nodes = ("--nodes=2", "--node-rank=0", f"--rendezvous=localhost:{free_port()}")
    assert launched("script.py", "--processes=1", "--logs=script.py/logs", *nodes)[0] == 1
    assert time.monotonic() - started < 15


def test_two_launches_of_one_rank_each_meet(folder: Path) -> None:
    """Two machines, as far as ranks can tell; the first ends before the second."""
    Path("script.py").write_text(
        "import os, time\n"
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "every = [None] * dist.get_world_size()\n"
        "dist.all_gather_object(every, (os.environ['RANK'], os.environ['LOCAL_RANK']))\n"
        "print(every, flush=True)\n"
        "time.sleep(dist.get_rank())\n"
        "dist.destroy_process_group()\n",
        encoding="utf-8",
    )
    port = free_port()
    words = ["run", "script.py", "--processes=1", "--nodes=2", f"--rendezvous=localhost:{port}"]
    launches = [
        subprocess.Popen(
            [sys.executable, "-m", "meshwright", *words, f"--node-rank={node}"],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (1, 0)
    ]
    found = [launch.communicate(timeout=120) for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0], found
    every = "[('0', '0'), ('1', '0')]\n"
    assert [out for out, _ in found] == [f"[rank 1] {every}", every]


def test_a_run_whose_standard_streams_are_closed_ends_as_any_other(folder: Path) -> None:
    (folder / "writes.py").write_text(
        "import os\nprint('nobody reads this', flush=True)\n"
        "open(os.environ['RANK'] + '.txt', 'w').write('done')\n"
    )
    words = [sys.executable, "-m", "meshwright", "run", "writes.py", "--processes", "2"]
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words]
    assert subprocess.run(closed, env=environment(), cwd=folder, timeout=120).returncode == 0
    assert [(folder / f"{rank}.txt").read_text() for rank in (0, 1)] == ["done", "done"]
