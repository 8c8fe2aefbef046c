"""The anchor of dispatch: a Python function, called from a loop in C (``vectorcalls.c``)."""

from __future__ import annotations

import importlib.util
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import compiler

__all__ = ["load"]


def load() -> Callable[[Callable[[Any], object], object, int], None]:
    """``repeat(function, argument, count)``, compiled for the Python that runs."""
    source = Path(__file__).with_suffix(".c")
    include = sysconfig.get_paths()["include"]
    with tempfile.TemporaryDirectory(prefix="domi-bench-") as folder:
        program = Path(folder, f"vectorcalls{sysconfig.get_config_var('EXT_SUFFIX')}")
        command = [*compiler.command(), "-O3", "-fno-plt", "-shared", "-fPIC", f"-I{include}"]
        subprocess.run([*command, str(source), "-o", str(program)], check=True)
        spec = importlib.util.spec_from_file_location("vectorcalls", program)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    repeat: Callable[[Callable[[Any], object], object, int], None] = module.repeat
    return repeat
