"""TimeWheel and Timer, case by case."""

from __future__ import annotations

import functools
import gc
import os
import sys
import tracemalloc
import weakref
from collections.abc import Callable, Iterator

import pytest

from domi_fast import Timer, TimeWheel, _core

SANITIZE = os.environ.get("DOMI_SANITIZE") == "1"


class Callback:
    """Something that a weak reference can watch."""

    def __call__(self) -> None:
        pass


def at(wheel: TimeWheel, times: list[float], into: list[float]) -> list[Timer]:
    def timer(when: float) -> Timer:
        return wheel.call_at(when, lambda: into.append(when))

    return [timer(when) for when in times]


def test_nothing_fires_before_its_time_nor_a_tick_after() -> None:
    wheel = TimeWheel(0.001)
    fired: list[float] = []
    at(wheel, [0.0105], fired)
    assert wheel.advance(0.0104) == 0
    assert wheel.advance(0.0105) == 0
    assert wheel.advance(0.01099) == 0
    assert wheel.advance(0.011) == 1
    assert fired == [0.0105]
    assert wheel.advance(1.0) == 0


def test_a_time_on_a_tick_fires_at_that_tick() -> None:
    wheel = TimeWheel(0.001)
    fired: list[float] = []
    at(wheel, [0.01], fired)
    assert wheel.advance(0.009999) == 0
    assert wheel.advance(0.01) == 1


@pytest.mark.parametrize("level", range(8))
def test_each_level_fires_to_the_tick(level: int) -> None:
    for count in (1, 2, 63):
        for off in (-1, 0, 1):
            ticks = count * 64**level + off
            if not 0 < ticks <= 9 * 10**12:
                continue
            when = ticks / 1000
            wheel = TimeWheel(0.001)
            fired: list[float] = []
            at(wheel, [when], fired)
            # Far out, a float does not hit the tick itself: the one behind it at the latest.
            early, due = (0.001, 0.0) if level < 6 else (0.002, 0.001)
            assert wheel.advance(when - early) == 0
            assert wheel.advance(when + due) == 1, (level, count, off)
            assert len(wheel) == 0


def test_one_huge_step_fires_all_levels_in_order() -> None:
    times = [64.0**level * 0.001 * factor for level in range(8) for factor in (1, 1.5, 63)]
    times = sorted(time for time in times if time < 9e9)
    wheel = TimeWheel(0.001)
    fired: list[float] = []
    at(wheel, times[::-1], fired)
    assert wheel.advance(9e9) == len(times)
    assert fired == times


def test_many_timers_in_tiny_steps() -> None:
    wheel = TimeWheel(0.001)
    fired: list[float] = []
    times = [i / 1000 for i in range(1, 5000)]
    at(wheel, times, fired)
    for i in range(1, 5000):
        assert wheel.advance(i / 1000) == 1
        assert fired[-1] == i / 1000
    assert len(wheel) == 0


def test_the_clock_may_begin_anywhere() -> None:
    wheel = TimeWheel(0.001, start=1e6)
    fired: list[float] = []
    at(wheel, [0.0, 1e6 + 0.5], fired)
    assert wheel.advance(1e6) == 0
    assert wheel.advance(1e6 + 0.001) == 1
    assert fired == [0.0]
    assert wheel.advance(1e6 + 0.499) == 0
    assert wheel.advance(1e6 + 0.5) == 1


def test_call_later_counts_from_the_last_advance() -> None:
    wheel = TimeWheel(0.001, start=10.0)
    wheel.advance(20.0)
    fired: list[str] = []
    timer = wheel.call_later(0.5, lambda: fired.append("later"))
    assert timer.active
    assert wheel.advance(20.499) == 0
    assert wheel.advance(20.501) == 1
    assert not timer.active


def test_a_time_that_has_passed_fires_at_the_next_tick() -> None:
    wheel = TimeWheel(0.001)
    wheel.advance(5.0)
    fired: list[float] = []
    at(wheel, [1.0, -3.0], fired)
    assert wheel.advance(5.0) == 0
    assert wheel.advance(5.001) == 2


