"""nats-py through a ``nats-server`` that is started for it, on the processor of who answers."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import nats

from bench.peers import loads, program
from bench.peers.peer import nats_server
from bench.two_process.channels import PING_DATA
from bench.two_process.commands import check, serve
from bench.two_process.memory import resident

MIB = 1024 * 1024
# A broker drops who does not read as fast as others write, hence the sender waits when so much is
# under way; the receiver says every so often what it has had.
AHEAD = 16 * MIB
STEP = 4 * MIB

# -------------------------------------------------------------------------------------- the broker


def end_with_the_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextmanager
def broker() -> Iterator[tuple[int, str]]:
    """A ``nats-server`` on a port that was free: its process id and its URL."""
    found = nats_server()
    if found is None:
        raise RuntimeError("no nats-server was found")
    process = subprocess.Popen(
        [found, "--addr", "127.0.0.1", "--port", "-1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=end_with_the_parent,  # noqa: PLW1509 - no thread has been started yet
    )
    assert process.stderr is not None
    try:
        port = ""
        for line in process.stderr:
            listens = re.search(r"Listening for client connections on .*:(\d+)", line)
            port = listens[1] if listens else port
            if "Server is ready" in line:
                break
        if not port:
            raise RuntimeError(f"{found} ended with code {process.wait(5.0)}")
        yield process.pid, f"nats://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


async def connect(address: str) -> Any:
    return await nats.connect(address, allow_reconnect=False)


# -------------------------------------------------------------------------------------- the server


async def answer(connection: Any) -> None:
    """Subscribe the echo, and the sink that says what has come to who sends it a request."""
    tally = loads.Tally()
    said = 0

    async def echo(message: Any) -> None:
        await message.respond(message.data)

    async def sink(message: Any) -> None:
        nonlocal said
        if message.reply:
            said = 0
            await message.respond(tally.told())
            return
        tally.add(message.data)
        if tally.size - said >= STEP:
            said = tally.size
            await connection.publish("taken", b"%d" % said)

    await connection.subscribe("echo", cb=echo)
    await connection.subscribe("sink", cb=sink)
    await connection.flush()


async def server(given: argparse.Namespace) -> None:
    with broker() as (process, address):
        connection = await connect(address)
        await answer(connection)

        async def memory() -> dict[str, Any]:
            """Of the broker, whose runtime has a heap of its own: nothing of it can be trimmed."""
            size = resident(process)
            return {"rss": size, "rss_trimmed": size}

        await serve({"memory": memory}, address=address)
        await connection.close()


# -------------------------------------------------------------------------------------- the client


class Client:
    def __init__(self, connection: Any) -> None:
        self.connection = connection

    async def ask(self, data: bytes) -> bytes:
        message = await self.connection.request("echo", data, timeout=loads.PATIENCE)
        answered: bytes = message.data
        return answered

    async def calls(self, window: int, seconds: float) -> dict[str, Any]:
        """Publications and the replies to their subject, of which ``window`` are under way."""
        await self._calls(window, seconds * loads.WARM_UP)
        rate = await self._calls(window, seconds)
        await self._distinct()
        return {"rate": rate}

    async def _calls(self, window: int, seconds: float) -> float:
        publish = self.connection.publish
        clock = time.perf_counter
        inbox = self.connection.new_inbox()
        done = asyncio.Event()
        last = b""
        sent = received = 0
        began = clock()

        async def replied(message: Any) -> None:
            nonlocal sent, received, last
            received += 1
            if clock() - began < seconds:
                sent += 1
                await publish("echo", PING_DATA, reply=inbox)
            elif received == sent:
                last = message.data
                done.set()

        subscription = await self.connection.subscribe(inbox, cb=replied)
        await self.connection.flush()
        began = clock()
        sent = window
        for _ in range(window):
            await publish("echo", PING_DATA, reply=inbox)
        await asyncio.wait_for(done.wait(), loads.PATIENCE)
        taken = clock() - began
        await subscription.unsubscribe()
        loads.check_last(last)
        return received / taken

    async def _distinct(self) -> None:
        inbox = self.connection.new_inbox()
        replies = await self.connection.subscribe(inbox)
        for data in loads.SENT:
            await self.connection.publish("echo", data, reply=inbox)
        found = [(await replies.next_msg(timeout=loads.PATIENCE)).data for _ in loads.SENT]
        check(found == loads.SENT, "answers were mixed up")
        await replies.unsubscribe()


class Flow:
    """Publishes to the sink, and waits when it is too far ahead of it."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._sent = self._taken = 0
        self._news = asyncio.Event()

    async def taken(self, message: Any) -> None:
        self._taken = int(message.data)
        self._news.set()

    async def send(self, data: bytes) -> None:
        while self._sent - self._taken > AHEAD:
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), loads.PATIENCE)
        self._sent += len(data)
        await self._connection.publish("sink", data)

    async def counted(self) -> bytes:
        message = await self._connection.request("sink", b"", timeout=loads.PATIENCE)
        counted: bytes = message.data
        self._sent = self._taken = 0
        return counted


