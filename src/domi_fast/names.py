"""Names of a cluster that one node holds at a time, many under one lease: ``node.cluster.names``.

A name is a key ``domi/<cluster>/names/<kind>/<name>``. When the lease is lost, its node keeps what
it holds, as it keeps its machine id, and claims it again once the registry is back; what another
has taken by then is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from typing import Final

from ._core import printable
from .config import NodeConfig
from .errors import DomiError, NameTaken, RegistryError
from .holder import Holder
from .keys import Keys
from .registry.base import Claim, CompareFailed, Lease, LeaseLost, NoKeyFree, Registry

log = logging.getLogger(__name__)

RETRY_PAUSE: Final = 0.2
# Names that are claimed again at the same time.
AT_ONCE: Final = 16


class Names:
    """The names of one kind, as one node sees them. Belongs to the node's loop."""

    def __init__(self, keeper: Keeper, kind: str) -> None:
        keeper.key(kind, "name")
        self._keeper = keeper
        self.kind = kind

    async def claim(self, name: str, value: bytes = b"") -> Name:
        """Take a name that nobody has, at once.

        :param name: 1 to 128 letters, digits, ``.``, ``_`` and ``-``; no ``.`` in front.
        :param value: what :meth:`find` shows of it to every node.
        :raises NameTaken: somebody has it, perhaps this node; its ``holder`` says who.
        :raises ValueError: the name is not allowed.
        :raises RegistryError: the registry cannot be reached, or does not take the value.
        :raises DomiError: the node has not started, or was closed.
        """
        return await self._keeper.claim(self.kind, name, value)

    async def find(self, name: str) -> Holder | None:
        """Who has the name, by the registry; None when nobody does.

        One that was killed is found until its lease is over.

        :raises ValueError: the name is not allowed.
        :raises RegistryError: the registry cannot be reached.
        :raises DomiError: the node has not started, or was closed.
        """
        return await self._keeper.find(self.kind, name)


class Name:
    """A name that this node has. Belongs to the node's loop.

    :ivar name: without its kind.
    :ivar lost: set once another node has it, or this one was closed. It never comes back: claim it
        anew. What was released is not lost.
    """

    def __init__(self, keeper: Keeper, key: str, claim: Claim, value: bytes) -> None:
        self.name = key.rpartition("/")[2]
        self.lost = asyncio.Event()
        self._keeper = keeper
        self._key = key
        self._claim = claim
        self._value = value
        self._released = False
        # Of what changes the key, one at a time.
        self._changing = asyncio.Lock()

    @property
    def epoch(self) -> int:
        """Larger than that of every earlier holder; it grows also when it is claimed again."""
        return self._claim.epoch

    @property
    def value(self) -> bytes:
        """What :meth:`Names.find` shows of it."""
        return self._value

    @property
    def held(self) -> bool:
        """Whether it is this node's, as far as this node knows."""
        return not self._released and not self.lost.is_set()

    async def update(self, value: bytes) -> None:
        """Put another value there.

        :raises RegistryError: the registry cannot be reached or does not take the value, which is
            as before; or the lease was lost, and the name is not claimed again yet.
        :raises DomiError: it was released or lost, or the node was closed.
        """
        check_value(value)
        self._keeper.check()
        async with self._changing:
            if not self.held:
                raise DomiError(f"the name {self.name!r} was released or lost: claim it anew")
            await self._keeper.update(self, value)
            if not self.held:
                raise DomiError(
                    f"the name {self.name!r} was lost: another has it, or the node ended"
                )

    async def release(self) -> None:
        """Give it back; nothing happens when it was released or lost before.

        :raises RegistryError: the registry cannot be reached, and the name is still held.
        :raises DomiError: it was called on another loop than the node's.
        """
        if not self.held:
            return
        self._keeper.check()
        async with self._changing:
            if self.held:
                await self._keeper.release(self)

    def __repr__(self) -> str:
        state = "held" if self.held else "released" if self._released else "lost"
        return f"<Name {self.name!r} epoch={self.epoch} {state}>"


