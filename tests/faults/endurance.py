"""Three nodes at 80 % of what they can: what is lost, and what becomes of latency and memory.

    python -m tests.faults.endurance --seconds 1800

One asks, notifies and publishes; two answer and take. The first seconds say how much they can; what
is due at the given share of that is sent when it is due. This process holds no node: it starts
theirs, and weighs them at every interval.

In the end three others of the same kind are started, which have done nothing yet, and the two
threes have the machine by turns, a quarter of a second each: what the latency of the old is beside
that of the new does not depend on what the machine was like half an hour ago.

It prints all of it as JSON, and each interval to the standard error. Latencies are those of
requests, from when they were due, in microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop

from domi_fast import Context, DomiError, Node
from tests.support import ROOT, environment

ASK, NOTE, NEWS = 50, 51, 52
TAKERS = ("one", "other")
# Requests that are under way at most; what is due then waits, and its time counts.
WINDOW = 64
TICK = 0.001
# Seconds of a schedule that may be made up for; the rest is given up, and told.
BEHIND = 1.0
# Seconds that the old and the new have by turns, and that one of them may owe its next turn.
SLICE = 0.25
PADDING = bytes(92)
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


# --------------------------------------------------------------------------------------- the takers


class Taker:
    """Counts what comes on each channel, each of which must bring the next number."""

    def __init__(self) -> None:
        self.next = Counter({ASK: 0, NOTE: 0, NEWS: 0})
        self.wrong: Counter[int] = Counter()

    def take(self, ctx: Context) -> None:
        data = ctx.data
        (number,) = struct.unpack_from("<Q", data)
        if number != self.next[ctx.channel]:
            self.wrong[ctx.channel] += 1
        self.next[ctx.channel] = number + 1
        if ctx.is_request:
            ctx.reply(data)

    async def run(self, name: str, registry: str) -> None:
        node = Node(name, registry=registry)
        for channel in self.next:
            node.subscribe(channel, self.take)
        async with node:
            say(id=node.id)
            await asyncio.to_thread(sys.stdin.readline)
            say(next=list(self.next.values()), wrong=dict(self.wrong), counters=node.counters())
            await asyncio.to_thread(sys.stdin.readline)


# ---------------------------------------------------------------------------------------- the asker


class Histogram:
    """Of microseconds, exact to a 512th.

    It takes the same memory whatever is in it: what it took for latencies that are spread wider
    would be seen as a growth of the node beside it.
    """

    EMPTY = array("Q", bytes(8 * 512 * 32))

    def __init__(self) -> None:
        self.counts = self.EMPTY[:]

    def add(self, value: int) -> None:
        shift = max(0, value.bit_length() - 10)
        self.counts[min((shift << 9) + (value >> shift), len(self.counts) - 1)] += 1

    def percentile(self, share: float) -> int:
        """By the nearest rank; 0 when it is empty."""
        left = share * sum(self.counts)
        for index, count in enumerate(self.counts):
            left -= count
            if count and left <= 0:
                shift = max(0, (index >> 9) - 1)
                return (index - (shift << 9)) << shift
        return 0

    def clear(self) -> None:
        memoryview(self.counts)[:] = self.EMPTY


class Asker:
    def __init__(self, node: Node, takers: list[int]) -> None:
        self.node = node
        self.takers = takers
        self.asked = [0, 0]
        self.noted = [0, 0]
        self.news = 0
        self.short = 0  # subscribers that a publish did not reach
        self.outcomes: Counter[str] = Counter()
        self.latencies = Histogram()
        self.waiting: deque[asyncio.Future[float]] = deque()
        self.over = False
        self.owed = 0.0  # seconds of the schedule that the last pace was behind with

    async def step(self, due: float) -> None:
        """A publish, two notifies and an awaited request."""
        turn = self.news % 2
        node, taker = self.node, self.takers[turn]
        self.short += len(self.takers) - node.publish(NEWS, struct.pack("<Q", self.news) + PADDING)
        self.news += 1
        for _ in range(2):
            node.notify(NOTE, struct.pack("<Q", self.noted[turn]) + PADDING, to=taker)
            self.noted[turn] += 1
        data = struct.pack("<Q", self.asked[turn]) + PADDING
        asking = node.request(ASK, data, to=taker)
        self.asked[turn] += 1
        try:
            right = await asking == data
        except DomiError as error:
            self.outcomes[type(error).__name__] += 1
            return
        self.outcomes["answer" if right else "wrong"] += 1
        self.latencies.add(int((time.monotonic() - due) * 1e6))

    async def peak(self, seconds: float) -> float:
        """Steps a second when each that ends makes room for the next."""
        end = time.monotonic() + seconds

        async def work() -> None:
            while (now := time.monotonic()) < end:
                await self.step(now)

        began, before = time.monotonic(), self.news
        await asyncio.gather(*(work() for _ in range(WINDOW)))
        self.latencies.clear()
        return (self.news - before) / (time.monotonic() - began)

    async def pace(self, rate: float, interval: float, count: int) -> None:
        """So many steps a second, for so many intervals, each of which is told.

        What it is behind with in the end falls to the next.
        """
        loop = asyncio.get_running_loop()
        self.over = False

        async def work() -> None:
            nonlocal given
            while not self.over:
                due = begun + given / rate
                if due <= time.monotonic():  # who is behind waits for no tick
                    given += 1
                else:
                    waiting = loop.create_future()
                    self.waiting.append(waiting)
                    due = await waiting
                await self.step(due)

        given = 0
        told = time.monotonic()
        begun = told - self.owed
        working = [asyncio.ensure_future(work()) for _ in range(WINDOW)]
        for left in reversed(range(count)):
            told += interval
            before, given_up = self.news, 0.0
            while (now := time.monotonic()) < told:
                late = now - (begun + given / rate) - BEHIND
                if late > 0:
                    given_up += late
                    begun += late
                due = int((now - begun) * rate)
                while given <= due and self.waiting:
                    self.waiting.popleft().set_result(begun + given / rate)
                    given += 1
                await asyncio.sleep(TICK)
            if not left:
                behind = max(0.0, told - (begun + given / rate))
                self.owed = min(behind, SLICE)
                given_up += behind - self.owed
            say(
                rate=(self.news - before) / interval,
                given_up=given_up,
                p50=self.latencies.percentile(0.5),
                p99=self.latencies.percentile(0.99),
            )
            self.latencies.clear()
        self.over = True
        for waiting in self.waiting:
            waiting.cancel()
        self.waiting.clear()
        for ended in await asyncio.gather(*working, return_exceptions=True):
            if isinstance(ended, BaseException) and not isinstance(ended, asyncio.CancelledError):
                raise ended


async def ask(registry: str, given: argparse.Namespace) -> None:
    refused: Counter[str] = Counter()

    def on_error(error: Exception, frame: object) -> None:
        refused[type(error).__name__] += 1

    async with Node(
        "asker", registry=registry, on_error=on_error, breaker=None, request_timeout=60.0
    ) as node:
        await node.wait_subscribed(NEWS, len(TAKERS), 30)
        named = {peer.name: peer.id for peer in node.peers.values()}
        asker = Asker(node, [named[name] for name in TAKERS])
        await asker.peak(given.peak / 3)
        say(peaks=[await asker.peak(given.peak) for _ in range(3)])
        while pace := json.loads(await asyncio.to_thread(sys.stdin.readline)):
            await asker.pace(*pace)
            asker.latencies.clear()
        for taker in asker.takers:
            await node.drained(taker)
        # Behind all else on its way to either: what is answered has had the rest before it.
        await asyncio.gather(*(asker.step(time.monotonic()) for _ in TAKERS))
        say(
            asked=asker.asked,
            noted=asker.noted,
            news=asker.news,
            short=asker.short,
            outcomes=asker.outcomes,
            refused=refused,
            counters=node.counters(),
        )
        await asyncio.to_thread(sys.stdin.readline)


# ------------------------------------------------------------------------------------------ the run


def spent(process: int) -> float:
    """Seconds of processor that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE


