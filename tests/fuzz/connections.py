"""Conversations with a node, mutated, each on a connection of its own: for test_connections.py.

    python -m tests.fuzz.connections serve REGISTRY LOOP  two nodes, one of them with a secret
    python -m tests.fuzz.connections send TARGETS SEED COUNT

Both say what they have seen in JSON lines; the nodes do so at each line of their standard input,
and end with it. What is sent depends on the seed alone, but for the proofs of the authentication.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import random
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import uvloop

from domi_fast import Context, Node
from domi_fast.membership import NodeInfo
from domi_fast.metrics import rss
from domi_fast.registry import open_registry
from tests import reference
from tests.reference import Decoder, Offer

SECRET = b"the secret of the mutated"
ECHO, LATER, NOWHERE, REPLIES = 50, 51, 52, 53
# Machine ids that are claimed in the registry by hand: senders may be nodes under them.
MEMBERS = range(700, 708)
PLAIN = range(600, 640)
LANES = 3
# Seconds within which a node that was sent all has to close its end.
PATIENCE = 20.0
# Connections that a sender leaves open, and silent, behind it.
LEFT_OPEN = 16


def say(facts: Any) -> None:
    print(json.dumps(facts), flush=True)


# -------------------------------------------------------------------------------------------- nodes


class Records(logging.Handler):
    """The errors that are logged, as text; but for handlers', who cannot answer who has gone."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []
        self.of_handlers = 0

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("the handler of channel"):
            self.of_handlers += 1
        elif len(self.texts) < 10:
            self.texts.append(f"{record.getMessage()} {record.exc_info}")


async def serve(url: str) -> None:
    records = Records()
    log = logging.getLogger("domi_fast")
    log.addHandler(records)
    log.propagate = False
    raised: Counter[str] = Counter()

    async def later(ctx: Context) -> None:
        await asyncio.sleep(0)
        ctx.reply(ctx.data)

    def node(name: str, **settings: Any) -> Node:
        made = Node(
            name,
            registry=f"{url}-{name}",
            sessions_per_peer=LANES,
            on_error=lambda error, frame: raised.update([type(error).__name__]),
            **settings,
        )
        made.subscribe(ECHO, lambda ctx: ctx.reply(ctx.data))
        made.subscribe(LATER, later)
        # The table of channels takes up memory as they are named, which strangers do at random:
        # each page of it is in use from the beginning.
        for channel in range(60, 65_500, 32):
            made.subscribe(channel, later)
            made.unsubscribe(channel)
        return made

    async with contextlib.AsyncExitStack() as stack:
        nodes: dict[str, Any] = {}
        members: dict[str, list[tuple[int, int, str]]] = {}
        for name, settings in (("open", {}), ("guarded", {"secret": SECRET})):
            nodes[name] = await stack.enter_async_context(node(name, **settings))
            registry = open_registry(f"{url}-{name}")
            await registry.open()
            stack.push_async_callback(registry.close)
            lease = await registry.grant(80_000)
            members[name] = []
            for machine in MEMBERS:
                instance = os.urandom(16)
                mark = reference.mark(instance)
                # Nobody listens on the port, and the node will dial in vain.
                info = NodeInfo(machine, 0, "member", "0", "127.0.0.1", 1, None, mark, "")
                key = f"domi/default/nodes/{machine:04d}"
                claim = await registry.claim([key], info.encode(), lease)
                members[name].append((machine, claim.epoch, instance.hex()))
        say(
            [
                {"name": name, "port": each.port, "id": each.id, "members": members[name]}
                for name, each in nodes.items()
            ]
        )
        while await asyncio.to_thread(sys.stdin.readline):
            gc.collect()
            say(
                {
                    "rss": rss(),
                    "descriptors": len(os.listdir("/proc/self/fd")),
                    "sessions": sum(len(each._mesh._sessions) for each in nodes.values()),
                    "peers": sum(len(each.peers) for each in nodes.values()),
                    "guests": sum(
                        session.is_guest
                        for each in nodes.values()
                        for session in each._mesh._sessions
                    ),
                    "errors": records.texts,
                    "raised": {**raised, "by handlers": records.of_handlers},
                    "counters": {name: dict(each.counters()) for name, each in nodes.items()},
                }
            )


# ------------------------------------------------------------------------------------------ senders


class Opening(NamedTuple):
    """How a valid peer begins.

    :ivar first: frames that are said at once.
    :ivar hello: the last of them, which waits for its challenge; or None.
    :ivar rest: what follows, its name first where it had to wait with that.
    """

    first: list[bytes]
    hello: bytes | None
    rest: list[bytes]


