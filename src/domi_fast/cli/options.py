"""The options that commands share, and the shape of a command: its examples are part of it."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import click

from ..channels import USER_FIRST, USER_LAST
from ..config import SECRET_VARIABLE, check_cluster, checked_secret
from ..errors import DomiError
from ..tls import Certificates, Tls
from .cluster import Where
from .outcome import USAGE, explained
from .output import Output

Function = Callable[..., Any]


class Seconds(click.FloatRange):
    """A number of seconds that is one: neither infinite nor NaN."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a number of seconds", param, ctx)
        return float(number)


class Readable(click.Path):
    """The path of a file that is there. Who gives what is in it instead does not see it again."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            pass  # whose text repeats it
        return self.fail("there is no such file, or it cannot be read", param, ctx)


CHANNEL = click.IntRange(USER_FIRST, USER_LAST)
SECONDS = Seconds(0.001, 86400)


class ExampleCommand(click.Command):
    """A command whose help ends with examples."""

    def __init__(self, *arguments: Any, examples: str = "", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.examples = inspect.cleandoc(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_lines(formatter, "Examples", self.examples)


def command(
    name: str, examples: str
) -> Callable[[Callable[..., Coroutine[Any, Any, int | None]]], click.Command]:
    """Make a command of a coroutine function, which returns the exit code, or None for success.

    Its docstring is the help. What the library raises ends it as ``outcome`` says.
    """

    def make(function: Callable[..., Coroutine[Any, Any, int | None]]) -> click.Command:
        @functools.wraps(function)
        def run(**given: Any) -> int | None:
            with explained():
                return asyncio.run(_until_interrupted(function(**given)))

        return click.command(name, cls=ExampleCommand, examples=examples)(run)

    return make


async def _until_interrupted(work: Coroutine[Any, Any, int | None]) -> int | None:
    """Cancel the work at Ctrl-C: it cleans up, and may take that for its end."""
    # Before Python 3.11 asyncio.run would raise KeyboardInterrupt whatever the work makes of it.
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    return await task


def show_help_alone(ctx: click.Context) -> None:
    """End a group that was given no subcommand with its help, which is an error."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(USAGE)


