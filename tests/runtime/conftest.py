"""What tests with real processes share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.runtime.forked import Forked


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """Forks ranks that have imported torch and compiled their programs."""
    server = Forked(
        tmp_path_factory.mktemp("ranks"), ["tests.runtime.mishap", "tests.runtime.mishaps"]
    )
    yield server
    server.close()
