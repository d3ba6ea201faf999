"""Golden texts, in files beside the tests, signals of processes that tests start, and garbage."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden texts")


def pytest_configure() -> None:
    """Let processes that tests start take signals as from a terminal, whatever started pytest.

    They would ignore a signal that pytest ignores, as under `nohup` or in the background of a
    script, but not one that it handles.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    """What is there before the tests of a file, modules and what is cached, stays: collecting
    garbage, which many tests do, need not visit it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` compares `text` with `golden/<name>.txt` beside the test file.

    A missing file fails, so that no text is golden before somebody has read it;
    `--update-golden` writes it.
    """
    folder = request.path.parent / "golden"
    update = request.config.getoption("--update-golden")

    def compare(name: str, text: str) -> None:
        __tracebackhide__ = True
        path = folder / f"{name}.txt"
        text = text if text.endswith("\n") else text + "\n"
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"no golden text {path.name}: read this, then --update-golden\n{text}")
        expected = path.read_text(encoding="utf-8")
        shown = "/".join(path.parts[-3:])
        assert text == expected, f"{shown} differs: --update-golden if it should"

    return compare
