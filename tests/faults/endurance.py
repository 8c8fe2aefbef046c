"""Three nodes at 80 % of what they can: what is lost, and what becomes of latency and memory.

    python -m tests.faults.endurance --seconds 1800

One asks, notifies and publishes; two answer and take. The first seconds say how much they can; what
is due at the given share of that is sent when it is due. This process holds no node: it starts
theirs, weighs them at every interval, and notes what the machine is like meanwhile: what others
take of its processors, how late a thread wakes up that sleeps 5 ms, and what a loop of always the
same length takes. It prints all of it as JSON, and each interval to the standard error.

Latencies are those of requests, from when they were due, in microseconds. In a quiet interval, and
in the one before, others had next to nothing of the processors.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
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
# As much of a schedule may be made up for; the rest is given up, and told.
BEHIND = 0.25
PADDING = bytes(92)
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")
NAP = 0.005
NAPS = 20  # between two loops
LOOP = range(20_000)


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
    """Of microseconds, exact to a 512th. Of one size from the beginning, so that it never grows."""

    def __init__(self) -> None:
        self.counts = [0] * (512 * 32)

    def add(self, value: int) -> None:
        shift = max(0, value.bit_length() - 10)
        self.counts[min((shift << 9) + (value >> shift), len(self.counts) - 1)] += 1

    def take(self) -> list[tuple[int, int]]:
        """What is in it, as values and their counts; it is empty then."""
        found = []
        for index, count in enumerate(self.counts):
            if count:
                shift = max(0, (index >> 9) - 1)
                found.append(((index - (shift << 9)) << shift, count))
                self.counts[index] = 0
        return found


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
        self.latencies.take()
        return (self.news - before) / (time.monotonic() - began)

    async def pace(self, rate: float, interval: float, count: int) -> None:
        """So many steps a second, for so many intervals, each of which is told."""
        loop = asyncio.get_running_loop()

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
        begun = told = time.monotonic()
        working = [asyncio.ensure_future(work()) for _ in range(WINDOW)]
        for _ in range(count):
            told += interval
            before, given_up = self.news, 0.0
            while (now := time.monotonic()) < told:
                if now - (begun + given / rate) > BEHIND:
                    given_up += BEHIND
                    begun += BEHIND
                due = int((now - begun) * rate)
                while given <= due and self.waiting:
                    self.waiting.popleft().set_result(begun + given / rate)
                    given += 1
                await asyncio.sleep(TICK)
            say(
                rate=(self.news - before) / interval,
                given_up=given_up,
                latencies=self.latencies.take(),
            )
        self.over = True
        for waiting in self.waiting:
            waiting.cancel()
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
        peaks = [await asker.peak(given.peak) for _ in range(3)]
        say(peaks=peaks)
        await asker.pace(given.share * max(peaks), given.interval, given.intervals)
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


# -------------------------------------------------------------------------------------- the machine


class Machine:
    """What the processes of the machine have used since the last look, ours and the others'."""

    def __init__(self, ours: list[int]) -> None:
        self.ours = ours
        self.late: list[float] = []
        self.loops: list[float] = []
        self.napping = threading.Event()
        self.thread = threading.Thread(target=self.nap, daemon=True)
        self.last = self.used()

    def nap(self) -> None:
        while not self.napping.is_set():
            for _ in range(NAPS):
                due = time.monotonic() + NAP
                time.sleep(NAP)
                self.late.append(time.monotonic() - due)
            begun = time.thread_time()
            for _ in LOOP:
                pass
            self.loops.append(time.thread_time() - begun)

    def used(self) -> tuple[float, float, float]:
        """Seconds: the time, all processors', and that of ours."""
        fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy = sum(fields) - fields[3] - fields[4]
        return time.monotonic(), busy / TICKS, time.process_time() + sum(map(spent, self.ours))

    def look(self) -> dict[str, float]:
        now = self.used()
        (at, busy, ours), self.last = self.last, now
        late, self.late = self.late or [0.0], []
        loops, self.loops = self.loops or [0.0], []
        capacity = (now[0] - at) * (os.cpu_count() or 1)
        return {
            "others": round(max(0.0, now[1] - busy - (now[2] - ours)) / capacity, 4),
            "ours": round((now[2] - ours) / capacity, 4),
            "late": round(sorted(late)[int(len(late) * 0.99)] * 1e6),
            "loop": round(statistics.median(loops) * 1e6),
        }


