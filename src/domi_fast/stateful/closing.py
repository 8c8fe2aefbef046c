"""How a zone ends with groups in it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from .claims import give_back
from .group import Group, Home
from .hand_over import HandOver
from .openings import Openings
from .saver import Saver

log = logging.getLogger(__name__)


async def close_groups(
    zone: Home,
    openings: Openings,
    hand_over: HandOver,
    saver: Saver,
    closers: set[asyncio.Task[Any]],
) -> None:
    """Let the handlers that run end, for ``drain_timeout`` seconds at most; save what has changed,
    tell the gateways, and give the names back.

    :param closers: tasks that wait for this, and which therefore are not waited for.
    """
    timeout = zone.node.config.drain_timeout
    await openings.end()
    await hand_over.end(timeout / 4)
    groups = list(zone._groups.values())
    late = await _stop(groups, closers, timeout / 2)
    for group in late:
        log.warning("%r: a handler still runs after %g s: it is cancelled", group, timeout / 2)
    try:
        await asyncio.wait_for(saver.save_all(), timeout / 4)
    except asyncio.TimeoutError:
        log.warning("%r: not all groups could be saved in time", zone)
    names = []
    for group in groups:
        zone._tell_lost(group, "its zone has closed")
        zone._forget(group.id, "is gone: the zone was closed")
        if group._name is not None:
            names.append(asyncio.ensure_future(give_back(group._name)))
    flushed = [link.flushed() for links in (zone._links, zone._zones) for link in links]
    try:
        await asyncio.wait_for(asyncio.gather(*flushed), timeout / 8)
    except asyncio.TimeoutError:
        log.warning("%r: not all nodes have been told in time", zone)
    if names:
        _, pending = await asyncio.wait(names, timeout=timeout / 4)
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending)


async def _stop(
    groups: list[Group], closers: set[asyncio.Task[Any]], timeout: float
) -> list[Group]:
    """Begin no handler any more, and end those that run. Returns whose was cancelled."""
    running = {}
    for group in groups:
        group._mailbox.stop()
        task = group._mailbox.task
        # A handler that closes the zone waits for it, and it does not wait for the handler.
        if task is not None and task not in closers:
            running[task] = group
    if not running:
        return []
    _, pending = await asyncio.wait(running, timeout=timeout)
    for task in pending:
        running[task]._mailbox.cancel()
    if pending:
        await asyncio.wait(pending, timeout=timeout)
    return [running[task] for task in pending]