def write_lines(formatter: click.HelpFormatter, title: str, text: str) -> None:
    """A section of the help whose lines stay as they are."""
    with formatter.section(title):
        for line in text.splitlines():
            formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def output_option(function: Function) -> Function:
    """``--json``; the command gets ``out``."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON, one document a line.")
    @functools.wraps(function)
    def with_output(*, as_json: bool, **given: Any) -> Any:
        return function(out=Output(as_json), **given)

    return with_output


def registry_options(function: Function) -> Function:
    """Where the cluster is; the command gets ``where`` and ``out``."""

    @click.option(
        "--registry",
        envvar="DOMI_REGISTRY",
        metavar="URL",
        help="The cluster's registry, as nodes name it. [env: DOMI_REGISTRY; default: the SQLite "
        "file of the cluster in your runtime directory]",
    )
    @click.option(
        "--cluster",
        envvar="DOMI_CLUSTER",
        default="default",
        callback=_cluster_name,
        metavar="NAME",
        help="The cluster's name. [env: DOMI_CLUSTER; default: default]",
    )
    @output_option
    @functools.wraps(function)
    def with_where(*, registry: str | None, cluster: str, **given: Any) -> Any:
        return function(where=Where(cluster, registry or None), **given)

    return with_where


def _cluster_name(ctx: click.Context, param: click.Parameter, given: str) -> str:
    try:
        check_cluster(given)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return given


def _secret(ctx: click.Context, param: click.Parameter, given: str | None) -> bytes | None:
    what, secret = SECRET_VARIABLE, os.environb.get(SECRET_VARIABLE.encode())
    try:
        if given is not None:
            what = given
            secret = Path(given).read_bytes().removesuffix(b"\n").removesuffix(b"\r")
        return None if secret is None else checked_secret(what, secret)
    except (OSError, ValueError) as error:
        raise click.UsageError(str(error)) from error


def _tls_option(field: str, text: str) -> Callable[[Function], Function]:
    variable = f"DOMI_TLS_{field.upper()}"
    return click.option(
        f"--tls-{field}",
        envvar=variable,
        type=Readable(),
        metavar="FILE",
        help=f"{text} [env: {variable}]",
    )


def _tls(certificate: str | None, key: str | None, authority: str | None) -> Tls | None:
    if certificate and key and authority:
        tls = Tls(certificate, key, authority)
        try:
            Certificates(tls, None)
        except DomiError as error:
            raise click.UsageError(str(error)) from error
        return tls
    if certificate or key or authority:
        raise click.UsageError(
            "--tls-certificate, --tls-key and --tls-authority go together: give all three"
        )
    return None


def guest_options(function: Function) -> Function:
    """Which node to talk through; the command gets ``where`` and ``out``."""

    @click.option(
        "--connect",
        metavar="URL",
        help="Talk through this node, tcp://host:port or unix:///path, and ask no registry.",
    )
    @click.option(
        "--secret-file",
        envvar="DOMI_SECRET_FILE",
        type=Readable(),
        callback=_secret,
        metavar="FILE",
        help="What this file holds is the cluster's secret, without a newline at its end. [env: "
        "DOMI_SECRET_FILE, or the secret itself in DOMI_SECRET]",
    )
    @_tls_option("certificate", "The certificate to show, where the nodes show theirs.")
    @_tls_option("key", "Its private key.")
    @_tls_option("authority", "Whose signature is good.")
    @registry_options
    @functools.wraps(function)
    def with_connect(
        *,
        connect: str | None,
        secret_file: bytes | None,
        tls_certificate: str | None,
        tls_key: str | None,
        tls_authority: str | None,
        where: Where,
        **given: Any,
    ) -> Any:
        there = Where(
            where.cluster,
            where.registry,
            connect,
            secret=secret_file,
            tls=_tls(tls_certificate, tls_key, tls_authority),
        )
        return function(where=there, **given)

    return with_connect


def token_option(function: Function) -> Function:
    return click.option(
        "--token",
        envvar="DOMI_ADMIN_TOKEN",
        metavar="TOKEN",
        help="The node's admin token. Others can see the command line: prefer the environment. "
        "[env: DOMI_ADMIN_TOKEN]",
    )(function)


def timeout_option(default: float | None, text: str) -> Callable[[Function], Function]:
    shown = "" if default is None else f" [default: {default:g}]"
    return click.option(
        "--timeout", type=SECONDS, default=default, metavar="SECONDS", help=text + shown
    )


def data_argument(function: Function) -> Function:
    """``DATA``, ``-`` and ``--hex``; the command gets ``data`` as bytes."""

    @click.argument("data")
    @click.option("--hex", "from_hex", is_flag=True, help="DATA are hexadecimal digits.")
    @functools.wraps(function)
    def with_data(*, data: str, from_hex: bool, **given: Any) -> Any:
        return function(data=_bytes(data, from_hex), **given)

    return with_data


def form_option(function: Function) -> Function:
    return click.option(
        "--output",
        "form",
        type=click.Choice(["utf8", "hex", "raw"]),
        default="utf8",
        help="How data are printed: as text without control characters, as hexadecimal digits, or "
        "byte for byte and nothing else. [default: utf8]",
    )(function)


def to_option(function: Function) -> Function:
    return click.option(
        "--to", metavar="NODE", help="The node that gets it, by id or name, instead of one in turn."
    )(function)


def _bytes(given: str, from_hex: bool) -> bytes:
    data = sys.stdin.buffer.read() if given == "-" else os.fsencode(given)
    if not from_hex:
        return data
    try:
        return bytes.fromhex(data.decode())
    except ValueError as error:
        raise click.UsageError(f"DATA with --hex: pairs of hexadecimal digits, {error}") from None
