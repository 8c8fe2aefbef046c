"""Rooms in the browser: gateways and zones as processes of one cluster, and the page.

    python examples/chat/main.py
    python examples/chat/main.py --help

Open the page at two gateways, talk, and kill a zone: its rooms come back at another one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
import tempfile
import webbrowser
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path

from aiohttp import web
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
PAGE = HERE / "page"
PATIENCE = 30.0  # seconds for a process to start
GRACE = 10.0  # seconds for the orderly end

EPILOG = """\
examples:
  python examples/chat/main.py                  two gateways, two zones, the page on port 8000
  python examples/chat/main.py --open           and a browser on it
  python examples/chat/main.py --gateways 3 --zones 5
  python examples/chat/main.py --port 0         on any port that is free
  kill -9 PID                                   of a zone: watch its rooms come back

Ctrl-C stops all of it. Nothing is started again that has ended.
"""


class ChatError(Exception):
    """Why there is no chat."""


class Child:
    """A gateway or a zone."""

    def __init__(self, name: str, process: Process) -> None:
        self.name = name
        self.process = process
        self.node = -1
        self.port = 0

    async def ready(self) -> None:
        """Wait until it says that it runs.

        :raises ChatError: it does not.
        """
        assert self.process.stdout is not None
        try:
            line = await asyncio.wait_for(self.process.stdout.readline(), PATIENCE)
        except asyncio.TimeoutError:
            raise ChatError(f"{self.name} has not started within {PATIENCE:g} s") from None
        if not line:
            raise ChatError(f"{self.name} has ended: what it says above is why")
        said = json.loads(line)
        self.node, self.port = said["node"], said.get("port", 0)

    async def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), GRACE)
        except asyncio.TimeoutError:
            self.process.kill()
            await self.process.wait()


async def start(name: str, program: str, *arguments: str) -> Child:
    """Start one of the programs beside this one. Ctrl-C is for this one alone to hear."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(HERE / program), *arguments), stdout=PIPE, start_new_session=True
    )
    return Child(name, process)


def make_page(gateways: list[Child]) -> web.Application:
    """The page, the client that it uses, and where the gateways are."""

    async def index(request: web.Request) -> web.StreamResponse:
        return web.FileResponse(PAGE / "index.html")

    async def client(request: web.Request) -> web.StreamResponse:
        source = files("domi_fast.gateway").joinpath("client.js").read_text("utf-8")
        return web.Response(text=source, content_type="text/javascript")

    async def places(request: web.Request) -> web.StreamResponse:
        host = request.url.host
        return web.json_response([f"ws://{host}:{each.port}/" for each in gateways])

    async def guard(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["Cache-Control"] = "no-cache"
        response.headers["Content-Security-Policy"] = "default-src 'self'; connect-src 'self' ws:"

    app = web.Application()
    app.add_routes(
        [
            web.get("/", index),
            web.get("/client.js", client),
            web.get("/gateways", places),
            web.static("/", PAGE),
        ]
    )
    app.on_response_prepare.append(guard)
    return app


@contextlib.asynccontextmanager
async def serving(runner: web.AppRunner, port: int) -> AsyncIterator[int]:
    """The page, for the length of the block; gives its port.

    :raises ChatError: the port is taken.
    """
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, "127.0.0.1", port).start()
        except OSError as error:
            raise ChatError(f"port {port}: {error.strerror}; give --port another, or 0") from None
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def show(console: Console, page: str, gateways: list[Child], zones: list[Child]) -> None:
    table = Table(title="The chat runs", title_justify="left")
    for name in ("process", "node", "pid", "page"):
        table.add_column(name, justify="right" if name in ("node", "pid") else "left")
    for number, each in enumerate(gateways):
        url = f"{page}/?gateway={number}"
        table.add_row(each.name, str(each.node), str(each.process.pid), url)
    for each in zones:
        table.add_row(each.name, str(each.node), str(each.process.pid), "")
    console.print(table)
    pid = zones[0].process.pid
    console.print(f"kill -9 {pid} kills a zone; Ctrl-C stops it all", soft_wrap=True)


async def watch(console: Console, child: Child) -> None:
    code = await child.process.wait()
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    console.print(f"{child.name} (pid {child.process.pid}) has ended: {how}", soft_wrap=True)


async def chat(options: argparse.Namespace, console: Console) -> None:
    stopped = asyncio.Event()
    for stop in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(stop, stopped.set)
    children: list[Child] = []
    gateways: list[Child] = []
    zones: list[Child] = []
    with tempfile.TemporaryDirectory(prefix="domi-chat-") as folder:
        registry = ("--registry", f"sqlite://{folder}/registry.sqlite")
        runner = web.AppRunner(make_page(gateways), access_log=None)
        async with serving(runner, options.port) as port:
            origins = [f"--origin=http://{host}:{port}" for host in ("127.0.0.1", "localhost")]
            try:
                for number in range(options.zones):
                    snapshots = f"--snapshots={folder}/rooms.sqlite"
                    zones.append(await start(f"zone {number}", "zone.py", *registry, snapshots))
                    children.append(zones[-1])
                for number in range(options.gateways):
                    name = f"gateway {number}"
                    gateways.append(await start(name, "gateway.py", *registry, *origins))
                    children.append(gateways[-1])
                for child in children:
                    await child.ready()
                page = f"http://127.0.0.1:{port}"
                show(console, page, gateways, zones)
                if options.open:
                    webbrowser.open(page)
                watchers = [asyncio.create_task(watch(console, child)) for child in children]
                await stopped.wait()
                for watcher in watchers:
                    watcher.cancel()
                await asyncio.gather(*watchers, return_exceptions=True)
            finally:
                # Gateways first, so that nobody is told of rooms that are lost.
                for group in (gateways, zones):
                    await asyncio.gather(*(child.stop() for child in group))


def port(text: str) -> int:
    """A TCP port. Raises ArgumentTypeError for what is none."""
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text}: 0 (any that is free) to 65535 are allowed")
    return int(text)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Rooms in the browser: several gateways and zones, as processes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, what in (("gateways", "browsers connect to"), ("zones", "hold the rooms")):
        parser.add_argument(
            f"--{name}",
            type=positive,
            default=2,
            metavar="N",
            help=f"processes that {what} (default: %(default)s)",
        )
    parser.add_argument(
        "--port", type=port, default=8000, metavar="P", help="of the page (default: %(default)s)"
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    options = parser.parse_args()
    console = Console(highlight=False)
    try:
        asyncio.run(chat(options, console))
    except ChatError as error:
        print(f"no chat: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
