"""Periodic timers against the arithmetic of their beats."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from domi_fast import TimeWheel

TICK = 1_000_000  # nanoseconds

steps = st.lists(
    st.one_of(st.integers(1, 3 * TICK), st.integers(1, 10**9), st.integers(1, 10**13)),
    min_size=1,
    max_size=60,
)


@given(period=st.one_of(st.integers(TICK, 20 * TICK), st.integers(TICK, 10**11)), steps=steps)
def test_every_beat_is_called_or_counted(period: int, steps: list[int]) -> None:
    """A beat is due at a multiple of the period, and called at the first tick from there on; those
    that have come due by then, but the first, are missed."""
    wheel = TimeWheel(TICK / 1e9)
    calls: list[int] = []
    timer = wheel.every(period / 1e9, lambda: calls.append(timer.missed))
    now = 0
    expected: list[int] = []
    done = 0  # beats that were called or missed
    for step in steps:
        now += step
        wheel.advance(now / 1e9)
        now = round(now / 1e9 * 1e9)
        tick_due = -(-(done + 1) * period // TICK)
        if now // TICK >= tick_due:
            expected.append(now // period - done - 1)
            done = now // period
        assert calls == expected
        assert timer.active
