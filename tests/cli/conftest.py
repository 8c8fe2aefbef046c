"""The command as a user runs it: a process of its own, beside a live cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from domi_fast.cli.commands import run_command
from tests.overheard import EAR
from tests.support import ROOT

PATIENCE = 30.0
VARIABLES = (
    "DOMI_REGISTRY",
    "DOMI_CLUSTER",
    "DOMI_ADMIN_TOKEN",
    "DOMI_SECRET",
    "DOMI_SECRET_FILE",
    "FORCE_COLOR",
    "NO_COLOR",
)


@dataclass(frozen=True)
class Ended:
    """How a run of the command ended.

    :ivar said: the standard error.
    """

    code: int
    out: bytes
    said: str

    @property
    def lines(self) -> list[str]:
        return self.out.decode().splitlines()

    def fails(self, code: int, *words: str) -> None:
        """It ended with this code, and one line that has these words."""
        assert (self.code, self.out) == (code, b""), self
        assert self.said.count("\n") == 1, self.said
        assert self.said.startswith("domi: ")
        for word in words:
            assert word in self.said

    def json(self) -> Any:
        assert (self.code, self.said) == (0, ""), self
        (line,) = self.lines
        return json.loads(line)


@dataclass
class Shell:
    """Runs the command in a folder, with an environment in which nothing is set for it."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        known = {name: text for name, text in os.environ.items() if name not in VARIABLES}
        runtime = self.folder / "runtime"
        runtime.mkdir(0o700, exist_ok=True)
        self.environment = {
            **known,
            "PYTHONPATH": os.pathsep.join(str(ROOT / path) for path in paths if path),
            "XDG_RUNTIME_DIR": str(runtime),
            **self.environment,
        }

    def start(self, *words: str, **settings: object) -> subprocess.Popen[bytes]:
        """Begin a run; its streams are pipes unless settings say otherwise."""
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
            [sys.executable, "-W", "error", "-m", "domi_fast", *words],
            **{"cwd": self.folder, "env": self.environment, **pipes, **settings},
        )

    def run(self, *words: str, stdin: bytes = b"") -> Ended:
        """Run it to its end."""
        return self.end(self.start(*words), stdin)

    @staticmethod
    def end(process: subprocess.Popen[bytes], stdin: bytes = b"") -> Ended:
        """Wait for the end of a run."""
        try:
            out, said = process.communicate(stdin, timeout=PATIENCE)
        finally:
            process.kill()
            process.communicate()
        EAR.hear((said or b"").decode())
        return Ended(process.returncode, out or b"", (said or b"").decode())


@dataclass(frozen=True)
class Cluster:
    """The nodes of tests/cli/nodes.py. Its ids, TCP ports and admin ports are in their order."""

    url: str
    unix_path: str
    ids: list[int]
    ports: list[int]
    http: list[int]
    pid: int


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A live cluster for everything that leaves it as it was."""
    folder = tmp_path_factory.mktemp("cluster")
    url = f"sqlite://{folder}/registry.db"
    unix_path = f"{folder}/alpha"
    shell = Shell(folder)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "cli" / "nodes.py"), url, unix_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=shell.environment,
    )
    try:
        assert process.stdout is not None
        ids, ports, http = zip(*json.loads(process.stdout.readline()), strict=True)
        yield Cluster(url, unix_path, list(ids), list(ports), list(http), process.pid)
        out, _ = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out) == (0, b"")
    finally:
        process.kill()
        process.communicate()


class Here:
    """Runs the command within this process: for many cases, and for what is not under test."""

    def __init__(
        self, folder: Path, capfd: pytest.CaptureFixture[bytes], patch: pytest.MonkeyPatch
    ) -> None:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        (folder / "runtime").mkdir(0o700, exist_ok=True)
        patch.setenv("XDG_RUNTIME_DIR", f"{folder}/runtime")
        patch.chdir(folder)
        self._patch = patch
        self._capfd = capfd

    def join(self, cluster: Cluster) -> None:
        self._patch.setenv("DOMI_REGISTRY", cluster.url)

    def run(self, *words: str) -> Ended:
        self._capfd.readouterr()
        code = run_command(words)
        out, said = self._capfd.readouterr()
        return Ended(code, out, said.decode())


@pytest.fixture
def here(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> Here:
    return Here(tmp_path, capfdbinary, monkeypatch)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A shell that knows of no cluster."""
    return Shell(tmp_path)


@pytest.fixture
def domi(cluster: Cluster, tmp_path: Path) -> Shell:
    """A shell whose environment names the live cluster."""
    return Shell(tmp_path, {"DOMI_REGISTRY": cluster.url})
