"""The standard streams of the command: of another encoding, full, or closed."""

from __future__ import annotations

import os
from functools import partial

import pytest

from tests.cli.conftest import Shell
from tests.cli.nodes import ECHO, KEEP, KEPT

pytestmark = pytest.mark.command

PRINTING = [
    "nodes",
    "nodes --json",
    "top --once",
    f"request {ECHO} x",
    f"request {ECHO} x --output raw",
    "--help",
    "nodes --help",
]


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_what_stdout_cannot_encode_is_escaped(domi: Shell, variables: dict[str, str]) -> None:
    domi.environment |= variables
    found = domi.run("request", str(ECHO), "é")
    assert (found.code, found.out, found.said) == (0, b"\\xe9\n", "")


@pytest.mark.parametrize("words", PRINTING)
def test_stdout_that_is_full(domi: Shell, words: str) -> None:
    with open("/dev/full", "wb") as full:
        ended = domi.end(domi.start(*words.split(), stdout=full))
    ended.fails(1, "No space left on device")


@pytest.mark.parametrize("words", PRINTING)
def test_stdout_that_is_closed(domi: Shell, words: str) -> None:
    process = domi.start(*words.split(), stdout=None, preexec_fn=partial(os.close, 1))
    domi.end(process).fails(1, "Bad file descriptor")


def test_who_prints_nothing_needs_no_stdout(domi: Shell) -> None:
    words = ("notify", str(KEEP), "x", "--to", "beta")
    process = domi.start(*words, stdout=None, preexec_fn=partial(os.close, 1))
    ended = domi.end(process)
    assert (ended.code, ended.said) == (0, "")
    # Other tests find nothing kept.
    assert domi.run("request", str(KEPT), "", "--to", "alpha").code == 0


def test_stdin_that_is_closed(domi: Shell) -> None:
    process = domi.start("request", str(ECHO), "-", stdin=None, preexec_fn=partial(os.close, 0))
    domi.end(process).fails(1, "Bad file descriptor")


def test_stderr_that_cannot_be_written(domi: Shell) -> None:
    """The exit code says what it would have."""
    with open("/dev/full", "wb") as full:
        ended = domi.end(domi.start("bogus", stderr=full))
    assert (ended.code, ended.out) == (2, b"")
    ended = domi.end(domi.start("bogus", stderr=None, preexec_fn=partial(os.close, 2)))
    assert (ended.code, ended.out) == (2, b"")
