"""What gets lost is told to who sent it, and what ends does so for everybody who waits for it."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from domi_fast import (
    Client,
    Context,
    DomiError,
    Frame,
    FrameReader,
    LibraryChannel,
    Node,
    PeerLost,
    RemoteError,
    connect,
    encode_frame,
)
from domi_fast.handshake import Offer, encode_welcome
from tests.support import RawPeer, forget_records, nodes, session, until

BIG = bytes(100_000)


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


# --------------------------------------------------------------------------------- frames of guests


@asynccontextmanager
async def deaf_node(**settings: Any) -> AsyncIterator[tuple[Client, RawPeer]]:
    """A guest whose node, number 3, has welcomed it and reads nothing more."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        connecting = asyncio.ensure_future(connect(url, **settings))
        sock, _ = await loop.sock_accept(server)
    sock.setblocking(False)
    raw = RawPeer(sock)
    raw.reader = FrameReader(magic=True)
    await raw.frame_on(LibraryChannel.GUEST_NAME)
    offer = Offer("false", "0", "", epoch=0, instance=bytes(16))
    await raw.send(encode_frame(LibraryChannel.WELCOME, encode_welcome(3, offer)))
    guest = await connecting
    try:
        yield guest, raw
    finally:
        raw.close()
        await guest.close()


async def test_a_guest_hears_of_its_frames_that_its_node_never_got() -> None:
    heard: list[tuple[DomiError, Frame]] = []
    async with deaf_node(on_error=lambda *what: heard.append(what)) as (guest, raw):
        for _ in range(120):
            guest.notify(60, BIG)
        guest.publish(61, b"published")
        guest.call(62, b"called", 70)
        guest.ventilator([63, 64, 65], b"staged")
        asked = guest.request(66, b"asked")
        raw.reset()
        await until(lambda: not guest.connected)
        with pytest.raises(PeerLost):
            await asked
        assert all(isinstance(error, PeerLost) and error.peer == 3 for error, _ in heard)
        assert [error.channel for error, _ in heard] == [frame.channel for _, frame in heard]
        frames = [frame for _, frame in heard]
        assert frames[-3:] == [
            Frame(61, b"published"),
            Frame(62, b"called", struct.pack("<HH", 3, 70)),
            Frame(63, b"staged", b"\4" + struct.pack("<HH", 64, 65)),
        ]
        # The kernel had taken the first, and has thrown them away.
        assert 20 < len(frames) - 3 < 120
        assert set(frames[:-3]) == {Frame(60, BIG)}


async def test_the_sender_hears_of_frames_that_a_guest_never_got(registry_url: str) -> None:
    heard: dict[str, list[tuple[DomiError, Frame]]] = {"a": [], "b": []}
    async with nodes(registry_url, "a", "b") as (a, b):
        a.on_error = lambda *what: heard["a"].append(what)
        b.on_error = lambda *what: heard["b"].append(what)
        raw = await RawPeer.guest(a)
        await raw.send(encode_frame(LibraryChannel.SUBSCRIPTIONS, struct.pack("<H", 60), b"\0"))
        await b.wait_subscribed(60, timeout=5)
        for number in range(100):
            b.notify(60, BIG)
            if number % 10 == 0:
                await b.drained(a.id)
        b.call(60, b"called", 70)
        b.publish(60, b"published")
        asked = b.request(60, b"asked")
        await until(lambda: a.counters()["in_flight"] == 1)
        a.notify(60, b"from a")
        await asyncio.sleep(0)
        raw.reset()
        with pytest.raises(PeerLost):
            await asked
        call = Frame(60, b"called", struct.pack("<HH", b.id, 70))
        await until(lambda: heard["b"] and heard["b"][-1][1] == call)
        assert len(heard["b"]) > 20
        assert {frame for _, frame in heard["b"]} == {Frame(60, BIG), call}
        assert [frame for _, frame in heard["a"]] == [Frame(60, b"from a")]
        for error, _ in heard["a"] + heard["b"]:
            assert isinstance(error, PeerLost)
            assert error.channel == 60


