"""Links: what one node has to tell another."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys

import pytest

from domi_fast import LibraryChannel, Node
from domi_fast.gateway.links import Link, Links
from tests.stateful.gateway import zone
from tests.stateful.rooms import Room
from tests.support import ROOT, until


async def test_what_cannot_be_sent_keeps_nothing_else_from_it(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    got: list[int] = []
    async with (
        Node("a", registry=registry_url, queue_limit=65536, frame_limit=65536) as a,
        Node("b", registry=registry_url) as b,
    ):
        b.subscribe(LibraryChannel.GATEWAY, lambda context: got.append(len(context.data)))
        await a.wait_subscribed(LibraryChannel.GATEWAY)
        link = Links(a, LibraryChannel.GATEWAY, lambda link: None).of(b.id)
        assert link is not None
        sent = 0
        while not link._waiting:
            assert link.tell(bytes(20_000))
            sent += 1
        assert link.tell(bytes(70_000))
        assert link.tell(b"behind it")
        await link.flushed()
        await until(lambda: got == [20_000] * sent + [9])
        assert f"node {b.id} cannot be told" in caplog.text
        assert not link.tell(bytes(70_000))


async def test_a_node_that_is_paused_is_not_lost(registry_url: str) -> None:
    lost: list[Link] = []
    async with Node("a", registry=registry_url) as a, Node("b", registry=registry_url) as b:
        links = Links(a, LibraryChannel.GATEWAY, lost.append)
        for node in (a, b):
            node.subscribe(LibraryChannel.GATEWAY, lambda context: None)
        await a.wait_subscribed(LibraryChannel.GATEWAY, 2)
        found = [links.of(node.id) for node in (a, b)]
        for node in (a, b):
            await node.pause()
        links.check()
        assert lost == []
        a.unsubscribe(LibraryChannel.GATEWAY)
        links.check()
        assert lost == found[:1]


async def test_a_node_with_another_machine_id_is_another(registry_url: str) -> None:
    async with Node("a", registry=registry_url) as node:
        own = Link(node, node.id, None, LibraryChannel.GATEWAY)
        assert own.alive
        earlier = Link(node, node.id + 1, None, LibraryChannel.GATEWAY)
        assert not earlier.alive


HEARS = """
import asyncio, sys
from domi_fast import LibraryChannel, Node

async def main():
    async with Node("gateway", registry=sys.argv[1]) as node:
        node.subscribe(LibraryChannel.GATEWAY, lambda context: None)
        await asyncio.sleep(600)

asyncio.run(main())
"""


async def test_a_gateway_that_hangs_does_not_keep_its_zone_from_closing(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with subprocess.Popen([sys.executable, "-c", HEARS, sqlite_url], cwd=ROOT) as process:
        try:
            node = {"queue_limit": 65536, "drain_timeout": 0.4, "heartbeat_timeout": 60.0}
            async with zone(sqlite_url, Room, node=node) as rooms:
                await rooms.node.wait_subscribed(LibraryChannel.GATEWAY, 1, 10)
                (machine,) = rooms.node.subscribers(LibraryChannel.GATEWAY)
                process.send_signal(signal.SIGSTOP)
                link = rooms._links.of(machine)
                assert link is not None
                while not link._waiting:
                    link.tell(bytes(50_000))
                    await asyncio.sleep(0)
                await asyncio.wait_for(rooms.close(), 10)
            assert "not all nodes have been told in time" in caplog.text
        finally:
            process.kill()
