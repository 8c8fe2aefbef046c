"""The client of the demonstration: uses every verb, and checks every answer.

Started by examples/demo/main.py, to which it writes what it does, a JSON object a line:
python examples/demo/main.py
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import uvloop

from domi_fast import (
    Client,
    Context,
    DeadlineExceeded,
    DomiError,
    Frame,
    Node,
    NoSubscriber,
    Overloaded,
    PeerLost,
    RemoteError,
    connect,
)
from examples.demo.common import END, SERVERS, Channel, Payloads, number_of, to_json

IN_FLIGHT = 256
PATIENCE = 30.0  # seconds that a step may stand still
BULK_FRAME = 64 * 1024
QUEUE_LIMIT = 1024 * 1024


E = TypeVar("E", bound=DomiError)


class WrongAnswerError(Exception):
    """Something is not as it must be; the text says what."""


def check(condition: object, text: str) -> None:
    if not condition:
        raise WrongAnswerError(text)


@contextmanager
def expected(kind: type[E]) -> Iterator[list[E]]:
    """The block must raise this; it is in the list then."""
    raised: list[E] = []
    try:
        yield raised
    except kind as error:
        raised.append(error)
    check(raised, f"no {kind.__name__} was raised")


@dataclass
class Row:
    """What one step did: a line of the table."""

    verb: str
    what: str
    messages: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    def line(self) -> dict[str, Any]:
        line = asdict(self)
        found = sorted(line.pop("latencies"))
        for name, share in (("p50", 0.50), ("p99", 0.99)):
            line[name] = found[int(share * (len(found) - 1))] if found else None
        return line


class Reporter:
    """Tells the program that started this one how far things are."""

    def __init__(self) -> None:
        self._next = 0.0

    def tell(self, event: str, **facts: Any) -> None:
        print(json.dumps({"event": event, **facts}), flush=True)

    def done(self, messages: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + 0.05
            self.tell("progress", done=messages)


class Flight:
    """How many messages are on their way, no more than so many; ends with the first failure."""

    def __init__(self, reporter: Reporter, size: int = IN_FLIGHT) -> None:
        self.size = size
        self.sent = 0
        self.landed = 0
        self.waiter: asyncio.Future[None] | None = None
        self.enough = 0
        self.failure: Exception | None = None
        self.reporter = reporter

    def land(self) -> None:
        self.landed += 1
        if self.landed % 4096 == 0:
            self.reporter.done(self.landed)
        if self.waiter is not None and self.landed >= self.enough and not self.waiter.done():
            self.waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        self.failure = self.failure or error
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    @property
    def full(self) -> bool:
        return self.sent - self.landed >= self.size or self.failure is not None

    async def room(self) -> None:
        await self._until(self.sent - self.size // 2)

    async def all_landed(self) -> None:
        await self._until(self.sent)

    async def _until(self, landed: int) -> None:
        if self.landed < landed and self.failure is None:
            self.enough = landed
            self.waiter = asyncio.get_running_loop().create_future()
            try:
                await asyncio.wait_for(self.waiter, PATIENCE)
            except asyncio.TimeoutError:
                raise WrongAnswerError(
                    f"{self.sent - self.landed} of {self.sent} answers did not come"
                ) from None
            finally:
                self.waiter = None
        if self.failure is not None:
            raise self.failure


class Demonstration:
    """The steps, in the order of ``steps``."""

    def __init__(self, node: Node, messages: int, seed: int) -> None:
        self.node = node
        self.messages = messages
        self.payloads = Payloads(seed)
        self.reporter = Reporter()
        self.servers: dict[int, dict[str, Any]] = {}
        self.reports: asyncio.Queue[bytes] = asyncio.Queue()
        self.refused: asyncio.Queue[tuple[DomiError, Frame]] = asyncio.Queue()
        node.on_error = lambda error, frame: self.refused.put_nowait((error, frame))
        node.subscribe(Channel.REPORT, lambda ctx: self.reports.put_nowait(ctx.data))

    def steps(self) -> list[tuple[str, int, Callable[[], Coroutine[Any, Any, list[Row]]]]]:
        """Name, messages and function of each."""
        n = self.messages
        return [
            ("to=", SERVERS, self.to),
            ("notify", n, self.notify),
            ("publish", n // 4 + 1, self.publish),
            ("call", n, self.call),
            ("request", n // 10 + 1, self.request_alone),
            ("request", n, self.request_together),
            ("reply", n // 10 + 1, self.reply),
            ("ventilator", n // 4 + 1, self.ventilator),
            ("watch_channel", n // 4 + 1, self.watch_channel),
            ("error", 0, self.error),
            ("deadlines", 0, self.deadlines),
            ("drained", n // 500 + 1, self.drained),
            ("unsubscribe", 0, self.unsubscribe),
            ("guest over TCP", n // 10 + 1, self.guest_over_tcp),
            ("guest over UNIX", n // 10 + 1, self.guest_over_unix),
            ("kill -9", n // 2 + 1, self.kill),
        ]

    async def run(self) -> None:
        self.reporter.tell("connecting")
        await self.node.wait_subscribed(Channel.ECHO, SERVERS, PATIENCE)
        before = self.node.counters()
        steps = self.steps()
        self.reporter.tell("steps", total=sum(messages for _, messages, _ in steps))
        for name, messages, step in steps:
            self.reporter.tell("step", name=name, messages=messages)
            try:
                rows = await step()
            except (DomiError, asyncio.TimeoutError, ValueError) as error:
                raise WrongAnswerError(f"{name}: {type(error).__name__}: {error}") from error
            except WrongAnswerError as error:
                raise WrongAnswerError(f"{name}: {error}") from error
            self.reporter.tell("rows", rows=[row.line() for row in rows])
        check(self.refused.empty(), f"on_error heard of {self.refused.qsize()} losses too many")
        for counter in ("handler_errors", "protocol_errors", "call_errors"):
            counted = self.node.counters().get(counter, 0) - before.get(counter, 0)
            check(not counted, f"the client has counted {counted} {counter}")

    # ------------------------------------------------------------------------------------ the verbs

    async def to(self) -> list[Row]:
        """A request to each server by its machine id; what they say is needed later on."""
        row = Row("to=", "a request to a given server")
        began = time.perf_counter()
        for server in self.node.subscribers(Channel.INFO):
            sent = time.perf_counter()
            answer = await self.node.request(Channel.INFO, b"", to=server)
            row.latencies.append(time.perf_counter() - sent)
            facts = self.servers[server] = json.loads(answer)
            check(facts["name"] == self.node.peers[server].name, f"node {server} has another name")
        row.seconds = time.perf_counter() - began
        row.messages = len(self.servers)
        check(len(self.servers) == SERVERS, f"{len(self.servers)} servers instead of {SERVERS}")
        self.reporter.tell(
            "servers",
            servers=[
                {"id": machine, "address": self.node.peers[machine].address, **facts}
                for machine, facts in self.servers.items()
            ],
        )
        return [row]

    async def notify(self) -> list[Row]:
        """Every message reaches one server, in order."""
        total, node = self.messages, self.node
        began = time.perf_counter()
        for number in range(total):
            while True:
                try:
                    node.notify(Channel.NOTIFIED, self.payloads[number])
                    break
                except Overloaded as error:  # not lost: it was refused, and is sent again
                    await self.drain(error)
            if number % 4096 == 0:
                self.reporter.done(number)
                await asyncio.sleep(0)
        for server in self.servers:
            await node.drained(server)
            node.notify(Channel.NOTIFIED, END, to=server)
        tallies = await self.tallies(SERVERS)
        seconds = time.perf_counter() - began
        self.check_tallies(tallies, total, sum(range(total)))
        return [Row("notify", "to one server each, in turn", total, seconds)]

    async def publish(self) -> list[Row]:
        """Every message reaches every server, in order."""
        total, node = self.messages // 4 + 1, self.node
        began = time.perf_counter()
        for number in range(total):
            if number % 256 == 0:
                self.reporter.done(number)
                for server in self.servers:
                    await node.drained(server)
                await asyncio.sleep(0)
            sent = node.publish(Channel.PUBLISHED, self.payloads[number])
            check(sent == SERVERS, f"a message was sent to {sent} servers")
        node.publish(Channel.PUBLISHED, END)
        tallies = await self.tallies(SERVERS)
        seconds = time.perf_counter() - began
        for tally in tallies:
            self.check_tallies([tally], total, sum(range(total)))
        return [Row("publish", f"to all {SERVERS} servers", total * SERVERS, seconds)]

    async def call(self) -> list[Row]:
        """Every call gets its reply on the reply channel, once."""
        return [await self.calls(self.node, Channel.ECHO, Channel.REPLY, self.messages)]

    async def calls(self, node: Node | Client, channel: int, replies: int, total: int) -> Row:
        flight = Flight(self.reporter)
        answered = bytearray(total)
        sent_at = [0.0] * total
        latencies = []

        def reply(ctx: Context) -> None:
            now = time.perf_counter()
            try:
                number = number_of(ctx.data[:1:-1])
                self.check_answer(ctx.data, number)
                check(number < total, f"reply {number} was never asked for")
                check(not answered[number], f"reply {number} came twice")
            except WrongAnswerError as error:
                flight.fail(error)
                return
            answered[number] = 1
            latencies.append(now - sent_at[number])
            flight.land()

        node.subscribe(replies, reply)
        began = time.perf_counter()
        try:
            for number in range(total):
                if flight.full:
                    await flight.room()
                sent_at[number] = time.perf_counter()
                node.call(channel, self.payloads[number], replies)
                flight.sent += 1
            await flight.all_landed()
        finally:
            node.unsubscribe(replies)
        what = f"replies on a channel, {IN_FLIGHT} in flight"
        return Row("call", what, total, time.perf_counter() - began, latencies)

    async def request_alone(self) -> list[Row]:
        row = await self.requests(self.node, Channel.ECHO, self.messages // 10 + 1, 1)
        return [row]

    async def request_together(self) -> list[Row]:
        row = await self.requests(self.node, Channel.ECHO, self.messages, IN_FLIGHT)
        return [row]

    async def requests(self, node: Node | Client, channel: int, total: int, at_once: int) -> Row:
        """Every request is answered rightly."""
        latencies = []
        numbers = iter(range(total))

        async def worker() -> None:
            for number in numbers:
                sent = time.perf_counter()
                answer = await node.request(channel, self.payloads[number])
                latencies.append(time.perf_counter() - sent)
                self.check_answer(answer, number)
                if number % 4096 == 0:
                    self.reporter.done(number)

        began = time.perf_counter()
        await together(worker() for _ in range(at_once))
        seconds = time.perf_counter() - began
        check(len(latencies) == total, f"{len(latencies)} answers to {total} requests")
        what = "one after the other" if at_once == 1 else f"{at_once} in flight"
        return Row("request", what, total, seconds, latencies)

    async def reply(self) -> list[Row]:
        """Replies from tasks and from threads, and the second reply that is refused."""
        later = await self.requests(
            self.node, Channel.ECHO_LATER, self.messages // 10 + 1, IN_FLIGHT
        )
        threads = await self.requests(self.node, Channel.ECHO_THREAD, min(100, self.messages), 8)
        answer = await self.node.request(Channel.TWICE, b"")
        check(answer == b"once", f"answered {answer!r}")
        said = await self.report()
        check(said == b"AlreadyReplied", f"a second reply raised {said!r}")
        return [
            Row("reply", "by async handlers", later.messages, later.seconds, later.latencies),
            Row("", "from other threads", threads.messages, threads.seconds, threads.latencies),
        ]

    async def ventilator(self) -> list[Row]:
        """Three stages on three servers, and back to here."""
        total = self.messages // 4 + 1
        row = await self.pipeline(self.node, Channel.RESULT, total)
        row.what = f"{SERVERS} stages with next, and back here"
        return [row]

    async def pipeline(self, node: Node | Client, sink: int, total: int) -> Row:
        stages = [Channel.STAGE_1, Channel.STAGE_2, Channel.STAGE_3]
        flight = Flight(self.reporter)
        latencies = []
        arrived = bytearray(total)
        sent_at = [0.0] * total

        def result(ctx: Context) -> None:
            now = time.perf_counter()
            number = number_of(ctx.data)
            if number >= total or arrived[number]:
                flight.fail(WrongAnswerError(f"result {number} came twice"))
            elif ctx.data != self.payloads[number] + b"\1\2\3":
                flight.fail(WrongAnswerError(f"result {number} is {ctx.data!r}"))
            else:
                arrived[number] = 1
                latencies.append(now - sent_at[number])
                flight.land()

        async with self.known_to_servers(node, sink, result):
            began = time.perf_counter()
            for number in range(total):
                if flight.full:
                    await flight.room()
                sent_at[number] = time.perf_counter()
                node.ventilator([*stages, sink], self.payloads[number])
                flight.sent += 1
            await flight.all_landed()
        return Row("ventilator", "", total, time.perf_counter() - began, latencies)

    async def watch_channel(self) -> list[Row]:
        """An iterator over what a server sends; leaving the block unsubscribes."""
        total = self.messages // 4 + 1
        noise = Payloads(0)
        began = time.perf_counter()
        async with self.node.watch_channel(Channel.FEED, maxsize=total) as messages:
            check(self.watches(Channel.FEED), "the watched channel is not subscribed")
            self.node.notify(Channel.STREAM, json.dumps(total).encode())
            for number in range(total):
                ctx = await messages.__anext__()
                check(ctx.data == noise[number], f"message {number} is not the one expected")
                if number % 4096 == 0:
                    self.reporter.done(number)
        seconds = time.perf_counter() - began
        check(not self.watches(Channel.FEED), "the watched channel is still subscribed")
        return [Row("watch_channel", "an iterator over a server's messages", total, seconds)]

    def watches(self, channel: int) -> bool:
        return self.node.id in self.node.subscribers(channel)

    async def error(self) -> list[Row]:
        """Handlers that answer with an error, that raise, and that are not there."""
        began = time.perf_counter()
        for channel, kind, message in (
            (Channel.REFUSE, "Error", "not today"),
            (Channel.RAISE, "LookupError", "no such thing"),
        ):
            for server in self.servers:
                with expected(RemoteError) as errors:
                    await self.node.request(channel, b"no such thing", to=server)
                (error,) = errors
                check(error.type == kind and error.message == message, f"raised {error!r}")
                check(error.peer == server, f"node {error.peer} instead of {server} raised")
        seconds = time.perf_counter() - began
        row = Row("error", "RemoteError, by ctx.error and by raising", 2 * SERVERS, seconds)

        began = time.perf_counter()
        sends: list[Callable[[], object]] = [
            lambda: self.node.notify(Channel.NOBODY, b""),
            lambda: self.node.call(Channel.NOBODY, b"", Channel.REPLY),
            lambda: self.node.request(Channel.NOBODY, b""),
            lambda: self.node.ventilator([Channel.NOBODY], b""),
        ]
        for send in sends:
            with expected(NoSubscriber) as nobody:
                send()
            check(nobody[0].channel == Channel.NOBODY, f"raised {nobody[0]!r}")
        check(self.node.publish(Channel.NOBODY, b"") == 0, "somebody got what nobody wants")
        seconds = time.perf_counter() - began
        return [row, Row("", "NoSubscriber, raised at once", 5, seconds)]

    async def deadlines(self) -> list[Row]:
        """A request ends at its deadline, which the handler knows of."""
        left = json.loads(await self.node.request(Channel.DEADLINE, b"", timeout=2.0))
        check(left is not None and 0.0 < left <= 2.001, f"{left} s were left of 2 s")
        left = json.loads(await self.node.request(Channel.DEADLINE, b"", timeout=None))
        check(left is None, f"{left} s were left without a deadline")
        row = Row("deadlines", "20 requests with 50 ms for a slow handler")

        async def late() -> None:
            sent = time.perf_counter()
            with expected(DeadlineExceeded):
                await self.node.request(Channel.SLOW, b"", timeout=0.05)
            row.latencies.append(time.perf_counter() - sent)

        began = time.perf_counter()
        await together(late() for _ in range(20))
        row.seconds = time.perf_counter() - began
        row.messages = len(row.latencies)
        check(min(row.latencies) >= 0.049, f"{min(row.latencies):.4f} s are not 50 ms")
        return [row]

    async def drained(self) -> list[Row]:
        """A slow receiver costs a bounded queue; nothing is lost, nothing out of order."""
        server = next(iter(self.servers))
        filler = bytes(BULK_FRAME - 32)
        at_least = self.messages // 500 + 1
        refused = number = 0
        began = time.perf_counter()
        while number < at_least or not refused:
            check(number < 4096, "256 MiB for a slow receiver were never refused")
            data = self.payloads[number] + filler
            try:
                self.node.notify(Channel.BULK, data, to=server)
            except Overloaded as error:
                check(error.peer == server and error.limit == QUEUE_LIMIT, f"raised {error!r}")
                refused += 1
                await self.drain(error)
                continue
            number += 1
            self.reporter.done(number)
        await self.node.drained(server)
        self.node.notify(Channel.BULK, END, to=server)
        self.check_tallies(await self.tallies(1), number, sum(range(number)))
        seconds = time.perf_counter() - began
        return [Row("drained", f"64 KiB each, slow receiver, {refused} refused", number, seconds)]

    async def unsubscribe(self) -> list[Row]:
        """What comes after an unsubscribe is refused: on_error hears of it, with the frame."""
        server = next(iter(self.servers))
        began = time.perf_counter()
        # The server cannot have said that it left before the second message is on its way.
        self.node.notify(Channel.LEAVE, b"leave", to=server)
        self.node.notify(Channel.LEAVE, b"one too many", to=server)
        error, frame = await asyncio.wait_for(self.refused.get(), PATIENCE)
        check(isinstance(error, NoSubscriber) and error.peer == server, f"on_error got {error!r}")
        check(frame.data == b"one too many", f"on_error got {frame.data!r}")
        with expected(NoSubscriber):
            await self.node.request(Channel.LEAVE, b"", to=server)
        left = [self.servers[s]["name"] for s in self.node.subscribers(Channel.LEAVE)]
        check(len(left) == SERVERS - 1, f"the channel is still subscribed by {left}")
        return [Row("unsubscribe", "on_error heard of it", 3, time.perf_counter() - began)]

    # ----------------------------------------------------------------------------------- the guests

    async def guest_over_tcp(self) -> list[Row]:
        server, facts = next(iter(self.servers.items()))
        return await self.guest(f"tcp://127.0.0.1:{facts['port']}", server)

    async def guest_over_unix(self) -> list[Row]:
        for server, facts in self.servers.items():
            if facts["path"]:
                return await self.guest(f"unix://{facts['path']}", server)
        raise WrongAnswerError("no server listens on a UNIX socket")

    async def guest(self, url: str, server: int) -> list[Row]:
        """A guest has the same verbs, through the node that it is connected to."""
        total = self.messages // 10 + 1
        name = f"guest, {url[:4].removesuffix(':')}"
        lost: asyncio.Queue[tuple[DomiError, Frame]] = asyncio.Queue()
        async with await connect(
            url, name="guest", on_error=lambda error, frame: lost.put_nowait((error, frame))
        ) as guest:
            check(guest.node_id == server, f"the guest is at node {guest.node_id}")
            row = await self.requests(guest, Channel.ECHO, total, 64)
            row.verb, row.what = name, "request, 64 in flight"
            call = await self.calls(guest, Channel.ECHO, Channel.GUEST_REPLY, total)
            call.verb, call.what = "", "call, 256 in flight"
            pipe = await self.pipeline(guest, Channel.GUEST_RESULT, total // 10 + 1)
            pipe.verb, pipe.what = "", "ventilator"

            began = time.perf_counter()
            async with guest.watch_channel(Channel.NEWS) as news:
                await self.node.wait_subscribed(Channel.NEWS, 1, PATIENCE)
                check(self.node.publish(Channel.NEWS, b"to guests") == 1, "one node has the guest")
                ctx = await asyncio.wait_for(news.__anext__(), PATIENCE)
                check(ctx.data == b"to guests" and ctx.sender == self.node.id, "the wrong news")
            for target in self.servers:
                guest.notify(Channel.NOTIFIED, self.payloads[7], to=target)
            guest.publish(Channel.PUBLISHED, self.payloads[8])
            await guest.drained()
            for target in self.servers:
                # Asked of the server itself, behind what the guest's node has sent it.
                facts = json.loads(await guest.request(Channel.INFO, b"", to=target))
                check(facts == self.servers[target], f"node {target} is another one for a guest")
            guest.notify(Channel.NOBODY, b"a guest's")
            error, frame = await asyncio.wait_for(lost.get(), PATIENCE)
            check(isinstance(error, NoSubscriber), f"the guest's on_error got {error!r}")
            check(frame.data == b"a guest's", f"the guest's on_error got {frame.data!r}")
            messages = 3 + 2 * SERVERS
            other = Row("", "publish, notify, watch_channel, on_error", messages)
            other.seconds = time.perf_counter() - began
        check(lost.empty(), f"the guest has lost {lost.qsize()} messages")
        await self.settle_guest_messages()
        return [row, call, pipe, other]

    async def settle_guest_messages(self) -> None:
        # The servers have counted the guest's messages: one each way at every server.
        for channel, number in ((Channel.NOTIFIED, 7), (Channel.PUBLISHED, 8)):
            for server in self.servers:
                self.node.notify(channel, END, to=server)
            for tally in await self.tallies(SERVERS):
                self.check_tallies([tally], 1, number)

    # ------------------------------------------------------------------------------- the last act

    async def kill(self) -> list[Row]:
        """A server is killed under load: its requests end with PeerLost, the others answer on."""
        total = self.messages // 2 + 1
        victim, facts = list(self.servers.items())[-1]
        latencies, lost = [], 0
        numbers = itertools.count()
        gone = False
        after = dict.fromkeys(self.servers, 0)

        async def worker() -> None:
            nonlocal lost
            for number in numbers:
                if number >= total and gone:
                    return
                if number % 1024 == 0:
                    self.reporter.done(min(number, total))
                if number == total // 3:
                    self.reporter.tell("kill", pid=facts["pid"])
                sent = time.perf_counter()
                try:
                    answer = await self.node.request(Channel.ECHO, self.payloads[number])
                except PeerLost as error:
                    check(error.peer == victim, f"node {error.peer} was lost, too")
                    lost += 1
                    answer = await self.node.request(Channel.ECHO, self.payloads[number])
                latencies.append(time.perf_counter() - sent)
                self.check_answer(answer, number)
                if gone:
                    after[int.from_bytes(answer[:2], "little")] += 1

        async def watch() -> None:
            nonlocal gone
            await self.node.wait_peers(SERVERS - 1, PATIENCE)
            gone = True

        began = time.perf_counter()
        await together([watch(), *(worker() for _ in range(64))])
        seconds = time.perf_counter() - began
        check(victim not in self.node.peers, "the killed server is still a peer")
        check(after.pop(victim) == 0, "the killed server has answered")
        answers = await together(
            self.node.request(Channel.ECHO, self.payloads[number]) for number in range(64)
        )
        for number, answer in enumerate(answers):
            self.check_answer(answer, number)
        machines = {int.from_bytes(answer[:2], "little") for answer in answers}
        check(machines == set(after), f"nodes {sorted(machines)} answered afterwards")
        return [Row("kill -9", f"{lost} PeerLost, asked again", len(latencies), seconds, latencies)]

    # ----------------------------------------------------------------------------------- the checks

    def check_answer(self, answer: bytes, number: int) -> None:
        machine = int.from_bytes(answer[:2], "little")
        check(machine in self.servers, f"node {machine}, which is no server, has answered")
        if answer[2:] != self.payloads.answer(number):
            name = self.servers[machine]["name"]
            raise WrongAnswerError(f"{name} answered message {number} wrongly: {answer[2:]!r}")

    def check_tallies(self, tallies: list[dict[str, int]], count: int, total: int) -> None:
        found = sum(tally["count"] for tally in tallies)
        check(found == count, f"{found} of {count} messages arrived")
        check(sum(tally["sum"] for tally in tallies) == total, "other messages arrived")
        for fault in ("disordered", "damaged"):
            many = sum(tally[fault] for tally in tallies)
            check(many == 0, f"{many} messages arrived {fault}")

    async def report(self) -> bytes:
        return await asyncio.wait_for(self.reports.get(), PATIENCE)

    async def tallies(self, count: int) -> list[dict[str, int]]:
        return [json.loads(await self.report()) for _ in range(count)]

    async def drain(self, error: Overloaded) -> None:
        check(error.peer is not None, f"{error!r} names no peer")
        assert error.peer is not None
        await asyncio.wait_for(self.node.drained(error.peer), PATIENCE)

    @asynccontextmanager
    async def known_to_servers(
        self, node: Node | Client, channel: int, handler: Callable[[Context], object]
    ) -> AsyncIterator[None]:
        """Subscribe, and go on when every server knows it: their answers will find the way."""
        node.subscribe(channel, handler)
        try:
            # A pipeline's last stage sends to whom it knows of; the others have been told too, but
            # nothing says when they have heard. So ask them until they have.
            for server in self.servers:
                await self.until_known(server, channel)
            yield
        finally:
            node.unsubscribe(channel)

    async def until_known(self, server: int, channel: int) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            known = await self.node.request(Channel.INFO, to_json(channel=channel), to=server)
            if json.loads(known)["subscribed"]:
                return
        raise WrongAnswerError(f"node {server} has not heard of the subscription")


async def together(work: Any) -> list[Any]:
    """Like gather, but the first failure stops the rest."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def run(options: argparse.Namespace) -> None:
    # Its end of the pipe closes when the program that started this one has gone.
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), os._exit, 1)
    node = Node("client", registry=options.registry, queue_limit=QUEUE_LIMIT)
    demonstration = Demonstration(node, options.messages, options.seed)
    try:
        async with node:
            await demonstration.run()
            demonstration.reporter.tell("closing")
    except WrongAnswerError as error:
        demonstration.reporter.tell("failed", why=str(error))
        raise SystemExit(1) from None
    demonstration.reporter.tell("done")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--registry", required=True)
    parser.add_argument("--messages", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    uvloop.run(run(options))


if __name__ == "__main__":
    main()
