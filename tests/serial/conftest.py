"""Fixtures of the tests of serial mode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serial.modes import MODE
from tests.support import forget_records


@pytest.fixture(params=[False, True], ids=["loop", "thread"])
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test twice: with handlers on the node's loop, and on a thread of their own."""
    MODE["thread"] = request.param
    yield
    MODE["thread"] = False


@pytest.fixture
def threaded() -> Iterator[None]:
    """With handlers on a thread of their own."""
    MODE["thread"] = True
    yield
    MODE["thread"] = False


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)
