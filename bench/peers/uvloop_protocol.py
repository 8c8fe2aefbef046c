"""Plain asyncio Protocols on uvloop: an echo, sinks, and a publisher with its subscribers.

They have no messages: both ends know that all are of one size, and that answers keep their order.
What a turn of the loop asks, answers or publishes is written together, and no Protocol knows more
than its work takes; there may be faster ones still.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar, cast

from bench.figures import LEAST_FOR_P999
from bench.peers import loads, program
from bench.two_process.channels import PING_DATA
from bench.two_process.commands import check, percentiles, serve
from bench.two_process.memory import memory

FRAME = b"\x0c\0\0\0\0\0\x32\0ping"
SIZE = len(PING_DATA)
LARGE = 64 * 1024  # bytes from which on cutting a message out of what comes is its main cost
HIGH_WATER = 256 * 1024  # bytes that who sends one way has ahead of the kernel
A_TURN = 256  # messages that are published before the loop has its turn, as ours

__all__ = ["EchoClient", "EchoServer"]


class EchoServer(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's.
        self._write = cast(asyncio.Transport, transport).write

    def data_received(self, data: bytes) -> None:
        self._write(data)


class EchoClient(asyncio.Protocol):
    """Sends a frame, and the next when it has come back, until so many or so long.

    :param least: so many in any case, unless that takes :data:`loads.PROLONGED` times as long.
    """

    def __init__(self, count: int, seconds: float = 1e6, least: int = 0) -> None:
        self.taken: list[int] = []
        self.done = asyncio.get_running_loop().create_future()
        self._count = count
        self._seconds = seconds
        self._least = least

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._write = cast(asyncio.Transport, transport).write
        self._then = time.perf_counter_ns()
        self._end = self._then + int(self._seconds * 1e9)
        self._latest = self._then + int(self._seconds * loads.PROLONGED * 1e9)
        self._write(FRAME)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter_ns()
        self.taken.append(now - self._then)
        if data != FRAME:
            self.done.set_exception(RuntimeError(f"the echo of {FRAME!r} was {data!r}"))
        elif len(self.taken) == self._count or (
            now > self._end and (len(self.taken) >= self._least or now > self._latest)
        ):
            self.done.set_result(None)
        else:
            self._then = now
            self._write(FRAME)


class Asker(asyncio.Protocol):
    """Futures, in the order in which they were asked; a turn of the loop writes all of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._asked: deque[asyncio.Future[bytes]] = deque()
        self._unwritten: list[bytes] = []
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        whole = len(data) - len(data) % SIZE
        for start in range(0, whole, SIZE):
            self._asked.popleft().set_result(data[start : start + SIZE])
        self._rest = data[whole:]

    def ask(self, data: bytes) -> asyncio.Future[bytes]:
        if not self._unwritten:
            self._loop.call_soon(self._write)
        self._unwritten.append(data)
        return self._answer()

    def ask_alone(self, data: bytes) -> asyncio.Future[bytes]:
        """Written at once: when nobody else asks there is nothing to wait for."""
        self._transport.write(data)
        return self._answer()

    def _answer(self) -> asyncio.Future[bytes]:
        future: asyncio.Future[bytes] = self._loop.create_future()
        self._asked.append(future)
        return future

    def _write(self) -> None:
        self._transport.write(b"".join(self._unwritten))
        self._unwritten.clear()


class Messages(asyncio.Protocol):
    """Cuts what comes into messages of one size."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pieces: list[bytes] = []
        self._length = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def cut(self, data: bytes) -> list[bytes]:
        """Those that are whole with this."""
        size = self.size
        self._pieces.append(data)
        self._length += len(data)
        if self._length < size:
            return []
        joined = b"".join(self._pieces)
        whole = self._length - self._length % size
        self._pieces = [joined[whole:]] if whole < self._length else []
        self._length -= whole
        return [joined[start : start + size] for start in range(0, whole, size)]


class Caller(Messages):
    """Messages that come back, ``window`` under way; what has come together is sent together."""

    def __init__(self, window: int, seconds: float) -> None:
        super().__init__(SIZE)
        self.received = 0
        self.last = b""
        self.done = asyncio.get_running_loop().create_future()
        self._sent = window
        self._seconds = seconds

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.began = time.perf_counter()
        self.transport.write(PING_DATA * self._sent)

    def data_received(self, data: bytes) -> None:
        messages = self.cut(data)
        for self.last in messages:
            self.received += 1
        if time.perf_counter() - self.began < self._seconds:
            self._sent += len(messages)
            self.transport.write(PING_DATA * len(messages))
        elif self.received == self._sent:
            self.done.set_result(None)


class Sink(Messages):
    """Counts messages, whose size comes first and is acknowledged; at their end it says so."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self._tally = loads.Tally()
        self._is_told = False

    def data_received(self, data: bytes) -> None:
        messages = self.cut(data)
        if not self._is_told and messages:
            self._is_told = True
            self.size = int.from_bytes(messages.pop(), "little")
            self.transport.write(b"!")
        for message in messages:
            self._tally.add(message)

    def eof_received(self) -> None:
        self.transport.write(self._tally.told())