def test_going_back_changes_nothing() -> None:
    wheel = TimeWheel(0.001)
    fired: list[float] = []
    at(wheel, [2.0], fired)
    wheel.advance(1.0)
    assert wheel.advance(0.5) == 0
    at(wheel, [1.5], fired)
    assert wheel.advance(1.6) == 1
    assert wheel.advance(2.0) == 1
    assert fired == [1.5, 2.0]


def test_cancel() -> None:
    wheel = TimeWheel(0.001)
    fired: list[float] = []
    first, second = at(wheel, [1.0, 1.0], fired)
    assert len(wheel) == 2
    assert first.cancel()
    assert not first.cancel()
    assert not first.active
    assert len(wheel) == 1
    assert wheel.advance(1.0) == 1
    assert not second.active
    assert not second.cancel()


def test_cancel_lets_go_of_the_callback_at_once() -> None:
    wheel = TimeWheel(0.001)
    callback = Callback()
    seen = weakref.ref(callback)
    timer = wheel.call_at(1.0, callback)
    del callback
    assert seen() is not None
    timer.cancel()
    assert seen() is None


def test_firing_lets_go_of_the_callback() -> None:
    wheel = TimeWheel(0.001)
    callback = Callback()
    seen = weakref.ref(callback)
    timer = wheel.call_at(1.0, callback)
    del callback
    wheel.advance(1.0)
    assert seen() is None
    assert not timer.active


def test_callbacks_may_cancel_what_is_due_with_them_and_what_is_not() -> None:
    wheel = TimeWheel(0.001)
    fired: list[str] = []
    timers: dict[str, Timer] = {}

    def kill() -> None:
        fired.append("kill")
        assert timers["together"].cancel()
        assert timers["later"].cancel()
        assert not timers["kill"].cancel()

    timers["kill"] = wheel.call_at(1.0, kill)
    timers["together"] = wheel.call_at(1.0, lambda: fired.append("together"))
    timers["later"] = wheel.call_at(500.0, lambda: fired.append("later"))
    assert wheel.advance(1000.0) == 1
    assert fired == ["kill"]
    assert len(wheel) == 0
    assert wheel.next_deadline() is None


def test_callbacks_may_schedule() -> None:
    wheel = TimeWheel(0.001)
    fired: list[float] = []

    def more() -> None:
        fired.append(1.0)
        at(wheel, [1.0, 2.0, 5.0], fired)

    wheel.call_at(1.0, more)
    assert wheel.advance(1.0) == 1
    assert wheel.advance(1.001) == 1
    assert wheel.advance(4.0) == 1
    assert wheel.advance(5.0) == 1
    assert fired == [1.0, 1.0, 2.0, 5.0]


def test_what_a_callback_schedules_keeps_the_order_within_one_step() -> None:
    wheel = TimeWheel(0.001)
    fired: list[float] = []

    def more() -> None:
        fired.append(1.0)
        at(wheel, [2.0], fired)

    wheel.call_at(1.0, more)
    at(wheel, [3.0], fired)
    assert wheel.advance(10.0) == 3
    assert fired == [1.0, 2.0, 3.0]


def test_a_callback_that_always_comes_again_ends_with_the_step() -> None:
    wheel = TimeWheel(0.001)
    calls: list[None] = []

    def again() -> None:
        calls.append(None)
        wheel.call_at(0.0, again)

    wheel.call_at(0.0, again)
    wheel.advance(0.1)
    assert 1 <= len(calls) <= 100
    assert len(wheel) == 1
    # The collector does not see into a wheel: callbacks that hold it are let go of by hand.
    wheel.clear()


def test_an_advance_within_an_advance_does_nothing() -> None:
    wheel = TimeWheel(0.001)
    results: list[int] = []
    wheel.call_at(1.0, lambda: results.append(wheel.advance(5.0)))
    wheel.call_at(2.0, lambda: results.append(-1))
    assert wheel.advance(1.0) == 1
    assert results == [0]
    assert wheel.advance(2.0) == 1


