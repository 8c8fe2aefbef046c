"""Mailboxes: one message at a time, whatever handlers do."""

from __future__ import annotations

import pytest

from domi_fast.gateway.wire import UserMessage
from domi_fast.stateful.mailbox import BUDGET, Backlog, Mailbox
from tests.support import until


def message(number: int, data: bytes = b"") -> UserMessage:
    return UserMessage(1, 2, number, b"", data)


async def test_what_a_handler_puts_comes_when_it_has_ended() -> None:
    order: list[str] = []

    def handle(got: UserMessage) -> None:
        order.append(f"begin {got.event}")
        if got.event == 0:
            box.put(message(1))
        order.append(f"end {got.event}")

    box = Mailbox(handle, Backlog(10, 1000))
    box.release()
    box.put(message(0))
    assert order == ["begin 0", "end 0", "begin 1", "end 1"]
    assert box.idle


async def test_what_waits_is_handled_when_a_handler_has_raised() -> None:
    handled: list[int] = []

    def handle(got: UserMessage) -> None:
        handled.append(got.event)
        if got.event == 0:
            raise LookupError("no such thing")

    box = Mailbox(handle, Backlog(10, 1000))
    box.extend([message(0), message(1)])
    with pytest.raises(LookupError):
        box.release()
    await until(lambda: box.idle)
    assert handled == [0, 1]


async def test_the_loop_has_its_turn() -> None:
    handled: list[int] = []
    box = Mailbox(lambda got: handled.append(got.event), Backlog(1000, 1000))
    box.extend([message(number) for number in range(BUDGET + 1)])
    box.release()
    box.put(message(BUDGET + 1))
    assert len(handled) == BUDGET
    await until(lambda: box.idle)
    assert handled == list(range(BUDGET + 2))