async def client(given: argparse.Namespace) -> None:
    connection = await connect(given.address)
    work = Client(connection)
    flow = Flow(connection)
    await connection.subscribe("taken", cb=flow.taken)
    stream = loads.Stream(flow.send, flow.counted)
    await serve(
        {
            **loads.asking(work.ask),
            "calls": work.calls,
            "notifies": partial(loads.notifies, lambda: stream),
        }
    )
    await connection.close()


async def connections(given: argparse.Namespace) -> None:
    """Opens as many as it is told to, and leaves them idle."""
    opened: list[Any] = []

    async def open_more(count: int) -> dict[str, Any]:
        opened.extend([await connect(given.address) for _ in range(count)])
        return {"open": sum(connection.is_connected for connection in opened)}

    await serve({"open": open_more})


# -------------------------------------------------------------------------------------- publishing


class Publisher:
    def __init__(self, connection: Any, subscribers: int) -> None:
        self._connection = connection
        self._subscribers = subscribers

    async def measure(self, size: int, count: int) -> dict[str, Any]:
        """From the first message sent until the last subscriber has had the last of them."""
        data = os.urandom(size)
        await self._send(data, max(1, count // 10))
        rate = count / await self._send(data, count)
        return {"rate": rate * self._subscribers}

    async def _send(self, data: bytes, count: int) -> float:
        word = await self._connection.subscribe("arrived")
        told = count.to_bytes(8, "little") + data
        await self._connection.request("expect", told, timeout=loads.PATIENCE)
        publish = self._connection.publish
        began = time.perf_counter()
        for number in range(count):
            await publish("feed", data)
            if number % loads.BATCH == 0:
                await asyncio.sleep(0)
        message = await word.next_msg(timeout=loads.PATIENCE)
        taken = time.perf_counter() - began
        await word.unsubscribe()
        check(message.data == b"right", "what came was not what was published")
        return taken


async def publisher(given: argparse.Namespace) -> None:
    with broker() as (_, address):
        connection = await connect(address)
        await serve({"measure": Publisher(connection, given.count).measure}, address=address)
        await connection.close()


async def subscribers(given: argparse.Namespace) -> None:
    """Connections that count together what is published, and say when all of it has come."""
    each = [0] * given.count
    count = left = wrong = 0
    content = b""
    opened = [await connect(given.address) for _ in each]

    async def expect(message: Any) -> None:
        nonlocal count, left, wrong, content
        count, content = int.from_bytes(message.data[:8], "little"), message.data[8:]
        each[:] = [0] * given.count
        left, wrong = count * given.count, 0
        await message.respond(b"")

    async def arrived(number: int, message: Any) -> None:
        nonlocal left, wrong
        each[number] += 1
        left -= 1
        wrong += message.data != content
        if left <= 0:
            is_right = not left and not wrong and set(each) == {count}
            await opened[0].publish("arrived", b"right" if is_right else b"wrong")

    await opened[0].subscribe("expect", cb=expect)
    for number, connection in enumerate(opened):
        await connection.subscribe("feed", cb=partial(arrived, number))
        await connection.flush()
    await serve({})


if __name__ == "__main__":
    program.main(
        __doc__,
        server=server,
        client=client,
        connections=connections,
        publisher=publisher,
        subscribers=subscribers,
    )
