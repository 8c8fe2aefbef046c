"""Dialling: whom to dial and when, until there is one session to each peer.

Who stays when both ends dial is the admission's to say; what a session does is the core's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Callable, Coroutine
from typing import Any

from . import transport
from ._core import ROLE_DIALLER, Router, Session, printable
from .admission import Admission
from .authentication import NODE, Dialler
from .channels import LibraryChannel
from .conditions import Conditions
from .config import NodeConfig
from .errors import AuthError, DomiError, FrameError, PeerLost, TryAgain
from .handshake import decode_welcome, encode_lane, lanes_between
from .membership import Membership, NodeInfo
from .tls import Certificates, check_name

log = logging.getLogger(__name__)

DIAL_BACKOFF = (0.02, 0.5)
_NOT_REACHED = (OSError, ValueError, asyncio.TimeoutError, DomiError)


class Dialling:
    """The connections that a node makes. Belongs to the loop's thread.

    :param began: called with each session that begins, of those that were dialled.
    :param spawn: has a coroutine run until the node closes.
    """

    def __init__(
        self,
        router: Router,
        config: NodeConfig,
        members: Membership,
        admission: Admission,
        certificates: Certificates | None,
        conditions: Conditions,
        began: Callable[[Session], None],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._router = router
        self._config = config
        assert not isinstance(config.secret, str)
        self._secret = config.secret
        self._members = members
        self._admission = admission
        self._certificates = certificates
        self._conditions = conditions
        self._began = began
        self._spawn = spawn
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._dialled: dict[Session, tuple[NodeInfo, asyncio.Future[None]]] = {}
        self._lanes: dict[Session, tuple[Session, int]] = {}
        self._lane_tasks: dict[Session, asyncio.Task[None]] = {}
        self._closing = False

    @property
    def wanted(self) -> frozenset[int]:
        """The machine ids that are dialled until there is a session."""
        return frozenset(self._tasks)

    def want(self, machine: int, *, grace: float = 0.0) -> None:
        """Have a task dial the machine until there is a session, unless one does already.

        :param grace: seconds, more or less, before the first attempt.
        """
        if machine == self._router.id or machine in self._tasks or self._closing:
            return
        task = asyncio.ensure_future(self._keep_dialling(machine, grace))
        self._tasks[machine] = task
        task.add_done_callback(lambda task: self._ended(machine, task))

    async def close(self) -> None:
        """Dial nobody any more."""
        self._closing = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, machine: int, task: asyncio.Task[None]) -> None:
        self._tasks.pop(machine, None)
        if not task.cancelled() and task.exception() is not None:
            log.error("dialling node %d failed", machine, exc_info=task.exception())
        elif machine in self._members.view and self._router.session(machine) is None:
            self.want(machine, grace=DIAL_BACKOFF[0])

    async def _keep_dialling(self, machine: int, grace: float) -> None:
        # Both ends of a lost session come here at once: the jitter lets one of them be first.
        pause = grace * random.uniform(0.5, 1.5)
        attempts = 0
        while True:
            if pause:
                await self._pause(machine, pause)
            info = self._members.view.get(machine)
            if self._closing or info is None or self._router.session(machine) is not None:
                return
            # Who was disconnected comes again once it has read the rest, lest a newer session take
            # the place of that.
            if (
                self._members.valid
                and not self._admission.accepts(machine)
                and not any(
                    offer is not None and info.is_of(offer)
                    for offer in self._router.lingers(machine)
                )
            ):
                try:
                    await self._dial(info)
                    return
                except _NOT_REACHED as error:
                    log.debug("node %d: dialling node %d: %s", self._router.id, machine, error)
            pause = min(DIAL_BACKOFF[1], DIAL_BACKOFF[0] * 2**attempts) * random.uniform(0.5, 1.5)
            attempts = min(attempts + 1, 10)

    async def _pause(self, machine: int, seconds: float) -> None:
        """Sleep, but no longer than until the machine has a session or is not registered."""
        with contextlib.suppress(asyncio.TimeoutError, DomiError):
            await self._conditions.wait_for(
                lambda: (
                    machine not in self._members.view or self._router.session(machine) is not None
                ),
                seconds,
            )

    async def _dial(self, info: NodeInfo) -> None:
        fd, address = await self._reach(info)
        if (
            self._closing
            or self._admission.accepts(info.id)
            or self._router.session(info.id) is not None
            or self._members.view.get(info.id) != info
        ):
            os.close(fd)
            return
        session = self._open(fd, address, info)
        welcome = asyncio.get_running_loop().create_future()
        self._admission.dials[info.id] = session
        self._dialled[session] = info, welcome
        try:
            session.start()
            session.dial(
                LibraryChannel.NODE_NAME,
                self._router.id.to_bytes(2, "little"),
                self._members.offer.encode(),
            )
            await welcome
        finally:
            if not session.up:
                session.close("dialling was given up")
            self._dialled.pop(session, None)
            if self._admission.dials.get(info.id) is session:
                del self._admission.dials[info.id]

    async def _reach(self, info: NodeInfo) -> tuple[int, str]:
        """A connection to the node: its descriptor, and where it leads."""
        machine = self._members.machine
        path = info.unix_path if machine and info.machine == machine else None
        # By its path: nodes of two network namespaces may have one address.
        if (
            path == self._config.unix_path
            if path
            else (info.host, info.port) == (self._config.host, self._members.port)
        ):
            raise TryAgain(f"nobody but this node listens where node {info.id} did", peer=info.id)
        fd = await asyncio.wait_for(
            transport.dial(info.host, info.port, path), self._config.handshake_timeout
        )
        return fd, f"unix:{path}" if path else f"{info.host}:{info.port}"

    def _open(self, fd: int, address: str, info: NodeInfo) -> Session:
        session = Session(
            self._router,
            fd,
            ROLE_DIALLER,
            printable(address),  # as it registered
            peer=info.id,
            guard=None
            if self._secret is None
            else Dialler(self._secret, self._config.cluster, NODE, self._router.id, info.id),
            tls=None if self._certificates is None else self._certificates.client(),
        )
        self._began(session)
        return session

    async def _dial_lanes(self, main: Session, info: NodeInfo, ticket: bytes, count: int) -> None:
        """The connections that a session is to have beside its first."""
        await asyncio.sleep(0)  # even where tasks begin at once, welcomed() returns first
        dialling = [
            asyncio.ensure_future(self._dial_lane(main, info, ticket, index))
            for index in range(1, count)
        ]
        try:
            await asyncio.gather(*dialling)
        except _NOT_REACHED as error:
            main.close(f"a lane could not be dialled: {error}")
        finally:
            for each in dialling:
                each.cancel()

    async def _dial_lane(self, main: Session, info: NodeInfo, ticket: bytes, index: int) -> None:
        fd, address = await self._reach(info)
        lane = self._open(fd, address, info)
        self._lanes[lane] = main, index
        lane.start()
        lane.dial(LibraryChannel.LANE, encode_lane(self._router.id, index), ticket)

    # ------------------------------------------------------------- what the core's router tells it

    def welcomed(self, session: Session, data: bytes) -> int:
        """The dialled node has answered: its machine id. Raises DomiError to refuse it."""
        info, _ = self._dialled.get(session, (None, None))
        if info is None:
            raise FrameError("a welcome for what was dialled as a lane")
        machine, offer, ticket = decode_welcome(data)
        if machine != session.peer or offer.cluster != self._config.cluster:
            raise FrameError(f"dialled node {session.peer} and reached node {machine}")
        known = self._members.view.get(machine)
        if self._certificates is not None:
            check_name(session.certificate, offer.name, machine)
        # Neither the one that was dialled, nor who has its id by now.
        if not info.is_of(offer) or (known is not None and not known.is_of(offer)):
            raise AuthError(f"node {machine} is not the one that is registered", peer=machine)
        self._admission.make_room(machine, offer)
        session.info = offer
        count = lanes_between(self._members.offer, offer)
        if count > 1:
            if not ticket:
                raise FrameError(f"node {machine} offers lanes, and gives no ticket for them")
            session.expect_lanes(count)
            self._lane_tasks[session] = self._spawn(self._dial_lanes(session, info, ticket, count))
        return machine

    def lane_taken(self, lane: Session) -> tuple[Session, int]:
        """The dialled node knows this connection as a lane: of which session, and its number."""
        if lane not in self._lanes:
            raise FrameError("it takes for a lane what was not dialled as one")
        main, index = self._lanes[lane]
        if self._certificates is not None:
            check_name(lane.certificate, main.info.name, main.peer)
        del self._lanes[lane]
        return main, index

    def joined(self, session: Session) -> None:
        """The handshake of this session is complete."""
        self._lane_tasks.pop(session, None)
        _, welcome = self._dialled.get(session, (None, None))
        if welcome is not None and not welcome.done():
            welcome.set_result(None)

    def lost(self, session: Session) -> None:
        """The session is closed."""
        _, welcome = self._dialled.get(session, (None, None))
        if welcome is not None and not welcome.done():
            welcome.set_exception(
                PeerLost(f"node {session.peer}: {session.reason}", peer=session.peer)
            )
        task = self._lane_tasks.pop(session, None)
        if task is not None:
            task.cancel()
        main, _ = self._lanes.pop(session, (None, None))
        if main is not None:
            main.close(f"a lane was lost: {session.reason}")
        for lane in [lane for lane, (main, _) in self._lanes.items() if main is session]:
            del self._lanes[lane]
            lane.close("the session of this lane is over")