class Keeper:
    """All names of a node, of every kind, and the one lease on which they hang."""

    def __init__(self, config: NodeConfig, registry: Registry, keys: Keys) -> None:
        self._config = config
        self._registry = registry
        self._keys = keys
        self._held: dict[str, Name] = {}
        # What is being claimed: another claim of it by this node waits for the outcome.
        self._claiming: dict[str, asyncio.Event] = {}
        self._lease: Lease | None = None
        self._granting: asyncio.Task[Lease] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._closed = False

    def key(self, kind: str, name: str) -> str:
        return self._keys.key("names", kind, name)

    def check(self) -> None:
        if self._closed:
            raise DomiError("the node was closed: it has no names any more")
        self._keys.check()

    async def end(self) -> Lease | None:
        """All names are lost, and nothing is claimed any more; the lease is to be revoked."""
        self._closed = True
        for name in list(self._held.values()):
            name.lost.set()
        self._held.clear()
        tasks = [task for task in (self._granting, self._keeping) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        return self._lease

    # ------------------------------------------------------------------ what names ask for

    async def find(self, kind: str, name: str) -> Holder | None:
        key = self.key(kind, name)
        self.check()
        entry = await self._registry.get(key)
        return None if entry is None else self._keys.read(entry)[0]

    async def claim(self, kind: str, name: str, value: bytes) -> Name:
        key = self.key(kind, name)
        check_value(value)
        self.check()
        while key in self._claiming:
            await self._claiming[key].wait()
            self.check()
        if key in self._held:
            held = self._held[key]
            own = Holder(self._keys.machine, self._config.name, held.value, held.epoch)
            raise _taken(kind, name, own)
        over = self._claiming[key] = asyncio.Event()
        try:
            claim = await self._claim(kind, name, key, value)
        finally:
            del self._claiming[key]
            over.set()
        found = self._held[key] = Name(self, key, claim, value)
        return found

    async def update(self, name: Name, value: bytes) -> None:
        claim = name._claim
        try:
            await claim.update(self._keys.sign(value))
        except LeaseLost:
            if claim.lease.lost.is_set():
                raise
            self.check()
            # Somebody has deleted the key.
            if not await self._claim_again(name, claim.lease, value):
                return
        name._value = value

    async def release(self, name: Name) -> None:
        try:
            await name._claim.release()
        except (RegistryError, OSError):
            # With its lease the key ends by itself.
            if not name._claim.lease.lost.is_set():
                raise
        except asyncio.CancelledError:
            self._forget(name)  # it is released all the same
            raise
        self._forget(name)

    def _forget(self, name: Name) -> None:
        name._released = True
        self._held.pop(name._key, None)

    async def _claim(self, kind: str, name: str, key: str, value: bytes) -> Claim:
        while True:
            lease = await self._present()
            try:
                claim = await self._registry.claim([key], self._keys.sign(value), lease)
            except NoKeyFree:
                holder = await self._other(key)
                if holder is not None:
                    raise _taken(kind, name, holder) from None
            except LeaseLost:
                self.check()
                if not lease.lost.is_set():
                    raise
            else:
                self.check()
                if not lease.lost.is_set():
                    return claim

    async def _other(self, key: str) -> Holder | None:
        """Who else has the key; None when it is free, or was this node's and is free by now.

        Only for what is not held at this moment: what stands there for this node is then what is
        left of an earlier claim. A registry that was away itself may have given the lease its whole
        length again.
        """
        entry = await self._registry.get(key)
        if entry is None:
            return None
        try:
            holder, own = self._keys.read(entry)
        except RegistryError:
            return Holder(-1, "", entry.value, entry.epoch)  # no node wrote that
        if own:
            with contextlib.suppress(CompareFailed):
                await self._registry.delete(key, expect=entry.version)
            return None
        return holder

    # ------------------------------------------------------------------ the lease

    async def _present(self) -> Lease:
        """The lease; granted, once for all who ask, where there is none."""
        lease = self._lease
        if lease is not None and not lease.lost.is_set():
            return lease
        granting = self._granting
        if granting is None:
            granting = self._granting = asyncio.ensure_future(self._grant())
            # Whoever asked may be gone.
            granting.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait([granting])
        self.check()
        return granting.result()

    async def _grant(self) -> Lease:
        try:
            ttl = max(self._config.lease_ttl, self._registry.limits.min_ttl)
            lease = self._lease = await self._registry.grant(ttl)
        finally:
            self._granting = None
        if self._keeping is None:
            self._keeping = asyncio.ensure_future(self._keep(lease))
        return lease

    async def _keep(self, lease: Lease) -> None:
        """Claim everything again each time the lease is lost, for ever."""
        while True:
            await lease.lost.wait()
            log.warning(
                "%s: the lease on its %d names was lost", self._config.name, len(self._held)
            )
            lease = await self._claim_all_again()

    async def _claim_all_again(self) -> Lease:
        told = False
        while True:
            try:
                lease = await self._present()
                await self._claim_all_under(lease)
            except (RegistryError, OSError) as error:
                if not told:
                    log.warning("%s: cannot claim its names again: %s", self._config.name, error)
                    told = True
            else:
                log.info("%s: its %d names are claimed again", self._config.name, len(self._held))
                return lease
            await asyncio.sleep(RETRY_PAUSE * random.uniform(0.5, 1.5))

    async def _claim_all_under(self, lease: Lease) -> None:
        """Some at a time; the first error ends it all."""
        names = list(self._held.values())
        left = iter(names)

        async def some() -> None:
            for name in left:
                await self._claim_again_under(name, lease)

        tasks = [asyncio.ensure_future(some()) for _ in range(min(AT_ONCE, len(names)))]
        if not tasks:
            return
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _claim_again_under(self, name: Name, lease: Lease) -> None:
        async with name._changing:
            if name.held and name._claim.lease is not lease:
                await self._claim_again(name, lease, name.value)

    async def _claim_again(self, name: Name, lease: Lease, value: bytes) -> bool:
        """Claim what this node has had until now; False, and lost, if another was quicker."""
        holder: Holder | None = None
        while holder is None:
            with contextlib.suppress(NoKeyFree):
                name._claim = await self._registry.claim([name._key], self._keys.sign(value), lease)
                return True
            holder = await self._other(name._key)
        log.warning("%s: %s was lost: node %d has it now", self._config.name, name._key, holder.id)
        self._held.pop(name._key, None)
        name.lost.set()
        return False


def check_value(value: object) -> None:
    """Raise TypeError unless it is bytes."""
    if not isinstance(value, bytes):
        raise TypeError(f"value {value!r}: bytes are wanted")


def _taken(kind: str, name: str, holder: Holder) -> NameTaken:
    return NameTaken(
        f"the name {name!r} of {kind} is taken: node {holder.id} ({printable(holder.name)}) has it",
        holder,
    )