class BlockSink(asyncio.BufferedProtocol):
    """As :class:`Sink`, of large messages: all are received into the same block, nothing is cut."""

    def __init__(self) -> None:
        self._block = bytearray(SIZE)
        self._free = memoryview(self._block)
        self._tally: loads.Tally | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._free

    def buffer_updated(self, nbytes: int) -> None:
        self._free = self._free[nbytes:]
        if self._free:
            return
        if self._tally is None:
            self._tally = loads.Tally()
            self._block = bytearray(int.from_bytes(self._block, "little"))
            self._transport.write(b"!")
        else:
            self._tally.add(self._block)
        self._free = memoryview(self._block)

    def eof_received(self) -> None:
        if self._tally is not None:
            self._transport.write(self._tally.told())


class Sender(asyncio.Protocol):
    """Sends one way, as fast as there is room; small messages are written together."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._begun = loop.create_future()
        self._told = loop.create_future()
        self._said = b""
        self._room = asyncio.Event()
        self._room.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(HIGH_WATER)

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def data_received(self, data: bytes) -> None:
        if self._begun.done():
            self._said += data
        else:
            self._begun.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._told.set_result(self._said)

    async def send(self, data: bytes, seconds: float) -> tuple[int, float]:
        """How many, and until when they had come."""
        write = self._transport.write
        write(len(data).to_bytes(SIZE, "little"))
        await asyncio.wait_for(self._begun, loads.PATIENCE)
        clock = time.perf_counter
        batch = loads.batch_of(len(data))
        count = 0
        began = clock()
        while clock() - began < seconds:
            write(b"".join([data] * batch))
            count += batch
            await self._room.wait()
        self._transport.write_eof()
        arrived = await asyncio.wait_for(self._told, loads.PATIENCE)
        taken = clock() - began
        loads.check_arrival(arrived, data, count)
        return count, taken


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Kind = TypeVar("Kind", bound=asyncio.Protocol)


@asynccontextmanager
async def connected(address: str, to: str, protocol: Callable[[], Kind]) -> AsyncIterator[Kind]:
    """To the ``echo``, the ``sink`` or the ``blocks``, until the block ends."""
    port = json.loads(address)[to]
    loop = asyncio.get_running_loop()
    transport, client = await loop.create_connection(protocol, "127.0.0.1", port)
    try:
        yield client
    finally:
        transport.close()


class Client:
    """Its works, each on connections of its own."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def round_trips(self, seconds: float) -> dict[str, Any]:
        await self._trips(seconds * loads.WARM_UP, 0)
        return percentiles(await self._trips(seconds, LEAST_FOR_P999))

    async def _trips(self, seconds: float, least: int) -> list[int]:
        async with connected(
            self._address, "echo", lambda: EchoClient(1_000_000_000, seconds, least)
        ) as client:
            await asyncio.wait_for(client.done, loads.PATIENCE)
        return client.taken

    async def calls(self, window: int, seconds: float) -> dict[str, Any]:
        await self._calls(window, seconds * loads.WARM_UP)
        rate = await self._calls(window, seconds)
        async with connected(self._address, "echo", Asker) as asker:
            answers = await asyncio.gather(*map(asker.ask, loads.SENT))
        check(answers == loads.SENT, "answers were mixed up")
        return {"rate": rate}

    async def _calls(self, window: int, seconds: float) -> float:
        async with connected(self._address, "echo", lambda: Caller(window, seconds)) as caller:
            await asyncio.wait_for(caller.done, loads.PATIENCE)
            taken = time.perf_counter() - caller.began
        loads.check_last(caller.last)
        return caller.received / taken

    async def notifies(self, size: int, seconds: float) -> dict[str, Any]:
        """From the first message until the receiver says that it has had the last."""
        data = os.urandom(size)
        await self._one_way(data, seconds * loads.WARM_UP)
        count, taken = await self._one_way(data, seconds)
        return loads.streamed(size, count, taken)

    async def _one_way(self, data: bytes, seconds: float) -> tuple[int, float]:
        to = "blocks" if len(data) >= LARGE else "sink"
        async with connected(self._address, to, Sender) as sender:
            return await sender.send(data, seconds)