class Conversation:
    """What a valid peer says, frame by frame; some steps depend on what has come back."""

    def __init__(self, chance: random.Random, target: dict[str, Any], guarded: bool) -> None:
        self.chance = chance
        self.target = target
        self.guarded = guarded

    def opening(self) -> Opening:
        """Of somebody, on one connection."""
        kind = self.chance.choice(["plain", "guest", "member", "member", "guest"])
        if kind == "plain" and not self.guarded:
            name = struct.pack("<H", self.chance.choice(PLAIN))
            return Opening(
                [reference.magic(), reference.encode(reference.NODE_NAME, name)], None, self.plain()
            )
        if kind == "member":
            return self.session(1)[1]
        offer = Offer("guest", cluster="", instance=self.chance.randbytes(16))
        named = reference.encode(reference.GUEST_NAME, reference.encode_offer(offer))
        rest = [reference.subscriptions(reference.ALL, [REPLIES]), *self.guest()]
        return self.introduced(1, reference.NO_MACHINE, reference.NO_MACHINE, named, rest)

    def session(self, lanes: int) -> tuple[int, Opening]:
        """Of a member that allows so many connections: its machine id, and the first of them."""
        machine, epoch, instance = self.chance.choice(self.target["members"])
        offer = Offer(
            "member", epoch=epoch, instance=bytes.fromhex(instance), features=lanes - 1 << 4
        )
        named = reference.encode(
            reference.NODE_NAME, struct.pack("<H", machine), reference.encode_offer(offer)
        )
        rest = [reference.subscriptions(reference.ALL, [ECHO, REPLIES]), *self.member()]
        return machine, self.introduced(0, machine, self.target["id"], named, rest)

    def lane(self, machine: int, index: int, ticket: bytes) -> Opening:
        """Of one of the others."""
        named = reference.encode(reference.LANE, struct.pack("<HB", machine, index), ticket)
        return self.introduced(0, machine, self.target["id"], named, self.member())

    def introduced(
        self, role: int, machine: int, dialled: int, named: bytes, rest: list[bytes]
    ) -> Opening:
        if not self.guarded:
            return Opening([reference.magic(), named], None, rest)
        hello = reference.auth_hello(role, machine, dialled, self.chance.randbytes(32), "default")
        first = [reference.magic(), reference.encode(reference.AUTH, hello)]
        return Opening(first, hello, [named, *rest])

    def some(self, frames: list[bytes]) -> list[bytes]:
        return self.chance.choices(frames, k=self.chance.randrange(1, 9))

    def data(self) -> bytes:
        return self.chance.randbytes(self.chance.choice([0, 1, 8, 60, 300, 3000]))

    def plain(self) -> list[bytes]:
        encode, data = reference.encode, self.data()
        return self.some(
            [
                encode(ECHO, data),
                encode(ECHO, data, reference.call_extend(self.chance.choice(PLAIN), REPLIES)),
                encode(ECHO, data, reference.channels([LATER, NOWHERE])),
                encode(NOWHERE, data),
                *self.library(),
            ]
        )

    def library(self) -> list[bytes]:
        encode = reference.encode
        return [
            encode(reference.HEARTBEAT),
            encode(reference.HEARTBEAT_REPLY),
            encode(reference.PING, b"ping"),
            encode(reference.PONG, b"pong"),
            encode(reference.NIL, b"nothing"),
            encode(reference.EXIT, b"enough"),
        ]

    def member(self) -> list[bytes]:
        encode, data, number = reference.encode, self.data(), self.chance.randrange(1 << 20)
        channel = self.chance.choice([ECHO, LATER, NOWHERE])
        return self.some(
            [
                encode(channel, data),
                encode(channel, data, reference.publish_extend()),
                encode(channel, data, reference.call_extend(self.chance.choice(MEMBERS), REPLIES)),
                encode(channel, data, reference.request_extend(number, 5000)),
                encode(channel, data, reference.request_extend(number)),
                encode(channel, data, reference.guest_call_extend(700, REPLIES, 3)),
                encode(channel, data, reference.pipeline_extend([LATER, NOWHERE])),
                encode(channel, data, reference.guest_reply_extend(number % 8)),
                encode(reference.ANSWER, data, reference.answer_extend(number, number % 9)),
                encode(reference.REJECT, data, reference.reject_extend(2, channel, 0)),
                encode(reference.STATE, b"\1", b"\0"),
                encode(reference.STATE, b"\0", b"\0"),
                encode(reference.MEMORY, struct.pack("<H", number % 1001)),
                reference.subscriptions(reference.ADD, [60 + number % 4, LATER]),
                reference.subscriptions(reference.REMOVE, [ECHO, 60]),
                *self.library(),
            ]
        )

    def guest(self) -> list[bytes]:
        encode, data, number = reference.encode, self.data(), self.chance.randrange(1 << 20)
        channel = self.chance.choice([ECHO, LATER, NOWHERE, REPLIES])
        to = self.chance.choice([reference.NO_MACHINE, self.target["id"], 700])
        relays = [
            reference.relay_extend(reference.NOTIFY, channel, to=to),
            reference.relay_extend(reference.PUBLISH, channel),
            reference.relay_extend(reference.CALL, channel, to=to, reply=REPLIES),
            reference.relay_extend(
                reference.REQUEST, channel, to=to, correlation=number, milliseconds=3000
            ),
            reference.relay_extend(reference.PIPELINE, channel, stages=[LATER, NOWHERE]),
            reference.relay_extend(
                reference.REPLY, channel, to=self.target["id"], correlation=reference.TO_A_GUEST + 1
            ),
        ]
        return self.some(
            [
                *[encode(reference.RELAY, data, extend) for extend in relays],
                encode(reference.ANSWER, data, reference.answer_extend(number)),
                encode(reference.REJECT, data, reference.reject_extend(2, channel, 0)),
                reference.subscriptions(reference.ADD, [60 + number % 4]),
                reference.subscriptions(reference.REMOVE, [REPLIES]),
                encode(ECHO, data),
                *self.library(),
            ]
        )


