"""The policies: whom they choose, how often, and what moves when somebody leaves."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvloop

from domi_fast import (
    Context,
    DomiError,
    Frame,
    Node,
    NoSubscriber,
    Overloaded,
    RemoteError,
    Serial,
    connect,
)
from domi_fast.balance import (
    POLICIES,
    Candidate,
    KeyHash,
    LeastConnections,
    LeastMemory,
    PeakEwma,
    Random,
    RoundRobin,
    WeightedRandom,
    WeightedRoundRobin,
)
from domi_fast.memory import used_share
from tests.serial.modes import within
from tests.support import echo, endings, forget_records, nodes, until

WORK = 50
CHOICES = 100_000
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


def some(count: int, weights: Sequence[float] = ()) -> list[Candidate]:
    return [
        Candidate(number, weight=weights[number] if weights else 1.0) for number in range(count)
    ]


def chosen(policy: Any, candidates: list[Candidate], count: int = CHOICES) -> list[int]:
    """How often each was chosen."""
    found = Counter(policy.choose(candidates).id for _ in range(count))
    return [found[candidate.id] for candidate in candidates]


def is_likely(counts: Sequence[int], expected: Sequence[float]) -> bool:
    """A chi-square test: whether the counts are what the probabilities give, but once in 10**6."""
    total = sum(counts)
    statistic = sum(
        (count - total * share) ** 2 / (total * share)
        for count, share in zip(counts, expected, strict=True)
    )
    # The Wilson-Hilferty approximation of the quantile; 4.753 is the normal one's.
    freedom = len(counts) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 4.753 * math.sqrt(2 / (9 * freedom))) ** 3
    return statistic < bound


# ----------------------------------------------------------------------------------- distributions


def test_the_chi_square_test_sees_a_bias_of_one_in_fifty() -> None:
    assert is_likely([25_000] * 4, [0.25] * 4)
    assert not is_likely([25_500, 24_500, 25_500, 24_500], [0.25] * 4)


def test_round_robin_is_exact() -> None:
    candidates = some(4)
    policy = RoundRobin()
    assert [policy.choose(candidates).id for _ in range(8)] == [0, 1, 2, 3] * 2


def test_weighted_round_robin_is_exact_and_smooth() -> None:
    policy = WeightedRoundRobin()
    candidates = [Candidate(name, weight=weight) for name, weight in (("a", 5), ("b", 1), ("c", 1))]
    # The sequence of nginx's own description of the algorithm.
    assert "".join(policy.choose(candidates).id for _ in range(14)) == "aabacaa" * 2


def test_weighted_round_robin_follows_who_comes_and_goes() -> None:
    policy = WeightedRoundRobin()
    for first in range(0, 300, 3):
        candidates = [Candidate(first + number, weight=number + 1) for number in range(3)]
        assert chosen(policy, candidates, 600) == [100, 200, 300]


@pytest.mark.parametrize("weights", [[1, 2, 3, 4], [0.5, 0.25, 10, 100], [7]])
@pytest.mark.parametrize("kind", [WeightedRoundRobin, WeightedRandom])
def test_weights_are_honoured_within_one_percent(
    kind: Callable[[], Any], weights: list[float]
) -> None:
    policy = WeightedRandom(7) if kind is WeightedRandom else kind()
    counts = chosen(policy, some(len(weights), weights), 1_000_000)
    for count, weight in zip(counts, weights, strict=True):
        share = weight / sum(weights)
        assert abs(count / 1_000_000 - share) <= 0.01
        if share > 0.05:
            assert abs(count / 1_000_000 / share - 1) <= 0.01


@pytest.mark.parametrize("count", [2, 3, 7, 100])
def test_random_is_even(count: int) -> None:
    assert is_likely(chosen(Random(count), some(count)), [1 / count] * count)


def test_weighted_random_is_as_likely_as_its_weights() -> None:
    weights = [1.0, 2.0, 3.0, 4.0]
    counts = chosen(WeightedRandom(1), some(4, weights))
    assert is_likely(counts, [weight / 10 for weight in weights])


@pytest.mark.parametrize("kind", [Random, WeightedRandom, PeakEwma])
def test_a_seed_gives_the_same_choices(kind: Callable[..., Any]) -> None:
    candidates = some(5)
    one, same, other, unseeded = kind(3), kind(3), kind(4), kind()
    choices = [[p.choose(candidates).id for _ in range(50)] for p in (one, same, other, unseeded)]
    assert choices[0] == choices[1]
    assert len({tuple(each) for each in choices}) == 3


def test_hashed_keys_are_spread_evenly() -> None:
    policy, candidates = KeyHash(), some(10)
    found = Counter(policy.choose(candidates, f"user-{n}").id for n in range(CHOICES))
    assert is_likely([found[number] for number in range(10)], [0.1] * 10)


def test_hashed_keys_honour_weights() -> None:
    weights = [1.0, 2.0, 3.0, 4.0]
    policy, candidates = KeyHash(), some(4, weights)
    found = Counter(policy.choose(candidates, f"user-{n}").id for n in range(CHOICES))
    assert is_likely([found[number] for number in range(4)], [w / 10 for w in weights])


def test_only_the_keys_of_who_leaves_move() -> None:
    policy, candidates = KeyHash(), some(10)
    keys = [f"/data/{number}" for number in range(20_000)]
    before = {key: policy.choose(candidates, key).id for key in keys}
    gone = candidates.pop(3)
    after = {key: policy.choose(candidates, key).id for key in keys}
    moved = [key for key in keys if before[key] != after[key]]
    assert moved == [key for key in keys if before[key] == gone.id]
    assert abs(len(moved) / len(keys) - 1 / 10) < 0.01
    # They are spread over all who are left, and come back with who has left.
    assert is_likely(
        [sum(after[key] == each.id for key in moved) for each in candidates], [1 / 9] * 9
    )
    candidates.append(gone)
    assert {key: policy.choose(candidates, key).id for key in keys} == before


def test_hashing_is_the_same_in_every_process() -> None:
    """Fixed for ever: nodes of different versions of this library must agree."""
    policy, candidates = KeyHash(), some(5)
    assert [
        policy.choose(candidates, key).id for key in ("a", b"a", "/data/video", "ü", 7, "7")
    ] == [
        policy.choose(candidates, key).id
        for key in (b"a", "a", b"/data/video", "ü".encode(), "7", 7)
    ]
    assert [policy.choose(candidates, f"k{n}").id for n in range(12)] == KNOWN


KNOWN = [2, 0, 1, 3, 4, 4, 1, 3, 3, 2, 4, 4]


@pytest.mark.parametrize("key", [None, 1.5, True, ["a"]])
def test_what_is_no_key(key: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="key"):
        KeyHash().choose(some(2), key)


def test_least_connections() -> None:
    policy, candidates = LeastConnections(), some(4)
    # Who is equal gets its turn.
    assert chosen(policy, candidates, 400) == [100] * 4
    for candidate, outstanding in zip(candidates, (3, 1, 2, 1), strict=True):
        candidate.outstanding = outstanding
    assert chosen(policy, candidates, 100) == [0, 50, 0, 50]
    candidates[2].outstanding = 0
    assert chosen(policy, candidates, 10) == [0, 0, 10, 0]


def test_least_memory_and_the_ninety_percent() -> None:
    policy, candidates = LeastMemory(), some(3)
    for candidate, memory in zip(candidates, (0.5, 0.2, 0.95), strict=True):
        candidate.memory = memory
    assert chosen(policy, candidates, 10) == [0, 10, 0]
    candidates[1].memory = 0.901
    assert chosen(policy, candidates, 10) == [10, 0, 0]
    candidates[0].memory = 0.9
    assert chosen(policy, candidates, 10) == [10, 0, 0]
    candidates[0].memory = 0.91
    with pytest.raises(Overloaded, match="each of 3 uses over 90% of its memory") as caught:
        policy.choose(candidates)
    assert caught.value.limit == 0.9
    # One that has not said is better than one that is full, and worse than any other.
    candidates[2].memory = -1.0
    assert chosen(policy, candidates, 10) == [0, 0, 10]
    candidates[1].memory = 0.89
    assert chosen(policy, candidates, 10) == [0, 10, 0]


def test_peak_ewma_prefers_who_answers_first() -> None:
    policy, candidates = PeakEwma(5), some(4)
    # Who has yet to be tried is as good as any other such.
    assert is_likely(chosen(policy, candidates, 20_000), [0.25] * 4)
    for candidate in candidates:
        candidate.observe(0.001)
    candidates[0].observe(0.1)
    counts = chosen(policy, candidates, 20_000)
    assert counts[0] == 0
    # Who has much to do is as good as slow.
    candidates[1].outstanding = 50
    assert chosen(policy, candidates, 1000)[:2] != [0, 0]
    assert chosen(policy, [candidates[1], candidates[2]], 1000) == [0, 1000]


def test_a_latency_rises_at_once_and_falls_by_and_by() -> None:
    candidate = Candidate(1)
    assert candidate.latency == 0.0
    candidate.observe(0.002)
    assert candidate.latency == pytest.approx(0.002)
    candidate.observe(0.5)
    assert candidate.latency == pytest.approx(0.5)
    candidate.observe(0.002)
    assert 0.4 < candidate.latency < 0.5


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_policy_chooses_one_of_them(name: str) -> None:
    policy = POLICIES[name]()
    for count in (1, 2, 5):
        candidates = some(count)
        for _ in range(20):
            assert policy.choose(candidates, "key") in candidates
    with pytest.raises(ValueError, match="no candidates"):
        policy.choose([], "key")
    with pytest.raises(TypeError, match="is not a Candidate"):
        policy.choose([object()], "key")  # type: ignore[list-item]


@pytest.mark.parametrize("weight", [0, -1, math.inf, math.nan, "2", True, None])
def test_a_weight_is_above_zero(weight: Any) -> None:
    with pytest.raises(ValueError, match=f"weight {weight!r}: a number above 0 is wanted"):
        Candidate(1, weight=weight)
    candidate = Candidate(1)
    with pytest.raises(ValueError, match="weight"):
        candidate.weight = weight
    assert candidate.weight == 1.0


@pytest.mark.parametrize("latency", [-1, math.inf, math.nan, "2", True, None])
def test_a_latency_is_a_number_of_seconds(latency: Any) -> None:
    candidate = Candidate(1)
    with pytest.raises(ValueError, match=f"latency {latency!r}: seconds, 0 or more, are wanted"):
        candidate.observe(latency)
    assert candidate.latency == 0.0


# ---------------------------------------------------------------------------------------- at a node


def name_on(node: Node) -> None:
    node.subscribe(WORK, lambda ctx: ctx.reply(b"%d" % node.id))


async def answers(node: Node, count: int, **how: Any) -> Counter[int]:
    return Counter([int(await node.request(WORK, b"", **how)) for _ in range(count)])


async def test_a_policy_for_a_channel_and_for_a_message(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c", "d") as (a, *servers):
        for node in servers:
            name_on(node)
        ids = {node.id for node in servers}
        await a.wait_subscribed(WORK, 3, timeout=5)
        assert await answers(a, 30) == dict.fromkeys(ids, 10)
        one = a.choose(WORK, key="user-7")
        assert await answers(a, 10, key="user-7") == {one: 10}
        assert servers[0].choose(WORK, key="user-7") == one
        a.balance(WORK, "url_hash")
        assert await answers(a, 10, key="user-7") == {one: 10}
        with pytest.raises(ValueError, match="goes by a key"):
            a.request(WORK, b"")
        assert len(await answers(a, 40, policy="random")) == 3
        a.balance(WORK, "ip_hash")
        assert len(await answers(a, 10)) == 1
        assert await answers(a, 10, key="user-7") == {one: 10}
        a.balance(WORK, None)
        assert await answers(a, 30) == dict.fromkeys(ids, 10)


async def test_the_policy_of_a_node(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", balance="ip_hash") as (a, b):
        name_on(a)
        name_on(b)
        await a.wait_subscribed(WORK, 2, timeout=5)
        assert len(await answers(a, 10)) == 1
        a.balance(WORK, "round_robin")
        assert await answers(a, 10) == {a.id: 5, b.id: 5}
        a.balance(WORK, None)
        a.balance(None, None)
        assert await answers(a, 10) == {a.id: 5, b.id: 5}


async def test_weights_come_with_the_registration(registry_url: str) -> None:
    async with (
        Node("a", registry=registry_url, balance="weighted_round_robin", weight=2) as a,
        Node("b", registry=registry_url, weight=3) as b,
        Node("c", registry=registry_url) as c,
    ):
        for node in (a, b, c):
            name_on(node)
        await a.wait_subscribed(WORK, 3, timeout=5)
        assert (a.peers[b.id].weight, a.peers[c.id].weight) == (3.0, 1.0)
        assert await answers(a, 60) == {a.id: 20, b.id: 30, c.id: 10}


async def test_outstanding_requests_count(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        kept: list[Context] = []
        b.subscribe(WORK, kept.append)
        name_on(c)
        await a.wait_subscribed(WORK, 2, timeout=5)
        waiting = [a.request(WORK, b"", to=b.id, timeout=None) for _ in range(3)]
        assert (a.peers[b.id].outstanding, a.peers[c.id].outstanding) == (3, 0)
        a.balance(WORK, "least_connections")
        assert await answers(a, 10) == {c.id: 10}
        waiting[0].cancel()
        assert a.peers[b.id].outstanding == 2
        await until(lambda: len(kept) == 3)
        for ctx in kept:
            ctx.reply(b"")
        await asyncio.gather(*waiting[1:])
        assert (a.peers[b.id].outstanding, a.peers[c.id].outstanding) == (0, 0)
        kept.clear()


async def test_peak_ewma_avoids_the_slow_one(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c", balance="peak_ewma") as (a, b, c):

        async def slow(ctx: Context) -> None:
            await asyncio.sleep(0.05)
            ctx.reply(b"%d" % b.id)

        b.subscribe(WORK, slow)
        name_on(c)
        await a.wait_subscribed(WORK, 2, timeout=5)
        found = await answers(a, 200)
        assert found[c.id] >= 195
        assert found[b.id] >= 1


async def test_the_share_of_memory_that_a_node_uses(
    registry_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = 0.25
    monkeypatch.setattr("domi_fast.memory.used_share", lambda: used)
    async with nodes(registry_url, "a", "b", memory_interval=0.01) as (a, b):
        name_on(b)
        await a.wait_subscribed(WORK, timeout=5)
        await until(lambda: a.peers[b.id].memory == pytest.approx(0.25))
        a.balance(WORK, "least_memory")
        assert await answers(a, 3) == {b.id: 3}
        used = 0.95
        await until(lambda: a.peers[b.id].memory == pytest.approx(0.95))
        with pytest.raises(Overloaded, match="over 90%") as caught:
            a.request(WORK, b"")
        assert caught.value.channel == WORK
        used = 0.5
        await until(lambda: a.peers[b.id].memory == pytest.approx(0.5))
        assert await answers(a, 3) == {b.id: 3}
        async with Node("late", registry=registry_url) as late:
            await late.wait_peers(2, 5)
            await until(lambda: late.peers[b.id].memory == pytest.approx(0.5))


async def test_the_ninety_percent_are_told_exactly(
    registry_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Small changes are not told, but this one is; a reading that fails is tried again."""
    used: list[float | OSError] = [0.899]
    failed = 0

    def reading() -> float:
        nonlocal failed
        if isinstance(used[0], OSError):
            failed += 1
            raise used[0]
        return used[0]

    monkeypatch.setattr("domi_fast.memory.used_share", reading)
    async with nodes(registry_url, "a", "b", memory_interval=0.01) as (a, b):
        name_on(b)
        await a.wait_subscribed(WORK, timeout=5)
        a.balance(WORK, "least_memory")
        for share, full in ((0.899, False), (0.9003, True), (0.9, False), (0.904, True)):
            used[0] = share

            def is_told(full: bool = full) -> bool:
                told = a.peers[b.id].memory
                return told is not None and (told > 0.9) is full

            await until(is_told)
            if full:
                with pytest.raises(Overloaded):
                    a.request(WORK, b"")
            else:
                assert await answers(a, 1) == {b.id: 1}
        used[0] = OSError("too many open files")
        warning = "cannot tell how much memory is used: too many open files"
        await until(lambda: failed >= 20 and caplog.text.count(warning) >= 2)
        used[0] = 0.25
        await until(lambda: a.peers[b.id].memory == pytest.approx(0.25))
        # Once for each of the two nodes, however often it failed.
        assert caplog.text.count(warning) == 2