class Part:
    def __init__(self, name: str, registry: str, given: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.endurance", *given, f"--{name}", registry],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment(),
            text=True,
        )

    def said(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended with {self.process.wait(10)}")
        return dict(json.loads(line))

    def tell(self, what: Any = None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()


class Three:
    """A cluster that talks: two takers, and the asker."""

    def __init__(self, given: list[str], registry: str) -> None:
        self.takers: list[Part] = []
        try:
            for name in TAKERS:
                self.takers.append(Part(name, registry, given))
                self.takers[-1].said()
            self.asker = Part("asker", registry, given)
            self.peaks: list[float] = self.asker.said()["peaks"]
        except BaseException:
            self.end()
            raise

    @property
    def parts(self) -> list[Part]:
        return [*self.takers, self.asker] if hasattr(self, "asker") else self.takers

    @property
    def processes(self) -> list[int]:
        return [part.process.pid for part in self.parts]

    def pace(self, rate: float, interval: float, count: int) -> Iterator[dict[str, Any]]:
        """What each interval was like, as soon as it is over."""
        self.asker.tell([rate, interval, count])
        for _ in range(count):
            yield self.asker.said()

    def finish(self) -> dict[str, Any]:
        """What was sent, and what each of the takers has had."""
        self.asker.tell([])
        sent = self.asker.said()
        for part in self.takers:
            part.tell()
        return {"sent": sent, "taken": [part.said() for part in self.takers]}

    def end(self) -> None:
        for part in self.parts:
            part.process.kill()
            part.process.communicate()


@contextlib.contextmanager
def three(given: list[str]) -> Iterator[Three]:
    with tempfile.TemporaryDirectory() as folder:
        started = Three(given, f"sqlite://{folder}/registry")
        try:
            yield started
        finally:
            started.end()


def measure(given: argparse.Namespace) -> dict[str, Any]:
    intervals = []
    with three(sys.argv[1:]) as old:
        rate = given.share * max(old.peaks)
        used = [spent(process) for process in old.processes]
        for number, told in enumerate(old.pace(rate, given.interval, given.intervals)):
            before, used = used, [spent(process) for process in old.processes]
            steps = max(1.0, told["rate"] * given.interval)
            told["processor"] = [
                round((now - then) / steps * 1e6, 2) for now, then in zip(used, before, strict=True)
            ]
            told["resident"] = [resident(process) for process in old.processes]
            intervals.append(told)
            print(number, json.dumps(told), file=sys.stderr, flush=True)
        with three(sys.argv[1:]) as new:
            pairs = compare(old, new, rate, given)
            ended = [each.finish() for each in (old, new)]
    slices = [told for pair in pairs for told in pair]
    return {
        "peaks": old.peaks,
        "rate": rate_of(intervals),
        "given_up": sum(told["given_up"] for told in intervals),
        "ended": ended,
        "first": part_of(intervals[slice(*given.first)]),
        "last": part_of(intervals[slice(*given.last)]),
        "pairs": len(pairs),
        "rate of the pairs": rate_of(slices),
        "drift": drift([(one["p99"], other["p99"]) for one, other in pairs]),
    }


def compare(
    old: Three, new: Three, rate: float, given: argparse.Namespace
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Both, slice by slice: what follows upon the other goes first in the next.

    Where some of the schedule was given up others had the machine: another pair is run instead, of
    as many again at most, and of a few that are wanted twenty more.
    """
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for number in range(-2, 2 * given.pairs + 20):  # those below 0 wake up what has slept
        if len(pairs) == given.pairs:
            break
        found = {}
        for each in (old, new) if number % 2 else (new, old):
            (told,) = each.pace(rate, SLICE, 1)
            found[each] = told
        if number >= 0 and not any(told["given_up"] for told in found.values()):
            pairs.append((found[old], found[new]))
    return pairs


def rate_of(some: list[dict[str, Any]]) -> float:
    """Steps a second; of nothing 0."""
    return sum(float(told["rate"]) for told in some) / max(1, len(some))


def drift(pairs: list[tuple[float, float]]) -> list[float]:
    """What the p99 of the old is to that of the new: the median of the pairs' ratios, and before
    and behind it the bounds that it lies between at a confidence of 95 %, by ranks. Empty when
    there is no pair: others had the machine all the time."""
    ratios = sorted(one / max(other, 1.0) for one, other in pairs)
    if not ratios:
        return []
    middle, reach = len(ratios) / 2, 0.98 * math.sqrt(len(ratios))
    low = ratios[max(0, int(middle - reach))]
    high = ratios[min(len(ratios) - 1, int(middle + reach))]
    return [round(each, 3) for each in (low, statistics.median(ratios), high)]


def part_of(some: list[dict[str, Any]]) -> dict[str, Any]:
    """What a stretch of intervals was like."""
    return {
        "p50": statistics.median(told["p50"] for told in some),
        "p99": statistics.median(told["p99"] for told in some),
        **{
            what: [
                statistics.median(values)
                for values in zip(*(told[what] for told in some), strict=True)
            ]
            for what in ("processor", "resident")
        },
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--interval", type=float, default=10.0)
    parser.add_argument("--peak", type=float, default=10.0, help="seconds of each of its 3 rounds")
    parser.add_argument("--share", type=float, default=0.8, help="of the peak")
    parser.add_argument("--pairs", type=int, default=1500, help="of slices of the old and the new")
    for name in ("asker", *TAKERS):
        parser.add_argument(f"--{name}", metavar="REGISTRY", help=argparse.SUPPRESS)
    given = parser.parse_args()
    count = given.intervals = max(8, int(given.seconds / given.interval))
    given.first = [count // 15, count // 5]  # of half an hour: minutes 2 to 6
    given.last = [count - (count // 5 - count // 15), count]
    return given


def main() -> None:
    given = arguments()
    if given.asker:
        uvloop.run(ask(given.asker, given))
    elif name := next((name for name in TAKERS if getattr(given, name)), None):
        uvloop.run(Taker().run(name, getattr(given, name)))
    else:
        print(json.dumps(measure(given), indent=2))


if __name__ == "__main__":
    main()
