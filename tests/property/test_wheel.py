"""TimeWheel against a list of times: never early, at most a tick late, in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from domi_fast import Timer, TimeWheel


class Boom(Exception):
    pass


def nanoseconds(seconds: float) -> int:
    return int(max(seconds, 0.0) * 1e9 + 0.5)


@dataclass
class Entry:
    """A timer of the model.

    ``when`` is what was asked for; ``base`` what its lateness counts from: a timer for
    a time that has passed is due at the first tick after the asking. Both in nanoseconds.
    ``tick`` is the one that it is due at, where the model can know it.
    """

    when: int
    base: int
    tick: int | None
    round: int
    action: tuple[Any, ...] = ()
    timer: Timer = field(init=False)


# The spans of all the levels, and what lies around their edges.
spans = st.builds(
    lambda level, count, off: max(0.0, count * 64.0**level + off),
    st.integers(0, 8),
    st.integers(0, 64),
    st.sampled_from([-1.0, -0.5, -0.001, 0.0, 0.0, 0.001, 0.5, 1.0]),
)
actions = st.one_of(
    st.just(()),
    st.just(()),
    st.just(("raise",)),
    st.just(("advance",)),
    st.tuples(st.just("cancel"), st.integers(0, 1000)),
    st.tuples(st.just("schedule"), spans),
    st.tuples(st.just("schedule in the past"), spans),
)


class WheelMachine(RuleBasedStateMachine):
    wheel: TimeWheel

    @initialize(
        resolution=st.sampled_from([0.00001, 0.001, 0.0125, 1.0]),
        start=st.sampled_from([0.0, 0.3, 12_345.678, 1e8]),
    )
    def begin(self, resolution: float, start: float) -> None:
        self.wheel = TimeWheel(resolution, start=start)
        self.resolution = resolution
        self.tick = nanoseconds(resolution)
        self.start = start
        self.farthest = min(9e9, start + 2.0**48 * resolution * 0.99)
        self.now = start
        self.target = nanoseconds(start)
        self.rounds = 0
        self.advancing = False
        self.pending: dict[int, Entry] = {}
        self.gone: list[Timer] = []
        self.fired: list[Entry] = []
        self.count = 0

    # ----------------------------------------------------------------------------------- scheduling

    def schedule(self, when: float, action: tuple[Any, ...] = (), *, later: bool = False) -> None:
        if when > self.farthest:
            return
        number = self.count = self.count + 1
        asked = nanoseconds(when)
        tick: int | None = None
        if not later and (asked > self.target or not self.advancing):
            tick = max(
                -(-self.passed(asked) // self.tick), self.passed(self.target) // self.tick + 1
            )
        entry = Entry(asked, max(asked, self.target), tick, self.rounds, action)
        self.pending[number] = entry
        if later:
            entry.timer = self.wheel.call_later(when - self.now, lambda: self.fire(number))
            # The sum is the wheel's to round.
            entry.when -= 1000 + asked // 10**15
            entry.base += 1000 + asked // 10**15
        else:
            entry.timer = self.wheel.call_at(when, lambda: self.fire(number))

    def passed(self, time: int) -> int:
        return max(0, time - nanoseconds(self.start))

    def fire(self, number: int) -> None:
        entry = self.pending.pop(number)
        self.fired.append(entry)
        self.gone.append(entry.timer)
        assert not entry.timer.active
        assert not entry.timer.cancel()
        assert entry.when <= self.target, "early"
        match entry.action:
            case ("raise",):
                raise Boom
            case ("advance",):
                before = len(self.fired)
                assert self.wheel.advance(self.now) == 0, "an advance within an advance"
                assert len(self.fired) == before
            case ("cancel", index):
                self.cancel_one(index)
            case ("schedule", ticks):
                self.schedule(self.now + ticks * self.resolution)
            case ("schedule in the past", ticks):
                self.schedule(max(0.0, self.now - ticks * self.resolution))

    def cancel_one(self, index: int) -> None:
        if self.pending:
            number = sorted(self.pending)[index % len(self.pending)]
            entry = self.pending.pop(number)
            assert entry.timer.cancel()
            assert not entry.timer.active
            self.gone.append(entry.timer)

    @rule(ticks=spans, action=actions)
    def call_at(self, ticks: float, action: tuple[Any, ...]) -> None:
        self.schedule(self.now + ticks * self.resolution, action)

    @rule(ticks=spans, action=actions)
    def call_at_in_the_past(self, ticks: float, action: tuple[Any, ...]) -> None:
        self.schedule(self.now - ticks * self.resolution, action)

    @rule(ticks=spans, count=st.integers(2, 12))
    def call_at_one_time(self, ticks: float, count: int) -> None:
        for _ in range(count):
            self.schedule(self.now + ticks * self.resolution)

    @rule(ticks=spans)
    def call_later(self, ticks: float) -> None:
        self.schedule(self.now + ticks * self.resolution, later=True)

    @precondition(lambda self: self.pending)
    @rule(index=st.integers(0, 1000))
    def cancel(self, index: int) -> None:
        self.cancel_one(index)

    @rule()
    def clear(self) -> None:
        self.wheel.clear()
        self.gone += [entry.timer for entry in self.pending.values()]
        self.pending.clear()

    # ------------------------------------------------------------------------------------ advancing

    def advance_to(self, when: float) -> None:
        if when > self.farthest:
            return
        self.rounds += 1
        if when > self.now:
            self.now = when
            self.target = nanoseconds(when)
        self.fired = []
        self.advancing = True
        while True:
            before = len(self.fired)
            try:
                count = self.wheel.advance(when)
            except Boom:
                # The rest fires with the next call, at the same time even.
                assert self.fired[-1].action == ("raise",)
            else:
                assert count == len(self.fired) - before
                break
        self.advancing = False
        for entry in self.pending.values():
            assert entry.round == self.rounds or entry.base + self.tick > self.target, "late"
        ticks = [entry.tick for entry in self.fired if entry.tick is not None]
        assert ticks == sorted(ticks), "out of order"

    @rule(ticks=spans)
    def advance(self, ticks: float) -> None:
        self.advance_to(self.now + ticks * self.resolution)

    @rule(ticks=st.floats(0.0, 3.0))
    def advance_a_little(self, ticks: float) -> None:
        self.advance_to(self.now + ticks * self.resolution)

    @rule()
    def advance_to_the_same_time(self) -> None:
        self.advance_to(self.now)

    @rule(ticks=spans)
    def advance_into_the_past(self, ticks: float) -> None:
        before = self.now
        self.advance_to(self.now - (ticks + 1) * self.resolution)
        assert self.now == before

    @precondition(lambda self: self.pending)
    @rule()
    def follow_the_deadlines(self) -> None:
        # The deadline is good enough to sleep by: a few of them lead to the next timer.
        before = self.count - len(self.pending)
        for _ in range(12):
            deadline = self.wheel.next_deadline()
            if deadline is None or self.count - len(self.pending) != before:
                return
            self.advance_to(deadline + 1e-9 + deadline * 2.0**-52)
        raise AssertionError("the deadlines lead nowhere")

    def teardown(self) -> None:
        # The collector does not see into a wheel, whose callbacks hold this machine.
        if hasattr(self, "wheel"):
            self.wheel.clear()

    # -------------------------------------------------------------------------------------- always

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pending"):
            return
        assert len(self.wheel) == len(self.pending)
        assert all(entry.timer.active for entry in self.pending.values())
        assert not any(timer.active for timer in self.gone[-20:])
        deadline = self.wheel.next_deadline()
        if not self.pending:
            assert deadline is None
        else:
            earliest = min(entry.base for entry in self.pending.values())
            assert deadline is not None
            # As exactly as a float can say it.
            assert nanoseconds(deadline) <= earliest + self.tick + 1 + (earliest >> 50)


TestTimeWheel = WheelMachine.TestCase
