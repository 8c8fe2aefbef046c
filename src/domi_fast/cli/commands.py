"""The command ``domi``: its subcommands, and how whatever goes wrong in them ends."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Sequence
from importlib import metadata

import click

from . import checking, life, messages, program, views, watching
from .options import show_help_alone, write_lines
from .outcome import FAILED, INTERRUPTED, MEANINGS, OK, USAGE, Failure
from .output import printable

EXAMPLES = """\
domi run app:node          run the node of app.py
domi nodes                 who is in the cluster
domi request 50 ping       ask somebody who subscribes to channel 50
domi COMMAND --help        more on a command, with examples"""


class _Domi(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order in which they were added

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        codes = "\n".join(f"{code:>3}  {meaning}" for code, meaning in MEANINGS.items())
        write_lines(formatter, "Exit codes", codes)
        write_lines(formatter, "Examples", EXAMPLES)


def _version() -> str:
    try:
        return metadata.version("domi-fast")
    except metadata.PackageNotFoundError:
        return "(not installed)"


@click.group(
    cls=_Domi,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 98},
)
@click.version_option(_version(), message="domi_fast %(version)s")
@click.pass_context
def domi(ctx: click.Context) -> None:
    """See and steer the nodes of a cluster, and talk to them."""
    show_help_alone(ctx)


for part in (
    *(program.run, views.nodes, views.peers, views.channels, watching.top),
    *(messages.notify, messages.publish, messages.request, messages.sub),
    *(life.pause, life.resume, life.drain, life.exit_node, checking.registry),
):
    domi.add_command(part)


def run_command(arguments: Sequence[str]) -> int:
    """Run the command; what went wrong is said on the standard error. Its exit code."""
    try:
        # In its standalone mode click would choose the exit codes itself.
        code = domi.main(list(arguments), prog_name="domi", standalone_mode=False)
        sys.stdout.flush()
        return OK if code is None else int(code)
    except Failure as failure:
        return _end(failure.code, str(failure))
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "domi"
        return _end(USAGE, f"{error.format_message()} ({path} --help says more)")
    except (click.Abort, KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED
    except BrokenPipeError:
        return FAILED  # whoever read the output has had enough of it
    except OSError as error:
        # What talks to nodes and registries has made a Failure of its own.
        return _end(FAILED, f"reading or writing failed: {error}")


def _end(code: int, why: str) -> int:
    with contextlib.suppress(OSError):  # the code is said in any case
        print(f"domi: {printable(' '.join(why.split()))}", file=sys.stderr)
    return code
