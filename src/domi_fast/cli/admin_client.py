"""Asks the admin pages of nodes. One request a connection; follows nothing, trusts no proxy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

from ..membership import NodeInfo
from .cluster import admin_address, title
from .outcome import FAILED, TIMEOUT, UNREACHABLE, Failure

LIMIT = 64 * 1024 * 1024
"""The most bytes that an answer may have."""


async def ask(
    info: NodeInfo, path: str, *, method: str = "GET", token: str | None = None, timeout: float
) -> Any:
    """What the page of the node says.

    :param timeout: seconds for the whole of it.
    :raises Failure: the node has no pages, does not answer, or refuses.
    """
    where = admin_address(info)
    host, port = info.host, info.http
    assert port is not None
    lines = [f"{method} {path} HTTP/1.0", f"Host: {where}"]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    try:
        data = await asyncio.wait_for(
            _exchange(host, port, "\r\n".join([*lines, "", ""]).encode()), timeout
        )
    except asyncio.TimeoutError:
        raise Failure(
            TIMEOUT, f"{title(info)} did not answer at http://{where}{path} within {timeout:g} s"
        ) from None
    except OSError as error:
        raise Failure(
            UNREACHABLE, f"{title(info)} cannot be asked at http://{where}{path}: {error}"
        ) from error
    status, found = _parse(info, data)
    if status >= 400:
        why = found.get("error") if isinstance(found, dict) else None
        hint = "; give it with --token or DOMI_ADMIN_TOKEN" if status == 401 else ""
        raise Failure(
            FAILED, f"{title(info)} refused {path} ({status}): {why or 'no reason'}{hint}"
        )
    return found


async def ask_all(
    infos: Iterable[NodeInfo], path: str, *, timeout: float
) -> dict[int, Any | Failure]:
    """The page of every node that has pages, at once, by machine id; or why not."""
    asked = [info for info in infos if info.http is not None]
    answers = await asyncio.gather(
        *(ask(info, path, timeout=timeout) for info in asked), return_exceptions=True
    )
    found: dict[int, Any | Failure] = {}
    for info, answer in zip(asked, answers, strict=True):
        if isinstance(answer, BaseException) and not isinstance(answer, Failure):
            raise answer
        found[info.id] = answer
    return found


async def _exchange(host: str, port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request)
        data = b""
        while len(data) <= LIMIT and (more := await reader.read(65536)):
            data += more
        return data
    finally:
        writer.close()


def _parse(info: NodeInfo, data: bytes) -> tuple[int, Any]:
    head, _, body = data.partition(b"\r\n\r\n")
    try:
        return int(head.split(maxsplit=2)[1]), json.loads(body)
    except (ValueError, IndexError, RecursionError):
        raise Failure(
            FAILED, f"what answers for {title(info)} at {admin_address(info)} is no admin page"
        ) from None
