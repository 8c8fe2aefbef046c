"""The nodes of a registry in ZooKeeper, and what is done to them: blocking calls, run in threads.

``<root>/keys`` has one child for every key, whose name is the key percent-encoded: keys may be
each other's beginnings, and what is bound to a session can have no children. A node holds a tag of
16 bytes, which says whose work it is, and the value.

``<root>/queue`` has one child for everybody who waits for a lock: the lock's name percent-encoded,
a tag, and the number that ZooKeeper has counted up to, between commas.

``<root>/created`` is written whenever a key is created, and ``<root>/changed`` whenever the value
of one is overwritten. The first tells the transaction's number, and lets a write depend on a key's
not having been made anew since it was read, which its own version does not tell; the second lets a
list be taken at one moment.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final
from urllib.parse import quote, unquote

from .base import Entry, LeaseLost, NoKeyFree, Snapshot, Version
from .zookeeper_session import Session

_TAG: Final = 16
_AT_ONCE: Final = 500


class Tree:
    """Where the nodes of a registry are.

    :param root: without a slash at either end.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.keys = f"/{root}/keys"
        self.queue = f"/{root}/queue"
        self.created = f"/{root}/created"
        self.changed = f"/{root}/changed"

    def at(self, key: str) -> str:
        return f"{self.keys}/{encoded(key)}"

    def prepare(self, session: Session) -> None:
        """Make the nodes that have to be there. Raises RegistryError where that is forbidden."""
        above = self.root.split("/")
        paths = ["/" + "/".join(above[: i + 1]) for i in range(len(above))]
        paths += [self.keys, self.queue, self.created, self.changed]
        for path in paths:
            if session.read(partial(_exists, path=path)) == [None]:
                with suppress(session.errors.NodeExistsError):  # another was quicker
                    session.commit(partial(_create, path=path))
        # That a node is there is told to anybody; what is below it is not.
        names_of(session, self, None)


def _exists(client: Any, path: str) -> Any:
    return client.exists_async(path)


def _create(transaction: Any, path: str) -> None:
    transaction.create(path)


def encoded(text: str) -> str:
    return quote(text, safe="")


def decoded(name: str) -> str:
    return unquote(name)


def new_tag() -> bytes:
    return secrets.token_bytes(_TAG)


def entry(name: str, data: bytes, stat: Any) -> Entry:
    """What ZooKeeper has, as the protocol has it."""
    return Entry(decoded(name), data[_TAG:], (stat.czxid, stat.version), stat.czxid)


# ---------------------------------------------------------------------------- keys


def get(session: Session, tree: Tree, key: str) -> Entry | None:
    (found,) = session.read(lambda c: c.get_async(tree.at(key)))
    return None if found is None else entry(encoded(key), *found)


def nodes(
    session: Session, tree: Tree, names: Sequence[str], watch: Callable[[Any], None] | None = None
) -> Iterator[tuple[str, Any]]:
    """Each name, with the data and the stat of its node, or None."""
    for begin in range(0, len(names), _AT_ONCE):
        some = names[begin : begin + _AT_ONCE]
        yield from zip(
            some,
            session.pipeline(
                *[lambda c, n=n: c.get_async(f"{tree.keys}/{n}", watch) for n in some]
            ),
            strict=True,
        )


def names_of(session: Session, tree: Tree, watch: Callable[[Any], None] | None) -> list[str]:
    """Of all keys."""
    ((names, _),) = session.read(
        lambda c: c.get_children_async(tree.keys, watch, include_data=True)
    )
    return list(names)


def snapshot(
    session: Session, tree: Tree, prefix: str, watch: Callable[[Any], None] | None = None
) -> Snapshot:
    """All keys under a prefix at one moment, which is that at which their names are read."""
    begin = encoded(prefix)
    while True:
        changed, listed = session.read(
            lambda c: c.exists_async(tree.changed),
            lambda c: c.get_children_async(tree.keys, watch, include_data=True),
        )
        names, stat = listed
        # Nothing later than this has happened to the keys by that moment.
        moment = max(changed.mzxid, stat.pzxid)
        entries = []
        for name, found in nodes(session, tree, [n for n in names if n.startswith(begin)], watch):
            if found is None or found[1].mzxid > moment:
                break
            entries.append(entry(name, *found))
        else:
            return Snapshot(tuple(sorted(entries, key=lambda e: e.key)), moment)


