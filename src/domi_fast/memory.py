"""How much of its memory this process's machine, or its cgroup, uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def used_share(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> float:
    """What the machine uses of its memory, or a cgroup of ours of its limit: the larger share.

    The page cache that the kernel can take back at once is free memory. Blocks, for some tens of
    microseconds.

    :returns: 0-1.
    :raises OSError: the system does not say.
    """
    shares = [_of_machine(proc), *_of_cgroups(proc, cgroups)]
    return min(1.0, max(0.0, *shares))


def _of_machine(proc: Path) -> float:
    sizes = {}
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in {"MemTotal", "MemAvailable"}:
            sizes[name] = int(rest.split()[0])
    if not sizes.get("MemTotal") or "MemAvailable" not in sizes:
        raise OSError(f"{proc}/meminfo does not say what is available of the memory")
    return 1.0 - sizes["MemAvailable"] / sizes["MemTotal"]


def _of_cgroups(proc: Path, cgroups: Path) -> Iterator[float]:
    """Of each cgroup that we are in and that has a limit: a limit of a parent binds us, too."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = ("memory.current", "memory.max", "inactive_file")
            root = cgroups
        elif "memory" in controllers.split(","):
            names = ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file")
            root = cgroups / "memory"
        else:
            continue
        folder = root / path.lstrip("/")
        # In a container the path may be the host's: then the root is what we see of it.
        for each in (folder, *folder.parents) if folder.is_dir() else (root,):
            yield from _of_cgroup(each, *names)
            if each == root:
                break


def _of_cgroup(folder: Path, current: str, limit: str, cache: str) -> Iterator[float]:
    try:
        most = int((folder / limit).read_text())  # "max" where there is none
        used = int((folder / current).read_text())
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith(f"{cache} "):
                used -= int(line.split()[1])
    except (OSError, ValueError):
        return
    if 0 < most < 1 << 60:
        yield used / most
