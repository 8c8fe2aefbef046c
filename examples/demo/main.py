"""The demonstration: four processes, every verb, every answer checked.

    python examples/demo/main.py
    python examples/demo/main.py --help

Three servers and a client find each other through a registry file; this program starts them, shows
how far they are, kills a server when the client asks for it, and reaps whatever is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SERVERS = 3
GRACE = 10.0  # seconds for the orderly end

EPILOG = """\
examples:
  python examples/demo/main.py                        the whole of it, in 10 to 20 seconds
  python examples/demo/main.py --messages 2000        a short one
  python examples/demo/main.py | tee demo.log         no terminal: plain lines, no colours
  NO_COLOR=1 python examples/demo/main.py             a progress bar without colours
  python examples/demo/main.py --break                the self-test: it must end in `demo failed`

The last line is `demo ok: ...` (exit code 0) or `demo failed: ...` (exit code 1).
"""


class DemoFailedError(Exception):
    """Why the demonstration has failed; with the log of the child that it is about."""

    def __init__(self, why: str, child: Child | None = None) -> None:
        super().__init__(why)
        self.log = child.last_lines() if child is not None else []


# ------------------------------------------------------------------------------------ what is shown


class Plain:
    """Lines, for what is not a terminal."""

    def __init__(self) -> None:
        self.name = ""

    def print(self, text: str, *, bold: bool = False) -> None:
        print(text, flush=True)

    def begin(self, total: int) -> None:
        pass

    def step(self, name: str, messages: int) -> None:
        self.name = name

    def progress(self, done: int) -> None:
        pass

    def step_done(self, seconds: float) -> None:
        self.print(f"  {self.name:<16} done in {seconds:6.2f} s")

    def end(self) -> None:
        pass


class Bar(Plain):
    """A progress bar, by rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        super().__init__()
        self.console = Console(highlight=False)
        self.bar = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("messages"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
        self.task: Any = None
        self.before = 0
        self.messages = 0

    def print(self, text: str, *, bold: bool = False) -> None:
        self.console.print(text, style="bold" if bold else None, markup=False, soft_wrap=True)

    def begin(self, total: int) -> None:
        self.task = self.bar.add_task("", total=total)
        self.bar.start()

    def step(self, name: str, messages: int) -> None:
        self.before += self.messages
        self.messages = messages
        self.bar.update(self.task, description=name, completed=self.before)

    def progress(self, done: int) -> None:
        self.bar.update(self.task, completed=self.before + min(done, self.messages))

    def step_done(self, seconds: float) -> None:
        pass

    def end(self) -> None:
        self.bar.stop()


def make_display() -> Plain:
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        with contextlib.suppress(ImportError):
            return Bar()
    return Plain()


def print_table(rows: list[dict[str, Any]], display: Plain) -> None:
    """What every step did, in columns."""

    def microseconds(value: float | None) -> str:
        return "" if value is None else f"{value * 1e6:,.0f}"

    display.print("")
    display.print(
        f"{'verb':<16}{'':<42}{'messages':>10}{'per second':>13}{'p50 µs':>9}{'p99 µs':>9}",
        bold=True,
    )
    display.print("-" * 99)
    for row in rows:
        rate = row["messages"] / row["seconds"] if row["seconds"] else 0.0
        line = (
            f"{row['verb']:<16}{row['what']:<42}{row['messages']:>10,}{rate:>13,.0f}"
            f"{microseconds(row['p50']):>9}{microseconds(row['p99']):>9}"
        )
        display.print(line.rstrip())
    display.print(
        f"\nmeasured just now: {SERVERS + 1} busy processes on {os.cpu_count()} CPUs, "
        f"Python {platform.python_version()}; with many in flight, a latency is mostly queueing"
    )


# ----------------------------------------------------------------------------------- the processes


class Child:
    """A process of the demonstration. It ends by itself when this one is gone: its stdin closes."""

    def __init__(self, name: str, folder: Path, *arguments: str, stdout: int | None = None) -> None:
        self.name = name
        self.may_end = False
        self.killed = False
        self.log = folder / f"{name}.log"
        paths = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(":") if p]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": ":".join([str(ROOT), *paths])},
                stdin=subprocess.PIPE,
                stdout=stdout or log,
                stderr=log,
                # Ctrl-C is for this process, which then sees to the others.
                start_new_session=True,
            )
        self.pidfd = os.pidfd_open(self.process.pid)

    @property
    def ended(self) -> str:
        """How it ended."""
        code = self.process.returncode
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def last_lines(self, count: int = 15) -> list[str]:
        lines = self.log.read_text(errors="replace").splitlines()
        return [f"  {self.name}: {line}" for line in lines[-count:]]

    def reap(self) -> None:
        """Kill what still runs, and collect it."""
        self.process.kill()
        self.process.wait()
        os.close(self.pidfd)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class Demo:
    """Starts the processes, follows what the client says, and ends everything."""

    def __init__(self, options: argparse.Namespace, folder: Path, display: Plain) -> None:
        self.options = options
        self.folder = folder
        self.display = display
        self.children: list[Child] = []
        self.rows: list[dict[str, Any]] = []
        self.deadline = time.monotonic() + options.timeout
        self.step = "the start"
        self.step_began = time.monotonic()
        self.done = False

    def run(self) -> None:
        registry = f"sqlite://{self.folder}/registry.db"
        common = ("--registry", registry, "--seed", str(self.options.seed))
        for number in range(1, SERVERS + 1):
            name = f"server-{number}"
            # One server also listens on a UNIX socket; its peers on this machine then prefer it.
            unix = ("--unix-path", f"{self.folder}/{name}.sock") if number == SERVERS else ()
            broken = ("--broken", self.options.broken) if number == 2 else ()
            self.start(
                name, "-m", "examples.demo.server", name, *common,
                "--stage", str(120 + number), *unix, *broken,
            )  # fmt: skip
        messages = ("--messages", str(self.options.messages))
        client = self.start(
            "client", "-m", "examples.demo.client", *common, *messages, stdout=subprocess.PIPE
        )
        self.follow(client)
        self.stop_servers()

    def start(self, name: str, *arguments: str, stdout: int | None = None) -> Child:
        child = Child(name, self.folder, *arguments, stdout=stdout)
        self.children.append(child)
        return child

    def follow(self, client: Child) -> None:
        """Until the client has ended: read what it says, and see that nobody dies."""
        stdout = client.process.stdout
        assert stdout is not None
        os.set_blocking(stdout.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            for child in self.children:
                selector.register(child.pidfd, selectors.EVENT_READ, child)
            lines = Lines(stdout)
            while not self.done:
                left = self.deadline - time.monotonic()
                if left <= 0:
                    raise DemoFailedError(
                        f"not done after {self.options.timeout:g} s, in {self.step}"
                    )
                for key, _ in selector.select(left):
                    if key.data is None:
                        for line in lines.read():
                            self.hear(json.loads(line))
                        continue
                    child = key.data
                    selector.unregister(child.pidfd)
                    for line in lines.read():  # its last words come before its end
                        self.hear(json.loads(line))
                    self.check_end(child)

    def check_end(self, child: Child) -> None:
        child.process.wait()
        if not child.may_end:
            raise DemoFailedError(f"{child.name} died in {self.step} ({child.ended})", child)

    def hear(self, event: dict[str, Any]) -> None:
        """What the client says."""
        display = self.display
        kind = event["event"]
        if kind == "connecting":
            display.print(f"{SERVERS} servers and a client start ...")
        elif kind == "steps":
            display.begin(event["total"])
        elif kind == "step":
            self.step = event["name"]
            self.step_began = time.monotonic()
            display.step(event["name"], event["messages"])
        elif kind == "progress":
            display.progress(event["done"])
        elif kind == "servers":
            for server in event["servers"]:
                display.print(
                    f"  node {server['id']}: {server['name']}, process {server['pid']}, "
                    f"connected by {server['address']}"
                )
        elif kind == "rows":
            self.rows += event["rows"]
            display.step_done(time.monotonic() - self.step_began)
        elif kind == "kill":
            (child,) = [c for c in self.children if c.process.pid == event["pid"]]
            child.may_end = child.killed = True
            child.process.kill()
            display.print(f"  {child.name} was killed with signal 9, under load")
        elif kind == "closing":
            self.step = "closing"
        elif kind == "failed":
            raise DemoFailedError(event["why"], self.children[-1])
        elif kind == "done":
            self.children[-1].may_end = True
            self.done = True

    def stop_servers(self) -> None:
        """The orderly end: SIGTERM, and exit code 0 of all but the one that was killed."""
        for child in self.children:
            if not child.may_end:
                child.process.terminate()
        for child in self.children:
            try:
                child.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                raise DemoFailedError(f"{child.name} did not stop within {GRACE:g} s") from None
            expected = -signal.SIGKILL if child.killed else 0
            if child.process.returncode != expected:
                raise DemoFailedError(f"{child.name} did not stop in order ({child.ended})", child)

    def reap(self) -> None:
        for child in self.children:
            child.reap()


class Lines:
    """Whole lines of a pipe that does not block."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._fd = pipe.fileno()
        self._rest = b""

    def read(self) -> Iterator[bytes]:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._fd, 65536):
                *whole, self._rest = (self._rest + data).split(b"\n")
                yield from whole


# --------------------------------------------------------------------------------------- the whole


def interrupted(number: int, frame: FrameType | None) -> None:
    raise DemoFailedError(f"interrupted by {signal.Signals(number).name}")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Three servers and a client, as processes: every verb, every answer checked, "
        "and a server killed under load.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--messages",
        type=positive,
        default=400_000,
        metavar="N",
        help="how much the busiest steps send; the others go by it (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, help="of the messages' contents (default: another one each time)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds after which the demonstration has failed (default: %(default)g)",
    )
    parser.add_argument(
        "--break",
        dest="broken",
        nargs="?",
        const="answer",
        default="",
        choices=["answer", "crash", "hang"],
        help="a self-test, to see that the checks are real: server-2 answers every seventh message "
        "wrongly (answer, the default), or dies (crash), or stops answering (hang) at the seventh; "
        "the demonstration must fail",
    )
    options = parser.parse_args(arguments)
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 32)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    display = make_display()
    began = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    failure, log = "", []
    with tempfile.TemporaryDirectory(prefix="domi-demo-") as folder:
        demo = Demo(options, Path(folder), display)
        try:
            demo.run()
        except DemoFailedError as error:
            failure, log = str(error), error.log
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            log = traceback.format_exc().splitlines()
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            display.end()
            demo.reap()
    if demo.rows:
        print_table(demo.rows, display)
    display.print("\n".join(["", *log, ""]).rstrip("\n") if log else "")
    if failure:
        display.print(f"demo failed: {failure} (seed {options.seed})")
        return 1
    messages = sum(row["messages"] for row in demo.rows)
    display.print(
        f"demo ok: {messages:,} messages by every verb, each answer checked, one server killed, "
        f"in {time.monotonic() - began:.1f} s (seed {options.seed})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
