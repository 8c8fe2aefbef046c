"""``domi notify``, ``publish``, ``request`` and ``sub``: the verbs, as a guest of a node."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import click

from .._core import Context
from ..client import Client
from ..errors import DomiError, PeerLost
from .cluster import Where, settle
from .options import (
    CHANNEL,
    command,
    data_argument,
    form_option,
    guest_options,
    timeout_option,
    to_option,
)
from .outcome import NOT_FOUND, TIMEOUT, UNREACHABLE, USAGE, Failure
from .output import Output, fields_of, text_of


@command(
    "notify",
    """
    domi notify 50 hello
    domi notify 50 --hex 00ff10
    echo hello | domi notify 50 - --to server
    """,
)
@click.argument("channel", type=CHANNEL)
@data_argument
@to_option
@timeout_option(5.0, "Seconds to send it in.")
@guest_options
async def notify(
    channel: int, data: bytes, to: str | None, timeout: float, where: Where, out: Output
) -> None:
    """Send DATA to one subscriber of CHANNEL. DATA may be `-`, for the standard input."""
    machine = await where.target(to)
    refused: list[DomiError] = []
    async with where.guest(on_error=lambda error, frame: refused.append(error)) as guest:
        guest.notify(channel, data, to=machine)
        await _sent(guest, timeout, refused, to)
    if out.json:
        out.document({"channel": channel, "bytes": len(data), "sent": True})


@command(
    "publish",
    """
    domi publish 60 hello
    domi publish 60 - < picture.png
    """,
)
@click.argument("channel", type=CHANNEL)
@data_argument
@timeout_option(5.0, "Seconds to send it in.")
@guest_options
async def publish(channel: int, data: bytes, timeout: float, where: Where, out: Output) -> None:
    """Send DATA to every subscriber of CHANNEL, if there is one.

    DATA may be `-`, for the standard input. That nobody subscribes is no failure.
    """
    refused: list[DomiError] = []
    async with where.guest(on_error=lambda error, frame: refused.append(error)) as guest:
        guest.publish(channel, data)
        await _sent(guest, timeout, refused, None)
    if out.json:
        out.document({"channel": channel, "bytes": len(data), "sent": True})


@command(
    "request",
    """
    domi request 50 ping
    domi request 50 ping --to 3 --timeout 1
    domi request 50 - --output raw < question > answer
    """,
)
@click.argument("channel", type=CHANNEL)
@data_argument
@to_option
@timeout_option(5.0, "Seconds to wait for the answer.")
@form_option
@guest_options
async def request(
    channel: int, data: bytes, to: str | None, timeout: float, form: str, where: Where, out: Output
) -> None:
    """Ask one subscriber of CHANNEL and print its answer.

    DATA may be `-`, for the standard input.
    """
    _check_form(form, out)
    machine = await where.target(to)
    async with where.guest() as guest:
        begun = time.perf_counter()
        try:
            answer = await guest.request(channel, data, timeout, to=machine)
        except PeerLost as error:
            raise _lost(error, to) from error
        seconds = time.perf_counter() - begun
    if out.json:
        out.document({"channel": channel, **fields_of(answer, form), "seconds": round(seconds, 6)})
    elif form == "raw":
        _write(answer)
    else:
        out.line(text_of(answer, form, keep="\n\t"))


@command(
    "sub",
    """
    domi sub 60
    domi sub 60 --count 1 --timeout 10
    domi sub 60 --json | jq .data
    """,
)
@click.argument("channel", type=CHANNEL)
@click.option(
    "--count",
    type=click.IntRange(1),
    metavar="N",
    help="End after so many messages; without it, at Ctrl-C.",
)
@timeout_option(None, "Seconds for all of it; exit code 5 when they are over.")
@form_option
@guest_options
async def sub(
    channel: int, count: int | None, timeout: float | None, form: str, where: Where, out: Output
) -> None:
    """Subscribe to CHANNEL and print what arrives, a message a line.

    It is a subscriber like others: it has its turn at what goes to one of them, and leaves requests
    unanswered.
    """
    _check_form(form, out)
    try:
        await asyncio.wait_for(_print_messages(channel, count, form, where, out), timeout)
    except asyncio.TimeoutError:
        raise Failure(
            TIMEOUT, f"not within {timeout:g} s: what channel {channel} was to bring"
        ) from None
    except asyncio.CancelledError:
        if count is not None:
            raise
        # Ctrl-C is how it ends.


async def _print_messages(
    channel: int, count: int | None, form: str, where: Where, out: Output
) -> None:
    async with where.guest() as guest, guest.watch_channel(channel, 65536) as arriving:
        await settle(guest, where.patience)
        if not out.json and sys.stderr.isatty():
            print(f"channel {channel}, through node {guest.node_id}", file=sys.stderr)
        left = count
        async for message in arriving:
            _print(message, form, out)
            if left is not None:
                left -= 1
                if left == 0:
                    return
        raise Failure(UNREACHABLE, f"node {guest.node_id}, which this is a guest of, has gone")


def _print(message: Context, form: str, out: Output) -> None:
    if out.json:
        out.document(
            {
                "channel": message.channel,
                "sender": message.sender,
                "request": message.is_request,
                **fields_of(message.data, form),
            }
        )
    elif form == "raw":
        _write(message.data)
    else:
        out.line(text_of(message.data, form))


async def _sent(guest: Client, timeout: float, refused: list[Any], to: str | None) -> None:
    """Wait until the node has taken what was sent; raise what it refused."""
    await asyncio.wait_for(guest.drained(), timeout)
    await settle(guest, timeout)
    if refused and isinstance(refused[0], PeerLost):
        raise _lost(refused[0], to)
    if refused:
        raise refused[0]


def _lost(error: PeerLost, to: str | None) -> Failure:
    if to is None:
        return Failure(UNREACHABLE, str(error))
    return Failure(NOT_FOUND, f"node {to!r} is not there, or has gone: {error}")


def _check_form(form: str, out: Output) -> None:
    if form == "raw" and out.json:
        raise Failure(USAGE, "--output raw with --json: choose one; JSON has text or hex")


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
