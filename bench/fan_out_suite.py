"""Fan-out: one message to a thousand sessions, beside a loop of ``send`` in C on as many sockets.

Each publish has its turn of the loop to itself, so that every session costs a system call of its
own, as in the loop. What is judged is what it costs who sends: until all have come, the receivers'
processor has its share, and where that is the slower one both figures are the receivers'.
"""

from __future__ import annotations

from typing import Any

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

# What the receivers say on the first socket: that all has come, or that it was not right.
WORDS = {
    "ours": [reference.encode(ALL_HERE, word) for word in (b"right", b"wrong")],
    "anchor": [b".", b"!"],
}

__all__ = ["fan_out"]


def fan_out(settings: Settings) -> list[Figure]:
    cpus = settings.pair()
    sessions = settings.few(SESSIONS)
    rounds = {1: settings.few(60), STREAM: settings.few(3)}
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

        def measure(who: str, frames: int) -> dict[str, Any]:
            right, wrong = (word.hex() for word in WORDS[who])
            receivers[who].ask("expect", frame=FRAME.hex(), frames=frames, right=right, wrong=wrong)
            if who == "anchor":
                return loop.measure(rounds[frames], frames)
            measured = publisher.ask(
                "measure", data=DATA.hex(), rounds=rounds[frames], frames=frames
            )
            if measured["subscribers"] != sessions:
                raise BenchError(f"{measured['subscribers']} of {sessions} subscribe")
            return measured

        def add(who: str) -> None:
            for frames, figure in figures.items():
                measured = measure(who, frames)
                count = sessions * frames
                delivered = count / (measured["taken_ns"] * 1e-9)
                sent = count / (measured["sending_ns"] * 1e-9)
                to = figure.values if who == "ours" else figure.anchor_values
                to.append(sent if frames == 1 else delivered)
                if frames == 1:
                    prefix = "" if who == "ours" else "anchor_"
                    detail[f"{prefix}deliveries_per_s"].append(delivered)

        for number in range(settings.rounds):
            in_turn(number, lambda: add("anchor"), lambda: add("ours"))
    figures[1].detail = {"sessions": sessions, "frame_bytes": len(FRAME), **detail}
    figures[STREAM].detail = {"sessions": sessions, "messages": STREAM}
    return list(figures.values())
