"""Elections and locks of a node: ``node.cluster``, on each registry."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from domi_fast import (
    Context,
    DeadlineExceeded,
    DomiError,
    Leader,
    Leadership,
    LeadershipLost,
    Node,
    RegistryError,
    RemoteError,
)
from tests.servers import Etcd
from tests.support import forget_records, nodes, until

LEASES = {"memory": 0.5, "sqlite": 0.5, "etcd": 2.0}


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    server = Etcd(tmp_path_factory.mktemp("etcd"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["memory", "sqlite", pytest.param("etcd", marks=pytest.mark.external)])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def lease(backend: str) -> float:
    return LEASES[backend]


@pytest.fixture
def url(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    if backend == "memory":
        return f"memory://{tmp_path.name}"
    if backend == "sqlite":
        return f"sqlite://{tmp_path}/registry.sqlite"
    return f"{request.getfixturevalue('etcd').url}/{tmp_path.name}"


class Holder:
    """A task that holds a leadership until it is told to leave.

    :ivar held: the leadership, once it has it.
    """

    def __init__(self, node: Node, name: str = "post", kind: str = "elect") -> None:
        self.held: Leadership | None = None
        self._leave = asyncio.Event()
        self.task = asyncio.ensure_future(self._hold(getattr(node.cluster, kind)(name)))

    async def _hold(self, block: Any) -> None:
        async with block as self.held:
            await self._leave.wait()

    async def has_it(self, timeout: float = 10.0) -> Leadership:
        await until(lambda: self.held is not None or self.task.done(), timeout)
        assert self.held is not None, self.task
        return self.held

    async def leave(self) -> None:
        self._leave.set()
        await self.task

    async def ends(self) -> None:
        """Raises what ends it."""
        await asyncio.wait_for(asyncio.shield(self.task), 10.0)


@asynccontextmanager
async def holder(node: Node, name: str = "post", kind: str = "elect") -> AsyncIterator[Leadership]:
    it = Holder(node, name, kind)
    try:
        yield await it.has_it()
    finally:
        await it.leave()


async def end_its_lease(node: Node, held: Leadership) -> None:
    """As when the registry has taken it for dead: the next renewal finds nothing."""
    registry: Any = node._mesh._registry
    await registry._revoke(held._lease)


def stop_renewals(node: Node) -> None:
    registry: Any = node._mesh._registry
    registry._keep_alive = False


async def try_for(node: Node, timeout: float = 0.1, name: str = "post") -> int:
    async with node.cluster.elect(name, timeout=timeout) as held:
        return held.token


# ------------------------------------------------------------------------------- holding in turn


@pytest.mark.parametrize("kind", ["elect", "lock"])
async def test_one_at_a_time_and_at_once_after_a_clean_exit(
    url: str, lease: float, kind: str
) -> None:
    async with nodes(url, "a", "b", lease_ttl=lease) as (a, b):
        first = Holder(a, kind=kind)
        one = await first.has_it()
        one.check()
        assert time.monotonic() < one.valid_until <= time.monotonic() + lease
        second = Holder(b, kind=kind)
        # For longer than a lease: it is renewed by itself.
        await asyncio.wait([second.task], timeout=lease * 1.5)
        assert second.held is None
        one.check()

        left = time.monotonic()
        await first.leave()
        two = await second.has_it()
        assert time.monotonic() - left < lease / 3
        assert two.token > one.token
        assert two.name == one.name == "post"
        assert one.lost.is_set()
        assert one.valid_until <= time.monotonic()
        with pytest.raises(LeadershipLost, match=f"token {one.token}.*its block was left"):
            one.check()
        await second.leave()


async def test_who_leads(url: str, lease: float) -> None:
    async with nodes(url, "a", "b", lease_ttl=lease) as (a, b):
        assert await a.cluster.leader("post") is None
        async with a.cluster.elect("post") as held:
            for node in (a, b):
                assert await node.cluster.leader("post") == Leader(a.id, "a", held.token)
            assert await a.cluster.leader("another") is None
        assert await b.cluster.leader("post") is None


async def test_tokens_grow_from_one_to_the_next(url: str, lease: float) -> None:
    async with nodes(url, "a", "b", lease_ttl=lease) as (a, b):
        tokens = [await try_for(node, timeout=10.0) for node in (a, b, a, a, b)]
        assert tokens == sorted(set(tokens))


async def test_leaving_by_an_error_resigns_too(url: str, lease: float) -> None:
    async with nodes(url, "a", "b", lease_ttl=lease) as (a, b):
        with pytest.raises(KeyError, match="mine"):
            async with a.cluster.elect("post"):
                raise KeyError("mine")
        assert await b.cluster.leader("post") is None


async def test_elections_and_locks_of_other_names_are_others(url: str, lease: float) -> None:
    """Several at once on one node; each has a lease and a token of its own."""
    async with nodes(url, "a", lease_ttl=lease) as (a,):
        async with (
            a.cluster.elect("post") as one,
            a.cluster.elect("other") as two,
            a.cluster.lock("post") as three,
            a.cluster.lock("p") as four,
        ):
            assert len({held.token for held in (one, two, three, four)}) == 4
            for held in (one, two, three, four):
                held.check()
            leader = await a.cluster.leader("post")
            assert leader is not None
            assert leader.token == one.token
        async with (
            Node("a", registry=url, cluster="elsewhere", lease_ttl=lease) as stranger,
            a.cluster.elect("post"),
            stranger.cluster.elect("post", timeout=5.0),
        ):
            pass


# etcd takes calls that are made at the same moment in any order.
@pytest.mark.parametrize("backend", ["memory", "sqlite"], indirect=True)
async def test_tasks_of_one_node_hold_in_the_order_in_which_they_came(url: str) -> None:
    async with nodes(url, "a") as (a,):
        served: list[int] = []

        async def work(number: int) -> None:
            async with a.cluster.lock("post"):
                served.append(number)

        async with holder(a, kind="lock"):
            tasks = [asyncio.ensure_future(work(number)) for number in range(8)]
            assert (await asyncio.wait(tasks, timeout=0.1))[0] == set()
        await asyncio.gather(*tasks)
        assert served == list(range(8))


# -------------------------------------------------------------------------------------- its loss


async def test_a_leadership_that_is_lost_cancels_its_block(url: str, lease: float) -> None:
    """The node and its other leaderships feel nothing of it."""
    async with (
        nodes(url, "a", "b", lease_ttl=lease) as (a, b),
        a.cluster.elect("other") as other,
    ):
        machine = a.id
        it = Holder(a)
        held = await it.has_it()
        await end_its_lease(a, held)
        waiting = asyncio.ensure_future(held.lost.wait())
        with pytest.raises(LeadershipLost, match=rf"'post' \(token {held.token}\) is over"):
            await it.ends()
        await waiting
        assert held.valid_until <= time.monotonic()
        with pytest.raises(LeadershipLost):
            held.check()
        assert await try_for(b, 10.0) > held.token
        other.check()
        assert a.id == machine
        assert len(a.peers) == len(b.peers) == 1


async def test_it_is_over_at_its_end_and_not_later(url: str, lease: float) -> None:
    """Renewals that do not come; whoever waits elsewhere begins after it and soon."""
    async with nodes(url, "a", "b", lease_ttl=lease) as (a, b):
        it, ended = Holder(a), 0.0
        held = await it.has_it()
        other = Holder(b)
        stop_renewals(a)
        end = held.valid_until
        try:
            await it.ends()
        except LeadershipLost:
            ended = time.monotonic()
        assert end <= ended <= end + 0.2
        await other.has_it()
        assert end <= time.monotonic() <= end + b._mesh._registry.limits.expiry_bound + 1.0
        await other.leave()


@pytest.mark.parametrize("backend", ["memory"], indirect=True)
async def test_check_goes_by_the_clock(url: str, lease: float) -> None:
    """Nothing of the loop has run since the end, as in a process that was stopped."""
    async with nodes(url, "a", lease_ttl=lease) as (a,):

        async def stopped() -> None:
            async with a.cluster.elect("post") as held:
                time.sleep(lease * 1.1)
                assert not held.lost.is_set()
                held.check()

        with pytest.raises(LeadershipLost, match=r"\(token \d+\) is over: its lease ran out"):
            await stopped()


@pytest.mark.parametrize("backend", ["memory"], indirect=True)
async def test_a_block_that_ends_too_late_says_so(url: str, lease: float) -> None:
    """What it did at last, it did without the lock."""
    async with nodes(url, "a", lease_ttl=lease) as (a,):
        with pytest.raises(LeadershipLost):
            async with a.cluster.lock("post"):
                time.sleep(lease * 1.1)


async def test_what_is_over_stays_over(registry_url: str) -> None:
    """A renewal that was under way, and comes after all, does not bring it back."""
    async with nodes(registry_url, "a", lease_ttl=0.5) as (a,):
        it = Holder(a)
        held = await it.has_it()
        lease: Any = held._lease
        until_then = held.valid_until
        lease._valid_until = time.monotonic() - 0.001
        with pytest.raises(LeadershipLost):
            held.check()
        lease.renewed(until_then)
        with pytest.raises(LeadershipLost):
            held.check()
        assert held.valid_until < time.monotonic()
        with pytest.raises(LeadershipLost):
            await it.ends()
        # The registry was told: another need not wait for the lease.
        assert await a.cluster.leader("post") is None


async def test_check_in_another_thread(registry_url: str) -> None:
    """It tells the thread at once, and ends the block too."""
    async with nodes(registry_url, "a", lease_ttl=0.5) as (a,):
        it = Holder(a)
        held = await it.has_it()
        await asyncio.to_thread(held.check)
        lease: Any = held._lease
        lease._valid_until = time.monotonic()
        with pytest.raises(LeadershipLost, match="ran out"):
            await asyncio.to_thread(held.check)
        with pytest.raises(LeadershipLost, match="ran out"):
            await it.ends()


async def test_a_block_that_does_not_heed_its_cancellation(registry_url: str) -> None:
    async with nodes(registry_url, "a", lease_ttl=0.5) as (a,):
        cancelled = 0

        async def hold() -> None:
            nonlocal cancelled
            async with a.cluster.elect("post") as held:
                await end_its_lease(a, held)
                try:
                    await asyncio.sleep(10)
                except asyncio.CancelledError:
                    cancelled += 1

        async def stubborn() -> None:
            with pytest.raises(LeadershipLost):
                await hold()
            # Nothing of the cancellation is left.
            await asyncio.sleep(0)
            if sys.version_info >= (3, 11):
                task = asyncio.current_task()
                assert task is not None
                assert task.cancelling() == 0

        await asyncio.wait_for(asyncio.ensure_future(stubborn()), 5.0)
        assert cancelled == 1


async def test_an_error_of_the_block_comes_before_the_loss(registry_url: str) -> None:
    async with nodes(registry_url, "a", lease_ttl=0.5) as (a,):

        async def hold() -> None:
            async with a.cluster.elect("post") as held:
                await end_its_lease(a, held)
                try:
                    await asyncio.sleep(10)
                except asyncio.CancelledError:
                    raise KeyError("mine") from None

        with pytest.raises(KeyError, match="mine"):
            await hold()


async def test_a_cancellation_from_outside_stays_one(registry_url: str) -> None:
    async with nodes(registry_url, "a", lease_ttl=0.5) as (a,):
        it = Holder(a)
        await it.has_it()
        it.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await it.ends()
        assert await a.cluster.leader("post") is None


async def test_a_cancellation_together_with_the_loss_stays_one(registry_url: str) -> None:
    """From Python 3.11 on; before that, nobody can tell them apart."""
    kind = asyncio.CancelledError if sys.version_info >= (3, 11) else LeadershipLost
    async with nodes(registry_url, "a", lease_ttl=0.5) as (a,):
        it = Holder(a)
        held = await it.has_it()
        held._end("for the test")
        it.task.cancel()
        with pytest.raises(kind):
            await it.ends()


@pytest.mark.parametrize("lost", ["outer", "inner"])
async def test_blocks_within_one_another(registry_url: str, lost: str) -> None:
    """The loss of either ends both, and says which it was."""
    async with nodes(registry_url, "a", lease_ttl=0.5) as (a,):
        held: dict[str, Leadership] = {}

        async def hold() -> None:
            async with a.cluster.lock("outer") as held["outer"]:
                async with a.cluster.lock("inner") as held["inner"]:
                    await end_its_lease(a, held[lost])
                    await asyncio.sleep(10)
                pytest.fail("the outer block went on")

        with pytest.raises(LeadershipLost, match=f"the lock '{lost}'"):
            await hold()
        assert all(each.lost.is_set() for each in held.values())
        assert (await a._mesh._registry.list("domi/default/locks/")).entries == ()


# ------------------------------------------------------------------------------------ the waiting


async def test_a_wait_that_lasts_too_long(url: str, lease: float) -> None:
    """It leaves its place: the next in turn is not kept waiting by it."""
    async with nodes(url, "a", "b", lease_ttl=lease) as (a, b):
        first = Holder(a, kind="lock")
        await first.has_it()
        begun = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"the lock 'post' .* within 0\.2 s") as caught:
            async with b.cluster.lock("post", timeout=0.2):
                pass
        assert 0.19 <= time.monotonic() - begun < 0.2 + lease
        assert caught.value.limit == 0.2
        assert isinstance(caught.value, TimeoutError)
        second = Holder(b, kind="lock")
        await until(lambda: not b.cluster._tasks)
        left = time.monotonic()
        await first.leave()
        await second.has_it()
        assert time.monotonic() - left < lease / 3
        await second.leave()


async def test_a_cancelled_wait_leaves_nothing(url: str, lease: float) -> None:
    async with nodes(url, "a", "b", lease_ttl=lease) as (a, b):
        first = Holder(a)
        await first.has_it()
        waiting = Holder(b)
        await asyncio.wait([waiting.task], timeout=0.1)
        waiting.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting.ends()
        await until(lambda: not b.cluster._tasks)
        left = time.monotonic()
        await first.leave()
        assert await try_for(a, timeout=5.0)
        assert time.monotonic() - left < lease / 3
        assert len(b._mesh._registry._leases) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("moment", range(12))
async def test_a_wait_that_is_cancelled_at_any_moment(registry_url: str, moment: int) -> None:
    """Also at the one at which it has just won."""
    async with nodes(registry_url, "a", lease_ttl=0.5) as (a,):
        it = Holder(a)
        for _ in range(moment):
            await asyncio.sleep(0)
        it.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await it.ends()
        await until(lambda: not a.cluster._tasks)
        assert await a.cluster.leader("post") is None
        assert len(a._mesh._registry._leases) == 1  # type: ignore[attr-defined]


async def test_a_lease_that_is_lost_in_the_queue_is_replaced(
    url: str, lease: float, caplog: pytest.LogCaptureFixture
) -> None:
    async with nodes(url, "a", "b", lease_ttl=lease) as (a, b):
        first = Holder(a)
        await first.has_it()
        registry: Any = b._mesh._registry
        before = set(registry._leases)
        second = Holder(b)
        await until(lambda: set(registry._leases) - before)
        (number,) = set(registry._leases) - before
        await registry._revoke(registry._leases[number])
        await until(lambda: "cannot wait for the leadership of 'post'" in caplog.text, 10.0)
        await until(lambda: set(registry._leases) - before - {number}, 10.0)
        assert second.held is None
        await first.leave()
        await second.has_it()
        await second.leave()


async def test_what_is_won_too_late_is_not_begun(
    registry_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is over when the news comes that the turn has come."""
    async with nodes(registry_url, "a", lease_ttl=0.5) as (a,):
        registry: Any = a._mesh._registry
        acquire, late = registry.acquire, [True]

        async def acquire_late(name: str, lease: Any, value: bytes) -> Any:
            claim = await acquire(name, lease, value)
            if late:
                late.clear()
                lease.lose()
            return claim

        monkeypatch.setattr(registry, "acquire", acquire_late)
        async with a.cluster.elect("post") as held:
            held.check()
        assert not late


