"""pyzmq at its fastest: blocking sockets, PAIR between two processes, XPUB to SUB for many.

The server's sockets have a thread each, of which only the one that is in use ever wakes up.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import zmq

from bench.figures import LEAST_FOR_P999
from bench.peers import loads, program
from bench.two_process.channels import PING_DATA
from bench.two_process.commands import Command, check, percentiles, serve

LARGE = 65_536  # from here on pyzmq's own advice is to send and receive without a copy
PATIENCE = int(loads.PATIENCE * 1000)
# How many messages either end of a socket holds before its sender waits. An echo must hold all
# that are under way.
HIGH_WATER = {"echo": 10_000, "sink": 4_000, "large": 256, "control": 10}


def pair(context: zmq.Context, name: str, port: int = 0) -> zmq.Socket:
    """A PAIR socket that is bound to some port, or connected to that one."""
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(HIGH_WATER[name])
    if port:
        socket.setsockopt(zmq.RCVTIMEO, PATIENCE)
        socket.setsockopt(zmq.SNDTIMEO, PATIENCE)
        socket.connect(f"tcp://127.0.0.1:{port}")
    return socket


def new_context(sockets: int = 0) -> zmq.Context:
    """Of so many sockets, and some more."""
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 100 + sockets)
    context.setsockopt(zmq.LINGER, 0)
    return context


# -------------------------------------------------------------------------------------- the server


def echo(socket: zmq.Socket) -> None:
    send, recv = socket.send, socket.recv
    while True:
        send(recv())


def sink(socket: zmq.Socket, copy: bool) -> None:
    """Counts until an empty message asks for what has come."""
    recv = socket.recv if copy else partial(socket.recv, copy=False)
    count = size = 0
    last: Any = b""
    while True:
        data = recv()
        length = len(data)
        if length:
            count += 1
            size += length
            last = data
        else:
            socket.send(loads.tally(count, size, bytes(last)))
            count = size = 0


def until_the_end(work: Callable[[], None], *sockets: zmq.Socket) -> None:
    """A thread's whole life: its sockets are used and closed by no other."""
    with suppress(zmq.ContextTerminated):
        work()
    for socket in sockets:
        socket.close()


async def server(given: argparse.Namespace) -> None:
    context = new_context()
    ports = {}
    works: dict[str, Callable[[zmq.Socket], None]] = {
        "echo": echo,
        "sink": partial(sink, copy=True),
        "large": partial(sink, copy=False),
    }
    threads = []
    for name, work in works.items():
        socket = pair(context, name)
        ports[name] = socket.bind_to_random_port("tcp://127.0.0.1")
        threads.append(threading.Thread(target=until_the_end, args=(partial(work, socket), socket)))
    for thread in threads:
        thread.start()
    try:
        await serve({}, address=json.dumps(ports))
    finally:
        context.term()
        for thread in threads:
            thread.join()


# -------------------------------------------------------------------------------------- the client


class Client:
    """Its commands block: nothing else goes on in its process."""

    def __init__(self, context: zmq.Context, ports: dict[str, int]) -> None:
        self.sockets = {name: pair(context, name, port) for name, port in ports.items()}
        self.echo = self.sockets["echo"]

    async def round_trips(self, seconds: float) -> dict[str, Any]:
        self._trips(seconds * loads.WARM_UP, 0)
        taken = self._trips(seconds, LEAST_FOR_P999)
        self._distinct()
        return percentiles(taken)

    def _trips(self, seconds: float, least: int) -> list[int]:
        send, recv = self.echo.send, self.echo.recv
        clock = time.perf_counter_ns
        taken: list[int] = []
        wrong = 0
        then = clock()
        end, latest = then + int(seconds * 1e9), then + int(seconds * loads.PROLONGED * 1e9)
        while then < end or (len(taken) < least and then < latest):
            send(PING_DATA)
            wrong += recv() != PING_DATA
            now = clock()
            taken.append(now - then)
            then = now
        check(wrong == 0, f"{wrong} of {len(taken)} answers were wrong")
        return taken

    async def calls(self, window: int, seconds: float) -> dict[str, Any]:
        """Messages that come back, of which ``window`` are under way."""
        self._echoes(window, seconds * loads.WARM_UP)
        rate = self._echoes(window, seconds)
        self._distinct()
        return {"rate": rate}

    def _echoes(self, window: int, seconds: float) -> float:
        send, recv = self.echo.send, self.echo.recv
        clock = time.perf_counter
        last = b""
        answers = 0
        began = clock()
        for _ in range(window):
            send(PING_DATA)
        while clock() - began < seconds:
            for _ in range(loads.BATCH):
                recv()
                send(PING_DATA)
            answers += loads.BATCH
        for _ in range(window):
            last = recv()
        taken = clock() - began
        answers += window
        loads.check_last(last)
        return answers / taken

    def _distinct(self) -> None:
        for data in loads.SENT:
            self.echo.send(data)
        check([self.echo.recv() for _ in loads.SENT] == loads.SENT, "answers were mixed up")

    async def notifies(self, size: int, seconds: float) -> dict[str, Any]:
        """From the first message until the receiver says that it has had the last."""
        data = os.urandom(size)
        self._one_way(data, seconds * loads.WARM_UP)
        count, taken = self._one_way(data, seconds)
        return loads.streamed(size, count, taken)

    def _one_way(self, data: bytes, seconds: float) -> tuple[int, float]:
        is_large = len(data) >= LARGE
        socket = self.sockets["large" if is_large else "sink"]
        send = partial(socket.send, copy=False) if is_large else socket.send
        batch = loads.batch_of(len(data))
        clock = time.perf_counter
        count = 0
        began = clock()
        while clock() - began < seconds:
            for _ in range(batch):
                send(data)
            count += batch
        socket.send(b"")
        arrived = socket.recv()
        taken = clock() - began
        loads.check_arrival(arrived, data, count)
        return count, taken


