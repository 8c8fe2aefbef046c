"""Who may come in, by what it says of itself in the handshake.

The rules that keep two nodes at one session though both dial (docs/protocol.md, "One session a
pair"): while a node dials a peer and the peer's own connection arrives, the lower machine id's
connection is the one that stays; and a connection counts, or replaces an older one, only once its
dialler has confirmed it.
"""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import Callable, Coroutine
from typing import Any

from ._core import Router, Session
from .authentication import GUEST, NO_MACHINE, NODE, check_claim
from .config import NodeConfig, is_loopback
from .errors import AuthError, DomiError, TryAgain
from .handshake import DISPLACED, TICKET, Offer, decode_lane, encode_welcome, lanes_between
from .membership import Membership
from .tls import check_name


class Admission:
    """What a node answers to those who dial it. Belongs to the loop's thread.

    :param spawn: has a coroutine run until the node closes.
    :ivar dials: sessions by which this node is dialling others, by their machine ids.
    """

    def __init__(
        self,
        router: Router,
        config: NodeConfig,
        members: Membership,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._router = router
        self._config = config
        self._members = members
        self._spawn = spawn
        self.dials: dict[int, Session] = {}
        self._accepting: dict[Session, int] = {}
        self._tickets: dict[Session, bytes] = {}

    def admit(self, session: Session, machine: int, extend: bytes) -> bytes | None:
        """A dialler has named itself: the welcome for it, or None for the plain protocol.

        Empty when the registry has to be asked first: ``Session.welcome`` or ``close`` follows.

        Raises :class:`~domi_fast.errors.DomiError` to refuse it.
        """
        if self._router.id < 0 or not self._members.valid:
            raise TryAgain("this node does not hold a machine id at this moment")
        if machine == self._router.id:
            raise AuthError(f"machine id {machine} is this node's own", peer=machine)
        if session.guard is not None:
            check_claim(session.guard, NODE, machine)
        known = self._members.view.get(machine)
        if not extend:
            guarded = self._config.secret is not None or self._config.tls is not None
            if guarded or not (is_loopback(self._config.host) or self._config.insecure):
                raise AuthError("the plain protocol is not served here", peer=machine)
            if known is not None or self._router.session(machine) is not None:
                raise AuthError(f"machine id {machine} is held by a live node", peer=machine)
            return None
        offer = Offer.decode(extend)
        if offer.cluster != self._config.cluster:
            raise AuthError(
                f"node {machine} belongs to cluster {offer.cluster!r}, this node to "
                f"{self._config.cluster!r}",
                peer=machine,
            )
        if self._config.tls is not None:
            check_name(session.certificate, offer.name, machine)
        self._check_holder(machine, offer)
        older = self._router.session(machine)
        if older is not None and older.parting and older.info.instance == offer.instance:
            raise TryAgain(
                f"what node {machine} sent before it ended its session is still read", peer=machine
            )
        session.info = offer
        known = self._members.view.get(machine)
        if known is not None and known.epoch == offer.epoch:
            return self._welcome(session, machine)
        # The watch may be behind the newcomer, or the epoch invented: ask the registry itself.
        self._spawn(self._examine(session, machine, offer))
        return b""

    async def _examine(self, session: Session, machine: int, offer: Offer) -> None:
        await asyncio.sleep(0)  # even where tasks begin at once, admit() returns first
        try:
            if not await self._members.is_claimed_by(machine, offer):
                raise AuthError(f"the registry does not know this node as {machine}", peer=machine)
            if not session.closed:
                session.welcome(self._welcome(session, machine))
        except DomiError as error:
            session.refuse(error)

    def _welcome(self, session: Session, machine: int) -> bytes:
        own = self.dials.get(machine)
        if own is not None:
            if self._router.id < machine:
                raise TryAgain(
                    f"node {self._router.id} is dialling node {machine} itself", peer=machine
                )
            own.close("the peer's own connection stays")
        self._accepting[session] = machine
        count = lanes_between(self._members.offer, session.info)
        if count == 1:
            return encode_welcome(self._router.id, self._members.offer)
        session.expect_lanes(count)
        ticket = self._tickets[session] = os.urandom(TICKET)
        return encode_welcome(self._router.id, self._members.offer, ticket)

    def _check_holder(self, machine: int, offer: Offer) -> None:
        known = self._members.view.get(machine)
        if known is not None and (
            offer.epoch < known.epoch or (offer.epoch == known.epoch and not known.is_of(offer))
        ):
            raise AuthError(f"machine id {machine} is leased to another node", peer=machine)
        session = self._router.session(machine)
        if (
            session is not None
            and session.info is not None
            and session.info.epoch >= offer.epoch
            and session.info.instance != offer.instance
        ):
            raise AuthError(f"machine id {machine} is held by a live node", peer=machine)

    def admit_guest(self, session: Session, data: bytes) -> bytes:
        """A guest has named itself: the welcome for it. Raises DomiError to refuse it."""
        if self._router.id < 0 or not self._members.valid:
            raise TryAgain("this node does not hold a machine id at this moment")
        if session.guard is not None:
            check_claim(session.guard, GUEST, NO_MACHINE)
        session.info = Offer.decode(data)
        if session.info.cluster not in ("", self._config.cluster):
            raise AuthError(
                f"the guest wants cluster {session.info.cluster!r}, this node belongs to "
                f"{self._config.cluster!r}"
            )
        return encode_welcome(self._router.id, self._members.offer.for_guests())

    def admit_lane(self, session: Session, data: bytes, ticket: bytes) -> tuple[Session, int]:
        """A dialler says that this is a lane: of which session, and its number there.

        Raises DomiError to refuse it.
        """
        machine, index = decode_lane(data)
        if session.guard is not None:
            check_claim(session.guard, NODE, machine)
        for main, own in self._tickets.items():
            if self._accepting[main] == machine and hmac.compare_digest(own, ticket):
                break
        else:
            raise AuthError(f"no session with node {machine} waits for this lane", peer=machine)
        if self._config.tls is not None:
            check_name(session.certificate, main.info.name, machine)
        return main, index

    def confirm(self, session: Session) -> None:
        """The dialler has chosen this connection. Raises DomiError to refuse it still."""
        self._tickets.pop(session, None)
        machine = self._accepting.pop(session)
        self._check_holder(machine, session.info)
        self.make_room(machine, session.info)

    def make_room(self, machine: int, offer: Offer) -> None:
        """Who had the machine id before hears that somebody else has it now."""
        older = self._router.session(machine)
        if older is not None and older.info is not None and older.info.instance != offer.instance:
            older.close(DISPLACED)

    def accepts(self, machine: int) -> bool:
        """Whether a dialler was made welcome as this machine, and has not confirmed it."""
        return machine in self._accepting.values()

    def forget(self, session: Session) -> None:
        """This session is over."""
        self._tickets.pop(session, None)
        self._accepting.pop(session, None)
