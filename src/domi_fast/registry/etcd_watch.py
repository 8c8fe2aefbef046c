"""A watch in etcd that outlives its connection: it begins anew behind the last revision it gave."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final, Protocol

from ..errors import RegistryError
from .base import Cursor, Delete, Entry, Event, Put, Reset, Snapshot
from .etcd_link import Channel, prefix_end
from .link import Away, Link
from .remote import Ending
from .watching import OpenedWatch, Watched

log = logging.getLogger(__name__)

_PAUSE: Final = 0.1


class WatchedEtcd(Watched, Protocol):
    """What a watch needs of its registry.

    :ivar watches: those that have not ended.
    """

    link: Link[Channel]
    watches: set[Ending]
    _loop: asyncio.AbstractEventLoop | None

    def entry(self, kv: Any) -> Entry:
        """What etcd has, as the protocol has it."""

    def snapshot(self, channel: Channel, prefix: bytes) -> Snapshot:
        """All under a prefix. Blocks."""


class EtcdWatch(OpenedWatch):
    """See :class:`~domi_fast.registry.base.Watch`.

    A thread of its own waits for etcd, from the first time that somebody waits for an event.

    :param key: what it watches, as etcd has it.
    :param since: a revision; anything else, and one that etcd has not reached, gives a Reset.
    :param alone: the key alone, and not all that begin with it.
    """

    def __init__(
        self, registry: WatchedEtcd, key: bytes, since: Cursor, *, alone: bool = False
    ) -> None:
        super().__init__(registry)
        self._registry = registry
        self._key = key
        self._alone = alone
        self._revision = since if isinstance(since, int) else -1
        self._news = asyncio.Event()
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._stream: Any = None
        registry.watches.add(self)

    async def _more(self) -> None:
        self._news.clear()
        self._begin()
        await self._news.wait()

    def end(self) -> None:
        super().end()
        self._stopped.set()
        self._registry.watches.discard(self)
        self._news.set()
        stream = self._stream
        if stream is not None:
            stream.cancel()

    def _begin(self) -> None:
        if self._thread is None:
            # A program that ends without closing its registry is not kept from ending.
            self._thread = threading.Thread(
                target=self._run, name=f"watch {self._key.decode()}", daemon=True
            )
            self._thread.start()

    def _arrived(self, events: list[Event]) -> None:
        """On the loop."""
        if not self._stopped.is_set():
            self.events.extend(events)
            self._news.set()

    # ------------------------------------------------------------------ on the thread

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._follow()
            except RegistryError:
                pass  # away, or ended by etcd: what comes next finds out from which revision on
            except Exception:
                log.exception("a watch of etcd failed, and begins anew")
                self._revision = -1
            self._stopped.wait(_PAUSE)

    def _follow(self) -> None:
        """Follow one stream to its end. Raises RegistryError.

        A server that ends a watch is not away: the calls of others over its channel go on.
        """
        link = self._registry.link
        channel = link.channel()
        ended = threading.Event()
        stream: Any = None
        try:
            if self._revision < 0:
                self._reset(channel)
            with channel.errors():
                stream = self._stream = channel.watch(self._requests(channel, ended))
                if self._stopped.is_set():
                    stream.cancel()
                for response in stream:
                    self._take(channel, response)
        except Away:
            if not self._stopped.is_set():
                link.drop(channel)
            raise
        finally:
            ended.set()
            self._stream = None
            if stream is not None:
                stream.cancel()

    def _requests(self, channel: Channel, ended: threading.Event) -> Iterator[Any]:
        """One request; etcd ends the stream when no more can come."""
        create = channel.rpc.WatchCreateRequest(
            key=self._key,
            range_end=b"" if self._alone else prefix_end(self._key),
            start_revision=self._revision + 1,
        )
        yield channel.rpc.WatchRequest(create_request=create)
        ended.wait()

    def _take(self, channel: Channel, response: Any) -> None:
        if response.compact_revision:
            self._reset(channel)
            raise RegistryError("the watch fell behind what etcd keeps")
        if response.canceled:
            self._revision = -1  # whether we may still look at all, the snapshot will say
            raise RegistryError(f"etcd has ended the watch: {response.cancel_reason}")
        if response.created:
            # An etcd whose data was lost or put back knows less than we do.
            if response.header.revision < self._revision:
                self._reset(channel)
                raise RegistryError("etcd is at an older revision than the watch")
            return
        came = list(response.events)
        if came:
            revisions = [int(event.kv.mod_revision) for event in came]
            # A cursor within a revision stands before it: an event may come twice, none is lost.
            cursors = [
                revision if revision != following else revision - 1
                for revision, following in zip(revisions, [*revisions[1:], -1], strict=True)
            ]
            self._revision = revisions[-1]
            self._tell([self._event(e, c) for e, c in zip(came, cursors, strict=True)])

    def _event(self, event: Any, cursor: Cursor) -> Event:
        entry = self._registry.entry(event.kv)
        return Delete(entry.key, cursor) if event.type == event.DELETE else Put(entry, cursor)

    def _reset(self, channel: Channel) -> None:
        snapshot = self._registry.snapshot(channel, self._key)
        assert isinstance(snapshot.cursor, int)
        self._revision = snapshot.cursor
        self._tell([Reset(snapshot)])

    def _tell(self, events: list[Event]) -> None:
        loop = self._registry._loop
        assert loop is not None
        with suppress(RuntimeError):  # the loop was closed, and nobody closed the registry
            loop.call_soon_threadsafe(self._arrived, events)
