"""What happens is visible: events, loggers, and what never stands in a log."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest

from domi_fast import (
    Event,
    LibraryChannel,
    Node,
    Overloaded,
    RemoteError,
    connect,
    encode_frame,
)
from domi_fast._core import printable
from tests.support import ROOT, RawPeer, echo, forget_records, nodes, session, until

PACKAGE = ROOT / "src" / "domi_fast"


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.DEBUG)
    yield
    forget_records(caplog)


async def test_peers_that_join_and_leave(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        events = a.events()
        other = Node("b", registry=registry_url)
        await other.start()
        joined = await asyncio.wait_for(anext(events), 5)
        assert (joined.kind, joined.peer, joined.name) == ("joined", other.id, "b")
        assert joined.address == a.peers[other.id].address
        machine = other.id
        await other.close()
        left = await asyncio.wait_for(anext(events), 5)
        assert (left.kind, left.peer, left.name) == ("left", machine, "b")
        assert "the node is closing" in left.reason
        assert left.at >= joined.at


async def test_a_peer_that_comes_again_has_left_before(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        events = a.events()
        session(a, b.id).close("the test ends it")
        await until(lambda: not a.peers)
        await a.wait_peers(1, 5)
        kinds = [(await asyncio.wait_for(anext(events), 5)).kind for _ in range(2)]
        assert kinds == ["left", "joined"]


async def test_who_is_refused(registry_url: str) -> None:
    settings = {"registry": registry_url, "secret": b"the secret of this test"}
    async with Node("a", handshakes_per_address=1, **settings) as a:  # type: ignore[arg-type]
        events = a.events()
        raw = await RawPeer.connect(a.port)
        await raw.send(b"no magic")
        refused = await asyncio.wait_for(anext(events), 5)
        assert (refused.kind, refused.peer) == ("refused", None)
        assert refused.address.startswith("127.0.0.1:")
        assert "magic" in refused.reason
        raw.close()
        first, second = [await RawPeer.connect(a.port) for _ in range(2)]
        refused = await asyncio.wait_for(anext(events), 5)
        assert (refused.kind, refused.peer) == ("refused", None)
        assert refused.reason.endswith("(handshakes_per_address)")
        first.close()
        second.close()


async def test_a_peer_that_breaks_the_rules_is_named(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        raw = await RawPeer.plain(a, 700)
        events = a.events()
        await raw.send(bytes(8))
        found = [await asyncio.wait_for(anext(events), 5) for _ in range(2)]
        assert {(event.kind, event.peer) for event in found} == {("refused", 700), ("left", 700)}
        raw.close()


@pytest.mark.parametrize("policy", ["raise", "drop_newest"])
async def test_a_queue_that_is_full_is_told_once(registry_url: str, policy: Any) -> None:
    """However often it is full in the next seconds."""
    async with nodes(registry_url, "a", queue_limit=64 << 10, when_full=policy) as (a,):
        a.subscribe(50, lambda ctx: None)
        events = a.events()
        for _ in range(3):
            for _ in range(100):
                with contextlib.suppress(Overloaded):
                    a.notify(50, bytes(1_000))
            await asyncio.wait_for(a.drained(a.id), 5)
        event = await asyncio.wait_for(anext(events), 5)
        assert (event.kind, event.peer) == ("overloaded", a.id)
        assert re.fullmatch(r"\d+ bytes wait for it", event.reason)
        await a.close()
        assert [event async for event in events] == []


async def test_a_full_iterator_drops_the_oldest_and_says_so(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        events = a.events(maxsize=2)
        for machine in range(700, 705):
            raw = await RawPeer.plain(a, machine)
            await until(lambda machine=machine: machine in a.peers)  # type: ignore[misc]
            raw.close()
            await until(lambda machine=machine: machine not in a.peers)  # type: ignore[misc]
        first, second = await anext(events), await anext(events)
        assert (first.kind, first.peer, first.missed) == ("joined", 704, 8)
        assert (second.kind, second.peer, second.missed) == ("left", 704, 0)


async def test_it_ends_with_its_node(registry_url: str) -> None:
    """For who waits, for who has yet to take what waits, and for who comes too late."""
    node = Node("a", registry=registry_url)
    early = node.events()
    await node.start()
    raw = await RawPeer.plain(node, 700)
    waiting = node.events()
    waiter = asyncio.ensure_future(anext(waiting, None))
    raw.close()
    assert isinstance(await asyncio.wait_for(waiter, 5), Event)
    await node.close()
    assert [event.kind async for event in early] == ["joined", "left"]
    assert [event async for event in waiting] == []
    assert [event async for event in node.events()] == []


async def test_an_iterator_that_is_dropped_is_forgotten(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        for _ in range(100):
            a.events()
        assert len(a._mesh.witness._watching) == 0
        with pytest.raises(ValueError, match="maxsize 0: at least 1"):
            a.events(0)


# ---------------------------------------------------------------------------------------- logging


def test_each_component_has_a_logger_of_its_own() -> None:
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pxi")]:
        for name in re.findall(r"getLogger\((.*?)\)", path.read_text()):
            libraries = {'"domi_fast.kazoo"', '"domi_fast.websockets"'}
            assert name in {"__name__", '"domi_fast.core"', *libraries}, path


async def test_a_record_has_its_facts_as_fields(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fields(logger: str, text: str) -> dict[str, Any]:
        (record,) = [r for r in caplog.records if r.name == logger and text in r.getMessage()]
        return {name: value for name, value in vars(record).items() if name.startswith("domi_")}

    async with nodes(registry_url, "a", "b") as (a, b):

        def fails(ctx: Any) -> None:
            raise RuntimeError("on purpose")

        b.subscribe(50, fails)
        await a.wait_subscribed(50, timeout=5)
        a.notify(50, b"")
        await until(lambda: b.counters()["handler_errors"] == 1)
        told = fields("domi_fast.core", "the handler of channel 50 failed")
        assert told == {"domi_channel": 50, "domi_peer": a.id}
        session(a, b.id).close("the test ends it")
        await until(lambda: not a.peers)
        told = fields("domi_fast.mesh", f"lost node {b.id}: the test ends it")
        assert told == {"domi_node": a.id, "domi_peer": b.id}


FORGED = "x\nWARNING:domi_fast.mesh:forged\x1b[31m\r\0\x9b\u2028\u202e"
SHOWN = r"x\nWARNING:domi_fast.mesh:forged\x1b[31m\r\x00\x9b\u2028\u202e"


def test_what_is_printable_stays_as_it_is() -> None:
    for text in ("", "größe 名前 \\n 🙂 \ufffd", SHOWN):
        assert printable(text) == text
    assert printable(FORGED) == SHOWN
    assert printable("\ud800\t\U000e0001") == r"\ud800\t\U000e0001"


async def test_a_goodbye_writes_no_lines_of_a_log(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(registry_url, "a") as (a,):
        raw = await RawPeer.plain(a, 700)
        events, lost = a.events(), session(a, 700)
        await raw.send(encode_frame(LibraryChannel.EXIT, FORGED.encode()))
        left = await asyncio.wait_for(anext(events), 5)
        assert left.reason == lost.reason == f"the peer said goodbye: {SHOWN}"
        raw.close()
    assert [r for r in caplog.records if SHOWN in r.getMessage()]
    assert all(r.getMessage().isprintable() for r in caplog.records)


async def test_a_name_writes_no_lines_of_a_log(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What acts on names has them as they are."""
    async with nodes(registry_url, "a") as (a,):
        events = a.events()
        async with Node(f"b{FORGED}", registry=registry_url) as b:
            await a.wait_peers(1, 5)
            assert a.peers[b.id].name == f"b{FORGED}"
            joined = await asyncio.wait_for(anext(events), 5)
            caplog.clear()
        left = await asyncio.wait_for(anext(events), 5)
        assert [(e.kind, e.name) for e in (joined, left)] == [
            ("joined", f"b{SHOWN}"),
            ("left", f"b{SHOWN}"),
        ]
        assert all(r.getMessage().isprintable() for r in caplog.records)


