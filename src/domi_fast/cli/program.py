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
from .options import ExampleCommand, timeout_option
from .outcome import FAILED, UNREACHABLE, USAGE, Failure

EXAMPLES = """
domi run app:node                 the attribute node of app.py
domi run app                      the same
domi run shop.desk:node shop.desk:serial --timeout 20
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
def run(targets: tuple[str, ...], timeout: float, log_level: str) -> None:
    """Run nodes, and other components, until SIGINT or SIGTERM.

    Each is an attribute of a module, `node` unless given; they start in this order and stop in the
    reverse. Modules are found in the current directory and on Python's path.
    """
    sys.path.insert(0, os.getcwd())
    components = [_load(target) for target in targets]
    if len({id(component) for component in components}) < len(components):
        raise Failure(USAGE, f"{' '.join(targets)}: a component is named twice")
    logging.basicConfig(
        level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        run_components(*components, timeout=timeout)
    except RegistryError as error:
        raise Failure(UNREACHABLE, str(error)) from error
    except (DomiError, OSError) as error:
        raise Failure(FAILED, str(error)) from error


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
