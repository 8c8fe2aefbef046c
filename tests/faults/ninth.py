"""One of nine processes, each with a node that asks and notifies the others while they are killed.

A node is named by its incarnation: a number that no other process of the test has. Its commands
are those of ``tests.cluster.worker``; it is started by ``tests.support.Worker``.
"""

from __future__ import annotations

import asyncio
import gc
import mmap
import random
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from domi_fast import Context, DomiError, Frame, Node, Peer, PeerLost
from domi_fast.events import Events
from domi_fast.metrics import rss
from tests.cluster.worker import run, until

AT_ONCE, LATER, NUMBERED = 50, 51, 52
# The sender's incarnation, the receiver's (0: whose turn it is), and the message's number.
HEAD = struct.Struct("<IIQ")
ANSWERER = struct.Struct("<I")
ASKERS = 4
# Of requests: so long that none is reached unless an answer was lost without a word.
TIMEOUT = 30.0
# Seconds that a task waits between two of its rounds, at most.
PAUSE = 0.02
# Bytes beyond the head, and how often: some frames are cut by the death of their sender.
SIZES, SHARES = (0, 200, 20_000, 300_000), (600, 380, 18, 2)
# More incarnations than there are in a test.
MOST = 256


class Journal:
    """What a process has notified and got, by the other's incarnation; it survives its process.

    :ivar sent: the number of the last notify to each, noted before it is sent.
    :ivar received: how many notifies of each have come.
    :ivar last: the number of the last of them.
    :ivar faults: at 0, how many came twice, or after a later one.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(8 * 4 * MOST))
        with path.open("r+b") as file:
            numbers = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
        parts = (numbers[place * MOST : (place + 1) * MOST] for place in range(4))
        self.sent, self.received, self.last, self.faults = parts


class Ninth:
    """The commands. Each is a coroutine method named as the command."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.wrong: Counter[str] = Counter()
        self.asked = 0
        self.open: set[int] = set()
        self.outcomes: Counter[str] = Counter()
        # All of these by the other's incarnation.
        self.lost_by: Counter[str] = Counter()
        self.unanswered: Counter[str] = Counter()
        self.told: Counter[str] = Counter()
        self.joined: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        self.refused: Counter[str] = Counter()
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self, incarnation: int, seed: int, journal: str, **settings: Any) -> None:
        """Join, and begin with the load."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.problems.append(str(context)))
        self.chance = random.Random(seed)
        self.incarnation = incarnation
        self.journal = Journal(Path(journal))
        self.node = node = Node(str(incarnation), on_error=self.on_error, **settings)
        node.subscribe(AT_ONCE, self.answer)
        node.subscribe(LATER, self.answer_later)
        node.subscribe(NUMBERED, self.numbered)
        self.watching = asyncio.ensure_future(self.watch(node.events()))
        await node.start()
        self.first_id = node.id
        await self.go_on()

    async def go_on(self) -> None:
        self.stop = asyncio.Event()
        parts = [self.ask_on() for _ in range(ASKERS)] + [self.notify_on()]
        self.tasks = [asyncio.ensure_future(part) for part in parts]

    async def wait_others(self, names: list[str], timeout: float) -> None:
        """Wait until the peers are exactly these."""
        await until(lambda: {p.name for p in self.node.peers.values()} == set(names), timeout)

    async def wait_answers(self, count: int, timeout: float) -> None:
        wanted = self.outcomes["answer"] + count
        await until(lambda: self.outcomes["answer"] >= wanted, timeout)

    async def quiet(self) -> None:
        """End the load; all requests have ended then, and all notifies have been handled."""
        self.stop.set()
        await asyncio.gather(*self.tasks)
        # It comes after the notifies of its channel, and is answered after them.
        flushes = [self.node.request(NUMBERED, b"", TIMEOUT, to=id) for id in self.node.peers]
        await asyncio.gather(*flushes)
        # The dead are dialled until their leases are over.
        await until(lambda: not self.node._mesh._dialling.wanted, TIMEOUT)

    async def report(self) -> dict[str, Any]:
        gc.collect()
        counters = self.node.counters()
        return {
            "wrong": +self.wrong,
            "problems": self.problems,
            "asked": self.asked,
            "outcomes": +self.outcomes,
            "open": len(self.open),
            "in_flight": counters["in_flight"],
            "late_answers": counters.get("late_answers", 0),
            "handler_errors": counters.get("handler_errors", 0),
            "lost_by": self.lost_by,
            "unanswered": self.unanswered,
            "told": self.told,
            "refused": self.refused,
            "joined": self.joined,
            "left": self.left,
            "reasons": self.reasons,
            "moved": self.node.id != self.first_id,
            "memory": rss(),
        }

    # ------------------------------------------------------------------------------------- serving

    def answer(self, ctx: Context) -> None:
        asker, receiver, _ = HEAD.unpack_from(ctx.data)
        self.wrong["request of another"] += receiver not in {0, self.incarnation}
        try:
            ctx.reply(ctx.data[: HEAD.size] + ANSWERER.pack(self.incarnation))
        except PeerLost:
            self.unanswered[str(asker)] += 1

    async def answer_later(self, ctx: Context) -> None:
        await asyncio.sleep(self.chance.uniform(0.0, PAUSE))
        self.answer(ctx)

    def numbered(self, ctx: Context) -> None:
        if ctx.is_request:
            ctx.reply(b"")
            return
        sender, receiver, number = HEAD.unpack_from(ctx.data)
        self.wrong["notify of another"] += receiver != self.incarnation
        self.journal.faults[0] += number <= self.journal.last[sender]
        self.journal.last[sender] = number
        self.journal.received[sender] += 1

    # ----------------------------------------------------------------------------------- the load

    def message(self, receiver: int, number: int) -> bytes:
        [size] = self.chance.choices(SIZES, SHARES)
        return HEAD.pack(self.incarnation, receiver, number) + bytes(size)

    async def notify_on(self) -> None:
        while not self.stop.is_set():
            for peer in list(self.node.peers.values()):
                for _ in range(self.chance.randrange(4)):
                    self.notify(peer.id, int(peer.name))
            await asyncio.sleep(self.chance.uniform(0.0, PAUSE))

    def notify(self, machine: int, receiver: int) -> None:
        number = self.journal.sent[receiver] + 1
        self.journal.sent[receiver] = number
        try:
            self.node.notify(NUMBERED, self.message(receiver, number), to=machine)
        except DomiError as error:
            self.journal.sent[receiver] = number - 1
            self.refused[type(error).__name__] += 1

    def on_error(self, error: DomiError, frame: Frame) -> None:
        self.refused[type(error).__name__] += 1
        self.told[str(HEAD.unpack_from(frame.data)[1])] += 1

    async def ask_on(self) -> None:
        while not self.stop.is_set():
            await self.ask(self.chance.choice([None, *self.node.peers.values()]))
            await asyncio.sleep(self.chance.uniform(0.0, PAUSE))

    async def ask(self, peer: Peer | None) -> None:
        """One request, of this peer or of whose turn it is."""
        self.asked += 1
        number = self.asked
        receiver, machine = (0, None) if peer is None else (int(peer.name), peer.id)
        channel = self.chance.choice([AT_ONCE, LATER])
        data = self.message(receiver, number)

        def ended(done: Any) -> None:
            if number not in self.open:
                self.wrong["ended twice"] += 1
                return
            self.open.remove(number)
            error = done.exception()
            if error is not None:
                self.outcomes[type(error).__name__] += 1
                self.lost_by[str(receiver)] += 1
                return
            answer = done.result()
            (answerer,) = ANSWERER.unpack_from(answer, HEAD.size)
            whole = len(answer) == HEAD.size + ANSWERER.size
            mine = whole and answer[: HEAD.size] == data[: HEAD.size]
            right = mine and receiver in {0, answerer}
            self.outcomes["answer" if right else "answer of another"] += 1

        try:
            request = self.node.request(channel, data, TIMEOUT, to=machine)
        except DomiError as error:
            self.outcomes[type(error).__name__] += 1
            return
        self.open.add(number)
        request.add_done_callback(ended)
        await asyncio.wait([request])

    async def watch(self, events: Events) -> None:
        async for event in events:
            self.wrong["events missed"] += event.missed
            if event.kind == "joined":
                self.joined[event.name] += 1
            elif event.kind == "left":
                self.left[event.name] += 1
                self.reasons[event.name] = event.reason


if __name__ == "__main__":
    run(Ninth)
