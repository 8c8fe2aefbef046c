"""What stands on a node: attached wings, ``on_newer``, and counters of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from domi_fast import DomiError, Name, Node, Peer, Serial
from tests.support import echo, forget_records, nodes, until


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


async def nothing() -> None:
    return


class Recorder:
    """A wing that writes down what is asked of it.

    :ivar told: the verb, and the node's state then.
    """

    def __init__(
        self,
        node: Node,
        drain: Callable[[], Awaitable[Any]] = nothing,
        close: Callable[[], Awaitable[Any]] = nothing,
    ) -> None:
        self.told: list[tuple[str, str]] = []
        self._node = node
        self._drain = drain
        self._close = close

    async def drain(self) -> None:
        self.told.append(("drain", self._node.state))
        await self._drain()

    async def close(self) -> None:
        self.told.append(("close", self._node.state))
        await self._close()


async def cancelled_late(told: list[str]) -> None:
    try:
        await asyncio.sleep(60)
    finally:
        told.append("cancelled")


# -------------------------------------------------------------------------------------- closing


@pytest.mark.parametrize("early", [True, False])
async def test_a_wing_is_closed_first_and_can_still_send(registry_url: str, early: bool) -> None:
    """It may be attached before the start and after it; twice is once."""
    async with nodes(registry_url, "b") as (b,):
        got: list[bytes] = []
        b.subscribe(50, lambda ctx: got.append(ctx.data))
        b.subscribe(51, echo)
        a = Node("a", registry=registry_url)
        serial = Serial(a)

        async def say_goodbye() -> None:
            serial.subscribe(52, echo)
            a.notify(50, b"goodbye")
            assert await a.request(51, b"still here") == b"still here"
            await name.release()

        wing = Recorder(a, close=say_goodbye)
        if early:
            a.attach(wing)
        await a.start()
        a.attach(wing)
        name: Name = await a.cluster.names("kind").claim("n")
        await a.wait_subscribed(51, timeout=5)
        await a.close()
        assert wing.told == [("close", "closed")]
        assert not name.lost.is_set()
        await until(lambda: got)
        assert got == [b"goodbye"]
        with pytest.raises(DomiError, match="the node was closed"):
            a.attach(wing)
        with pytest.raises(DomiError, match="the node was closed"):
            a.attach(Recorder(a))


async def test_a_wing_that_fails_or_hangs_holds_up_nobody_for_long(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(registry_url, "a", drain_timeout=0.3) as (a,):
        told: list[str] = []

        async def fail() -> None:
            raise KeyError("mine")

        wings = [
            Recorder(a, close=fail),
            Recorder(a, close=lambda: cancelled_late(told)),
            Recorder(a),
        ]
        for wing in wings:
            a.attach(wing)
        begun = time.monotonic()
        await a.close()
        assert 0.25 < time.monotonic() - begun < 5.0
        assert [wing.told for wing in wings] == [[("close", "closed")]] * 3
        assert told == ["cancelled"]
        assert "a: a wing failed to close" in caplog.text
        assert "KeyError: 'mine'" in caplog.text
        assert "a: 1 wings did not close within 0.3 s" in caplog.messages


async def test_a_wing_that_did_not_start_is_closed_with_its_node(registry_url: str) -> None:
    node = Node("a", registry=registry_url)
    wing = Recorder(node)
    node.attach(wing)
    await node.close()
    assert wing.told == [("close", "closed")]


@pytest.mark.parametrize(
    ("by", "verb"), [("close", "close"), ("drain", "close"), ("drain", "drain")]
)
async def test_a_wing_may_end_its_own_node(registry_url: str, by: str, verb: str) -> None:
    """From what the node itself waits for; neither waits for the other."""
    async with nodes(registry_url, "a", drain_timeout=20.0) as (a,):
        ended: list[str] = []

        async def end() -> None:
            await getattr(a, verb)()
            ended.append(a.state)

        wing = Recorder(a, drain=end) if by == "drain" else Recorder(a, close=end)
        a.attach(wing)
        begun = time.monotonic()
        await (a.drain() if by == "drain" else a.close())
        await until(lambda: ended)
        assert time.monotonic() - begun < 10.0
        assert ended == ["closed"]
        assert [told[0] for told in wing.told] == ["drain", "close"][by == "close" :]


# -------------------------------------------------------------------------------------- draining


async def test_wings_are_drained_together_while_the_node_serves(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b):
        a.subscribe(50, echo)
        await b.wait_subscribed(50, timeout=5)
        both = 0

        async def hand_over() -> None:
            nonlocal both
            both += 1
            await until(lambda: both == 2)
            assert await b.request(50, b"x") == b"x"
            assert b.peers[a.id].state == "serving"

        wings = [Recorder(a, drain=hand_over) for _ in range(2)]
        for wing in wings:
            a.attach(wing)
        assert await a.drain(10.0)
        assert [wing.told for wing in wings] == [[("drain", "serving"), ("close", "closed")]] * 2


async def test_a_wing_that_drains_for_too_long(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It has the whole deadline, and is closed after it."""
    async with nodes(registry_url, "a") as (a,):
        told: list[str] = []

        async def close() -> None:
            told.append("closed")

        wing = Recorder(a, drain=lambda: cancelled_late(told), close=close)
        a.attach(wing)
        begun = time.monotonic()
        assert not await a.drain(0.3)
        assert 0.25 < time.monotonic() - begun < 5.0
        assert told == ["cancelled", "closed"]
        assert wing.told == [("drain", "serving"), ("close", "closed")]
        assert "not everything was finished within 0.3 s" in caplog.text


