"""The Autobahn test suite against the gateway's WebSockets."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.autobahn.suite import BEYOND, AutobahnError, command, run
from tests.conftest import SOAK
from tests.gateway.echo import echo

MIB = 1 << 20


@pytest.fixture(autouse=True)
def installed() -> None:
    try:
        command()
    except AutobahnError as error:
        pytest.skip(str(error))


@pytest.mark.native
@pytest.mark.timeout(600)
async def test_the_protocol(tmp_path: Path) -> None:
    async with echo(message_limit=MIB) as gate:
        url = f"ws://127.0.0.1:{gate.port}"
        found = await asyncio.to_thread(run, url, tmp_path)
    assert len(found) == 247
    assert {case: each for case, each in found.items() if not each.passed} == {}


@pytest.mark.soak
@pytest.mark.native
@pytest.mark.skipif(not SOAK, reason="takes minutes: make soak")
async def test_what_is_beyond_the_protocol(tmp_path: Path) -> None:
    """Limits hold as well; compression is not offered, which the suite calls unimplemented."""
    largest: dict[str, Any] = {"message_limit": 64 * MIB, "write_limit": 64 * MIB}
    async with echo(node={"frame_limit": 65 * MIB}, **largest) as gate:
        url = f"ws://127.0.0.1:{gate.port}"
        found = await asyncio.to_thread(run, url, tmp_path, BEYOND, ())
    limits = [each for case, each in found.items() if case.startswith("9.")]
    rest = Counter(each.behavior for case, each in found.items() if not case.startswith("9."))
    assert len(limits) == 54
    assert all(each.passed for each in limits)
    assert rest == {"UNIMPLEMENTED": 216}