async def test_an_address_writes_no_lines_of_a_log(
    registry_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """That of who is dialled is what it has registered."""
    async with Node("a", registry=registry_url, unix_path=str(tmp_path / "a\nb")) as a:
        async with Node("b", registry=registry_url, unix_path=str(tmp_path / "b\nb")) as b:
            await asyncio.gather(a.wait_peers(1, 5), b.wait_peers(1, 5))
            dialled = [session(a, b.id), session(b, a.id)]
            assert any(each.address.endswith(r"\nb") for each in dialled)
            for each in dialled:
                each.tell_slow(0)
        told = [r.getMessage() for r in caplog.records if "is slow" in r.getMessage()]
        assert len(told) == 2
        assert any(r"\nb) is slow" in text for text in told)


async def test_why_a_peer_took_no_request_is_printable(registry_url: str) -> None:
    """But for the text of an exception, which is the program's at both ends."""
    async with nodes(registry_url, "a", "b") as (a, b):

        def fails(ctx: Any) -> None:
            raise (Overloaded if ctx.data == b"full" else RuntimeError)(FORGED)

        b.subscribe(50, fails)
        await a.wait_subscribed(50, timeout=5)
        with pytest.raises(Overloaded) as refused:
            await a.request(50, b"full")
        assert str(refused.value) == SHOWN
        with pytest.raises(RemoteError) as failed:
            await a.request(50, b"")
        assert failed.value.message == FORGED


async def test_no_payload_stands_in_a_log(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever becomes of the messages: failed, refused, dropped, lost, or from a stranger."""
    mark = b"MARKED"

    def fails(ctx: Any) -> None:
        raise RuntimeError("on purpose")

    async with nodes(registry_url, "a", "b", queue_limit=64 << 10) as (a, b):
        b.subscribe(50, fails)
        b.subscribe(60, echo)
        b.subscribe(61, lambda ctx: None)
        await a.wait_subscribed(61, timeout=5)
        a.notify(50, mark)
        a.call(50, mark, 51)
        with pytest.raises(Exception, match="on purpose"):
            await a.request(50, mark)
        a.ventilator([50, 60], mark)
        async with await connect(f"tcp://127.0.0.1:{a.port}", name="guest") as guest:
            guest.notify(70, mark)
            guest.notify(50, mark)
            await guest.request(60, mark)
        a.when_full("drop_newest", channel=61)
        while not a.drops():
            a.notify(61, mark * 2_000)
        with pytest.raises(Overloaded):
            a.notify(50, mark)
        raw = await RawPeer.connect(a.port)
        await raw.send(mark * 10)
        session(a, b.id).close("with messages in its queue")
        await until(lambda: not a.peers)
        raw.close()
    records = [f"{r.getMessage()} {r.exc_text} {vars(r)}" for r in caplog.records]
    assert len(records) > 10
    assert not [text for text in records if "MARKED" in text or mark.hex() in text]


def test_the_pages_say_which_loggers_there_are() -> None:
    page = (ROOT / "docs" / "observing.md").read_text()
    for path in PACKAGE.rglob("*.py"):
        if "getLogger(__name__)" in path.read_text() and "cli" not in path.parts:
            assert f"`domi_fast.{path.relative_to(PACKAGE).parts[0].removesuffix('.py')}" in page


async def test_being_short_of_descriptors_is_told_once_in_a_while(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """However often callers are left waiting; each time is counted."""
    async with nodes(registry_url, "a") as (a,):
        events, mesh = a.events(), a._mesh
        for _ in range(20):
            mesh._short(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        event = await anext(aiter(events))
        assert (event.kind, event.peer, event.missed) == ("overloaded", None, 0)
        assert "Too many open files" in event.reason
        assert a.counters()["accepts_put_off"] == 20
    assert [event.kind async for event in events] == []
    assert sum("left waiting" in record.getMessage() for record in caplog.records) == 1
