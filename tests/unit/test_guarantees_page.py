"""docs/guarantees.md: every promise has a test or a command, and each of these is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from bench.suite import BENCHMARKS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "guarantees.md"


class Row(NamedTuple):
    line: int
    promise: str
    shown: str


def rows() -> list[Row]:
    """The rows of all tables, without their heads."""
    found = []
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("|") or re.fullmatch(r"[|\- :]+", line):
            continue
        if number < len(lines) and re.fullmatch(r"\|[|\- :]+", lines[number]):
            continue  # the head: a ruler follows it
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        assert len(cells) == 2, f"line {number} has {len(cells)} cells"
        found.append(Row(number, *cells))
    return found


ROWS = rows()
TESTS = sorted({found for row in ROWS for found in re.findall(r"`(tests/[^`]+)`", row.shown)})
COMMANDS = sorted(
    {found for row in ROWS for found in re.findall(r"`((?:make|bash) [^`]+)`", row.shown)}
)


def names_in(path: str) -> set[str]:
    """What pytest collects from the file: functions, and methods and names of test classes."""
    found = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            methods = (item for item in node.body if isinstance(item, ast.FunctionDef))
            found |= {node.name, *(f"{node.name}::{method.name}" for method in methods)}
        elif isinstance(node, ast.Assign):
            # TestX = Machine.TestCase
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in found if name.startswith(("test_", "Test"))}


def test_the_page_has_tables() -> None:
    assert len(ROWS) >= 100
    assert len(TESTS) >= 150


@pytest.mark.parametrize("path", sorted({test.partition("::")[0] for test in TESTS}))
def test_every_test_that_the_page_names_is_there(path: str) -> None:
    assert (ROOT / path).is_file()
    named = {name for file, _, name in (test.partition("::") for test in TESTS) if file == path}
    assert "" not in named, f"the page names {path}, and no test in it"
    assert named <= names_in(path), f"not in {path}: {sorted(named - names_in(path))}"


def test_every_promise_has_a_test_or_a_command() -> None:
    for row in ROWS:
        assert row.promise, f"line {row.line}"
        named = re.findall(r"`(?:tests/|make |bash )", row.shown)
        assert named, f"line {row.line}: {row.promise}"


def test_everything_in_the_second_column_is_a_test_or_a_command() -> None:
    for row in ROWS:
        for found in re.findall(r"`([^`]+)`", row.shown):
            assert found in TESTS or found in COMMANDS, f"line {row.line}: {found}"


def test_no_promise_is_made_twice() -> None:
    promises = [row.promise for row in ROWS]
    assert len(set(promises)) == len(promises)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_the_page_names_is_there(command: str) -> None:
    words = command.split(maxsplit=2)
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        return
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{re.escape(words[1])}:", rules, re.MULTILINE)
    if words[1] == "bench":
        only = re.fullmatch(r'ARGS="--only ([a-z0-9-]+)"', words[2])
        assert only is not None
        assert only[1] in {benchmark.name for benchmark in BENCHMARKS}
    if words[1] == "soak":
        chosen = re.fullmatch(r'ARGS="(tests/\S+\.py) -k (\w+)"', words[2])
        assert chosen is not None
        assert [name for name in names_in(chosen[1]) if chosen[2] in name]