async def server(given: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    protocols = {"echo": EchoServer, "sink": Sink, "blocks": BlockSink}
    listening = {
        name: await loop.create_server(protocol, "127.0.0.1", 0, backlog=1024)
        for name, protocol in protocols.items()
    }
    ports = {name: each.sockets[0].getsockname()[1] for name, each in listening.items()}
    await serve({"memory": memory}, address=json.dumps(ports))


async def client(given: argparse.Namespace) -> None:
    work = Client(given.address)
    async with connected(given.address, "echo", Asker) as asker:

        async def requests(in_flight: int, seconds: float) -> dict[str, Any]:
            ask = asker.ask if in_flight > 1 else asker.ask_alone
            return await loads.requests(ask, in_flight, seconds)

        await serve(
            {
                "round_trips": work.round_trips,
                "requests": requests,
                "calls": work.calls,
                "notifies": work.notifies,
            }
        )


async def connections(given: argparse.Namespace) -> None:
    """Opens as many as it is told to, and leaves them idle once each has had an answer."""
    opened: list[Asker] = []
    async with AsyncExitStack() as stack:

        async def open_more(count: int) -> dict[str, Any]:
            for _ in range(count):
                of = connected(given.address, "echo", Asker)
                asker = await stack.enter_async_context(of)
                check(await asker.ask(PING_DATA) == PING_DATA, "a wrong answer")
                opened.append(asker)
            return {"open": len(opened)}

        await serve({"open": open_more})


class Publisher:
    """Writes what a turn of the loop publishes to each subscriber in one piece."""

    def __init__(self, subscribers: int) -> None:
        self._subscribers = subscribers
        self._opened: list[Streams] = []
        self._all_here = asyncio.Event()

    def opened(self, *streams: Any) -> None:
        """By a subscriber, or, after all of them, by who counts for them."""
        self._opened.append(streams)
        if len(self._opened) > self._subscribers:
            self._all_here.set()

    async def measure(self, size: int, count: int) -> dict[str, Any]:
        """From the first message sent until the last subscriber has had the last of them."""
        await asyncio.wait_for(self._all_here.wait(), loads.PATIENCE)
        data = os.urandom(size)
        await self._send(data, max(1, count // 10))
        rate = count / await self._send(data, count)
        return {"rate": rate * self._subscribers}

    async def _send(self, data: bytes, count: int) -> float:
        *feeds, (reader, control) = self._opened
        writes = [feed.transport.write for _, feed in feeds]
        control.write(json.dumps({"count": count, "content": data.hex()}).encode() + b"\n")
        await asyncio.wait_for(reader.readline(), loads.PATIENCE)
        began = time.perf_counter()
        # All of it fits into memory: nobody looks for room.
        for first in range(0, count, A_TURN):
            joined = b"".join([data] * min(A_TURN, count - first))
            for write in writes:
                write(joined)
            await asyncio.sleep(0)
        word = await asyncio.wait_for(reader.readline(), loads.PATIENCE)
        taken = time.perf_counter() - began
        check(word == b"right\n", "what came was not what was published")
        return taken


class Subscriber(Messages):
    """Compares each that comes; says how many were wrong or too many when all have come."""

    def __init__(self, done: Callable[[int], None]) -> None:
        super().__init__(SIZE)
        self._done = done

    def expect(self, count: int, content: bytes) -> None:
        self.size, self._content = len(content), content
        self._left, self._wrong = count, 0

    def data_received(self, data: bytes) -> None:
        messages = self.cut(data)
        self._left -= len(messages)
        self._wrong += len(messages) - messages.count(self._content)
        if self._left <= 0:
            self._done(self._wrong - self._left)


async def publisher(given: argparse.Namespace) -> None:
    work = Publisher(given.count)
    listening = await asyncio.start_server(work.opened, "127.0.0.1", 0, backlog=1024)
    port = listening.sockets[0].getsockname()[1]
    await serve({"measure": work.measure}, address=json.dumps({"feed": port}))


async def subscribers(given: argparse.Namespace) -> None:
    left = wrong = 0

    def done(of_one: int) -> None:
        nonlocal left, wrong
        left -= 1
        wrong += of_one
        if left == 0:
            control.write(b"wrong\n" if wrong else b"right\n")

    async def keep_expecting() -> None:
        nonlocal left, wrong
        async for line in reader:
            told = json.loads(line)
            left, wrong = len(opened), 0
            for each in opened:
                each.expect(told["count"], bytes.fromhex(told["content"]))
            control.write(b"ready\n")

    async with AsyncExitStack() as stack:
        opened = []
        for _ in range(given.count):
            of = connected(given.address, "feed", lambda: Subscriber(done))
            opened.append(await stack.enter_async_context(of))
        port = json.loads(given.address)["feed"]
        reader, control = await asyncio.open_connection("127.0.0.1", port)
        expecting = asyncio.ensure_future(keep_expecting())
        await serve({})
        expecting.cancel()


if __name__ == "__main__":
    program.main(
        __doc__,
        server=server,
        client=client,
        connections=connections,
        publisher=publisher,
        subscribers=subscribers,
    )