NAMES = ["", ".", "..", ".x", "a/b", "a b", "x" * 129, "naïve", "a\n", None, 7, b"x"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
async def test_a_name_that_is_not_allowed(registry_url: str, name: Any) -> None:
    async with nodes(registry_url, "a") as (a,):
        for block in (a.cluster.elect(name), a.cluster.lock(name)):
            with pytest.raises(ValueError, match="1 to 128 letters, digits"):
                await block.__aenter__()
        with pytest.raises(ValueError, match="1 to 128 letters, digits"):
            await a.cluster.leader(name)


async def test_the_longest_names_fit(url: str, lease: float) -> None:
    async with (
        Node("n" * 255, registry=url, cluster="c" * 64, lease_ttl=lease) as node,
        node.cluster.elect("e" * 128) as held,
    ):
        leader = await node.cluster.leader("e" * 128)
        assert leader == Leader(node.id, "n" * 255, held.token)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "1"])
async def test_a_timeout_that_is_not_allowed(registry_url: str, timeout: Any) -> None:
    async with nodes(registry_url, "a") as (a,):
        with pytest.raises(ValueError, match="timeout"):
            await a.cluster.lock("post", timeout=timeout).__aenter__()


async def test_an_entry_that_no_leader_wrote(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        registry = a._mesh._registry
        for value in (b"x", b"{}", b"[]", b'{"id": 1, "name": "n", "mark": "zz"}'):
            await registry.put("domi/default/leaders/post", value)
            with pytest.raises(RegistryError, match="leaders/post is not a holder's"):
                await a.cluster.leader("post")


async def test_a_leader_that_got_another_machine_id(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b") as (a, b), a.cluster.elect("post"):
        members = b._mesh._members
        members.view[700] = dataclasses.replace(members.view.pop(a.id), id=700)
        leader = await b.cluster.leader("post")
        assert leader is not None
        assert leader.id == 700
        del members.view[700]  # as before the view has heard of it
        leader = await b.cluster.leader("post")
        assert leader is not None
        assert leader.id == a.id


# ------------------------------------------------------------------------------- the node's closing


async def test_closing_the_node_ends_its_leaderships(url: str, lease: float) -> None:
    """Blocks and waits end, each with an error that says so, and the next leads at once."""
    async with nodes(url, "a", "b", lease_ttl=lease) as (a, b):
        holding = [Holder(a, name) for name in ("one", "two")]
        for each in holding:
            await each.has_it()
        async with b.cluster.elect("three"):
            waiting = [Holder(a, "one"), Holder(a, "three")]
            next_one = Holder(b, "one")
            await asyncio.wait([next_one.task], timeout=0.1)
            begun = time.monotonic()
            await a.close()
            for each in holding:
                with pytest.raises(LeadershipLost, match="the node was closed"):
                    await each.ends()
            for each in waiting:
                with pytest.raises(DomiError, match="the node was closed while it waited"):
                    await each.ends()
            await next_one.has_it()
            assert time.monotonic() - begun < lease / 2
            await next_one.leave()
            with pytest.raises(DomiError, match="the node was closed"):
                await try_for(a)


async def test_closing_leaves_nothing_to_a_registry_that_hangs(
    registry_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be given back in time runs out there; no task is left, and the block hears why.

    A stand-in hangs, for a server cannot be made to do so for one call alone.
    """
    async with nodes(registry_url, "a", drain_timeout=0.2) as (a,):
        it = Holder(a)
        held = (await it.has_it())._lease
        revoke = type(held).revoke

        async def hangs(lease: Any) -> None:
            await (asyncio.Event().wait() if lease is held else revoke(lease))

        monkeypatch.setattr(type(held), "revoke", hangs)
        await asyncio.wait_for(a.close(), 5)
        assert not a.cluster._tasks
        with pytest.raises(LeadershipLost, match="the node was closed"):
            await it.ends()


@pytest.mark.parametrize("moment", range(12))
async def test_a_node_that_closes_at_any_moment_of_a_wait(registry_url: str, moment: int) -> None:
    """Also at the one at which it has just won: no block is left that has not heard of it."""
    async with nodes(registry_url, "a", "b", lease_ttl=0.5) as (a, b):
        it = Holder(a)
        for _ in range(moment):
            await asyncio.sleep(0)
        await a.close()
        with pytest.raises(DomiError, match="the node was closed"):
            await it.ends()
        assert await b.cluster.leader("post") is None
        await until(lambda: not a.cluster._tasks)


async def test_a_block_may_take_its_time_to_end_when_its_node_closes(registry_url: str) -> None:
    """Until it has ended, nobody else leads."""
    async with nodes(registry_url, "a", "b", lease_ttl=0.5) as (a, b):
        ending = asyncio.Event()

        async def slow() -> None:
            async with a.cluster.elect("post") as held:
                try:
                    await asyncio.sleep(10)
                finally:
                    with pytest.raises(LeadershipLost):
                        held.check()
                    ending.set()
                    await asyncio.sleep(0.7)
                    assert await b.cluster.leader("post") == Leader(a.id, "a", held.token)

        task = asyncio.ensure_future(slow())
        await until(lambda: a.cluster._held)
        closing = asyncio.ensure_future(a.close())
        await ending.wait()
        assert not closing.done()
        await closing
        with pytest.raises(LeadershipLost, match="closed"):
            await task


async def test_a_block_that_does_not_end_is_not_waited_for_for_ever(registry_url: str) -> None:
    async with nodes(registry_url, "b") as (b,):
        a = Node("a", registry=registry_url, drain_timeout=0.2)
        await a.start()
        let_go = asyncio.Event()

        async def deaf() -> None:
            async with a.cluster.elect("post"):
                while not let_go.is_set():
                    with contextlib.suppress(asyncio.CancelledError):
                        await let_go.wait()

        task = asyncio.ensure_future(deaf())
        await until(lambda: a.cluster._held)
        await a.close()
        assert not task.done()
        assert await try_for(b, 1.0)
        let_go.set()
        with pytest.raises(LeadershipLost):
            await task


async def test_a_block_that_closes_its_own_node(url: str, lease: float) -> None:
    """The lock is free when the close is done, and the block ends as any other that came late."""
    async with nodes(url, "b", lease_ttl=lease) as (b,):
        a = Node("a", registry=url, lease_ttl=lease, drain_timeout=20.0)
        await a.start()
        begun = time.monotonic()
        went_on = False

        async def hold() -> None:
            nonlocal went_on
            async with a.cluster.elect("post") as held:
                await a.close()
                assert time.monotonic() - begun < 5.0
                assert held.lost.is_set()
                assert await try_for(b, 1.0) > held.token
                went_on = True

        with pytest.raises(LeadershipLost, match="the node was closed"):
            await hold()
        assert went_on


async def test_a_handler_may_finish_under_its_lock(registry_url: str) -> None:
    """One that holds it ends in order when the node closes; one that waits hears of it."""
    async with nodes(registry_url, "a", "b") as (a, b):
        entered, finish = asyncio.Event(), asyncio.Event()

        async def handle(ctx: Context) -> None:
            async with a.cluster.lock("post") as held:
                entered.set()
                await finish.wait()
                held.check()
            ctx.reply(b"done")

        a.subscribe(50, handle)
        await b.wait_subscribed(50)
        first = b.request(50, b"")
        await entered.wait()
        second = b.request(50, b"")
        await until(lambda: a.cluster._joining)
        closing = asyncio.ensure_future(a.close())
        with pytest.raises(RemoteError, match="DomiError: the node was closed while it waited"):
            await second
        finish.set()
        assert await first == b"done"
        await closing


async def test_before_the_start_and_on_another_loop(registry_url: str) -> None:
    node = Node("a", registry=registry_url)
    with pytest.raises(DomiError, match="has not started"):
        await try_for(node)
    with pytest.raises(DomiError, match="has not started"):
        await node.cluster.leader("post")

    def elsewhere() -> None:
        with pytest.raises(DomiError, match="another event loop"):
            asyncio.run(try_for(node))

    async with node:
        await asyncio.to_thread(elsewhere)
    with pytest.raises(DomiError, match="was closed"):
        await node.cluster.leader("post")


async def test_a_node_that_waits_for_its_peers_may_lead(registry_url: str) -> None:
    """Its handlers run already."""
    async with nodes(registry_url, "a") as (a,):
        silent = dataclasses.replace(a._mesh._members.view[a.id], id=700, port=1)
        await a._mesh._registry.put("domi/default/nodes/0700", silent.encode())
        b = Node("b", registry=registry_url)
        starting = asyncio.ensure_future(b.start())
        await asyncio.sleep(0)
        with pytest.raises(DomiError, match="has not started"):
            await try_for(b, 5.0)
        await until(lambda: b.id >= 0)
        assert await try_for(b, 5.0)
        assert b.state == "starting"
        await b.close()
        with pytest.raises(DomiError, match="closed while it started"):
            await starting


@pytest.mark.external
async def test_a_wait_outlasts_its_registry(tmp_path: Path) -> None:
    """The etcd is away for longer than a lease and than the patience of a call."""
    server = Etcd(tmp_path)
    server.start()
    try:
        async with nodes(server.url, "a", lease_ttl=2.0) as (a,):
            server.kill()
            it = Holder(a)
            with pytest.raises(DeadlineExceeded):
                await try_for(a, 0.5)
            await asyncio.wait([it.task], timeout=6.0)
            assert not it.task.done()
            server.start()
            held = await it.has_it(20.0)
            held.check()
            await it.leave()
    finally:
        server.kill()