def test_a_callback_that_raises_holds_nothing_up_for_good() -> None:
    wheel = TimeWheel(0.001)
    fired: list[float] = []

    def fail() -> None:
        raise ZeroDivisionError

    at(wheel, [1.0], fired)
    broken = wheel.call_at(1.0, fail)
    at(wheel, [1.0, 2.0], fired)
    with pytest.raises(ZeroDivisionError):
        wheel.advance(3.0)
    assert not broken.active
    assert fired == [1.0]
    assert len(wheel) == 2
    assert wheel.next_deadline() is not None
    assert wheel.advance(3.0) == 2
    assert fired == [1.0, 1.0, 2.0]


def test_what_waits_behind_a_failure_can_be_cancelled_and_cleared() -> None:
    for clear in (True, False):
        wheel = TimeWheel(0.001)
        fired: list[float] = []

        def fail() -> None:
            raise ZeroDivisionError

        wheel.call_at(1.0, fail)
        [rest] = at(wheel, [1.0], fired)
        with pytest.raises(ZeroDivisionError):
            wheel.advance(1.0)
        assert len(wheel) == 1
        if clear:
            wheel.clear()
        else:
            assert rest.cancel()
        assert not rest.active
        assert len(wheel) == 0
        assert wheel.advance(2.0) == 0
        assert fired == []


def test_clear() -> None:
    wheel = TimeWheel(0.001)
    fired: list[float] = []
    timers = at(wheel, [0.001, 1.0, 100.0, 1e6, 1e9], fired)
    wheel.clear()
    assert len(wheel) == 0
    assert wheel.next_deadline() is None
    assert not any(timer.active for timer in timers)
    assert not any(timer.cancel() for timer in timers)
    assert wheel.advance(9e9) == 0
    at(wheel, [9e9 + 1], fired)
    assert wheel.advance(9e9 + 2) == 1


def test_clear_within_a_callback() -> None:
    wheel = TimeWheel(0.001)
    fired: list[float] = []
    wheel.call_at(1.0, wheel.clear)
    at(wheel, [1.0, 1.5, 70.0], fired)
    assert wheel.advance(100.0) == 1
    assert fired == []
    assert len(wheel) == 0


def test_a_wheel_that_is_dropped_frees_its_timers() -> None:
    wheel = TimeWheel(0.001)
    callbacks = [Callback() for _ in range(8)]
    seen = [weakref.ref(callback) for callback in callbacks]
    timers = [wheel.call_at(64.0**i / 1000, callbacks[i]) for i in range(8)]
    del callbacks
    live = _core.live_objects()["timers"]
    del wheel
    gc.collect()
    assert [ref() for ref in seen] == [None] * 8
    assert not any(timer.active for timer in timers)
    assert not any(timer.cancel() for timer in timers)
    del timers
    gc.collect()
    if _core.is_debug_build():
        assert _core.live_objects()["timers"] == live - 8


def test_a_timer_that_nobody_holds_still_fires() -> None:
    wheel = TimeWheel(0.001)
    fired: list[float] = []
    at(wheel, [1.0], fired)
    gc.collect()
    assert wheel.advance(1.0) == 1


def test_a_timer_costs_one_reference_while_it_waits() -> None:
    wheel = TimeWheel(0.001)
    timer = wheel.call_at(1.0, int)
    pending = sys.getrefcount(timer)
    wheel.advance(1.0)
    assert sys.getrefcount(timer) == pending - 1


def test_next_deadline_is_never_later_than_the_earliest() -> None:
    wheel = TimeWheel(0.001)
    assert wheel.next_deadline() is None
    fired: list[float] = []
    for when in (4000.0, 70.0, 0.05, 0.02):
        at(wheel, [when], fired)
        deadline = wheel.next_deadline()
        assert deadline is not None
        assert 0 < deadline <= when
    steps = 0
    while (deadline := wheel.next_deadline()) is not None:
        wheel.advance(deadline)
        steps += 1
        assert steps < 20
    assert fired == [0.02, 0.05, 70.0, 4000.0]


@pytest.mark.parametrize("resolution", [0.0, -1.0, 0.000009, 1.1, float("nan"), float("inf")])
def test_a_resolution_out_of_range(resolution: float) -> None:
    with pytest.raises(ValueError, match=r"0\.00001 to 1 second"):
        TimeWheel(resolution)