# ------------------------------------------------------------------------------ a context let go of


@pytest.mark.parametrize("where", ["here", "in a thread", "in a cycle"])
async def test_a_request_whose_context_is_let_go_of_later(registry_url: str, where: str) -> None:
    """It ends, though it has no deadline: nobody is left to answer it."""
    async with nodes(registry_url, "a", "b") as (a, b):
        kept: list[Any] = []
        b.subscribe(60, kept.append)
        await a.wait_subscribed(60, timeout=5)
        asked = a.request(60, b"", None)
        await until(lambda: kept)
        assert not asked.done()
        if where == "in a thread":
            thread = threading.Thread(target=kept.clear)
            thread.start()
            thread.join()
        elif where == "in a cycle":
            cycle: list[Any] = [kept.pop()]
            cycle.append(cycle)
            del cycle
            gc.collect()
        else:
            kept.clear()
        with pytest.raises(RemoteError) as caught:
            await asyncio.wait_for(asked, 5)
        assert caught.value.type == "NoAnswer"
        assert b.counters()["handlers_without_answer"] == 1


async def test_watched_messages_that_nobody_answers(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        async with b.watch_channel(60) as messages:
            await a.wait_subscribed(60, timeout=5)
            asked = a.request(60, b"", None)
            async for context in messages:
                assert context.is_request
                del context
                break
        with pytest.raises(RemoteError):
            await asyncio.wait_for(asked, 5)


# ------------------------------------------------------------------------------- closing, for all


async def test_close_delivers_what_the_node_has_sent_to_itself(registry_url: str) -> None:
    got: list[bytes] = []
    async with Node("a", registry=registry_url) as node:
        node.subscribe(60, lambda ctx: got.append(ctx.data))

        async def slow(ctx: Context) -> None:
            await asyncio.sleep(0.05)
            got.append(ctx.data)

        node.subscribe(61, slow)
        for number in range(5000):
            node.notify(60, b"%d" % number)
        node.notify(61, b"last")
    assert got == [b"%d" % number for number in range(5000)] + [b"last"]


async def test_what_its_handler_has_is_not_lost(registry_url: str) -> None:
    """A node's session with itself ends inside a handler: the rest is told of, in order."""
    lost: list[bytes] = []
    got: list[bytes] = []
    settings: dict[str, Any] = {"on_error": lambda error, frame: lost.append(frame.data)}
    async with nodes(registry_url, "a", **settings) as (a,):

        def handler(ctx: Context) -> None:
            got.append(ctx.data)
            session(a, a.id).close("for the test")
            assert ctx.data == got[0]

        a.subscribe(50, handler)
        sent = [b"%d" % number + bytes(10_000 * (number % 3)) for number in range(100)]
        for data in sent:
            a.notify(50, data, to=a.id)
        await until(lambda: len(lost) == 99)
        assert (got, lost) == (sent[:1], sent[1:])


async def test_every_task_that_iterates_ends(registry_url: str) -> None:
    """With the block, and with the node."""
    async with Node("a", registry=registry_url) as node:
        ended = 0

        async def iterate(messages: Any) -> None:
            nonlocal ended
            async for _ in messages:
                pass
            ended += 1

        async with node.watch_channel(60) as messages:
            tasks = [asyncio.ensure_future(iterate(messages)) for _ in range(3)]
            await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*tasks), 5)
        async with node.watch_channel(60) as messages:
            tasks = [asyncio.ensure_future(iterate(messages)) for _ in range(3)]
            await asyncio.sleep(0)
            await node.close()
            await asyncio.wait_for(asyncio.gather(*tasks), 5)
        assert ended == 6


async def test_a_watch_takes_off_its_own_handler_only(registry_url: str) -> None:
    async with Node("a", registry=registry_url) as node:
        got: list[bytes] = []
        async with node.watch_channel(60):
            node.unsubscribe(60)
            node.subscribe(60, lambda ctx: got.append(ctx.data))
        node.notify(60, b"still there")
        await until(lambda: got)


