"""``domi run``: components of modules, run as a program."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from typing import Any

import click

from ..app import Component
from ..app import run as run_components
from ..errors import DomiError, RegistryError
from ..node import Node
from .options import ExampleCommand, output_option, timeout_option
from .outcome import FAILED, UNREACHABLE, USAGE, Failure
from .output import Output

EXAMPLES = """
domi run app:node                 the attribute node of app.py
domi run app                      the same
domi run shop.desk:node shop.desk:serial --timeout 20
domi run app --json | jq .event   when it is there, and when it has ended
"""


@click.command("run", cls=ExampleCommand, examples=EXAMPLES)
@click.argument("targets", nargs=-1, required=True, metavar="MODULE[:ATTRIBUTE]...")
@timeout_option(8.0, "Seconds for the orderly stop, before it is forced.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    help="What is logged to the standard error, unless the module sets up logging. [default: info]",
)
@output_option
def run(targets: tuple[str, ...], timeout: float, log_level: str, out: Output) -> None:
    """Run nodes, and other components, until SIGINT or SIGTERM.

    Each is an attribute of a module, `node` unless given; they start in this order and stop in the
    reverse. Modules are found in the current directory and on Python's path. With `--json` it says
    when all have started, and when they have stopped in order.
    """
    sys.path.insert(0, os.getcwd())
    components = [_load(target) for target in targets]
    if len({id(component) for component in components}) < len(components):
        raise Failure(USAGE, f"{' '.join(targets)}: a component is named twice")
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    told = [_Ready(components, out)] if out.json else []
    try:
        run_components(*components, *told, timeout=timeout)
    except RegistryError as error:
        raise Failure(UNREACHABLE, str(error)) from error
    except (DomiError, OSError) as error:
        raise Failure(FAILED, str(error)) from error
    if out.json:
        out.document({"event": "ended"})


class _Ready:
    """The last component to start: by then the nodes are there."""

    def __init__(self, components: list[Component], out: Output) -> None:
        self._nodes = [each for each in components if isinstance(each, Node)]
        self._out = out

    async def start(self) -> None:
        nodes = [
            {
                "id": node.id,
                "name": node.config.name,
                "version": node.config.version,
                "host": node.config.host,
                "port": node.port,
                "unix_path": node.config.unix_path,
                "http": node.http_port,
            }
            for node in self._nodes
        ]
        self._out.document({"event": "ready", "nodes": nodes})

    async def close(self) -> None:
        pass


def _load(target: str) -> Component:
    """The component that ``module:attribute`` names."""
    name, colon, attribute = target.partition(":")
    attribute = attribute if colon else "node"
    if not name or not attribute:
        raise Failure(USAGE, f"{target!r}: MODULE:ATTRIBUTE is wanted, for example app:node")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # One that the module itself lacks is its own affair, and comes with its traceback.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise Failure(
            USAGE, f"there is no module {name!r} in {os.getcwd()} or on Python's path"
        ) from error
    except OSError as error:
        traceback.print_exc()
        raise Failure(FAILED, f"module {name!r} cannot be imported: {error}") from error
    found: Any = module
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise Failure(
            USAGE, f"module {name!r} ({module.__file__}) has no attribute {attribute!r}"
        ) from None
    if isinstance(found, type) or not isinstance(found, Component):
        raise Failure(
            USAGE,
            f"{target} is {found!r}: a Node, or another component with async start() and close(), "
            "is wanted",
        )
    return found
