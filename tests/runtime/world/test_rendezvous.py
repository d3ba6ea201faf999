"""Environments that name no place to meet, or a wrong one, and ranks that do not come."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore

from meshwright.compiler.layout.mesh import Mesh
from meshwright.runtime.errors import PeerError, RunError
from meshwright.runtime.transports.process import ProcessMesh
from meshwright.runtime.world import rendezvous
from meshwright.runtime.world.rendezvous import Limit, meet, under_torchrun
from tests.runtime.processes import free_port

MESH = Mesh((("tp", 2),))
SET_PORT = (
    "check that rank 0 has come to `launch`, and give every rank its host in `MASTER_ADDR` and "
    "one free port in `MASTER_PORT`"
)


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as rank 1 of two, with a second to meet."""
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (values | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MESHWRIGHT_RENDEZVOUS_SECONDS", "1")
    monkeypatch.setattr(rendezvous, "_store", None)


def problem(kind: type[RunError] = RunError) -> str:
    """What starting the transport says."""
    begin = time.monotonic()
    with pytest.raises(kind) as caught:
        ProcessMesh(MESH)
    assert time.monotonic() - begin < 30
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("RANK", None, "`RANK` is not in the environment"),
        ("RANK", "2", "`RANK` is `'2'`, not a number of 0 to 1"),
        ("RANK", "first", "`RANK` is `'first'`, not a number of 0 to 1"),
        ("WORLD_SIZE", "", "`WORLD_SIZE` is an empty text, not a number of 1 or more"),
        ("MASTER_PORT", None, "`MASTER_PORT` is not in the environment"),
        ("MASTER_PORT", "0", "`MASTER_PORT` is `'0'`, not a number of 1 to 65535"),
    ],
)
def test_a_variable_that_is_missing_or_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str | None, text: str
) -> None:
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    assert problem() == f"{text}\n  help: start the script with `torchrun`, which sets it"


def test_a_missing_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR")
    assert problem() == (
        "`MASTER_ADDR` is not in the environment\n"
        "  help: start the script with `torchrun`, which sets it, or set it to the host of rank 0"
    )


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE"])
def test_half_an_environment_is_no_reason_to_train_alone(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.delenv(missing)
    with pytest.raises(RunError, match=f"is in the environment and `{missing}` is not\n"):
        under_torchrun()
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not under_torchrun()


def test_nobody_at_the_address_is_an_error_within_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = problem()
    assert text.startswith("rank 1 cannot reach rank 0 at `127.0.0.1:")
    assert text.endswith(f" after 1 s: Connection refused\n  help: {SET_PORT}")
    monkeypatch.setenv("MASTER_ADDR", "host.invalid")
    assert problem().startswith("rank 1 cannot reach rank 0 at `host.invalid:")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Another program that has the port, and does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found


def test_a_port_that_is_taken_is_an_error_at_once(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    port = listener.getsockname()[1]
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("RANK", "0")
    assert problem() == (
        f"rank 0 cannot keep the store of the run: port {port} (`MASTER_PORT`) is taken\n"
        "  help: set `MASTER_PORT` to a free port, the same on every rank; `torchrun --standalone` "
        "finds one by itself"
    )


@pytest.mark.parametrize("answers", [False, True])
def test_another_program_at_the_port_is_named_as_such(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket, answers: bool
) -> None:
    def answer() -> None:
        for _ in range(2):
            with listener.accept()[0] as connection:
                connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")

    if answers:
        threading.Thread(target=answer, daemon=True).start()
    monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
    assert ": what answers there is not the store of a run\n" in problem()


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert problem(PeerError) == (
        "rank 1 has not come to `launch` within 1 s\n"
        "  help: read the output of rank 1; where it only takes longer, raise "
        "`MESHWRIGHT_RENDEZVOUS_SECONDS` on every rank"
    )


@pytest.mark.parametrize("told", [False, True])
def test_the_rank_that_keeps_the_store_stays_until_all_who_have_come_know_why(told: bool) -> None:
    store, errors = HashStore(), list[PeerError]()
    store.set("beat/1", "")
    if told:
        store.set("gave up", "rank 2 has not come to `launch` within 1 s|2")

    def keep() -> None:
        try:
            meet(store, 0, 3, Limit(), {"beat": ""})
        except PeerError as error:
            errors.append(error)

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    store.wait(["gave up/0"], timedelta(seconds=60))
    keeper.join(0.3)
    assert keeper.is_alive()
    store.set("gave up/1", "")
    keeper.join(60)
    assert [error.problem for error in errors] == ["rank 2 has not come to `launch` within 1 s"]


def test_whom_a_rank_waits_for_is_said_before_the_limit(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "_QUIET_SECONDS", 0.5)
    monkeypatch.setenv("RANK", "0")
    problem(PeerError)
    said = capfd.readouterr().err
    assert said == "meshwright: rank 0 waits in `launch` for rank 1, for 1 of 1 s\n"


@pytest.mark.parametrize("value", ["soon", "0", "inf"])
def test_the_limit_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MESHWRIGHT_RENDEZVOUS_SECONDS", value)
    assert problem() == (
        f"`MESHWRIGHT_RENDEZVOUS_SECONDS` is `{value!r}`\n"
        "  help: set `MESHWRIGHT_RENDEZVOUS_SECONDS` to a number of seconds"
    )