@pytest.mark.parametrize("start", [-1.0, 1.1e9, float("nan"), float("inf")])
def test_a_start_out_of_range(start: float) -> None:
    with pytest.raises(ValueError, match="start"):
        TimeWheel(0.001, start=start)


@pytest.mark.parametrize("when", [1.1e10, 1e300, float("nan"), float("inf")])
def test_a_time_out_of_range(when: float) -> None:
    wheel = TimeWheel(0.001)
    callback = Callback()
    seen = weakref.ref(callback)
    timer = wheel.call_at(1.0, callback)
    asking: list[Callable[[], object]] = [
        lambda: wheel.call_at(when, print),
        lambda: wheel.call_later(when, print),
        lambda: wheel.advance(when),
    ]
    for ask in asking:
        with pytest.raises(ValueError, match="are allowed"):
            ask()
    assert len(wheel) == 1
    assert timer.active
    assert seen() is not None
    assert wheel.advance(1.0) == 1


def test_a_time_beyond_the_wheel_of_a_fine_resolution() -> None:
    wheel = TimeWheel(0.00001)
    fired: list[float] = []
    at(wheel, [2.8e9], fired)
    with pytest.raises(ValueError, match=r"2\.81475e\+09 s"):
        wheel.call_at(2.9e9, print)
    with pytest.raises(ValueError, match=r"2\.81475e\+09 s"):
        wheel.advance(1e10)
    assert wheel.advance(2.8e9) == 1


def test_a_callback_that_would_not_run_when_it_is_called() -> None:
    async def later() -> None:
        pass

    def generator() -> Iterator[None]:
        yield

    class Holder:
        async def method(self) -> None:
            pass

    wheel = TimeWheel(0.001)
    for callback in (later, generator, Holder().method):
        for add in (wheel.call_at, wheel.call_later, wheel.every):
            with pytest.raises(TypeError, match="is an async def or a generator"):
                add(1.0, callback)
    assert wheel.pending == 0
    # What hides it is found when it has run.
    wheel.call_at(1.0, functools.partial(later))
    with pytest.raises(TypeError, match="has returned a coroutine"):
        wheel.advance(2.0)


def test_timers_of_one_tick_fire_in_the_order_in_which_they_were_set() -> None:
    fired: list[str] = []
    wheel = TimeWheel(1.0)
    wheel.call_at(0.9, lambda: fired.append("first"))
    wheel.call_at(0.2, lambda: fired.append("second"))
    wheel.advance(1.0)
    assert fired == ["first", "second"]