def mutated(chance: random.Random, frames: list[bytes]) -> bytes:
    """The frames as one stream, with one to four faults in it; one of ten has none."""
    frames = list(frames)
    if chance.random() < 0.1:
        return b"".join(frames)
    faults = chance.randrange(1, 5)
    for _ in range(chance.randrange(faults + 1)):
        whole_frames(chance, frames)
    data = bytearray(b"".join(frames))
    for _ in range(faults):
        if data:
            some_bytes(chance, data)
    return bytes(data)


def whole_frames(chance: random.Random, frames: list[bytes]) -> None:
    if not frames:
        return
    at, other = chance.randrange(len(frames)), chance.randrange(len(frames))
    kind = chance.randrange(5)
    if kind == 0:
        frames.insert(other, frames[at])
    elif kind == 1:
        del frames[at]
    elif kind == 2:
        frames[at], frames[other] = frames[other], frames[at]
    elif kind == 3:
        frames[at] = (
            frames[at][: chance.randrange(len(frames[at]) + 1)]
            + frames[other][chance.randrange(len(frames[other]) + 1) :]
        )
    else:
        # A length, an extend's size or a channel, which may be right for what is there or not.
        field, size = chance.choice([(0, 4), (4, 2), (6, 2)])
        value = chance.choice([0, 1, 7, 8, 9, 255, 4095, 4097, 65_500, 65_535, len(frames[at])])
        value = value if chance.random() < 0.7 else chance.randrange(1 << (8 * size))
        if len(frames[at]) >= 8:
            changed = bytearray(frames[at])
            changed[field : field + size] = value.to_bytes(4, "little")[:size]
            frames[at] = bytes(changed)


def some_bytes(chance: random.Random, data: bytearray) -> None:
    at = chance.randrange(len(data))
    end = min(len(data), at + chance.choice([1, 2, 4, 8, 40]))
    kind = chance.randrange(6)
    if kind == 0:
        data[at] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[at:end]
    elif kind == 2:
        data[at:at] = data[at:end]
    elif kind == 3:
        data[at:at] = chance.randbytes(end - at)
    elif kind == 4:
        data[at:end] = bytes([chance.choice([0, 1, 0x7F, 0x80, 0xFF])]) * (end - at)
    elif chance.random() < 0.3:
        del data[at:]


