"""What etcd is asked to do for a claim or a lock: transactions, which block, and run in threads."""

from __future__ import annotations

import secrets
from typing import Any

from .base import LeaseLost, NoKeyFree
from .etcd_link import Channel, prefix_end


def is_at(channel: Channel, key: bytes, **field: int) -> Any:
    """That a key is at this revision, or bound to this lease."""
    rpc = channel.rpc
    (name,) = field
    target = {
        "create_revision": rpc.Compare.CREATE,
        "mod_revision": rpc.Compare.MOD,
        "lease": rpc.Compare.LEASE,
    }[name]
    return rpc.Compare(key=key, target=target, result=rpc.Compare.EQUAL, **field)


def put(channel: Channel, key: bytes, value: bytes, lease: int) -> Any:
    """To write a key."""
    rpc = channel.rpc
    return rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=value, lease=lease))


def get(channel: Channel, key: bytes) -> Any:
    """To read a key."""
    return channel.rpc.RequestOp(request_range=channel.rpc.RangeRequest(key=key))


def delete(channel: Channel, key: bytes) -> Any:
    """To delete a key."""
    rpc = channel.rpc
    return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key))


class Mark:
    """A key that is written together with what is claimed, and says what that was."""

    def __init__(self, claims: bytes, lease: int) -> None:
        self.key = claims + secrets.token_hex(16).encode()
        self.lease = lease

    def put(self, channel: Channel, claimed: bytes) -> Any:
        return put(channel, self.key, claimed, self.lease)

    def found(self, channel: Channel) -> tuple[bytes, int] | None:
        """What was claimed, and its epoch."""
        kvs = channel.range(key=self.key).kvs
        return (bytes(kvs[0].value), int(kvs[0].create_revision)) if kvs else None

    def withdraw(self, channel: Channel) -> None:
        found = self.found(channel)
        if found is not None:
            self.release(channel, *found)

    def release(self, channel: Channel, claimed: bytes, epoch: int) -> None:
        channel.txn(
            self.held(channel, claimed, epoch),
            [delete(channel, claimed), delete(channel, self.key)],
            [delete(channel, self.key)],
        )

    def held(self, channel: Channel, claimed: bytes, epoch: int) -> list[Any]:
        # Whoever else has put something there has bound it to another lease, or to none.
        return [
            is_at(channel, claimed, create_revision=epoch),
            is_at(channel, claimed, lease=self.lease),
        ]


class Attempt:
    """To take the first of some keys that is free."""

    def __init__(self, mark: Mark, keys: list[bytes], value: bytes) -> None:
        self._mark = mark
        self._keys = keys
        self._value = value
        self._tried = False

    def take(self, channel: Channel) -> tuple[bytes, int]:
        before = self._mark.found(channel) if self._tried else None
        if before is not None:
            return before
        first, last = min(self._keys), max(self._keys)
        while True:
            found = channel.range(key=first, range_end=last + b"\0", keys_only=True)
            held = {bytes(kv.key) for kv in found.kvs}
            free = next((key for key in self._keys if key not in held), None)
            if free is None:
                raise NoKeyFree(f"all {len(self._keys)} keys are held")
            self._tried = True
            done = channel.txn(
                [is_at(channel, free, create_revision=0)],
                [
                    put(channel, free, self._value, self._mark.lease),
                    self._mark.put(channel, free),
                ],
            )
            if done.succeeded:
                return free, int(done.header.revision)


class Place:
    """A place in the queue for a lock: a key whose revision says who came first."""

    def __init__(self, mark: Mark, lock: bytes, queue: bytes, value: bytes) -> None:
        self._mark = mark
        self._lock = lock
        self._queue = queue
        self._key = queue + secrets.token_hex(16).encode()
        self._value = value
        self._since = 0  # the revision at which the place was taken

    def enter(self, channel: Channel) -> None:
        done = channel.txn(
            [is_at(channel, self._key, create_revision=0)],
            [put(channel, self._key, b"", self._mark.lease)],
            [get(channel, self._key)],
        )
        if done.succeeded:
            self._since = int(done.header.revision)
        else:
            self._since = int(done.responses[0].response_range.kvs[0].create_revision)

    def look(self, channel: Channel) -> int | tuple[bytes, int]:
        """The epoch, if the lock is ours now; else what has to go, and the revision of the look."""
        before = channel.range(
            key=self._queue,
            range_end=prefix_end(self._queue),
            max_create_revision=self._since - 1,
            sort_order=channel.rpc.RangeRequest.DESCEND,
            sort_target=channel.rpc.RangeRequest.CREATE,
            limit=1,
            keys_only=True,
        )
        if before.kvs:
            return bytes(before.kvs[0].key), int(before.header.revision)
        done = channel.txn(
            [
                is_at(channel, self._lock, create_revision=0),
                is_at(channel, self._key, create_revision=self._since),
            ],
            [
                put(channel, self._lock, self._value, self._mark.lease),
                self._mark.put(channel, self._lock),
                delete(channel, self._key),
            ],
            [get(channel, self._key)],
        )
        revision = int(done.header.revision)
        if done.succeeded:
            return revision
        if done.responses[0].response_range.kvs:
            return self._lock, revision
        found = self._mark.found(channel)
        if found is None:
            raise LeaseLost("the place in the queue is gone: the lease has ended")
        return found[1]  # an earlier try has won, and did not hear of it

    def withdraw(self, channel: Channel) -> None:
        channel.txn([], [delete(channel, self._key)])
        self._mark.withdraw(channel)
