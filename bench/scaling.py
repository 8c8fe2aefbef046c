"""The way to a cluster of 1,024 nodes, worked out from what a run has measured: docs/scaling.md.

What is counted follows from the protocol and the defaults of the settings; what it costs is taken
from the run, and where that has not measured it, the page says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from bench.figures import Figure, write
from bench.report import Report, replace_between
from domi_fast import NodeConfig
from domi_fast.membership import MACHINES, NodeInfo

START, END = "<!-- scaling:start -->", "<!-- scaling:end -->"
COLUMNS = ("", "how", "that is")
OTHERS = MACHINES - 1
PAIRS = MACHINES * OTHERS // 2
HEADER = 8  # bytes of a frame without data: a heartbeat
RENEWALS = 3  # of a lease in its length
CHANNELS = 100  # of a node, for example
DEFAULTS = NodeConfig("node")

__all__ = ["rows", "write_docs"]


class NotMeasuredError(Exception):
    """The run has no such figure."""


def figure(report: Report, name: str) -> Figure:
    """Of that name; where it ends with a dash, the one of the largest size."""
    found = [
        each
        for each in report.figures
        if each.name == name or (name.endswith("-") and each.name.startswith(name))
    ]
    if not found:
        raise NotMeasuredError(name.rstrip("-"))
    return found[-1]


def size(measured: Figure) -> int:
    """How large what was measured was."""
    return int(measured.detail["curve"]["x"][-1])


def entry_bytes() -> int:
    """What the registry holds of a node and tells the others: the value of its key."""
    info = NodeInfo(0, 0, "server", "1.0.0", "192.168.100.100", 40000, None, bytes(16), "")
    return len(info.encode())


# ------------------------------------------------------------------------------- what is measured


def memory(report: Report) -> str:
    per_peer = figure(report, "growth-peers-").detail["bytes_a_peer"]
    return f"{write(per_peer, 'B')} each: {write(OTHERS * per_peer, 'B')}"


def idle(report: Report) -> str:
    measured = figure(report, "growth-peers-")
    with_many = measured.detail["share_of_a_core_when_idle"]
    with_one = measured.detail["share_of_a_core_when_idle_with_one"]
    count = size(measured)
    share = with_one + max(0.0, with_many - with_one) * (OTHERS - 1) / (count - 1)
    # An older run has but the whole.
    parts = measured.detail.get("shares_of_a_core_when_idle", [with_many])
    return (
        f"{share:.1%} of a core (measured with {count:,}: {with_many:.1%}, {len(parts)} parts of "
        f"that time {min(parts):.1%} to {max(parts):.1%}; 1: {with_one:.1%})"
    )


def message(report: Report) -> str:
    trip, call = (figure(report, f"growth-peers-{work}-") for work in ("trip", "call"))
    ratios = [statistics.median(each.ratios) for each in (trip, call)]
    return (
        f"{ratios[0]:.2f}× (awaited request) and {ratios[1]:.2f}× (call and reply), measured "
        f"with {size(trip):,}"
    )


def cluster_message(report: Report) -> str:
    trip, call = (figure(report, f"growth-nodes-{work}-") for work in ("trip", "call"))
    ratios = [statistics.median(each.ratios) for each in (trip, call)]
    return (
        f"{ratios[0]:.2f}× (awaited request) and {ratios[1]:.2f}× (call and reply), measured "
        f"with {size(trip):,}"
    )


def seconds_a_send(report: Report) -> float:
    return 1.0 / statistics.median(figure(report, "fan-out").values)


def publish(report: Report) -> str:
    return write(OTHERS * seconds_a_send(report), "s")


def seconds_a_peer(report: Report) -> float:
    """Of a start, for each node that is connected with: between the two largest clusters."""
    curve = figure(report, "growth-nodes-join-").detail["curve"]
    (fewer, more), (less, longer) = curve["x"][-2:], curve["y"][-2:]
    return float((longer - less) / (more - fewer))


def last_start(report: Report) -> str:
    return write(OTHERS * seconds_a_peer(report), "s")


def all_starts(report: Report) -> str:
    return write(PAIRS * seconds_a_peer(report), "s")


def own_channels(report: Report) -> str:
    per_channel = statistics.median(figure(report, "growth-subscriptions-").values)
    return f"{write(per_channel, 'B')} each: {write(CHANNELS * per_channel, 'B')}"


def descriptors(_: Report) -> str:
    # session_limit is three quarters of them, sessions_per_address half of that.
    wanted = -(-OTHERS * 4 // 3)
    return f"`ulimit -n` of {wanted:,}; {2 * wanted:,} where all nodes are on one machine"


Row = tuple[str, str, Callable[[Report], str]]

BEATS = OTHERS / DEFAULTS.heartbeat_interval
ROWS: list[Row] = [
    ("Sessions of a node", f"{MACHINES:,} − 1", lambda _: f"{OTHERS:,}"),
    ("Sessions in all", f"{MACHINES:,} × {OTHERS:,} / 2", lambda _: f"{PAIRS:,}"),
    (
        "Descriptors of a node",
        "one for each session; a node keeps a quarter of those that it may have for all else",
        descriptors,
    ),
    ("Memory for a node's sessions", f"{OTHERS:,} × bytes of a peer", memory),
    (
        "Heartbeats that a node sends",
        f"{OTHERS:,} / {DEFAULTS.heartbeat_interval:g} s, and as many answers",
        lambda _: f"{2 * BEATS:,.0f} frames/s, {write(2 * BEATS * HEADER, 'B')}/s; as many come",
    ),
    ("Processor time of an idle node", f"with {OTHERS:,} peers", idle),
    ("A message between two of them", "beside nodes that have one peer each", message),
    ("A message in a cluster of real nodes", "beside a cluster of 2", cluster_message),
    ("A publish to all others", f"{OTHERS:,} / sends a second", publish),
    ("Start of the last node", f"{OTHERS:,} connections × seconds each", last_start),
    (
        "All starts, one after the other",
        f"{PAIRS:,} connections × seconds each",
        all_starts,
    ),
    (
        "What the registry tells of a start",
        f"{entry_bytes()} bytes to each of {OTHERS:,} who watch",
        lambda _: write(OTHERS * entry_bytes(), "B"),
    ),
    (
        "What it tells of all starts",
        f"{PAIRS:,} × {entry_bytes()} bytes",
        lambda _: write(PAIRS * entry_bytes(), "B"),
    ),
    (
        "Renewals of leases that it takes",
        f"{MACHINES:,} × {RENEWALS} / {DEFAULTS.lease_ttl:g} s",
        lambda _: f"{MACHINES * RENEWALS / DEFAULTS.lease_ttl:,.0f}/s",
    ),
    (
        f"List of a node's {CHANNELS} channels, at its start",
        f"{OTHERS:,} × ({HEADER + 1} + 2 × {CHANNELS}) bytes",
        lambda _: write(OTHERS * (HEADER + 1 + 2 * CHANNELS), "B"),
    ),
    (
        "One subscription more, later",
        f"{OTHERS:,} × {HEADER + 3} bytes, and as many sends",
        lambda report: (
            f"{write(OTHERS * (HEADER + 3), 'B')}, {write(OTHERS * seconds_a_send(report), 's')}"
        ),
    ),
    (f"Memory for {CHANNELS} channels of its own", f"{CHANNELS} × bytes each", own_channels),
]


# ------------------------------------------------------------------------------------ the page


def rows(report: Report) -> list[tuple[str, str, str]]:
    """What is worked out, how, and what it is by this run."""
    found = []
    for what, how, result in ROWS:
        try:
            found.append((what, how, result(report)))
        except NotMeasuredError as missing:  # noqa: PERF203 - the others are there all the same
            found.append((what, how, f"`{missing}` is not in this run"))
    return found


def write_docs(report: Report, path: Path) -> None:
    """Put what is worked out between the two markers of the page."""
    lines = [*[f"- {line}" for line in report.heading()], ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(report)]
    replace_between(path, START, END, lines)
