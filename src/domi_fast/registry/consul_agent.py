"""One Consul agent, as the package py-consul speaks to it on an event loop."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from ..errors import RegistryError
from .base import LeaseLost, Service
from .link import TIMEOUT, Away
from .server_url import Endpoints

WAIT: Final = 4.0
"""Seconds after which a question for changes is answered though there are none.

The agent adds up to a sixteenth; one that hangs is known after these and :data:`TIMEOUT`.
"""

NODE: Final = "domi-fast"
"""The node of Consul's catalog to which all sessions belong; no agent runs on it."""

# Each watch, and each that waits for a lock, has a connection of its own; py-consul's own limit
# would have the hundred-and-first wait until another ends.
_CONNECTIONS: Final = 1 << 16

_NO_PARTS: Final = ("", ".", "..")

# After which a service whose check passes no more is forgotten: Consul's least.
_FORGOTTEN: Final = "1m"

# The codes of what may go better later; and the words that come with them when nothing was done.
_LATER: Final = ("429", "5")
_UNDONE: Final = ("No cluster leader", "too many concurrent connections")

Op: TypeAlias = dict[str, Any]
"""One operation of a transaction."""


@dataclass(frozen=True)
class Row:
    """A key as Consul has it.

    :ivar created: Consul's index at which it was created.
    :ivar modified: and at which it was changed for the last time.
    :ivar session: the session that holds it, or none.
    :ivar mark: who writes a key gives it a number, by which a write is known again.
    """

    key: str
    value: bytes
    created: int
    modified: int
    session: str | None
    mark: int


class Conflict(RegistryError):
    """A transaction was not done, since something was not as it expected."""


# ---------------------------------------------------------------------------- transactions


def absent(key: str) -> Op:
    """That there is no such key."""
    return {"Verb": "check-not-exists", "Key": key}


def unchanged(row: Row) -> Op:
    """That a key is as it was."""
    return {"Verb": "check-index", "Key": row.key, "Index": row.modified}


def delete(key: str) -> Op:
    """To delete a key, if it is there."""
    return {"Verb": "delete", "Key": key}


def write(key: str, value: bytes, mark: int, session: str | None) -> Op:
    """To write a key, which the session then holds; without one, who holds it still does."""
    text = base64.b64encode(value).decode()
    op: Op = {"Verb": "set", "Key": key, "Value": text, "Flags": mark}
    return op if session is None else {**op, "Verb": "lock", "Session": session}


def let_go(row: Row, value: bytes, mark: int) -> Op:
    """To write a key that a session holds, so that none does."""
    return {**write(row.key, value, mark, row.session), "Verb": "unlock"}


# ---------------------------------------------------------------------------- the agent


def load_consul() -> Any:
    """The module ``consul.aio``.

    :raises RegistryError: it is not installed, or something that it needs is not.
    """
    try:
        import consul.aio
    except ImportError as error:
        raise RegistryError(
            f"the Consul registry needs the extra [consul], which cannot be imported ({error}): "
            "pip install 'domi-fast[consul]'"
        ) from error
    return consul.aio


