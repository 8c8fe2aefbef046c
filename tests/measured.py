"""A run of the benchmarks that never was, made by hand for the tests of what is written of one."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.figures import Figure, Target
from bench.page import END, START
from bench.report import Report
from bench.suite import BENCHMARKS, ONE, SEVERAL, SINGLE

FASTER = Figure(
    "round-trip",
    "Awaited request, faster than the echo",
    "s",
    values=[8e-6, 9e-6, 10e-6],
    p99=[30e-6, 30e-6, 31e-6],
    p999=[60e-6, 70e-6, 80e-6],
    anchor="C epoll echo",
    anchor_values=[10e-6, 10e-6, 10e-6],
    anchor_p99=[20e-6, 20e-6, 25e-6],
    anchor_p999=[90e-6, 90e-6, 90e-6],
    target=Target("ratio", 1.5, at_most=True),
    level=SEVERAL,
)
SLOWER = Figure(
    "calls-vs-pyzmq",
    "call + reply, slower than the other library",
    "/s",
    values=[1e6, 2e6, 4e6],
    anchor="pyzmq",
    anchor_values=[3e6, 3e6, 3e6],
    target=Target("value", 3e6, at_most=False),
    level=SEVERAL,
)
LOST = replace(
    SLOWER, name="calls-vs-nats", anchor="nats-py", anchor_values=[5e6, 5e6, 5e6], target=None
)
FLOODED = Figure(
    "flood",
    "p99 beside a flood",
    "s",
    by="p99",
    values=[50e-6, 60e-6, 50e-6],
    p99=[300e-6, 320e-6, 300e-6],
    p999=[600e-6, 600e-6, 900e-6],
    anchor="without the flood",
    anchor_values=[50e-6, 50e-6, 50e-6],
    anchor_p99=[100e-6, 100e-6, 100e-6],
    anchor_p999=[150e-6, 150e-6, 150e-6],
    anchor_is_ours=True,
    target=Target("ratio", 3.0, at_most=True),
    void="the server had nothing to do",
    level=ONE,
    remark="1.00 M/s (idle), the server's core 10% busy",
)
COSTS_NOTHING = Figure(
    "breaker-cost",
    "what a circuit breaker adds",
    "s",
    values=[-1e-9, 0.0, 1e-9],
    target=Target("value", 20e-9, at_most=True),
    level=ONE,
)
LARGE = Figure(
    "notify-1MiB",
    "notify of 1 MiB",
    "B/s",
    values=[2e9, 2.1e9, 2.2e9],
    anchor="blocking sockets",
    anchor_values=[2e9, 2e9, 2e9],
    level=SEVERAL,
)
MEMORY = Figure(
    "idle-vs-grpc",
    "Resident memory of an idle session",
    "B",
    values=[2300.0, 2310.0, 2320.0],
    anchor="grpc.aio",
    anchor_values=[70e3, 71e3, 72e3],
    level=SEVERAL,
)
PUBLISHED = [
    Figure(f"publish-{count}", f"publish to {count}", "/s", values=[rate, rate], level=SEVERAL)
    for count, rate in ((1, 1e6), (10, 4e6), (100, 2e6))
]
GROWN = Figure(
    "growth-nodes",
    "request between two of many nodes",
    "s",
    values=[1e-6, 1e-6],
    level=SINGLE,
    detail={
        "curve": {
            "x": [2, 20, 200],
            "y": [1.0e-6, 1.1e-6, 1.05e-6],
            "x_title": "nodes",
            "y_title": "Time of a message, s",
        }
    },
)
FIGURES = [FASTER, SLOWER, FLOODED, COSTS_NOTHING, LARGE, MEMORY, *PUBLISHED, GROWN]
PICTURES = {
    "anchors-bytes.svg",
    "anchors-latency.svg",
    "growth.svg",
    "peers-memory.svg",
    "peers-rates.svg",
    "publish.svg",
    "targets.svg",
}


def run(figures: list[Figure], **circumstances: Any) -> Report:
    names = (
        *("cpu", "cpus_usable", "memory_mib", "system", "kernel", "architecture", "compiler"),
        *("implementation", "python", "domi_fast", "uvloop", "cython", "dirty"),
    )
    about = {
        "when": "2026-01-02 03:04 UTC",
        "benchmarks": [each.name for each in BENCHMARKS],
        "rounds": 3,
        "smoke": False,
        "cpus": [0, 1],
        "load_before": 0.25,
        "seconds": 754.3,
        "stolen": 0.0123,
        **circumstances,
    }
    machine = {**dict.fromkeys(names, "it"), "commit": "0123456789abcdef"}
    return Report(machine, about, figures)


def empty_page(folder: Path) -> Path:
    """One with the markers between which results are written."""
    path = folder / "benchmarks.md"
    path.write_text(f"# Before\n\n{START}\n\nan older run\n\n{END}\n\nafter\n")
    return path


def text_of(picture: Path) -> str:
    """What is written in it; a label of several lines is read as one."""
    return " ".join(" ".join(ET.parse(picture).getroot().itertext()).split())