def create(session: Session, tree: Tree, key: str, data: bytes, *, bound: bool) -> int | None:
    """The epoch; None if the key exists."""

    def fill(t: Any) -> None:
        t.set_data(tree.created, b"")
        t.create(tree.at(key), data, ephemeral=bound)

    try:
        return int(session.commit(fill)[0].mzxid)
    except session.errors.NodeExistsError:
        return None


def put(
    session: Session, tree: Tree, key: str, value: bytes, expect: Version | None, *, bound: bool
) -> Entry | None:
    """What is there now; None if the key is not at the expected version."""
    path, data = tree.at(key), new_tag() + value
    owner = session.number if bound else 0
    while True:
        stat, created = _stats(session, tree, path)
        if expect is not None and (stat is None or (stat.czxid, stat.version) != expect):
            return None
        if stat is None:
            epoch = create(session, tree, key, data, bound=bound)
            if epoch is None:
                continue
            return Entry(key, value, (epoch, 0), epoch)

        def fill(t: Any, stat: Any = stat, created: Any = created) -> None:
            t.check(tree.created, created.version)
            if stat.ephemeralOwner == owner:
                t.set_data(tree.changed, b"")
                t.set_data(path, data, stat.version)
            else:
                # A node is bound once and for all.
                t.set_data(tree.created, b"")
                t.delete(path, stat.version)
                t.create(path, data, ephemeral=bound)

        try:
            results = session.commit(fill)
        except (session.errors.BadVersionError, session.errors.NoNodeError):
            continue
        if stat.ephemeralOwner == owner:
            return entry(encoded(key), data, results[-1])
        epoch = int(results[1].mzxid)
        return Entry(key, value, (epoch, 0), epoch)


def delete(session: Session, tree: Tree, key: str, expect: Version | None) -> bool | None:
    """Whether it was there; None if it is not at the expected version."""
    path = tree.at(key)
    while True:
        stat, created = _stats(session, tree, path)
        if stat is None:
            return False
        if expect is not None and (stat.czxid, stat.version) != expect:
            return None
        if _delete(session, tree, path, stat, created):
            return True


def _stats(session: Session, tree: Tree, path: str) -> tuple[Any, Any]:
    stat, created = session.read(
        lambda c: c.exists_async(path), lambda c: c.exists_async(tree.created)
    )
    return stat, created


def _delete(session: Session, tree: Tree, path: str, stat: Any, created: Any) -> bool:
    """Whether the node was still the one that was looked at."""

    def fill(t: Any) -> None:
        t.check(tree.created, created.version)
        t.delete(path, stat.version)

    try:
        session.commit(fill)
    except (session.errors.BadVersionError, session.errors.NoNodeError):
        return False
    return True


# ---------------------------------------------------------------------------- claims


class Holding:
    """A key that this claim may hold."""

    def __init__(self, session: Session, tree: Tree, key: str, epoch: int) -> None:
        self._session = session
        self._tree = tree
        self._path = tree.at(key)
        self._epoch = epoch

    def update(self, value: bytes) -> bool:
        """Whether it is held."""
        session, tree, data = self._session, self._tree, new_tag() + value
        while True:
            stat, created = _stats(session, tree, self._path)
            if not self._is_held(stat):
                return False

            def fill(t: Any, stat: Any = stat, created: Any = created) -> None:
                t.check(tree.created, created.version)
                t.set_data(tree.changed, b"")
                t.set_data(self._path, data, stat.version)

            try:
                session.commit(fill)
            except (session.errors.BadVersionError, session.errors.NoNodeError):
                continue
            return True

    def release(self) -> None:
        while True:
            stat, created = _stats(self._session, self._tree, self._path)
            if not self._is_held(stat) or _delete(
                self._session, self._tree, self._path, stat, created
            ):
                return

    def _is_held(self, stat: Any) -> bool:
        return (
            stat is not None
            and stat.czxid == self._epoch
            and stat.ephemeralOwner == self._session.number
        )


