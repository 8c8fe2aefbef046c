"""A node's messages to itself: routing, dispatch and waking, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from domi_fast import Node


@pytest.fixture
def node(loop: Any) -> Iterator[Node]:
    node = Node("local", registry="memory://micro")
    loop.run_until_complete(node.start())
    yield node
    loop.run_until_complete(node.close())


def test_local_notify(measure: Any, items: int, loop: Any, node: Node) -> None:
    """From ``notify`` to a handler that does nothing, beside a Python function that is called
    through another one.
    """
    seen = 0
    done = asyncio.Event()

    def last(context: object) -> None:
        nonlocal seen
        seen += 1
        done.set()

    node.subscribe(50, lambda context: None)
    node.subscribe(51, last)

    async def notifies() -> None:
        done.clear()
        for _ in range(items):
            node.notify(50, b"sixteen bytes!!!")
        node.notify(51, b"")
        await done.wait()

    def handler(data: bytes) -> None:
        pass

    def notify(data: bytes) -> None:
        handler(data)

    def anchor() -> None:
        for _ in range(items):
            notify(b"sixteen bytes!!!")

    measure(lambda: loop.run_until_complete(notifies()), anchor, items)
    before = node.counters()["frames_in"]
    loop.run_until_complete(notifies())
    assert node.counters()["frames_in"] - before == items + 1


def test_local_request(measure: Any, items: int, loop: Any, node: Node) -> None:
    """Beside a future that the loop's next turn fulfils: the least that waiting costs."""
    node.subscribe(50, lambda context: context.reply(b"pong"))
    wrong = 0

    async def requests() -> None:
        nonlocal wrong
        for _ in range(items):
            wrong += await node.request(50, b"ping") != b"pong"

    async def futures() -> None:
        nonlocal wrong
        for _ in range(items):
            future = loop.create_future()
            loop.call_soon(future.set_result, b"pong")
            wrong += await future != b"pong"

    measure(
        lambda: loop.run_until_complete(requests()),
        lambda: loop.run_until_complete(futures()),
        items,
    )
    assert wrong == 0
