"""Fan-out: one message to a thousand sessions, beside a loop of ``send`` in C on as many sockets.

Each publish has its turn of the loop to itself, so that every session costs a system call of its
own, as in the loop. What is judged is what it costs who sends: until all have come, the receivers'
processor has its share, and where that is the slower one both figures are the receivers'.

Both have many short turns in a round: a machine's mood often lasts no longer than one long turn.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial

from bench.child import BenchError
from bench.figures import Figure
from bench.peers.send_loop import SendLoop
from bench.settings import Settings, Skip, in_turn
from bench.two_process.channels import ALL_HERE, FEED
from bench.two_process.processes import cluster, start
from tests import reference

SESSIONS = 1000
DATA = b"sixteen bytes..."
FRAME = reference.encode(FEED, DATA, reference.publish_extend())
STREAM = 128  # messages one after the other, of which a node sends several at a time
# Of a round: so many turns of either, with so many to warm up and so many that count. A turn of
# STREAM comes right after one of a single message, by the same sender.
TURNS = {1: (10, 1, 6), STREAM: (3, 0, 1)}

# What the receivers say on the first socket: that all has come, or that it was not right.
WORDS = {
    "ours": [reference.encode(ALL_HERE, word) for word in (b"right", b"wrong")],
    "anchor": [b".", b"!"],
}

__all__ = ["fan_out"]


def by_turns(
    number: int, settings: Settings, measure: Callable[[str, int], dict[str, list[int]]]
) -> dict[tuple[str, int], dict[str, list[int]]]:
    """The times of a round, by who has sent and how many messages one after the other.

    :param measure: has a turn, of whom and of how many, and gives its times by what they are of.
    """
    times: dict[tuple[str, int], dict[str, list[int]]] = {
        (who, frames): defaultdict(list) for who in WORDS for frames in TURNS
    }

    def take(who: str, turn: int) -> None:
        for frames, (turns, _, _) in TURNS.items():
            if turn < turns:
                for of, taken in measure(who, frames).items():
                    times[who, frames][of] += taken

    for turn in range(settings.few(TURNS[1][0])):
        in_turn(number + turn, partial(take, "anchor", turn), partial(take, "ours", turn))
    return times


def fan_out(settings: Settings) -> list[Figure]:
    cpus = settings.pair()
    sessions = settings.few(SESSIONS)
    figures = {
        1: Figure(
            "fan-out",
            f"publish of 16 B to {sessions:,} sessions, sends",
            "/s",
            anchor="C loop of send",
        ),
        STREAM: Figure(
            "fan-out-deliveries",
            f"the same, {STREAM} one after the other, deliveries",
            "/s",
            anchor="C loop of send",
        ),
    }
    detail: dict[str, list[float]] = {"deliveries_per_s": [], "anchor_deliveries_per_s": []}
    with cluster() as (stack, folder):
        publisher = start(stack, "fan_out", folder, cpus[0])
        loop = stack.enter_context(SendLoop(sessions, FRAME, cpus[0]))
        receivers = {who: start(stack, "receivers", folder, cpus[1]) for who in WORDS}
        for each in receivers.values():
            if each.ready["files"] < sessions + 100:
                raise Skip(f"a process may not open {sessions + 100} files")
        port = publisher.ready["port"]
        receivers["ours"].ask("subscribe", port=port, count_of=sessions)
        receivers["anchor"].ask("connect", port=loop.port, count_of=sessions)
        publisher.ask("subscribed", count=sessions)
        loop.wait_connected()

        def measure(who: str, frames: int) -> dict[str, list[int]]:
            _, warm_up, rounds = TURNS[frames]
            rounds = settings.few(rounds)
            right, wrong = (word.hex() for word in WORDS[who])
            receivers[who].ask("expect", frame=FRAME.hex(), frames=frames, right=right, wrong=wrong)
            if who == "anchor":
                return loop.measure(warm_up, rounds, frames)
            measured = publisher.ask(
                "measure", data=DATA.hex(), warm_up=warm_up, rounds=rounds, frames=frames
            )
            subscribers = measured.pop("subscribers")
            if subscribers != sessions:
                raise BenchError(f"{subscribers} of {sessions} subscribe")
            return measured

        def rate(times: list[int], frames: int) -> float:
            return sessions * frames / (statistics.median(times) * 1e-9)

        for number in range(settings.rounds):
            times = by_turns(number, settings, measure)
            for who, prefix in (("ours", ""), ("anchor", "anchor_")):
                one, stream = times[who, 1], times[who, STREAM]
                detail[f"{prefix}deliveries_per_s"].append(rate(one["taken_ns"], 1))
                for frames, taken in ((1, one["sending_ns"]), (STREAM, stream["taken_ns"])):
                    getattr(figures[frames], f"{prefix}values").append(rate(taken, frames))
    figures[1].detail = {"sessions": sessions, "frame_bytes": len(FRAME), **detail}
    figures[STREAM].detail = {"sessions": sessions, "messages": STREAM}
    return list(figures.values())