def test_a_callback_that_cannot_be_called() -> None:
    wheel = TimeWheel(0.001)
    with pytest.raises(TypeError, match="not callable"):
        wheel.call_at(1.0, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not callable"):
        wheel.call_later(1.0, 5)  # type: ignore[arg-type]
    assert len(wheel) == 0


# ---------------------------------------------------------------------------------------- every


def test_a_periodic_timer_beats_until_it_is_cancelled() -> None:
    wheel = TimeWheel(0.001, start=5.0)
    beats: list[float] = []
    now = 5.0
    timer = wheel.every(0.25, lambda: beats.append(now))
    for step in range(1, 1001):
        now = 5.0 + step / 1000
        wheel.advance(now)
    assert beats == [5.25, 5.5, 5.75, 6.0]
    assert len(wheel) == 1
    assert [timer.active, timer.cancel(), timer.active] == [True, True, False]
    assert wheel.advance(100.0) == 0
    assert (len(wheel), len(beats)) == (0, 4)


def test_a_periodic_timer_does_not_drift() -> None:
    """However late the wheel is advanced, the next beat is where it would have been."""
    wheel = TimeWheel(0.001)
    beats: list[float] = []
    now = 0.0
    wheel.every(1.0, lambda: beats.append(now))
    for beat in range(1, 2000):
        now = beat + 0.9 * (beat % 2)
        wheel.advance(now)
    assert beats == [beat + 0.9 * (beat % 2) for beat in range(1, 2000)]
    now = 2000.0
    assert wheel.advance(now) == 1


def test_a_period_that_is_no_number_of_ticks() -> None:
    wheel = TimeWheel(0.01)
    beats: list[int] = []
    tick = 0
    wheel.every(0.024, lambda: beats.append(tick))
    for tick in range(1, 1201):
        wheel.advance(tick / 100)
    assert beats == [-(-24 * beat // 10) for beat in range(1, 501)]


def test_a_periodic_timer_says_how_many_beats_it_missed() -> None:
    wheel = TimeWheel(0.001)
    missed: list[int] = []
    timer = wheel.every(0.1, lambda: missed.append(timer.missed))
    for now in (0.1, 0.2, 0.55, 0.6, 2.05, 2.1):
        assert wheel.advance(now) == 1
    assert missed == [0, 0, 2, 0, 13, 0]
    assert len(missed) + sum(missed) == 21
    assert wheel.call_later(1.0, print).missed == 0
    timer.cancel()
    assert timer.missed == 0


def test_a_periodic_timer_cancelled_by_its_own_callback() -> None:
    wheel = TimeWheel(0.001)
    callback = Callback()
    seen = weakref.ref(callback)
    beats: list[bool] = []

    def beat(held: object = callback) -> None:
        beats.append(timer.cancel())
        beats.append(timer.cancel())

    timer = wheel.every(0.1, beat)
    del beat, callback
    assert wheel.advance(1.0) == 1
    assert wheel.advance(2.0) == 0
    assert beats == [True, False]
    gc.collect()
    assert seen() is None


def test_a_periodic_callback_that_raises_is_called_again() -> None:
    wheel = TimeWheel(0.001)
    beats: list[int] = []

    def beat() -> None:
        beats.append(timer.missed)
        raise KeyError

    timer = wheel.every(0.5, beat)
    for now in (0.5, 1.0, 2.0):
        with pytest.raises(KeyError):
            wheel.advance(now)
    assert beats == [0, 0, 1]


@pytest.mark.parametrize("period", [0.0, -1.0, 0.0009, 1.1e9, float("inf"), float("nan")])
def test_a_period_out_of_range(period: float) -> None:
    wheel = TimeWheel(0.001)
    with pytest.raises(ValueError, match=r"from 0\.001 s, one tick, to 1e9 s is allowed"):
        wheel.every(period, print)
    with pytest.raises(TypeError, match="not callable"):
        wheel.every(1.0, 5)  # type: ignore[arg-type]
    assert len(wheel) == 0


def test_a_period_of_one_tick_is_allowed_whatever_the_tick() -> None:
    for micros in range(10, 20_000, 7):
        wheel = TimeWheel(micros / 1e6)
        wheel.every(micros / 1e6, print).cancel()


def test_periodic_timers_go_with_their_wheel() -> None:
    wheel = TimeWheel(0.001)
    callback = Callback()
    seen = weakref.ref(callback)
    timers = [wheel.every(10.0**power, callback) for power in range(-2, 5)]
    del callback
    wheel.advance(50.0)
    wheel.clear()
    assert seen() is None
    assert not any(timer.active for timer in timers)
    dropped = TimeWheel(0.001)
    left = dropped.every(1.0, lambda: None)
    del dropped
    gc.collect()
    assert not left.active


@pytest.mark.parametrize("resolution", [0.00001, 0.001, 1.0])
def test_a_million_pending_timers(resolution: float) -> None:
    """64 bytes each, besides the callback; and each fires once, in order, when its time comes."""
    count = 1_000_000 if not _core.is_debug_build() and not SANITIZE else 20_000
    wheel = TimeWheel(resolution)
    last = 0.0
    fired = 0

    def callback() -> None:
        nonlocal fired
        fired += 1

    call_at = wheel.call_at
    times = [(number * 7919 % count + 1) * resolution for number in range(count)]
    gc.collect()
    tracemalloc.start()
    try:
        for when in times:
            call_at(when, callback)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(wheel) == count
    assert used <= 64 * count + 4096
    for part in range(1, 5):
        last = count * resolution * part / 4
        wheel.advance(last)
        assert abs(fired - count * part // 4) <= 1
    assert wheel.advance(last + 2 * resolution) <= 1
    assert fired == count
    assert len(wheel) == 0