class Agent:
    """Calls to one agent, on the loop on which it was made.

    They raise Away when it cannot be reached or does not answer, and RegistryError. What they read
    is what the majority of Consul's servers has at that moment.
    """

    def __init__(self, endpoints: Endpoints) -> None:
        aio = load_consul()
        ((host, port),) = endpoints.addresses
        host = f"[{host}]" if ":" in host else host
        self.address = f"{host}:{port}"
        try:
            self._client = aio.Consul(
                host,
                port,
                scheme="https" if endpoints.ca else "http",
                verify=endpoints.ca or False,
                cert=(endpoints.cert, endpoints.key) if endpoints.cert else None,
                consistency="consistent",
                connections_limit=_CONNECTIONS,
                connections_timeout=TIMEOUT,
            )
        except OSError as error:
            raise RegistryError(f"Consul at {self.address}: ca=, cert= or key=: {error}") from error
        if endpoints.password is not None:
            self._client.token = endpoints.password  # py-consul prefers that of the environment

    async def close(self) -> None:
        await self._client.close()

    # ------------------------------------------------------------------ keys

    async def read(self, key: str) -> Row | None:
        with self._errors():
            _, found = await self._client.kv.get(key)
            return None if found is None else _row(found)

    async def list(self, prefix: str) -> tuple[Sequence[Row], int]:
        """All keys that begin so, in order, and the index of the last change to them."""
        with self._errors():
            index, found = await self._client.kv.get(_within(prefix), recurse=True)
            rows = [_row(item) for item in found or ()]
            return [row for row in rows if row.key.startswith(prefix)], int(index)

    async def names(self, prefix: str) -> Sequence[str]:
        """All keys that begin so, in order, without what is under them."""
        with self._errors():
            _, found = await self._client.kv.get(_within(prefix), keys=True)
            return [key for key in found or () if key.startswith(prefix)]

    async def transact(self, ops: Sequence[Op]) -> Row | None:
        """Do all, or nothing: the key as the last operation left it, without its value.

        Raises Conflict, and LeaseLost when a session is over.
        """
        with self._errors(changes=True):
            # py-consul's own txn.put has no token, and loses what Consul says of a conflict.
            answer = await self._put("/v1/txn", [{"KV": op} for op in ops])
            results = answer["Results"] or []
            errors = [(error["OpIndex"], error["What"]) for error in answer["Errors"] or ()]
            if not errors:
                return _row(results[-1]["KV"]) if results else None
        what = f"Consul at {self.address}: {errors[0][1]}"
        if any(ops[position]["Verb"].startswith("check-") for position, _ in errors):
            raise Conflict(what)
        raise LeaseLost(what) if "invalid session" in what else RegistryError(what)

    async def await_change(self, prefix: str, index: int) -> int:
        """Wait for up to :data:`WAIT` seconds until something under the prefix changes.

        Other changes may end the wait as well. Returns the index from which to go on.

        :param index: from an earlier call; 0 does not wait.
        """
        # All keys together are then one name, so that little comes back however many there are.
        within, slash, _ = _within(prefix).rpartition("/")
        now, _ = await self._wait(within, index, keys=True, separator=slash)
        # Consul wants to be asked from the start once it is behind what it said.
        return now if now >= index else 0

    async def has_changed(self, row: Row) -> bool:
        """Wait for up to :data:`WAIT` seconds until a key is not as it was."""
        _, found = await self._wait(row.key, row.modified)
        return found is None or _row(found).modified != row.modified

    async def _wait(self, key: str, index: int, **options: Any) -> tuple[int, Any]:
        with self._errors():
            now, found = await self._client.kv.get(
                key,
                index=index,
                wait=f"{WAIT * 1000:.0f}ms",
                connections_timeout=WAIT + WAIT / 16 + TIMEOUT,
                **options,
            )
            return int(now), found

    # ------------------------------------------------------------------ sessions

    async def create_session(self, ttl: int) -> str:
        """A session that is over when it was not renewed for ``ttl`` ms, or up to twice that.

        What it holds goes with it, and can be held by another at once.
        """
        # Nothing else ends it. A session of the agent's own node would go with that when the agent
        # leaves, or fails a check of its health, and so before the time until which the lease's
        # owner relies on it. As that time is never later than the session's end, what it held need
        # not be kept from the next for a while, as Consul does by default.
        session = {
            "Node": NODE,
            "TTL": f"{ttl}ms",
            "Behavior": "delete",
            "LockDelay": "0s",
            "Checks": [],
        }
        with self._errors(changes=True):
            # What py-consul says in catalog.register, with a token, Consul takes for wrong; and
            # its session.create refuses less than 10 s, whatever the servers take.
            await self._put("/v1/catalog/register", {"Node": NODE, "Address": "127.0.0.1"})
            return str((await self._put("/v1/session/create", session))["ID"])

    async def renew_session(self, session: str) -> bool:
        """Whether it was still there."""
        from consul import NotFound

        with self._errors(changes=True):
            try:
                await self._client.session.renew(session)
            except NotFound:
                return False
            return True

    async def destroy_session(self, session: str) -> None:
        with self._errors(changes=True):
            await self._client.session.destroy(session)

    # ------------------------------------------------------------------ services

    async def pass_check(self, service: Service) -> bool:
        """For another ``ttl`` seconds; False: the agent does not know the service (any more)."""
        with self._errors(changes=True):
            return await self._has_put(f"/v1/agent/check/pass/{_check_of(service)}")

    async def show(self, service: Service, ttl: float) -> None:
        """Register a service with this agent, whose check passes for the next ``ttl`` seconds."""
        with self._errors(changes=True):
            check = {
                "CheckID": _check_of(service),
                "Name": "its lease is renewed",
                "TTL": f"{ttl * 1000:.0f}ms",
                "Status": "passing",
                "DeregisterCriticalServiceAfter": _FORGOTTEN,
            }
            body = {
                "ID": service.id,
                "Name": service.name,
                "Address": service.host,
                "Port": service.port,
                "Tags": list(service.tags),
                "Meta": dict(service.meta),
                "Check": check,
            }
            await self._has_put("/v1/agent/service/register", body)
        # A check that was there before keeps its status.
        await self.pass_check(service)

    async def hide(self, service: Service) -> None:
        """Have a service gone."""
        with self._errors(changes=True):
            await self._has_put(f"/v1/agent/service/deregister/{service.id}")

    async def _has_put(self, path: str, body: object = None) -> bool:
        """False where there is nothing of that name."""
        from consul.callback import CB

        def done(response: Any) -> bool:
            return response.code != 404 and bool(CB.boolean()(response))

        data = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        return bool(
            await self._client.http.put(
                done, path, data=data, headers=self._client.prepare_headers()
            )
        )

    # ------------------------------------------------------------------ under the hood

    async def _put(self, path: str, body: object) -> Any:
        """What Consul answers."""
        return await self._client.http.put(
            _answer,
            path,
            data=json.dumps(body, ensure_ascii=False).encode(),
            headers=self._client.prepare_headers(),
        )

    @contextlib.contextmanager
    def _errors(self, *, changes: bool = False) -> Iterator[None]:
        """What py-consul raises becomes Away or RegistryError.

        :param changes: what fails may have been done all the same.
        """
        import aiohttp
        from consul import ACLPermissionDenied, ConsulException
        from consul.exceptions import BadRequest, ClientError

        where = f"Consul at {self.address}"
        try:
            yield
        except aiohttp.ClientConnectorError as error:
            raise Away(f"{where}: {error}", sent=False) from error
        except asyncio.TimeoutError as error:
            raise Away(f"{where} does not answer", sent=changes) from error
        except (aiohttp.ClientError, OSError) as error:
            raise Away(f"{where}: {str(error) or type(error).__name__}", sent=changes) from error
        except (ConsulException, ValueError, LookupError, TypeError) as error:
            text = str(error)
            if text.startswith(_LATER):
                undone = any(words in text for words in _UNDONE)
                raise Away(f"{where}: {text}", sent=changes and not undone) from error
            if not isinstance(error, (ACLPermissionDenied, BadRequest, ClientError)):
                text = f"what answers there is no Consul: {text[:200]}"
            raise RegistryError(f"{where}: {text}") from error


def _check_of(service: Service) -> str:
    return f"service:{service.id}"


def _row(item: dict[str, Any]) -> Row:
    return Row(
        item["Key"],
        item["Value"] or b"",
        int(item["CreateIndex"]),
        int(item["ModifyIndex"]),
        item.get("Session"),
        int(item["Flags"]),
    )


def _within(prefix: str) -> str:
    """A prefix with which all keys begin that begin with the other, and which can stand in a URL.

    An empty part, '.' or '..' would be taken out of its path. No key has one.
    """
    *parts, last = prefix.split("/")
    for position, part in enumerate(parts):
        if part in _NO_PARTS:
            return "".join(f"{each}/" for each in parts[:position])
    return prefix if last not in _NO_PARTS else prefix[: len(prefix) - len(last)]


def _answer(response: Any) -> Any:
    """409 is the code of a transaction that was not done, and of nothing else."""
    from consul.callback import CB

    return json.loads(response.body) if response.code == 409 else CB.json()(response)