@pytest.mark.parametrize("name", ["round_robin", "weighted_round_robin", "least_connections"])
async def test_each_channel_has_turns_of_its_own(registry_url: str, name: str) -> None:
    """Messages on several channels by turns are spread on each of them."""
    channels = (WORK, WORK + 1)

    def send(node: Node, **settings: Any) -> None:
        for _ in range(100):
            for channel in channels:
                node.notify(channel, b"", **settings)

    heard: Counter[tuple[int, int]] = Counter()
    async with (
        nodes(registry_url, "a", "b", "c") as (a, *others),
        Node("d", registry=registry_url, balance=name) as d,
    ):
        for node in others:
            for channel in channels:
                node.subscribe(
                    channel,
                    lambda ctx, node=node: heard.update([(ctx.channel, node.id)]),  # type: ignore[misc]
                )
        for sender, settings in ((d, {}), (a, {"policy": name})):
            for channel in channels:
                await sender.wait_subscribed(channel, 2, timeout=5)
            heard.clear()
            send(sender, **settings)
            await until(lambda: sum(heard.values()) == 200)
            for channel in channels:
                for node in others:
                    assert abs(heard[channel, node.id] - 50) <= 1, heard


class Alternate:
    """A policy of one's own."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], Any]] = []

    def choose(self, candidates: Sequence[Candidate], key: Any) -> Candidate:
        self.seen.append(([candidate.id for candidate in candidates], key))
        return candidates[-1]


async def test_a_policy_of_ones_own(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        name_on(b)
        await a.wait_subscribed(WORK, timeout=5)
        name_on(c)
        await a.wait_subscribed(WORK, 2, timeout=5)
        policy = Alternate()
        a.balance(WORK, policy)
        assert await answers(a, 3) == {c.id: 3}
        assert await answers(a, 1, key="x") == {c.id: 1}
        assert policy.seen == [([b.id, c.id], None)] * 3 + [([b.id, c.id], "x")]
        assert await answers(a, 1, policy=policy) == {c.id: 1}

        class Wrong:
            def choose(self, candidates: Sequence[Candidate], key: Any) -> Any:
                return Candidate(99)

        class Raises:
            def choose(self, candidates: Sequence[Candidate], key: Any) -> Any:
                b.unsubscribe(WORK)
                raise LookupError("nobody is good enough")

        with pytest.raises(TypeError, match="none of the candidates"):
            a.request(WORK, b"", policy=Wrong())
        with pytest.raises(LookupError, match="nobody is good enough"):
            a.request(WORK, b"", policy=Raises())


class Failing:
    """A policy of one's own that raises, or returns what is no candidate."""

    def __init__(self, kind: type[BaseException] | None) -> None:
        self.kind = kind

    def choose(self, candidates: Sequence[Candidate], key: Any) -> Any:
        if self.kind is not None:
            raise self.kind("now")