class Attempt:
    """To take one key for a claim, and to know it again by its tag."""

    def __init__(self, session: Session, tree: Tree, value: bytes) -> None:
        self.session = session
        self.tree = tree
        self.tag = new_tag()
        self.data = self.tag + value
        self._tried = ""

    def first(self, keys: Sequence[str]) -> tuple[str, int]:
        """The first key that is free, and its epoch. Raises NoKeyFree."""
        won = self.won()
        if won is not None:
            return won
        while True:
            taken = set(names_of(self.session, self.tree, None))
            lost = False
            for key in keys:
                if encoded(key) in taken:
                    continue
                self._tried = key
                epoch = create(self.session, self.tree, key, self.data, bound=True)
                if epoch is not None:
                    return key, epoch
                lost = True
            if not lost:
                raise NoKeyFree(f"all {len(keys)} keys are held")

    def won(self) -> tuple[str, int] | None:
        """What an earlier try has won, and did not hear of."""
        if not self._tried:
            return None
        (found,) = self.session.read(lambda c: c.get_async(self.tree.at(self._tried)))
        if found is None or not found[0].startswith(self.tag):
            return None
        return self._tried, int(found[1].czxid)

    def withdraw(self) -> None:
        won = self.won()
        if won is not None:
            Holding(self.session, self.tree, *won).release()


class Place(Attempt):
    """A place in the queue for a lock. Who is not the first watches the one before it alone."""

    def __init__(self, session: Session, tree: Tree, name: str, value: bytes) -> None:
        super().__init__(session, tree, value)
        self._name = name
        self._begin = f"{encoded(name)},"
        self._place = f"{self._begin}{self.tag.hex()},"
        self._asked = False

    def enter(self) -> None:
        if self._asked and self._mine(self._line()) is not None:
            return
        self._asked = True
        self.session.pipeline(
            lambda c: c.create_async(
                f"{self.tree.queue}/{self._place}", b"", ephemeral=True, sequence=True
            )
        )

    def look(self, ring: Callable[[Any], None]) -> int | None:
        """The epoch, if the lock is ours now; else what has to go is watched.

        Raises LeaseLost.
        """
        session, tree = self.session, self.tree
        while True:
            line = self._line()
            mine = self._mine(line)
            if mine is None:
                won = self.won()
                if won is None:
                    raise LeaseLost("the place in the queue is gone: the lease has ended")
                return won[1]
            if line[0] != mine:
                ahead = f"{tree.queue}/{line[line.index(mine) - 1]}"
                if self._is_there(ahead, ring):
                    return None
                continue

            def fill(t: Any, mine: str = mine) -> None:
                t.set_data(tree.created, b"")
                t.create(tree.at(self._name), self.data, ephemeral=True)
                t.delete(f"{tree.queue}/{mine}")

            self._tried = self._name
            try:
                return int(session.commit(fill)[0].mzxid)
            except session.errors.NodeExistsError:
                if self._is_there(tree.at(self._name), ring):
                    return None
            except session.errors.NoNodeError:
                pass  # the place has gone since the look

    def withdraw(self) -> None:
        mine = self._mine(self._line())
        if mine is not None:
            self.session.pipeline(lambda c: c.delete_async(f"{self.tree.queue}/{mine}"))
        super().withdraw()

    def _line(self) -> list[str]:
        """All who wait for the lock, first come first."""
        ((names, _),) = self.session.read(
            lambda c: c.get_children_async(self.tree.queue, include_data=True)
        )
        waiting = [name for name in names if name.startswith(self._begin)]
        if not waiting:
            return waiting
        # ZooKeeper counts in 32 bits: what counts is how far one is from another.
        one = _number(waiting[0])
        return sorted(waiting, key=lambda name: (_number(name) - one + 2**31) % 2**32)

    def _mine(self, line: list[str]) -> str | None:
        return next((name for name in line if name.startswith(self._place)), None)

    def _is_there(self, path: str, ring: Callable[[Any], None]) -> bool:
        (stat,) = self.session.read(lambda c: c.exists_async(path, ring))
        return stat is not None


def _number(name: str) -> int:
    return int(name.rpartition(",")[2])
