"""The disk under the SQLite registry is full: a tmpfs of 256 KiB in a mount namespace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

pytestmark = [
    pytest.mark.netns,
    pytest.mark.command,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "mount"))),
        reason="needs root, unshare and mount",
    ),
]


def full_disk(folder: Path, harsh: bool) -> Any:
    script = 'mount -t tmpfs -o size=256k none "$1" && shift && exec "$@"'
    program = [sys.executable, "-m", "tests.faults.full_disk", str(folder), "4", str(int(harsh))]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", str(folder), *program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "said": done.stderr}


def test_a_full_disk_is_not_even_noticed(tmp_path: Path) -> None:
    """What the registry's files have is room enough: leases are renewed, and nodes come and go."""
    seen = full_disk(tmp_path, harsh=False)
    assert seen["blocks left"] == 0
    assert set(seen["requests"]) == {"answer"}
    assert seen["requests"]["answer"] > 100
    assert (seen["lost"], seen["held"], seen["refused"]) == ({}, True, [])
    assert seen["healed"] <= 1.0


def test_registrations_heal_once_there_is_room(tmp_path: Path) -> None:
    """Nothing can be written, for four times as long as a lease: nobody is lost for that."""
    seen = full_disk(tmp_path, harsh=True)
    assert seen["blocks left"] == 0
    assert set(seen["requests"]) == {"answer"}
    assert seen["requests"]["answer"] > 100
    assert (seen["lost"], seen["held"], seen["ids kept"]) == ({}, False, True)
    assert all("disk is full" in refused for refused in seen["refused"])
    assert seen["refused"]
    assert "cannot register again" in seen["said"]
    assert seen["valid"] <= seen["healed"] <= 1.0
