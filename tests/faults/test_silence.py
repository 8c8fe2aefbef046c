"""A peer that goes silent: its packets are dropped, and no socket is closed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import SOAK
from tests.support import ROOT

pytestmark = [
    pytest.mark.netns,
    pytest.mark.command,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "ip", "iptables-restore"))),
        reason="needs root, unshare, ip and iptables",
    ),
]


def silence(*arguments: object) -> Any:
    script = 'ip link set lo up && exec "$@"'
    program = [sys.executable, "-m", "tests.faults.silence", *map(str, arguments)]
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", script, "sh", *program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3600 if SOAK else 100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_half_open_peer_is_lost_in_three_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """Either side, by the timeout and by the rhythm; and they find each other again.

    By the rhythm it is quicker, where the machine leaves the peers one.
    """
    pairs = 50 if SOAK else 10
    seen = silence("cut", "--pairs", pairs)
    with capsys.disabled():
        print(f"\nhalf-open peers, seconds until both sides have lost the other: {seen}")
    fixed, phi = seen["timeout-2.5"], seen["phi-8-2.5"]
    assert fixed["lost"] + phi["lost"] == pairs
    assert fixed["longest"] <= 3.0
    assert phi["longest"] <= 3.0
    if SOAK:
        assert phi["median"] < 0.8 * fixed["median"]


def test_nobody_is_lost_for_a_tenth_of_the_packets(capsys: pytest.CaptureFixture[str]) -> None:
    """At a detection time of six seconds; quicker ones may be wrong, and are counted."""
    seconds = 600 if SOAK else 8
    seen = silence("noise", "--seconds", seconds)
    with capsys.disabled():
        print(f"\n{seconds} s with a tenth of the packets dropped: {seen}")
    assert seen["false alarms"]["timeout-6"] == 0
    assert set(seen["false alarms"]) == {"timeout-6", "timeout-2.5", "phi-8-2.5"}
    requests = seen["requests"]
    assert requests["answer"] > 5 * seen["pairs"]
    assert set(requests) <= {"answer", "PeerLost", "NoSubscriber"}
    if not any(seen["false alarms"].values()):
        assert set(requests) == {"answer"}
