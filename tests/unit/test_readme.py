"""Every Python block of README.md runs, and prints what its comments say."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench import summary

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PATIENCE = 60.0
PAGES = sorted([README, *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"])


@dataclass(frozen=True)
class Block:
    line: int
    text: str

    @property
    def serves(self) -> bool:
        """Whether it runs until it is told to stop."""
        return re.search(r"^run\(", self.text, re.MULTILINE) is not None

    @property
    def prints(self) -> list[str]:
        return re.findall(r"^\s*print\(.*\)  # (.+)$", self.text, re.MULTILINE)


def blocks() -> list[Block]:
    text = README.read_text()
    return [
        Block(text[: match.start()].count("\n") + 1, match[1])
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A runtime directory, and so a default cluster, of this test alone."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(0o700)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {
        **os.environ,
        "PYTHONASYNCIODEBUG": "",  # which says more than the blocks
        "XDG_RUNTIME_DIR": str(runtime),
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in paths if path),
    }


def start(block: Block, folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    program = folder / f"readme_{block.line}.py"
    program.write_text(block.text)
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(program)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_block_runs(tmp_path: Path, environment: dict[str, str]) -> None:
    found = blocks()
    assert len(found) >= 5
    assert any(block.serves for block in found)
    servers: list[tuple[Block, subprocess.Popen[str]]] = []
    try:
        for block in found:
            process = start(block, tmp_path, environment)
            if block.serves:
                servers.append((block, process))
                continue
            try:
                out, errors = process.communicate(timeout=PATIENCE)
            finally:
                process.kill()
                process.wait()
            assert process.returncode == 0, f"README.md:{block.line}\n{errors}"
            assert errors == "", f"README.md:{block.line}"
            assert block.prints, f"README.md:{block.line} shows nothing"
            assert out.splitlines() == block.prints, f"README.md:{block.line}"
        for block, process in servers:
            until_it_handles_sigint(process.pid)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, f"README.md:{block.line}\n{errors}"
            assert errors == "", f"README.md:{block.line}"
    finally:
        for _, process in servers:
            process.kill()
            process.communicate()


def until_it_handles_sigint(pid: int) -> None:
    """Python handles SIGINT from the beginning, but SIGTERM only once run() has begun."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        (caught,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
        if int(caught, 16) & (1 << (signal.SIGTERM - 1)):
            return
        time.sleep(0.01)
    raise AssertionError("run() never took the signals")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_what_the_pages_import_is_there() -> None:
    found = {
        (module, name)
        for page in PAGES
        for module, names in re.findall(
            r"from (domi_fast[.\w]*) import (\w+(?:, \w+)*)", page.read_text()
        )
        for name in names.split(", ")
    }
    assert {("domi_fast.breaker", "Breaker"), ("domi_fast.limiter", "RateLimit")} <= found
    for module, name in found:
        assert hasattr(importlib.import_module(module), name), f"from {module} import {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name}: {target}"


def test_the_figures_of_the_readme_are_those_of_the_page() -> None:
    section = README.read_text().partition("## Benchmarks")[2].partition("\n## ")[0]
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    said = re.findall(r"^\| ([^|]*[a-z][^|]*) \| ([^|]+) \| ([^|]*) \|$", section, re.MULTILINE)
    assert len(said) == len(summary.ROWS)
    for _, median, beside in said:
        assert [row for row in rows if re.match(rf"\| [^|]+ \| {median}[ |]", row)], median
        for ratio, anchor in re.findall(
            r"([\d.]+×) the \w+ of ([^|]+?)(?:, (?=[\d.]+×)|$)", beside
        ):
            assert [row for row in rows if f"| {ratio} (" in row and anchor in row], ratio


def test_the_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"\bmake ([a-z-]+)\b", README.read_text()))
    assert {"demo", "test", "bench"} <= used
    assert used <= targets
