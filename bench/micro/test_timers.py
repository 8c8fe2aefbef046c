"""A timer that is set and taken back, as every request's deadline is."""

from __future__ import annotations

from typing import Any

from domi_fast import TimeWheel


def nothing() -> None:
    pass


def test_wheel_schedule_cancel(measure: Any, items: int) -> None:
    wheel = TimeWheel()

    def work() -> None:
        for _ in range(items):
            wheel.call_later(5.0, nothing).cancel()

    measure(work, items)
    assert len(wheel) == 0


def test_wheel_schedule_cancel_anchor(measure: Any, items: int, loop: Any) -> None:
    def work() -> None:
        for _ in range(items):
            loop.call_later(5.0, nothing).cancel()
        # uvloop frees a cancelled timer in the loop's next turn.
        loop.call_soon(loop.stop)
        loop.run_forever()

    measure(work, items)
