"""docs/scaling.md: what is worked out for 1,024 nodes from what a run has measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import report, scaling
from bench.figures import Figure
from bench.report import Report

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {
    "cpu": "a processor",
    "cpus_usable": 2,
    "memory_mib": 1024,
    "system": "Linux",
    "kernel": "6",
    "architecture": "x86_64",
    "implementation": "CPython",
    "python": "3.11",
    "domi_fast": "0.1",
    "uvloop": "0.22",
    "cython": "3.1",
    "compiler": "gcc",
    "commit": "0123456789abcdef",
    "dirty": False,
}
RUN = {
    "when": "then",
    "rounds": 3,
    "cpus": [0, 1],
    "load_before": 0.0,
    "seconds": 60.0,
    "smoke": False,
}


def curve(x: list[int], y: list[float]) -> dict[str, Any]:
    return {"curve": {"x": x, "y": y, "x_title": "", "y_title": ""}}


def measured() -> list[Figure]:
    """Of round numbers, so that the results can be worked out in the head."""
    idle = {
        "bytes_a_peer": 2048.0,
        "share_of_a_core_when_idle": 0.05,
        "share_of_a_core_when_idle_with_one": 0.01,
        "shares_of_a_core_when_idle": [0.04, 0.06],
    }
    peers = {**curve([1, 1023], [1.0, 1.0]), **idle}
    nodes = curve([2, 20, 200], [1.0, 1.0, 1.0])
    return [
        *[
            Figure(f"growth-peers-{work}-1023", "", "s", [ratio], anchor_values=[1], detail=peers)
            for work, ratio in (("trip", 1.1), ("call", 1.05))
        ],
        *[
            Figure(f"growth-nodes-{work}-{size}", "", "s", [ratio], anchor_values=[1], detail=nodes)
            for work, ratio in (("trip", 1.02), ("call", 1.04))
            for size in (20, 200)
        ],
        # 180 nodes more took 0.36 s more: 2 ms each.
        Figure(
            "growth-nodes-join-200", "", "s", [0.46], detail=curve([2, 20, 200], [0.06, 0.1, 0.46])
        ),
        Figure("fan-out", "", "/s", [500_000.0]),
        Figure("fan-out-deliveries", "", "/s", [1.0]),
        Figure("growth-subscriptions-bytes-60000", "", "B", [160.0]),
    ]


def test_what_a_run_has_measured_is_multiplied_out() -> None:
    found = {what: result for what, _, result in scaling.rows(Report(MACHINE, RUN, measured()))}
    assert found["Sessions of a node"] == "1,023"
    assert found["Sessions in all"] == "523,776"
    assert found["Descriptors of a node"].startswith("`ulimit -n` of 1,364; 2,728 where")
    assert found["Memory for a node's sessions"] == "2.00 KiB each: 2.00 MiB"
    assert found["Heartbeats that a node sends"].startswith("409 frames/s, 3.20 KiB/s;")
    assert found["Processor time of an idle node"].startswith("5.0% of a core")
    assert "2 parts of that time 4.0% to 6.0%" in found["Processor time of an idle node"]
    assert found["A message between two of them"].startswith("1.10× (awaited request) and 1.05×")
    assert found["A message in a cluster of real nodes"].startswith("1.02× (awaited request)")
    assert found["A publish to all others"] == "2.05 ms"
    assert found["Start of the last node"] == "2.05 s"
    assert found["All starts, one after the other"] == "1048 s"
    assert found["Renewals of leases that it takes"] == "1,024/s"
    assert found["List of a node's 100 channels, at its start"] == "209 KiB"
    assert found["One subscription more, later"] == "11.0 KiB, 2.05 ms"
    assert found["Memory for 100 channels of its own"] == "160 B each: 15.6 KiB"
    entry = scaling.entry_bytes()
    assert found["What the registry tells of a start"] == f"{1023 * entry / 1024:.0f} KiB"


def test_what_was_measured_with_fewer_grows_in_proportion() -> None:
    figures = measured()
    for each in figures[:2]:
        each.detail["curve"]["x"] = [1, 512]
    found = {what: result for what, _, result in scaling.rows(Report(MACHINE, RUN, figures))}
    assert found["Processor time of an idle node"].startswith("9.0% of a core")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("growth-peers-", 3),
        ("growth-nodes-trip-", 1),
        ("growth-nodes-join-", 2),
        ("fan-out", 2),
        ("growth-subscriptions-", 1),
    ],
)
def test_what_a_run_has_not_measured_is_said(name: str, lines: int) -> None:
    figures = [figure for figure in measured() if not figure.name.startswith(name)]
    rows = scaling.rows(Report(MACHINE, RUN, figures))
    missing = [result for _, _, result in rows if result.endswith("is not in this run")]
    assert len(missing) == lines
    assert all(name.rstrip("-") in result for result in missing)


def test_only_what_is_between_the_markers_changes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    before = (ROOT / "docs" / "scaling.md").read_text()
    page.write_text(before)
    scaling.write_docs(Report(MACHINE, RUN, measured()), page)
    after = page.read_text()
    assert "| Sessions in all | 1,024 × 1,023 / 2 | 523,776 |" in after
    assert "a processor, 2 CPUs" in after
    for marker, part in ((scaling.START, 0), (scaling.END, 2)):
        assert after.partition(marker)[part] == before.partition(marker)[part]
    page.write_text("a page without them")
    with pytest.raises(ValueError, match="scaling:start"):
        scaling.write_docs(Report(MACHINE, RUN, measured()), page)


@pytest.mark.native
@pytest.mark.timeout(300)
def test_a_run_has_all_that_is_worked_out_from_it(tmp_path: Path) -> None:
    path = tmp_path / "smoke.json"
    only = [f"--only={name}" for name in ("growth", "fan-out")]
    command = [sys.executable, "-m", "bench", "--smoke", *only, "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = report.read(path)
    rows = scaling.rows(found)
    missing = [result for _, _, result in rows if result.endswith("is not in this run")]
    # Nothing but what this machine cannot run.
    assert not missing or found.skipped, missing
    assert len(rows) == len(scaling.ROWS)
