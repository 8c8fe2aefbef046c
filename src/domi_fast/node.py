"""Node: a member of a cluster. Its verbs are the compiled router's own methods."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from . import _core, errors
from ._core import STATE_DRAINING, STATE_PAUSED, STATE_SERVING, Router, printable
from .channels import LibraryChannel
from .checks import is_number
from .cluster import Cluster
from .config import MIB, NodeConfig, check_callback
from .endpoint import Endpoint
from .errors import DomiError
from .limiter import RateLimit
from .mesh import Mesh
from .metrics import check_counter
from .peer import STATES, Peer
from .registry import default_url, open_registry
from .wings import Wing, Wings

if TYPE_CHECKING:
    from .admin import AdminServer

_core.bind(errors, LibraryChannel)

log = logging.getLogger(__name__)

# Seconds between two looks at whether a node that drains has finished.
_LOOK: Final = 0.005


class Node(Endpoint):
    """A node of the mesh: it subscribes, sends and answers.

    ``Node(name, *, version="0", cluster="default", host="127.0.0.1", port=0, ...)``: every keyword
    is a field of :class:`~domi_fast.config.NodeConfig`, which says what is allowed.

    Use it as ``async with Node(...) as node``, or ``start`` and ``close`` it, or give it to
    :func:`~domi_fast.app.run`. It belongs to the event loop that started it; only a
    :class:`Context` may be answered from other threads. A closed node stays closed.

    :raises ValueError: a setting is out of its range.
    :raises DomiError: a setting asks for what this version does not have, or is not installed.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        NodeConfig.check_names("Node", settings)
        self.config = config = NodeConfig(name, **settings)
        router = Router(
            heartbeat=config.heartbeat_interval,
            silence=config.heartbeat_timeout,
            phi=config.phi_threshold,
            handshake=config.handshake_timeout,
            timeout=config.request_timeout,
            queue_limit=config.queue_limit,
            frame_limit=config.frame_limit,
            node_queue_limit=config.node_queue_limit or 256 * MIB,
            when_full=config.when_full,
            channel_limit=config.channel_limit,
            subscriber_limit=config.subscriber_limit,
            handler_limit=config.handler_limit,
            busy_poll=config.busy_poll,
            on_error=config.on_error,
        )
        super().__init__(router, router, router)
        registry = open_registry(config.registry or default_url(config.cluster))
        self._mesh = Mesh(router, config, registry, self._newer_came)
        self.events = self._mesh.witness.events
        self._cluster = Cluster(config, registry, self._mesh._members)
        self._state = "new"
        self._starting: asyncio.Future[None] | None = None
        self._draining: asyncio.Future[bool] | None = None
        self._closers: set[asyncio.Task[Any]] = set()
        self._wings = Wings(config.name)
        self._on_newer: Callable[[Peer], object] | None = None
        self._serials: weakref.WeakSet[Endpoint] = weakref.WeakSet()
        self._closed = asyncio.Event()
        self._admin = self._make_admin()
        self.subscribe = router.subscribe
        self.unsubscribe = router.unsubscribe
        self.request = router.request
        self.drained = router.drained
        self.when_full = router.when_full
        self.drops = router.drops
        self.subscribers = router.subscribers
        self.balance = router.balance
        self.choose = router.choose
        breaker = config.breaker
        if breaker is not None:
            router.protect(breaker.failures, breaker.window, breaker.pause)
        router.limit(_bucket(config.rate_limit), _bucket(config.peer_rate_limit))
        router.own_address = config.host.encode()
        router.balance(None, None if config.balance == "round_robin" else config.balance)

    def _make_admin(self) -> AdminServer | None:
        if self.config.http_port is None:
            return None
        from .admin import AdminServer

        return AdminServer(self, self._router.note)

    async def start(self) -> None:
        """Join the cluster.

        Returns when every registered peer is connected, or after ``start_timeout`` seconds with
        the missing ones logged.

        :raises ClusterFull: all 1,024 machine ids are taken.
        :raises VersionTooOld: a newer version of this name is in the cluster.
        :raises RegistryError: the registry cannot be reached.
        :raises OSError: an address cannot be listened on.
        """
        if self._state != "new":
            raise DomiError(f"this node is {self._state}: make another Node to start again")
        self._state = "started"
        self._loop = asyncio.get_running_loop()
        self._cluster.open()
        self._starting = asyncio.ensure_future(self._join())
        try:
            await self._starting
        except BaseException:
            closed_by_another = self._closing is not None
            await self.close()
            if closed_by_another:
                raise DomiError("the node was closed while it started") from None
            raise

    async def _join(self) -> None:
        # The pages first: the registry is told their port.
        if self._admin is not None:
            await self._admin.start()
        await self._mesh.start(self.http_port)

    async def close(self) -> None:
        """Leave the cluster: finish the handlers that run, send what is queued, say goodbye.

        What was attached is closed first of all, then each :class:`~domi_fast.serial.Serial` of
        this node, which runs what it holds.

        Who waits for a leadership or a lock gets a DomiError at once. Once the handlers are
        finished, the blocks of those that are held end with LeadershipLost.

        Waits up to ``drain_timeout`` seconds for each step. Every call waits until the node is
        closed; cancelling one of them does not stop the closing.
        """
        self._note_closer()
        await super().close()

    def _note_closer(self) -> None:
        # A handler that closes the node waits for it, and it does not wait for the handler.
        current = asyncio.current_task()
        if current is not None:
            self._closers.add(current)
            self._wings.let_go(current)

    async def _close(self) -> None:
        self._state = "closed"
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])
        self._cluster.stop()
        try:
            await self._wings.close(self.config.drain_timeout)
            self._end_watches()
            await self._close_serials()
            await self._mesh.drain_itself()
            await self._end_handlers(self.config.drain_timeout)
            await self._cluster.close(self._closers)
        finally:
            try:
                if self._admin is not None:
                    await self._admin.close()
            finally:
                await self._mesh.close()
        # What arrived meanwhile may have started more; nobody can be answered any more.
        await self._end_handlers(0.0)
        self._closed.set()

    async def _close_serials(self) -> None:
        closings = [serial._begin_closing() for serial in self._serials]
        if not closings:
            return
        done, pending = await asyncio.wait(closings, timeout=self.config.drain_timeout)
        for closing in done:
            if not closing.cancelled() and closing.exception() is not None:
                log.error("a Serial failed to close", exc_info=closing.exception())
        if pending:
            log.warning(
                "%s: a handler of serial mode still runs after %g s: the node closes without it",
                self.config.name,
                self.config.drain_timeout,
            )

    async def wait_closed(self) -> None:
        """Wait until the node is closed, by whomever; it need not have started."""
        await self._closed.wait()

    @property
    def state(self) -> str:
        """``new``, ``starting``, ``serving``, ``paused``, ``draining`` or ``closed``."""
        if self._state != "started":
            return self._state
        if self._starting is None or not self._starting.done():
            return "starting"
        return STATES[self._router.state]

    async def pause(self) -> None:
        """Take no new work, and stay in the mesh.

        Returns when every peer knows; what they had sent before has arrived by then, and is done as
        ever. Not waited for is a peer that hangs, of which nothing comes for a second (or for
        ``heartbeat_timeout``, if that is less): what it had sent is done when it comes.

        From now on their messages go to the other subscribers, and raise NoSubscriber when there
        are none; what is published passes a paused node by. What this node sends goes to itself
        only where nobody else subscribes.

        :raises DomiError: the node does not run, or drains.
        """
        await self._enter(STATE_PAUSED)

    async def resume(self) -> None:
        """Take new work again. Returns when every peer knows, but for those that hang.

        :raises DomiError: the node does not run, or drains.
        """
        await self._enter(STATE_SERVING)

    async def _enter(self, state: int) -> None:
        if self.state not in {"serving", "paused"}:
            raise DomiError(f"this node is {self.state}, and cannot be paused or resumed")
        await self._mesh.enter_state(state)

    async def drain(self, deadline: float = 30.0, *, until_closed: bool = True) -> bool:
        """Leave without losing work: take no more, finish what was taken, and close.

        What was attached is drained first, while this node still serves.

        Finished are the handlers that run, the requests that are still to be answered, what waits
        in serial mode and in ``watch_channel`` blocks, and the requests that this node has sent,
        its guests' among them: each has its outcome, so a program that goes on asking holds the
        draining up. A ``call`` that is answered after its handler has returned is not waited for,
        and a handler that drains its node is not either: it answers first. A peer that hangs, of
        which nothing comes for ``heartbeat_timeout``, or for half the deadline if that is less, is
        waited for no longer: what it had sent and this node has not read is lost. Every call waits
        for the one draining; cancelling one of them does not stop it.

        :param deadline: seconds to finish in. The node closes after them all the same, and what has
            not ended then ends with PeerLost.
        :param until_closed: return when the node is closed; otherwise when it begins to close.
        :returns: whether everything was finished in time; of a node that has closed, and sent.
        :raises ValueError: ``deadline`` is no number of seconds.
        :raises DomiError: the node has not started.
        """
        if not is_number(deadline) or not deadline >= 0:
            raise ValueError(f"deadline {deadline!r}: seconds, 0 or more, are wanted")
        if self._draining is None:
            if self.state not in {"serving", "paused", "starting"}:
                raise DomiError(f"this node is {self.state}, and cannot be drained")
            self._begin_draining(deadline)
        self._note_closer()
        assert self._draining is not None
        finished = await asyncio.shield(self._draining)
        if until_closed:
            await super().close()
            return finished and self._mesh.all_was_sent
        return finished

    def _begin_draining(self, deadline: float) -> None:
        self._draining = asyncio.ensure_future(self._drain(deadline))
        self._draining.add_done_callback(lambda _: self._begin_closing())

    async def _drain(self, deadline: float) -> bool:
        try:
            await asyncio.wait_for(self._finish(deadline / 2), deadline)
            return True
        except asyncio.TimeoutError:
            log.warning(
                "%s: not everything was finished within %g s: the node closes all the same",
                self.config.name,
                deadline,
            )
        except DomiError as error:
            log.warning("%s: draining has ended early: %s", self.config.name, error)
        return False

    async def _finish(self, patience: float) -> None:
        await self._wings.drain()
        if self._closing is not None:
            raise DomiError("the node was closed")
        await self._mesh.enter_state(STATE_DRAINING, patience)
        await asyncio.gather(*[serial.close() for serial in self._serials])
        while (
            self._router.unfinished()
            or self._router.handler_tasks() - self._closers
            or any(len(messages) for messages in self._watches)
        ):
            await asyncio.sleep(_LOOK)
            if self._closing is not None:
                raise DomiError("the node was closed")

    def _newer_came(self, peer: Peer) -> None:
        if self._draining is not None or self._closing is not None:
            return
        if self._on_newer is not None:
            self._tell_newer(self._on_newer, peer)
            return
        deadline = self.config.roll_deadline
        if deadline is not None:
            log.info(
                "%s %s is there as node %d: node %d, of version %s, drains",
                printable(peer.name),
                printable(peer.version),
                peer.id,
                self.id,
                self.config.version,
            )
            self._begin_draining(deadline)

    def _tell_newer(self, function: Callable[[Peer], object], peer: Peer) -> None:
        try:
            function(peer)
        except Exception:
            log.exception("%s: what on_newer was given has raised", self.config.name)

    def on_newer(self, function: Callable[[Peer], object] | None) -> None:
        """Have ``function(peer)`` called when a newer version of this node's name has come.

        Without it the node drains by itself, within ``roll_deadline`` seconds. It is called for
        each such peer, for one that connects anew again, and in here for those that are there; no
        more once the node drains or closes. What it raises is logged.

        :param function: a plain function; it may start a task. None takes back what was given: the
            node drains by itself again, at once where a newer version is there.
        :raises TypeError: it is not callable, or an ``async def``.
        :raises DomiError: there is one already.
        """
        if function is not None:
            check_callback("on_newer", function)
        if function is not None and self._on_newer is not None:
            raise DomiError(f"on_newer is {self._on_newer!r} already, and a node has one")
        self._on_newer = function
        for peer in self._mesh.newer():
            self._newer_came(peer)

    def attach(self, wing: Wing) -> None:
        """Let a wing end with this node: drained before the node drains, closed before it closes.

        It may be attached before and after the start; a second time changes nothing.

        :raises DomiError: the node is closing, or was closed.
        """
        if self._closing is not None:
            raise DomiError("the node was closed: attach to one that runs, or will")
        self._wings.attach(wing)

    def detach(self, wing: Wing) -> None:
        """Let go of a wing that has ended before its node; nothing happens if it is not attached.

        A ``drain`` or ``close`` of it that the node has begun is waited for all the same.
        """
        self._wings.detach(wing)

    def count(self, name: str) -> None:
        """Add one to a counter of ``counters()`` and the metrics page; it begins at 0.

        :param name: as an identifier of ASCII, ``domi_<name>_total`` on the page.
        :raises ValueError: the name is not allowed.
        """
        check_counter(name)
        self._router.note(name)

    async def _end_handlers(self, timeout: float) -> None:
        tasks = self._router.handler_tasks() - self._closers
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=timeout)
            for task in pending:
                task.cancel()
            if pending:
                await asyncio.wait(pending, timeout=self.config.drain_timeout)

    async def __aenter__(self) -> Node:
        await self.start()
        return self

    @property
    def id(self) -> int:
        """The machine id, 0-1023; -1 before the start."""
        return self._router.id

    @property
    def port(self) -> int:
        """The TCP port that the node listens on; 0 before the start."""
        return self._mesh.port

    @property
    def cluster(self) -> Cluster:
        """Elections, locks and names, once the node has started."""
        return self._cluster

    @property
    def http_port(self) -> int | None:
        """The TCP port of the admin pages; None before the start, and when there are none."""
        return None if self._admin is None else self._admin.port

    @property
    def registered(self) -> bool:
        """Whether the registry's lease on the machine id holds at this moment."""
        return self._mesh.registered

    @property
    def channels(self) -> frozenset[int]:
        """The channels that this node, or a guest of it, subscribes to, as its peers are told."""
        found = set(self._router.handlers())
        for session in self._router.sessions():
            if session.is_guest:
                found |= session.subscribed
        return frozenset(found)

    @property
    def peers(self) -> Mapping[int, Peer]:
        """The connected peers by machine id, without this node; a live view."""
        return self._mesh.peers

    async def wait_subscribed(
        self, channel: int, count: int = 1, timeout: float | None = None
    ) -> None:
        """Wait until at least ``count`` nodes (this one included) subscribe to ``channel``.

        :param timeout: seconds; None waits for as long as it takes.
        :raises asyncio.TimeoutError: there were not enough in time.
        """
        await self._mesh.conditions.wait_for(
            lambda: len(self._router.subscribers(channel)) >= count, timeout
        )

    async def wait_peers(self, count: int, timeout: float | None = None) -> None:
        """Wait until exactly ``count`` peers are connected. ``timeout`` as above."""
        await self._mesh.conditions.wait_for(lambda: len(self.peers) == count, timeout)


def _bucket(limit: RateLimit | None) -> tuple[float, float] | None:
    return None if limit is None else (limit.rate, limit.size)