@pytest.mark.parametrize("raised", [KeyError, ValueError, asyncio.CancelledError, None])
async def test_a_policy_that_fails_for_a_guest(
    registry_url: str, raised: type[BaseException] | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Its request has one outcome, its on_error hears of the rest, and the loop of nothing."""
    kind = "TypeError" if raised is None else raised.__name__
    message = "chose None, which is none of the candidates" if raised is None else "now"
    unhandled: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, what: unhandled.append(what))
    heard: list[tuple[DomiError, Frame]] = []
    async with nodes(registry_url, "a", "b") as (a, b):
        name_on(b)
        b.subscribe(WORK + 1, echo)
        await a.wait_subscribed(WORK + 1, timeout=5)
        a.balance(WORK, Failing(raised))
        async with await connect(
            f"tcp://127.0.0.1:{a.port}", on_error=lambda error, frame: heard.append((error, frame))
        ) as guest:
            asked = guest.request(WORK, b"asked", timeout=None)
            behind = guest.request(WORK + 1, b"behind")
            ends = endings(asked)
            with pytest.raises(RemoteError) as caught:
                await asked
            assert (caught.value.type, caught.value.channel) == (kind, WORK)
            assert message in caught.value.message
            assert await behind == b"behind"
            guest.notify(WORK, b"notify")
            guest.call(WORK, b"call", WORK + 2)
            guest.ventilator([WORK, WORK + 1], b"ventilator")
            guest.notify_many(WORK, [b"many"])
            await until(lambda: len(heard) == 4)
            assert [frame.data for _, frame in heard] == [
                b"notify",
                b"call",
                b"ventilator",
                b"many",
            ]
            assert {(type(error), error.channel) for error, _ in heard} == {(RemoteError, WORK)}
            assert ends == ["RemoteError"]
            assert guest.counters()["in_flight"] == a.counters()["in_flight"] == 0
        assert a.counters()["relay_errors"] == 5
        assert f"a guest's message on channel {WORK} could not be sent on" in caplog.text
    assert unhandled == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("kind", list(LOOPS))
def test_an_interruption_in_a_policy(
    registry_url: str, kind: str, error: type[BaseException]
) -> None:
    """It ends the loop, and the guest's request as well."""
    loop = LOOPS[kind]()
    a = Node("a", registry=registry_url)
    try:
        loop.run_until_complete(a.start())
        name_on(a)
        a.balance(WORK, Failing(error))
        guest = loop.run_until_complete(connect(f"tcp://127.0.0.1:{a.port}"))

        async def ask() -> bytes:
            return await guest.request(WORK, b"", timeout=None)

        asking = loop.create_task(ask())
        guard = loop.call_later(5, loop.stop)
        with pytest.raises(error):
            loop.run_forever()
        guard.cancel()
        with pytest.raises(RemoteError, match=f"{error.__name__}: now"):
            loop.run_until_complete(asyncio.wait_for(asking, 5))
        loop.run_until_complete(guest.close())
    finally:
        loop.run_until_complete(a.close())
        loop.close()


@pytest.mark.parametrize("how", ["of the channel", "of the node"])
async def test_url_hash_wants_a_key_where_one_can_be_given(registry_url: str, how: str) -> None:
    """What has no place for a key goes by the address of the node that sends it."""
    heard: list[tuple[bytes, int]] = []

    def serve(node: Node) -> None:
        def hear(ctx: Context) -> None:
            heard.append((ctx.data, node.id))
            if ctx.is_request:
                ctx.reply(ctx.data)

        node.subscribe(WORK, hear)

    def pass_on(ctx: Context) -> None:
        ctx.next(ctx.data)

    policy = "url_hash" if how == "of the node" else "round_robin"
    async with (
        nodes(registry_url, "b", "c", "d") as others,
        Node("a", registry=registry_url, balance=policy) as a,
    ):
        for node in others:
            serve(node)
        a.balance(WORK, "url_hash" if how == "of the channel" else None)
        a.subscribe(WORK + 1, pass_on)
        await a.wait_subscribed(WORK, 3, timeout=5)
        by_address = a.choose(WORK, policy="ip_hash")
        by_key = a.choose(WORK, key="user-7")

        def send(verbs: Any) -> None:
            for refused in (
                lambda: verbs.notify(WORK, b""),
                lambda: verbs.call(WORK, b"", WORK + 2),
                lambda: verbs.request(WORK, b""),
            ):
                with pytest.raises(ValueError, match="goes by a key: give key="):
                    refused()
            verbs.notify(WORK, b"keyed", key="user-7")
            verbs.call(WORK, b"keyed", WORK + 2, key="user-7")
            verbs.notify_many(WORK, [b"many"] * 2)
            verbs.call_many(WORK, [b"many"] * 2, WORK + 2)
            verbs.ventilator([WORK], b"ventilator")

        async def check(expected: Counter[tuple[bytes, int]]) -> None:
            await until(lambda: len(heard) >= expected.total())
            assert Counter(heard) == expected
            heard.clear()

        sent = Counter(
            {(b"keyed", by_key): 2, (b"many", by_address): 4, (b"ventilator", by_address): 1}
        )
        with pytest.raises(ValueError, match="goes by a key"):
            a.choose(WORK)
        send(a)
        if how == "of the channel":
            a.ventilator([WORK + 1, WORK], b"next")
        else:
            others[0].ventilator([WORK + 1, WORK], b"next")
        await check(sent + Counter({(b"next", by_address): 1}))
        assert await a.request(WORK, b"asked", key="user-7") == b"asked"
        await check(Counter({(b"asked", by_key): 1}))

        async with Serial(a, thread=True) as serial:
            serial.subscribe(WORK + 3, pass_on)
            await within(serial, lambda: send(serial))
            others[0].ventilator([WORK + 3, WORK], b"next")
            await check(sent + Counter({(b"next", by_address): 1}))

        async with await connect(f"tcp://127.0.0.1:{a.port}") as guest:
            guest.notify(WORK, b"guest")
            guest.call(WORK, b"guest", WORK + 2)
            guest.notify_many(WORK, [b"guest"])
            guest.ventilator([WORK], b"guest")
            assert await guest.request(WORK, b"guest") == b"guest"
            await check(Counter({(b"guest", by_address): 5}))


async def test_what_is_no_policy(registry_url: str) -> None:
    with pytest.raises(ValueError, match="policy 'fastest': round_robin, weighted_round_robin"):
        Node("a", registry=registry_url, balance="fastest")
    async with nodes(registry_url, "a", "b") as (a, b):
        name_on(b)
        await a.wait_subscribed(WORK, timeout=5)
        with pytest.raises(TypeError, match="has no method choose"):
            a.balance(WORK, 7)
        with pytest.raises(TypeError, match="is a class"):
            a.balance(WORK, Random)
        with pytest.raises(ValueError, match="users have 50-65499"):
            a.balance(7, "random")
        with pytest.raises(ValueError, match="give one of them"):
            a.notify(WORK, b"", to=b.id, key="x")
        with pytest.raises(NoSubscriber):
            a.notify(WORK + 1, b"", key="x")
        async with await connect(f"tcp://127.0.0.1:{b.port}") as guest:
            with pytest.raises(DomiError, match="a guest's node chooses"):
                guest.notify(WORK, b"", key="x")


async def test_key_and_policy_from_a_serial_thread(registry_url: str) -> None:
    async with nodes(registry_url, "a", "b", "c") as (a, b, c):
        for node in (b, c):
            name_on(node)
        await a.wait_subscribed(WORK, 2, timeout=5)
        found: list[int] = []
        async with Serial(a, thread=True) as serial:

            def ask() -> None:
                for _ in range(5):
                    done = serial.request(WORK, b"", key="user-7")
                    done.add_done_callback(lambda done: found.append(int(done.result())))

            serial.call_later(0, ask)
            await until(lambda: len(found) == 5)
        assert set(found) == {a.choose(WORK, key="user-7")}


# ------------------------------------------------------------------------------------------ memory


def files(folder: Path, contents: dict[str, str]) -> str:
    for name, text in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)


