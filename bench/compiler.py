"""The C compiler: which one compiles here, and which one has compiled a file."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sysconfig

__all__ = ["NoCompiler", "command", "names_in"]


class NoCompiler(Exception):
    """There is none; the message says what to do."""


def command() -> list[str]:
    """What ``CC`` says, otherwise what Python was compiled with, otherwise ``cc``.

    :raises NoCompiler: it is not there.
    """
    wanted = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    words = shlex.split(wanted)
    if shutil.which(words[0]) is None:
        raise NoCompiler(f"no C compiler: {words[0]!r} was not found; set CC")
    return words


def names_in(code: bytes) -> str:
    """The compilers that have left their names in a compiled file."""
    gcc = {f"gcc {found.decode()}" for found in re.findall(rb"GCC: \([^)]*\) ([\d.]+)", code)}
    clang = {f"clang {found.decode()}" for found in re.findall(rb"clang version ([\d.]+)", code)}
    return " and ".join(sorted(gcc | clang)) or "an unknown compiler"