async def test_after_the_end_nothing_is_subscribed(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,), Node("b", registry=registry_url) as b:
        guest = await connect(f"tcp://127.0.0.1:{b.port}")
        await b.close()
        await until(lambda: not guest.connected)
        for one, error in ((b, DomiError), (guest, PeerLost)):
            with pytest.raises(error):
                one.subscribe(60, print)
            with pytest.raises(error):
                async with one.watch_channel(61):
                    pass
        await guest.close()
        with pytest.raises(DomiError):
            guest.subscribe(60, print)
        assert not a.peers


async def test_close_on_another_loop_is_refused_and_changes_nothing(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        a.subscribe(60, lambda ctx: ctx.reply(b"served"))
        await b.wait_subscribed(60, timeout=5)
        raised: list[BaseException] = []

        def elsewhere() -> None:
            try:
                asyncio.run(a.close())
            except DomiError as error:
                raised.append(error)

        await asyncio.get_running_loop().run_in_executor(None, elsewhere)
        assert len(raised) == 1
        assert await b.request(60, b"", 5) == b"served"
        guest = await connect(f"tcp://127.0.0.1:{a.port}")
        await guest.close()
        await a.close()
        await b.wait_peers(0, 5)


async def test_waits_that_cannot_begin_leave_nothing(registry_url: str) -> None:
    node = Node("a", registry=registry_url)
    with pytest.raises(DomiError):
        await node.wait_subscribed(60, timeout=1)
    async with node:
        waits = [node.wait_subscribed(60, timeout=timeout) for timeout in (float("inf"), 1e11)]
        tasks = [asyncio.ensure_future(wait) for wait in waits]
        await asyncio.sleep(0)
        node.subscribe(60, print)
        await asyncio.gather(*tasks)
        assert not node._mesh.conditions.waiting


# ------------------------------------------------------------------------------------- the registry


async def test_the_view_recovers_from_a_registry_that_was_spoilt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "registry.db"
    files = [Path(f"{path}{suffix}") for suffix in ("", "-wal", "-shm")]
    async with nodes(f"sqlite://{path}", "a", "b", lease_ttl=0.5) as (a, b):
        # What SQLite still has in its memory would hide the damage.
        for file in files:
            if file.exists():
                # In place: a file that is cut short first ends whoever has it mapped (SIGBUS).
                with file.open("r+b") as spoilt:
                    spoilt.write(b"garbage!" * 8192)
        await until(lambda: "cannot watch the registry" in caplog.text, 10)
        for file in files:
            file.unlink(missing_ok=True)
        async with Node("c", registry=f"sqlite://{path}", start_timeout=0.0) as c:
            for node in (a, b, c):
                await until(lambda node=node: len(node._mesh._members.view) == 3, 20)
                await node.wait_peers(2, 10)
            assert len({a.id, b.id, c.id}) == 3
        for node in (a, b):
            await until(lambda node=node: len(node._mesh._members.view) == 2, 10)


# ------------------------------------------------------------------------------------------- a fork


def test_the_verbs_of_a_forked_child_say_so() -> None:
    program = """
        import asyncio, os
        from domi_fast import DomiError, Node

        async def main():
            async with Node("a", registry="memory://fork") as node:
                node.subscribe(60, lambda ctx: ctx.reply(b"yes"))
                child = os.fork()
                if child == 0:
                    refused = 0
                    for verb in (
                        lambda: node.notify(60, b""),
                        lambda: node.request(60, b""),
                        lambda: node.subscribe(61, print),
                        lambda: node.drained(node.id),
                    ):
                        try:
                            verb()
                        except DomiError as error:
                            refused += "forked" in str(error)
                    os._exit(refused)
                _, status = os.waitpid(child, 0)
                assert os.waitstatus_to_exitcode(status) == 4, status
                assert await node.request(60, b"") == b"yes"

        asyncio.run(main())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)