def spent(process: int) -> float:
    """Seconds of processor that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE


# ------------------------------------------------------------------------------------------ the run


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

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@contextlib.contextmanager
def parts(given: list[str]) -> Iterator[list[Part]]:
    started: list[Part] = []
    with tempfile.TemporaryDirectory() as folder:
        registry = f"sqlite://{folder}/registry"
        try:
            for name in TAKERS:
                started.append(Part(name, registry, given))
                started[-1].said()
            started.append(Part("asker", registry, given))
            yield started
        finally:
            for part in started:
                part.process.kill()
                part.process.communicate()


def percentile(histograms: list[list[tuple[int, int]]], share: float) -> int:
    """Of all of them together, by the nearest rank."""
    together: Counter[int] = Counter()
    for histogram in histograms:
        for value, count in histogram:
            together[value] += count
    left = share * together.total()
    for value in sorted(together):
        left -= together[value]
        if left <= 0:
            return value
    return 0


def measure(given: argparse.Namespace) -> dict[str, Any]:
    intervals = []
    with parts(sys.argv[1:]) as (*takers, asker):
        peaks = asker.said()["peaks"]
        processes = [part.process.pid for part in (*takers, asker)]
        machine = Machine(processes)
        machine.thread.start()
        was_quiet, used = False, [spent(process) for process in processes]
        for number in range(given.intervals):
            told = asker.said()
            told |= machine.look()
            is_quiet = told["others"] <= given.quiet and not told["given_up"]
            told["quiet"], was_quiet = is_quiet and was_quiet, is_quiet
            before, used = used, [spent(process) for process in processes]
            steps = max(1.0, told["rate"] * given.interval)
            told["processor"] = [
                round((now - then) / steps * 1e6, 2) for now, then in zip(used, before, strict=True)
            ]
            told["resident"] = [resident(process) for process in processes]
            told["p50"] = percentile([told["latencies"]], 0.5)
            told["p99"] = percentile([told["latencies"]], 0.99)
            intervals.append(told)
            shown = {name: told[name] for name in told if name != "latencies"}
            print(number, json.dumps(shown), file=sys.stderr, flush=True)
        machine.napping.set()
        sent = asker.said()
        taken = []
        for part in takers:
            part.go_on()
            taken.append(part.said())
    return {
        "peaks": peaks,
        "rate": statistics.mean(told["rate"] for told in intervals),
        "given_up": sum(told["given_up"] for told in intervals),
        "sent": sent,
        "taken": taken,
        "first": part_of(intervals[slice(*given.first)]),
        "last": part_of(intervals[slice(*given.last)]),
    }


def part_of(some: list[dict[str, Any]]) -> dict[str, Any]:
    """What a stretch of intervals was like: all of it, and those that were quiet."""
    quiet = [told for told in some if told["quiet"]]
    return {
        "intervals": len(some),
        "quiet": len(quiet),
        "p50": percentile([told["latencies"] for told in some], 0.5),
        "p99": percentile([told["latencies"] for told in some], 0.99),
        "p99 of the quiet": percentile([told["latencies"] for told in quiet], 0.99),
        "median p99": statistics.median(told["p99"] for told in some),
        "late": statistics.median(told["late"] for told in quiet or some),
        "loop": statistics.median(told["loop"] for told in quiet or some),
        "others": round(statistics.mean(told["others"] for told in some), 4),
        "processor": [
            statistics.median(values)
            for values in zip(*(told["processor"] for told in quiet or some), strict=True)
        ],
        "resident": [
            statistics.median(values)
            for values in zip(*(told["resident"] for told in some), strict=True)
        ],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--interval", type=float, default=10.0)
    parser.add_argument("--peak", type=float, default=10.0, help="seconds of each of its 3 rounds")
    parser.add_argument("--share", type=float, default=0.8, help="of the peak")
    parser.add_argument(
        "--quiet", type=float, default=0.05, help="what others may have of the processors"
    )
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
