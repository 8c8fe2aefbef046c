"""Links: the nodes that a zone or a gateway talks with, each for as long as its session lasts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from ..channels import LibraryChannel
from ..errors import DomiError, Overloaded
from ..node import Node
from ..peer import Peer

log = logging.getLogger(__name__)


class Link:
    """One session with one node, a gateway's or a zone's; the node's own is never lost.

    :ivar peer: the session, by the node's own object for it: a later session has another.
    :ivar channel: what goes to that node is on this one: that on which gateways, or zones, hear.
    :ivar groups: what depends on it: the groups that the gateway there has open or has members of,
        or the routes to the groups of the zone there.
    """

    __slots__ = ("_flushing", "_node", "_waiting", "channel", "groups", "lost", "machine", "peer")

    def __init__(
        self, node: Node, machine: int, peer: Peer | None, channel: LibraryChannel
    ) -> None:
        self._node = node
        self.machine = machine
        self.peer = peer
        self.channel = channel
        self.groups: set[Any] = set()
        self.lost = False
        # What its queue had no room for, and may not be left out.
        self._waiting: deque[bytes] = deque()
        self._flushing: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether its session is still the node's present one, by the machine id of then."""
        if self.lost:
            return False
        if self.peer is None:
            return self.machine == self._node.id
        return self._node.peers.get(self.machine) is self.peer

    def send(self, data: bytes) -> None:
        """To the other.

        :raises Overloaded: its queue is full.
        :raises DomiError: it cannot be sent to.
        """
        if self._waiting:
            raise Overloaded(
                f"the queue to node {self.machine} is full: send less, or later",
                channel=self.channel,
                peer=self.machine,
            )
        self._node.notify(self.channel, data, to=self.machine)

    def offer(self, data: bytes) -> None:
        """The same for what may be left out where the other takes nothing at the moment."""
        with contextlib.suppress(DomiError):
            self.send(data)

    def tell(self, data: bytes) -> bool:
        """Send what the other has to hear: it waits for room, in order. To one that is gone
        it says nothing.

        :returns: whether it was sent, or waits.
        """
        if not self._waiting:
            try:
                self._node.notify(self.channel, data, to=self.machine)
                return True
            except Overloaded:
                self._flushing = asyncio.ensure_future(self._flush())
            except DomiError:
                return False
        self._waiting.append(data)
        return True

    async def flushed(self) -> None:
        """Wait until everything was sent, or the other is gone."""
        if self._flushing is not None:
            await asyncio.wait([self._flushing])

    async def _flush(self) -> None:
        try:
            while self._waiting:
                await self._node.drained(self.machine)
                if not self.alive:
                    return
                try:
                    self._node.notify(self.channel, self._waiting[0], to=self.machine)
                except Overloaded:
                    continue
                except DomiError as error:
                    log.warning("node %d cannot be told: %s", self.machine, error)
                self._waiting.popleft()
        except DomiError:
            return
        finally:
            self._waiting.clear()
            self._flushing = None

    def end(self) -> None:
        self.lost = True
        if self._flushing is not None:
            self._flushing.cancel()


class Links:
    """All of a zone's or a gateway's, one a node. Which are lost is looked up, not told: a session
    that came anew meanwhile is another.

    :param channel: what goes to those nodes is on this one; one that does not hear it any more is
        lost, though its node goes on.
    :param lost: called with each link that is lost, once.
    """

    def __init__(self, node: Node, channel: LibraryChannel, lost: Callable[[Link], None]) -> None:
        self._node = node
        self._channel = channel
        self._lost = lost
        self._links: dict[int, Link] = {}

    def __iter__(self) -> Iterator[Link]:
        return iter(list(self._links.values()))

    def of(self, machine: int) -> Link | None:
        """The link to this node, begun where there is none; None while it is not connected."""
        link = self._links.get(machine)
        if link is not None:
            if link.alive:
                return link
            self._drop(link)
        if machine == self._node.id:
            peer = None
        else:
            peer = self._node.peers.get(machine)
            if peer is None:
                return None
        link = self._links[machine] = Link(self._node, machine, peer, self._channel)
        return link

    def check(self) -> None:
        """Drop those whose session is over, and those that have ended on a node that goes on."""
        for link in list(self._links.values()):
            # One whose node is paused hears, though it is no subscriber for others' messages.
            node = self._node if link.peer is None else link.peer
            if not link.alive or self._channel not in node.channels:
                self._drop(link)

    def end(self) -> None:
        for link in self._links.values():
            link.end()
        self._links.clear()

    def _drop(self, link: Link) -> None:
        if self._links.get(link.machine) is link:
            del self._links[link.machine]
            link.end()
            self._lost(link)