MEMINFO = {"meminfo": "MemTotal: 1000 kB\nMemFree: 100 kB\nMemAvailable: 750 kB\n"}


def test_memory_of_the_machine(tmp_path: Path) -> None:
    proc = files(tmp_path / "proc", MEMINFO)
    assert used_share(proc, str(tmp_path / "none")) == pytest.approx(0.25)
    assert 0.0 < used_share() <= 1.0
    with pytest.raises(OSError, match="meminfo"):
        used_share(files(tmp_path / "odd", {"meminfo": "MemTotal: 1000 kB\n"}), str(tmp_path))


def test_memory_of_a_cgroup_of_version_2(tmp_path: Path) -> None:
    """A limit of a parent binds, and what can be had back at once is not used."""
    proc = files(tmp_path / "proc", {**MEMINFO, "self/cgroup": "0::/a/b\n"})
    cgroups = files(
        tmp_path / "cgroup",
        {
            "a/memory.current": "900",
            "a/memory.max": "1000",
            "a/memory.stat": "anon 500\ninactive_file 300\n",
            "a/b/memory.current": "100",
            "a/b/memory.max": "max",
            "a/b/memory.stat": "inactive_file 0\n",
        },
    )
    assert used_share(proc, cgroups) == pytest.approx(0.6)
    files(tmp_path / "cgroup", {"a/b/memory.max": "125"})
    assert used_share(proc, cgroups) == pytest.approx(0.8)


def test_memory_of_a_cgroup_of_version_1(tmp_path: Path) -> None:
    text = "3:cpu,cpuacct:/x\n2:memory:/not/seen/from/here\n1:name=systemd:/x\n"
    proc = files(tmp_path / "proc", {**MEMINFO, "self/cgroup": text})
    cgroups = files(
        tmp_path / "cgroup",
        {
            "memory/memory.usage_in_bytes": "800",
            "memory/memory.limit_in_bytes": "1000",
            "memory/memory.stat": "total_inactive_file 100\n",
        },
    )
    assert used_share(proc, cgroups) == pytest.approx(0.7)
    files(tmp_path / "cgroup", {"memory/memory.limit_in_bytes": str((1 << 63) - 4096)})
    assert used_share(proc, cgroups) == pytest.approx(0.25)
