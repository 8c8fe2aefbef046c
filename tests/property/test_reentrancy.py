"""Whatever a callback does, wherever it is called from: verbs from within what the verbs call."""

from __future__ import annotations

import asyncio
import collections
import gc
import os
import random
import struct
from collections.abc import Callable
from typing import Any

import pytest

from domi_fast import Client, Context, DomiError, Frame, Node, connect
from tests.strangers import extended
from tests.support import nodes, session

CHANNELS = range(60, 66)
REPLIES = 70
DEAF = (700, 701)
POLICIES = ("raise", "drop_oldest", "drop_newest", "disconnect", None)
SUBSCRIBE_WITH: list[dict[str, Any]] = [{}, {}, {"batch": True}]
STEPS = 3_000
SEEDS = 100 if os.environ.get("DOMI_SOAK") == "1" else 2
DEPTH = 12


class Chaos:
    """Does anything at random, from anywhere, until its steps are used up.

    Each message carries the number of who sent it and its place among all of that sender's, so that
    who receives can tell whether a channel has kept its order.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.left = STEPS
        self.depth = 0
        self.places = collections.Counter[int]()
        self.latest: dict[tuple[int, int, int], int] = {}
        self.speakers: list[Node | Client] = []
        self.subscribed: set[tuple[int, int]] = set()
        self.requests: set[asyncio.Future[bytes]] = set()
        self.kept: list[Context] = []
        self.did = collections.Counter[str]()
        self.wrong: list[str] = []

    def data(self, speaker: int) -> bytes:
        self.places[speaker] += 1
        size = self.random.choice((0, 0, 0, 100, 3000, 30_000))
        return struct.pack("<HI", speaker, self.places[speaker]) + bytes(size)

    def act(self) -> None:
        """One step; not too deep, since a verb may call what acts again."""
        if self.left <= 0 or self.depth >= DEPTH:
            return
        self.left -= 1
        self.depth += 1
        number = self.random.randrange(len(self.speakers))
        work = self.random.choices(self.WORK, self.WEIGHTS)[0]
        try:
            work(self, self.speakers[number], number)
            self.did[work.__name__] += 1
        except DomiError as error:
            self.did[f"{work.__name__} {type(error).__name__}"] += 1
        except Exception as error:
            self.wrong.append(f"{work.__name__}: {error!r}")
        finally:
            self.depth -= 1

    # -------------------------------------------------------------------------------- what it does

    def target(self, speaker: Node | Client) -> dict[str, int]:
        if self.random.random() < 0.6:
            return {}
        others = [each.id for each in self.speakers if isinstance(each, Node)]
        return {"to": self.random.choice([*others, *DEAF])}

    def notify(self, speaker: Node | Client, number: int) -> None:
        speaker.notify(self.random.choice(CHANNELS), self.data(number), **self.target(speaker))

    def publish(self, speaker: Node | Client, number: int) -> None:
        speaker.publish(self.random.choice(CHANNELS), self.data(number))

    def publish_many(self, speaker: Node | Client, number: int) -> None:
        speaker.publish_many(self.random.choice(CHANNELS), (self.data(number) for _ in range(5)))

    def notify_many(self, speaker: Node | Client, number: int) -> None:
        speaker.notify_many(
            self.random.choice(CHANNELS),
            (self.data(number) for _ in range(5)),
            **self.target(speaker),
        )

    def call(self, speaker: Node | Client, number: int) -> None:
        speaker.call(self.random.choice(CHANNELS), self.data(number), REPLIES)

    def request(self, speaker: Node | Client, number: int) -> None:
        request = speaker.request(
            self.random.choice(CHANNELS), self.data(number), 2.0, **self.target(speaker)
        )
        self.requests.add(request)
        request.add_done_callback(self.settled)

    def cancel(self, speaker: Node | Client, number: int) -> None:
        for request in [*self.requests][:1]:
            request.cancel()

    def pipeline(self, speaker: Node | Client, number: int) -> None:
        speaker.ventilator(self.random.sample(CHANNELS, 3), self.data(number))

    def answer(self, speaker: Node | Client, number: int) -> None:
        if self.kept:
            context = self.kept.pop(self.random.randrange(len(self.kept)))
            if self.random.random() < 0.5:
                context.reply(b"answer")
            else:
                context.error("answer")

    def change(self, speaker: Node | Client, number: int) -> None:
        channel = self.random.choice(CHANNELS)
        if (number, channel) in self.subscribed:
            self.subscribed.remove((number, channel))
            speaker.unsubscribe(channel)
        else:
            self.subscribed.add((number, channel))
            speaker.subscribe(channel, self.handler(number), **self.random.choice(SUBSCRIBE_WITH))

    def set_policy(self, speaker: Node | Client, number: int) -> None:
        if isinstance(speaker, Node):
            for_whom: dict[str, int] = self.random.choice(
                [{"channel": self.random.choice(CHANNELS)}, {"peer": self.random.choice(DEAF)}]
            )
            speaker.when_full(self.random.choice(POLICIES), **for_whom)

    def end_session(self, speaker: Node | Client, number: int) -> None:
        if isinstance(speaker, Node) and speaker.peers:
            session(speaker, self.random.choice([*speaker.peers])).close("chaos")

    def collect(self, speaker: Node | Client, number: int) -> None:
        gc.collect(0)

    WORK: tuple[Callable[[Chaos, Any, int], None], ...] = (
        *(notify, publish, publish_many, notify_many, call, request, cancel, pipeline),
        *(answer, change, set_policy, end_session, collect),
    )
    WEIGHTS = (10, 14, 5, 5, 5, 8, 2, 4, 4, 5, 4, 0.4, 1)

    # -------------------------------------------------------------------------------- what calls it

    def handler(self, receiver: int) -> Callable[[Any], None]:
        def one(ctx: Context) -> None:
            self.see(receiver, ctx)
            if self.random.random() < 0.3:
                self.kept.append(ctx)
            if self.random.random() < 0.7:
                self.act()

        def any_number(given: Any) -> None:
            for ctx in given if isinstance(given, list) else [given]:
                one(ctx)

        return any_number

    def see(self, receiver: int, ctx: Context) -> None:
        """What one sent to one on a channel comes in its order, and once, over one session."""
        speaker, place = struct.unpack_from("<HI", ctx.data)
        of = (receiver, speaker, ctx.channel)
        if place <= self.latest.get(of, 0):
            self.wrong.append(f"{place} after {self.latest[of]} to {of}")
        self.latest[of] = place

    def settled(self, request: asyncio.Future[bytes]) -> None:
        self.requests.discard(request)
        if not request.cancelled():
            request.exception()
        self.act()

    def told(self, error: DomiError, frame: Frame) -> None:
        self.did[f"told {type(error).__name__}"] += 1
        self.act()
        self.act()


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("lanes", [1, 3])
async def test_verbs_from_within(registry_url: str, seed: int, lanes: int) -> None:
    chaos = Chaos(seed)
    async with (
        nodes(
            registry_url,
            *("a", "b", "c"),
            queue_limit=65_536,
            sessions_per_peer=lanes,
            on_error=chaos.told,
        ) as made,
        extended(made[0], registry_url, DEAF[0], tuple(CHANNELS)),
        extended(made[0], registry_url, DEAF[1], tuple(CHANNELS)),
        await connect(f"tcp://127.0.0.1:{made[1].port}", on_error=chaos.told) as guest,
    ):
        chaos.speakers = [*made, guest]
        while chaos.left > 0:
            for _ in range(chaos.random.randrange(1, 40)):
                chaos.act()
            await asyncio.sleep(0)
        for request in [*chaos.requests]:
            await asyncio.wait([request])
        chaos.kept.clear()
    assert not chaos.wrong
    assert not chaos.requests
    for what in ("publish", "answer", "end_session", "told Overloaded", "told PeerLost"):
        assert chaos.did[what], what
