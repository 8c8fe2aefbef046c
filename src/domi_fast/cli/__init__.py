"""The command ``domi``: a cluster's nodes, channels and messages from a terminal (docs/cli.md).

It may use all of the package, and nothing of the package imports it. Its packages, click and rich,
are the extra ``domi-fast[cli]``.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command of ``sys.argv`` and end the process with its exit code."""
    try:
        for name in ("click", "rich"):
            importlib.import_module(name)
    except ImportError as error:
        text = f"domi: the command needs {error.name}: pip install 'domi-fast[cli]'"
        print(text, file=sys.stderr)
        sys.exit(1)
    from .commands import run_command

    code = run_command(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
