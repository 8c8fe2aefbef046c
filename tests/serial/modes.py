"""Serial mode of a node, on its loop or on a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from domi_fast import JoinContext, Node, Serial
from tests.support import nodes, until

MODE = {"thread": False}  # what the `mode` fixture says


def make_serial(node: Node, **settings: Any) -> Serial:
    return Serial(node, **{**MODE, **settings})


@asynccontextmanager
async def pair(url: str, **settings: Any) -> AsyncIterator[tuple[Node, Node, Serial]]:
    """Two nodes, and serial mode at the second, which has not started.

    :param node: a dict, settings of the nodes; the others are those of the serial mode.
    """
    async with nodes(url, "a", "b", **settings.pop("node", {})) as (a, b):
        serial = make_serial(b, **settings)
        try:
            yield a, b, serial
        finally:
            await serial.close()


def data(joined: JoinContext) -> list[bytes]:
    return [context.data for context in joined.requests]


async def within(serial: Serial, work: Callable[[], Any]) -> Any:
    """What ``work`` returns or raises, run on the serial thread."""
    ended: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            ended.set_result(work())
        except BaseException as error:
            ended.set_exception(error)

    serial.call_later(0.0, run)
    return await asyncio.wait_for(asyncio.wrap_future(ended), 10)


async def asleep(serial: Serial) -> None:
    """Wait until the serial thread sleeps, and not only for the interpreter's lock."""
    thread = await within(serial, threading.get_native_id)
    status = Path(f"/proc/self/task/{thread}/status")
    switches = ""

    def is_asleep() -> bool:
        # One that waits for the lock runs as soon as the loop waits for anything.
        nonlocal switches
        before, text = switches, status.read_text()
        switches = text[text.index("voluntary_ctxt_switches") :]
        return "State:\tS" in text and switches == before

    await until(is_asleep)
