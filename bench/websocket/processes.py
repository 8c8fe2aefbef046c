"""The driver's side: bare servers, and the clients in C, that are started, pinned and asked."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import compiler
from bench.child import BenchError, Child
from bench.processor import stay

PATIENCE = 30.0  # seconds until a server has seen its clients come or go

__all__ = ["ask", "await_clients", "compiled", "order", "started"]


def ask(child: Child, line: str) -> dict[str, Any]:
    child.say(line)
    return child.answer()


def order(do: str, **what: object) -> str:
    return json.dumps({"do": do, **what})


def started(name: str, cpu: int) -> Child:
    """The bare server of a library, by its name in ``SERVERS``; its first line has the port."""
    server = Child(name, [sys.executable, "-m", "bench.websocket.servers", name])
    stay(server.pid, cpu)
    return server


def compiled(folder: Path) -> Path:
    """The program of the clients."""
    program = folder / "load"
    source = str(Path(__file__).with_name("load.c"))
    try:
        command = compiler.command()
    except compiler.NoCompiler as error:
        raise BenchError(str(error)) from error
    subprocess.run([*command, "-O2", source, "-o", str(program)], check=True)
    return program


def await_clients(server: Child, count: int) -> dict[str, Any]:
    """What the server says of itself once it has so many clients."""
    until = time.monotonic() + PATIENCE
    while (state := ask(server, order("state")))["clients"] != count:
        if time.monotonic() > until:
            raise BenchError(f"{server.name}: {state['clients']} clients, and not {count}")
        time.sleep(0.05)
    return state