class Sender:
    """Sends so many conversations, one after the other."""

    def __init__(self, targets: list[dict[str, Any]], seed: int) -> None:
        self.chance = random.Random(seed)
        self.targets = targets
        self.open: list[socket.socket] = []
        self.ends: Counter[str] = Counter()
        self.longest = 0.0

    def run(self, count: int) -> None:
        while count:
            count -= self.converse(count)
        for sock in self.open:
            sock.close()

    def converse(self, most: int) -> int:
        """With one of the nodes, on at most so many connections; on how many."""
        target = self.chance.choice(self.targets)
        conversation = Conversation(self.chance, target, target["name"] == "guarded")
        if most >= LANES and self.chance.random() < 0.05:
            return self.with_lanes(conversation, self.chance.randrange(2, LANES + 1))
        with self.connection(target) as sock:
            self.open_with(sock, conversation.opening())
        return 1

    def with_lanes(self, conversation: Conversation, count: int) -> int:
        """A session whose first connection is as it should be until it is welcomed."""
        chance, target = self.chance, conversation.target
        machine, (first, hello, rest) = conversation.session(count)
        made = 1
        # The first is ended first, and is: until it has introduced itself nobody reads the others.
        with contextlib.ExitStack() as stack, self.connection(target, may_stay=False) as main:
            main.sendall(b"".join(first))
            if hello is not None:
                main.sendall(self.proof(main, hello) + rest.pop(0))
            ticket = reference.ticket_of(self.hear(main, reference.WELCOME).data)
            for index in range(1, count):
                made += 1
                lane = stack.enter_context(self.connection(target))
                opening = conversation.lane(machine, index, ticket)
                if chance.random() < 0.3:
                    self.open_with(lane, opening)
                    continue
                lane.sendall(b"".join(opening.first))
                if opening.hello is not None:
                    lane.sendall(self.proof(lane, opening.hello) + opening.rest.pop(0))
                self.hear(lane, reference.LANE)
                self.send(lane, mutated(chance, opening.rest))
            self.send(main, mutated(chance, rest))
        return made

    @contextlib.contextmanager
    def connection(self, target: dict[str, Any], may_stay: bool = True) -> Iterator[socket.socket]:
        """One to the node, which is ended in one way or another."""
        sock = socket.create_connection(("127.0.0.1", target["port"]), PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            yield sock
        except (BrokenPipeError, ConnectionResetError):
            self.ends["refused while it spoke"] += 1
            sock.close()
        else:
            self.end(sock, may_stay)

    def open_with(self, sock: socket.socket, opening: Opening) -> None:
        chance = self.chance
        first, hello, rest = opening
        if hello is not None and chance.random() < 0.7:
            # The hello as it should be, so that what is behind the secret is reached.
            sock.sendall(b"".join(first))
            proven = self.proof(sock, hello)
            if chance.random() < 0.8:
                self.send(sock, proven + mutated(chance, rest))
            else:
                self.send(sock, mutated(chance, [proven, *rest]))
        elif chance.random() < 0.6:
            self.send(sock, b"".join(first) + mutated(chance, rest))
        else:
            self.send(sock, mutated(chance, [*first, *rest]))

    def proof(self, sock: socket.socket, hello: bytes) -> bytes:
        """What answers the challenge that the hello gets."""
        challenge = self.hear(sock, reference.AUTH).data
        return reference.encode(reference.AUTH, reference.auth_proof(3, SECRET, hello, challenge))

    def hear(self, sock: socket.socket, channel: int) -> reference.Frame:
        """The next frame of this channel. Raises ConnectionResetError if there is none."""
        decoder = Decoder()
        while True:
            data = sock.recv(1 << 16)
            if not data:
                raise ConnectionResetError
            for frame in decoder.feed(data):
                if frame.channel == channel:
                    return frame

    def send(self, sock: socket.socket, data: bytes) -> None:
        """In one piece, or in several."""
        chance = self.chance
        while data:
            size = len(data) if chance.random() < 0.6 else chance.randrange(1, len(data) + 1)
            sock.sendall(data[:size])
            data = data[size:]

    def end(self, sock: socket.socket, may_stay: bool) -> None:
        """Leave it open, reset it, or say that this is all and wait until the node closes it."""
        draw = self.chance.random()
        if draw < 0.05 and may_stay:
            self.ends["left open"] += 1
            self.open.append(sock)
            if len(self.open) > LEFT_OPEN:
                self.open.pop(0).close()
            return
        if draw < 0.1:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
            self.ends["reset"] += 1
            return
        begun = time.monotonic()
        try:
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass
            self.ends["closed by the node"] += 1
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            self.ends["reset by the node"] += 1
        self.longest = max(self.longest, time.monotonic() - begun)
        sock.close()


def send(targets: list[dict[str, Any]], seed: int, count: int) -> None:
    sender = Sender(targets, seed)
    begun = time.monotonic()
    sender.run(count)
    say(
        {
            "sent": count,
            "seconds": time.monotonic() - begun,
            "ends": sender.ends,
            "longest": sender.longest,
        }
    )


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        (uvloop.run if sys.argv[3] == "uvloop" else asyncio.run)(serve(sys.argv[2]))
    else:
        send(json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