async def test_a_wing_that_fails_to_drain_is_told_and_the_rest_goes_on(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(registry_url, "a") as (a,):

        async def fail() -> None:
            raise KeyError("mine")

        wings = [Recorder(a, drain=fail), Recorder(a)]
        for wing in wings:
            a.attach(wing)
        await a.drain(5.0)
        assert [wing.told for wing in wings] == [[("drain", "serving"), ("close", "closed")]] * 2
        assert "a: a wing failed to drain" in caplog.text


async def test_a_node_that_is_closed_while_its_wings_drain(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        told: list[str] = []
        wing = Recorder(a, drain=lambda: cancelled_late(told))
        a.attach(wing)
        draining = asyncio.ensure_future(a.drain(30.0))
        await until(lambda: wing.told)
        await a.close()
        assert not await draining
        assert told == ["cancelled"]
        assert wing.told == [("drain", "serving"), ("close", "closed")]


# ------------------------------------------------------------------------------- a newer version


async def test_who_hears_of_a_newer_version_decides(
    registry_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The node goes on; also where it would not drain by itself."""
    async with (
        Node("service", version="1", registry=registry_url) as a,
        Node("service", version="1", registry=registry_url, roll_deadline=None) as b,
    ):
        heard: list[tuple[Node, int, str]] = []

        def hear(node: Node) -> Callable[[Peer], None]:
            return lambda peer: heard.append((node, peer.id, peer.version))

        def fail(peer: Peer) -> None:
            hear(b)(peer)
            raise KeyError("mine")

        a.on_newer(hear(a))
        b.on_newer(fail)
        for node in (a, b):
            with pytest.raises(DomiError, match="already"):
                node.on_newer(hear(node))
        async with (
            Node("other", version="3", registry=registry_url) as other,
            Node("service", version="1.1", registry=registry_url) as newer,
        ):
            await newer.wait_peers(3, 5)
            await other.wait_peers(3, 5)
            await until(lambda: len(heard) == 2)
            assert {(node.id, *rest) for node, *rest in heard} == {
                (node.id, newer.id, "1.1") for node in (a, b)
            }
            assert (a.state, b.state) == ("serving", "serving")
            assert "KeyError: 'mine'" in caplog.text


async def test_a_newer_version_that_is_there_already(registry_url: str) -> None:
    async with Node("service", version="1", registry=registry_url, roll_deadline=None) as a:
        async with Node("service", version="2", registry=registry_url) as newer:
            await a.wait_peers(1, 5)
            heard: list[int] = []
            a.on_newer(lambda peer: heard.append(peer.id))
            assert heard == [newer.id]
        assert a.state == "serving"


async def test_on_newer_is_taken_back(registry_url: str) -> None:
    """The node drains by itself again; at once, where a newer version is there."""
    settings: dict[str, Any] = {"version": "1", "registry": registry_url, "roll_deadline": 5.0}
    async with Node("service", **settings) as a, Node("service", **settings) as b:
        heard: list[int] = []
        for node in (a, b):
            node.on_newer(lambda peer: heard.append(peer.id))
        a.on_newer(None)
        a.on_newer(None)
        async with Node("service", version="2", registry=registry_url) as newer:
            await a.wait_closed()
            await until(lambda: heard == [newer.id])
            assert b.state == "serving"
            b.on_newer(None)
            await b.wait_closed()


async def test_a_wing_that_is_detached_is_told_nothing(registry_url: str) -> None:
    async with Node("a", registry=registry_url) as node:
        gone, stays = Recorder(node), Recorder(node)
        node.attach(gone)
        node.attach(stays)
        node.detach(gone)
        node.detach(gone)
        assert await node.drain()
    assert gone.told == []
    assert stays.told == [("drain", "serving"), ("close", "closed")]


async def test_what_on_newer_takes(registry_url: str) -> None:
    node: Any = Node("a", registry=registry_url)
    with pytest.raises(TypeError, match="on_newer 5 is not callable: a function is wanted"):
        node.on_newer(5)

    async def later(peer: Peer) -> None:
        pytest.fail(f"nobody awaits it for {peer}")

    with pytest.raises(TypeError, match=r"on_newer .* is an async def"):
        node.on_newer(later)
    await node.close()


# -------------------------------------------------------------------------------------- counters


async def test_a_counter_of_a_wing(registry_url: str) -> None:
    node: Any = Node("a", registry=registry_url)
    node.count("wing_joins")
    async with node:
        node.count("wing_joins")
        assert node.counters()["wing_joins"] == 2
        for wrong in ("", "two words", "5th", "é", "in_flight", 5):
            with pytest.raises(ValueError, match="letters, digits and '_' are allowed"):
                node.count(wrong)
