"""The mesh: one live session to each peer.

Frames, heartbeats and routing are the core's; whom to dial is the dialling's, and who may come in
the admission's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from . import memory, transport
from ._core import ROLE_ACCEPTOR, Router, Session
from .admission import Admission
from .authentication import NO_MACHINE, Dialled
from .callers import INCOMPLETE, Callers, most_handshakes
from .conditions import Conditions
from .config import NodeConfig, parse_version
from .dialling import DIAL_BACKOFF, Dialling
from .errors import DomiError
from .events import Witness
from .handshake import DISPLACED, Offer
from .membership import Membership, NodeInfo
from .peer import STATES, Peer
from .registry.base import Registry
from .tls import Certificates

log = logging.getLogger(__name__)

NEWCOMER_GRACE = 0.1
# Seconds between two warnings that there are no descriptors.
TOLD_AGAIN = 10.0
# Seconds without a byte of a peer that has been told of a state, after which it hangs.
PATIENCE = 1.0
_LOOKS = 10


class Mesh:
    """Everything of a node that concerns other nodes. Belongs to the loop's thread.

    The core's router calls ``admit`` to ``lost``; a node calls ``start`` and ``close``.

    :param newer_came: called with a peer of the node's own name and a newer version, once its
        channels are known.
    :ivar conditions: of peers and subscriptions, for which tasks wait.
    """

    def __init__(
        self,
        router: Router,
        config: NodeConfig,
        registry: Registry,
        newer_came: Callable[[Peer], None],
    ) -> None:
        self._router = router
        self._config = config
        self._registry = registry
        assert not isinstance(config.secret, str)
        self._secret = config.secret
        self._certificates = None if config.tls is None else Certificates(config.tls, config.name)
        self._newer_came = newer_came
        self.witness = Witness()
        self._members = Membership(config, registry, self)
        self._listeners: list[transport.Listener] = []
        self._port = 0
        self._peers: dict[int, Peer] = {}
        self._sessions: set[Session] = set()
        handshakes = config.handshakes_per_address or most_handshakes(config.tls is not None)
        self._callers = Callers(handshakes, config.session_limit, config.sessions_per_address)
        self._tasks: set[asyncio.Task[None]] = set()
        self._admission = Admission(router, config, self._members, self._spawn)
        # The router asks it by way of the mesh.
        self.admit = self._admission.admit
        self.admit_guest = self._admission.admit_guest
        self.admit_lane = self._admission.admit_lane
        self.confirm = self._admission.confirm
        self.conditions = Conditions(router)
        self._dialling = Dialling(
            router,
            config,
            self._members,
            self._admission,
            self._certificates,
            self.conditions,
            self._sessions.add,
            self._spawn,
        )
        self.welcomed = self._dialling.welcomed
        self.lane_taken = self._dialling.lane_taken
        self._closing = False
        self.all_was_sent = False  # of what was queued when the node closed
        self._told_short = -math.inf
        self.peers: Mapping[int, Peer] = MappingProxyType(self._peers)

    # ------------------------------------------------------------------------------ start and stop

    @property
    def id(self) -> int:
        return self._router.id

    @property
    def port(self) -> int:
        return self._port

    @property
    def registered(self) -> bool:
        """Whether the registry's lease on the machine id holds at this moment."""
        return self._members.valid

    async def start(self, http: int | None = None) -> None:
        """Listen, take a machine id, and connect to everybody who is registered.

        Returns when they are connected, or after ``start_timeout`` with the missing logged.

        :param http: the port of the admin pages, which the registry is told.
        """
        loop = asyncio.get_running_loop()
        self._router.start(self)
        self._listeners.append(
            transport.Listener(
                loop,
                transport.listen_tcp(self._config.host, self._config.port),
                self._wanted,
                self._accepted,
                self._short,
            )
        )
        self._port = self._listeners[0].port or 0
        if self._config.unix_path is not None:
            self._listeners.append(
                transport.Listener(
                    loop,
                    transport.listen_unix(self._config.unix_path),
                    self._wanted,
                    self._accepted,
                    self._short,
                )
            )
        snapshot = await self._members.join(self._port, http)
        self._spawn(self._members.follow(snapshot))
        self._spawn(self._members.keep())
        expected = set(self._members.view) - {self.id}
        for machine in expected:
            self._dialling.want(machine)
        # After the dials, which take their time meanwhile.
        self._spawn(self._watch_memory())
        try:
            await self.conditions.wait_for(
                lambda: all(m in self._peers or m not in self._members.view for m in expected),
                self._config.start_timeout,
            )
        except asyncio.TimeoutError:
            missing = sorted(
                m for m in expected if m not in self._peers and m in self._members.view
            )
            log.warning(
                "node %d started without nodes %s, which are registered but did not answer "
                "within %g s",
                self.id,
                missing,
                self._config.start_timeout,
            )

    async def _watch_memory(self) -> None:
        failing = False
        while True:
            try:
                self._router.use_memory(memory.used_share())
                failing = False
            except (OSError, ValueError) as error:
                if not failing:
                    log.warning("cannot tell how much memory is used: %s", error)
                failing = True
            await asyncio.sleep(self._config.memory_interval)

    async def enter_state(self, state: int, patience: float = PATIENCE) -> None:
        """Take new work or none; return when every peer knows, and what it sent before is here.

        A peer of which nothing comes for ``patience`` seconds hangs, and is waited for no longer.

        Raises DomiError when the node closes meanwhile.
        """
        if self._router.state != state:
            self._router.enter_state(state)
        # By what each look finds, and not by the clock: this process may have stood still itself.
        patience = min(patience, self._config.heartbeat_timeout)
        looks: dict[Session, tuple[int, int]] = {}

        def awaited() -> list[Session]:
            return [
                session
                for session in self._router.connections()
                if session.unheard and looks.get(session, (0, 0))[1] <= _LOOKS
            ]

        while waiting := awaited():
            for session in waiting:
                had, silent = looks.get(session, (0, 0))
                looks[session] = (session.bytes_in, silent + 1 if session.bytes_in == had else 1)
            with contextlib.suppress(asyncio.TimeoutError):
                await self.conditions.wait_for(lambda: not awaited(), patience / _LOOKS)
        hanging = sorted({each.peer for each in self._router.connections() if each.unheard})
        if hanging:
            log.warning(
                "node %d: nothing comes of nodes %s, which may not know that it is %s",
                self.id,
                hanging,
                STATES[state],
            )

    async def drain_itself(self) -> None:
        """Wait until the node's messages to itself are delivered, ``drain_timeout`` at most."""
        own = self._router.session(self.id)
        if own is not None:
            await drain([own], self._config.drain_timeout)

    async def close(self) -> None:
        """Leave the registry, stop listening, say goodbye to every peer."""
        self._closing = True
        self.conditions.close()
        for listener in self._listeners:
            listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._dialling.close(), *self._tasks, return_exceptions=True)
        try:
            await self._members.leave()
            self.all_was_sent = await drain(self._router.connections(), self._config.drain_timeout)
        finally:
            self._router.end_lingers()
            for session in list(self._sessions):
                session.close("the node is closing", closing=True)
            try:
                await acknowledged(self._router, self._config.drain_timeout)
            finally:
                self._router.stop("the node is closing")
                self.conditions.fail()
                self.witness.finish()
                await self._registry.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the mesh failed", exc_info=task.exception())

    # -------------------------------------------------------------------- what the membership calls

    def identified(self, machine: int) -> None:
        """See :class:`~domi_fast.membership.Follower`, for this and the next three."""
        if machine != self.id:
            self._router.identify(machine)
            self._weigh(machine, self._config.weight)
        log.info(
            "node %d: %s listens on %s:%d",
            self.id,
            self._config.name,
            self._config.host,
            self._port,
        )

    def displaced(self) -> None:
        for session in self._router.sessions():
            session.close("the machine id went to another node")

    def seen(self, infos: Iterable[NodeInfo]) -> None:
        for info in infos:
            self._weigh(info.id, info.weight)
            session = self._router.session(info.id)
            if info.id == self.id or session is None:
                continue
            offer: Offer | None = session.info
            if offer is None:
                session.close("the machine id is leased to another node")
            elif offer.epoch < info.epoch and offer.mark != info.mark:
                session.close(DISPLACED)

    def _weigh(self, machine: int, weight: float) -> None:
        session = self._router.session(machine)
        if session is not None:
            session.candidate.weight = weight

    def members_changed(self, joined: set[int]) -> None:
        for machine in joined:
            self._dialling.want(machine, grace=NEWCOMER_GRACE)
        self.conditions.changed()

    # ----------------------------------------------------------------- what the core's router calls

    def _short(self, error: OSError) -> None:
        self._router.note("accepts_put_off")
        now = asyncio.get_running_loop().time()
        if now >= self._told_short + TOLD_AGAIN:
            self._told_short = now
            reason = f"callers are left waiting: {error.strerror}"
            log.warning("node %d: %s", self.id, reason, extra={"domi_node": self.id})
            self.witness.saw("overloaded", None, "", "", reason)

    def _wanted(self, address: str) -> bool:
        reached = self._callers.reached(address)
        if reached is None:
            return True
        if reached.what == INCOMPLETE:
            self._router.note("refused_handshakes")
        else:
            self._router.note("refused_sessions")
        if reached.instead is None:
            self.witness.saw("refused", None, "", address, str(reached))
            return False
        self.witness.saw("refused", None, "", reached.instead.address, str(reached))
        reached.instead.close(str(reached))
        return True

    def _accepted(self, fd: int, address: str) -> None:
        guard = None
        if self._secret is not None:
            own = self.id if self.id >= 0 else NO_MACHINE
            guard = Dialled(self._secret, self._config.cluster, own)
        try:
            session = Session(
                self._router,
                fd,
                ROLE_ACCEPTOR,
                address,
                guard=guard,
                tls=None if self._certificates is None else self._certificates.server(),
            )
        except DomiError:
            os.close(fd)  # the router stopped while the connection waited to be accepted
            return
        self._callers.began(session)
        self._sessions.add(session)
        session.start()

    def joined(self, session: Session) -> None:
        """The handshake of this session is complete."""
        self._callers.completed(session)
        known = self._members.view.get(session.peer)
        if known is not None and not session.is_guest:
            self._weigh(session.peer, known.weight)
        self._dialling.joined(session)
        self.conditions.changed()

    def listed(self, session: Session) -> None:
        """The channels of this session's peer are known."""
        known = self._members.view.get(session.peer)
        listener = "" if known is None else known.listener
        peer = self._peers[session.peer] = Peer(session, listener)
        self.witness.saw("joined", peer.id, peer.name, peer.address, "")
        self.conditions.changed()
        if self._is_newer(peer):
            self._newer_came(peer)

    def _is_newer(self, peer: Peer) -> bool:
        config = self._config
        return peer.name == config.name and (
            parse_version(peer.version) > parse_version(config.version)
        )

    def newer(self) -> list[Peer]:
        """The peers of this node's name that are of a newer version."""
        return [peer for peer in self._peers.values() if self._is_newer(peer)]

    def refused(self, session: Session, was_up: bool) -> None:
        """This session was closed because of what its other end is, or said."""
        known = session.peer if was_up and not session.is_guest else None
        self.witness.saw("refused", known, "", session.address, session.reason or "")

    def overloaded(self, session: Session, queued: int) -> None:
        """The queue for this session's peer was full, of so many bytes."""
        self.witness.saw(
            "overloaded",
            None if session.is_guest else session.peer,
            session.info.name if session.info else "",
            session.address,
            f"{queued} bytes wait for it",
        )

    def routes_changed(self) -> None:
        """Subscriptions of a peer or of this node have changed."""
        self.conditions.changed()

    def lost(self, session: Session, was_up: bool) -> None:
        """The session is closed; it stands in no routing table any more."""
        self._sessions.discard(session)
        self._callers.left(session)
        self._admission.forget(session)
        self._dialling.lost(session)
        if not was_up or session.is_guest or session.is_lane:
            return
        if not self._members.valid and DISPLACED in (session.reason or ""):
            self.displaced()
        peer = self._peers.get(session.peer)
        if peer is not None and self._router.session(session.peer) is None:
            del self._peers[session.peer]
            self.witness.saw("left", peer.id, peer.name, peer.address, session.reason or "")
        if not self._closing:
            log.info(
                "node %d: lost node %d: %s",
                self.id,
                session.peer,
                session.reason,
                extra={"domi_node": self.id, "domi_peer": session.peer},
            )
            if session.peer in self._members.view:
                self._dialling.want(session.peer, grace=DIAL_BACKOFF[0])
        self.conditions.changed()


async def drain(sessions: Iterable[Session], timeout: float) -> bool:
    """Wait until everything queued is sent, for up to ``timeout`` seconds; whether it was."""
    waiting = [session.drained(everything=True) for session in sessions if session.queued]
    if not waiting:
        return True
    try:
        _, late = await asyncio.wait(waiting, timeout=timeout)
        return not late
    finally:
        for future in waiting:
            # A session that went meanwhile has nothing left to send.
            if not future.cancel():
                future.exception()


async def acknowledged(router: Router, timeout: float) -> None:
    """Wait until the peers' machines have what closed sessions sent, for up to ``timeout`` s.

    The kernel tells nobody when they do: it is asked.
    """
    loop = asyncio.get_running_loop()
    end, pause = loop.time() + timeout, 0.001
    while router.unacknowledged() and loop.time() < end:
        await asyncio.sleep(pause)
        pause = min(2 * pause, 0.05)
