"""Half an hour at 80 % of the peak: nothing is lost, doubled or out of order, and nothing grows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import SOAK
from tests.support import ROOT, environment

FULL = ["--seconds", "1800"]
SHORT = ["--seconds", "10", "--interval", "1", "--peak", "1", "--pairs", "3"]
GROWTH = 1.01 if SOAK else 1.03  # of what is resident; seconds after the start some of it is new
DRIFT = 1.1
SHARE = 0.79  # of the peak, where nothing of the schedule had to be given up
SLOW_BUILD = any(os.environ.get(f"DOMI_{name}") == "1" for name in ("DEBUG", "SANITIZE"))
PLAIN = {"frames_in", "frames_out", "bytes_in", "bytes_out", "in_flight"}


def endurance() -> dict[str, Any]:
    program = [sys.executable, "-m", "tests.faults.endurance", *(FULL if SOAK else SHORT)]
    done = subprocess.run(
        program,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=3900 if SOAK else 100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout))


@pytest.mark.timeout(4200 if SOAK else 120)
def test_nothing_is_lost_doubled_or_out_of_order_and_nothing_grows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = endurance()
    with capsys.disabled():
        print(f"\nat 80 % of the peak: {json.dumps(seen)}")
    for ended in seen["ended"]:
        check_that_all_came(ended)
    first, last = seen["first"], seen["last"]
    if not SLOW_BUILD:  # which keeps what was freed, or counts it
        pairs = zip(last["resident"], first["resident"], strict=True)
        assert all(now < then * GROWTH for now, then in pairs)
    if SOAK:
        assert seen["pairs"] == 1500
        # At less than that a latency says nothing: others had the machine, and it is run again.
        for rate in (seen["rate"], seen["rate of the pairs"]):
            assert rate >= SHARE * max(seen["peaks"])
        # Neither what it costs nor how long it takes: beside nodes that have done nothing yet.
        pairs = zip(last["processor"], first["processor"], strict=True)
        assert all(now < then * DRIFT for now, then in pairs)
        low, middle, high = seen["drift"]
        assert 1 / DRIFT <= middle <= DRIFT, f"{middle}, and between {low} and {high} for certain"


def check_that_all_came(ended: dict[str, Any]) -> None:
    sent = ended["sent"]
    one, other = ended["taken"]
    assert sent["news"] > 1000
    assert sent["outcomes"] == {"answer": sent["news"]}
    assert (sent["short"], sent["refused"]) == (0, {})
    for number, taken in enumerate((one, other)):
        # Each channel of each taker has brought the numbers from 0 on, one after the other.
        assert taken["wrong"] == {}
        assert taken["next"] == [sent["asked"][number], sent["noted"][number], sent["news"]]
    for counters in (sent["counters"], one["counters"], other["counters"]):
        assert counters["in_flight"] == 0
        assert set(counters) <= PLAIN
