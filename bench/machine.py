"""What a measurement was made with: a figure without its machine says nothing."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import compiler
from bench.child import ROOT
from bench.peers import peer
from domi_fast import _core

__all__ = ["machine", "processor_time"]


def machine() -> dict[str, Any]:
    """Describes the machine, the versions and the commit, ready for JSON."""
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "system": platform.system(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "congestion_control": _text("/proc/sys/net/ipv4/tcp_congestion_control"),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "domi_fast": _version("domi-fast"),
        "uvloop": _version("uvloop"),
        "cython": _version("Cython"),
        "compiler": compiler.names_in(Path(_core.__file__ or "").read_bytes()),
        "peers": peer.versions(),
        **_commit(),
    }


def processor_time() -> tuple[int, int]:
    """Since the boot, in ticks of all processors: what the host kept for others, and all of it."""
    first = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0]
    # user nice system idle iowait irq softirq steal; what guests had is part of user.
    ticks = [int(field) for field in first.split()[1:9]]
    return ticks[7], sum(ticks)


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo") or "", re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints; ``None`` if it fails or is not there."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> dict[str, Any]:
    # An unpacked sdist may lie inside somebody else's repository, whose commit is not ours.
    top = _output("git", "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:
        return {"commit": None, "dirty": None}
    status = _output("git", "status", "--porcelain")
    return {
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m bench.machine",
        description=(__doc__ or "").splitlines()[0],
        epilog="example:\n  python -m bench.machine    prints it as JSON, as each run keeps it",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    print(json.dumps(machine(), indent=2))


if __name__ == "__main__":
    main()
