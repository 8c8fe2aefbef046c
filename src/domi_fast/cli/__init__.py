"""The command ``domi``: a cluster's nodes, channels and messages from a terminal (docs/cli.md).

It may use all of the package, and nothing of the package imports it. Its packages, click and rich,
are the extra ``domi-fast[cli]``.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command of ``sys.argv`` and end the process with its exit code."""
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What its encoding lacks is escaped, as Python does it on the standard error.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        for name in ("click", "rich"):
            importlib.import_module(name)
    except ImportError as error:
        text = f"domi: the command needs {error.name}: pip install 'domi-fast[cli]'"
        print(text, file=sys.stderr)
        sys.exit(1)
    from .commands import run_command

    code = run_command(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # noqa: PERF203 - two streams
            # It was said, and Python would say it again at its end, with an exit code of its own.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _open_closed_streams() -> None:
    """A standard stream that was closed gets a descriptor which can be neither read nor written.

    Using it is then an error like any other, and its number goes to no file or socket.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            unfit = os.O_WRONLY if mode == "r" else os.O_RDONLY
            stream = os.fdopen(os.open(os.devnull, unfit), mode, closefd=False)
            setattr(sys, name, stream)