async def client(given: argparse.Namespace) -> None:
    context = new_context()
    worker = Client(context, json.loads(given.address))
    commands: dict[str, Command] = {
        "round_trips": worker.round_trips,
        "calls": worker.calls,
        "notifies": worker.notifies,
    }
    try:
        await serve(commands)
    finally:
        context.destroy()


# -------------------------------------------------------------------------------------- publishing


class Publisher:
    def __init__(self, feed: zmq.Socket, control: zmq.Socket, subscribers: int) -> None:
        self._feed = feed
        self._control = control
        self._subscribers = subscribers
        self._absent = subscribers

    async def measure(self, size: int, count: int) -> dict[str, Any]:
        """From the first message sent until the last subscriber has had the last of them."""
        while self._absent:
            self._absent -= self._feed.recv() == b"\x01"
        data = os.urandom(size)
        self._send(data, max(1, count // 10))
        rate = count / self._send(data, count)
        return {"rate": rate * self._subscribers}

    def _send(self, data: bytes, count: int) -> float:
        self._control.send(count.to_bytes(8, "little") + data)
        self._control.recv()
        send = self._feed.send
        began = time.perf_counter()
        for _ in range(count):
            send(data)
        word = self._control.recv()
        taken = time.perf_counter() - began
        check(word == b"right", "not all of what was published has come, or not as it was")
        return taken


async def publisher(given: argparse.Namespace) -> None:
    context = new_context()
    feed = context.socket(zmq.XPUB)
    # It hears of each subscriber, and waits for the slowest where a PUB would drop messages.
    feed.setsockopt(zmq.XPUB_VERBOSE, 1)
    feed.setsockopt(zmq.XPUB_NODROP, 1)
    control = pair(context, "control")
    ports = {}
    for name, socket in (("feed", feed), ("control", control)):
        socket.setsockopt(zmq.RCVTIMEO, PATIENCE)
        socket.setsockopt(zmq.SNDTIMEO, PATIENCE)
        ports[name] = socket.bind_to_random_port("tcp://127.0.0.1")
    try:
        work = Publisher(feed, control, given.count)
        await serve({"measure": work.measure}, address=json.dumps(ports))
    finally:
        context.destroy()


def count_arrivals(control: zmq.Socket, sockets: list[zmq.Socket]) -> None:
    """Told how many to wait for and of what content, say so when every socket has had all."""
    poller = zmq.Poller()
    for socket in sockets:
        poller.register(socket, zmq.POLLIN)
    while True:
        told = control.recv()
        count, content = int.from_bytes(told[:8], "little"), told[8:]
        each = dict.fromkeys(sockets, 0)
        left = count * len(sockets)
        wrong = 0
        control.send(b"")
        while left > 0:
            for socket, _ in poller.poll():
                recv = socket.recv
                had = 0
                with suppress(zmq.Again):
                    while True:
                        wrong += recv(zmq.NOBLOCK) != content
                        had += 1
                each[socket] += had
                left -= had
        is_right = not wrong and set(each.values()) == {count}
        control.send(b"right" if is_right else b"wrong")


async def subscribers(given: argparse.Namespace) -> None:
    ports = json.loads(given.address)
    context = new_context(given.count)
    control = context.socket(zmq.PAIR)
    control.connect(f"tcp://127.0.0.1:{ports['control']}")
    sockets = [context.socket(zmq.SUB) for _ in range(given.count)]
    for socket in sockets:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(f"tcp://127.0.0.1:{ports['feed']}")
    work = partial(count_arrivals, control, sockets)
    thread = threading.Thread(target=until_the_end, args=(work, control, *sockets))
    thread.start()
    try:
        await serve({})
    finally:
        context.term()
        thread.join()


if __name__ == "__main__":
    program.main(
        __doc__, server=server, client=client, publisher=publisher, subscribers=subscribers
    )
