"""Who belongs to the cluster: a mutual challenge and response over a secret that all share.

The three passes are those of ISO/IEC 9798-4 (mutual authentication by a keyed hash), with the names
of both ends, their roles and the cluster under the hash as well; the bytes are in docs/protocol.md,
"Authentication". One object is one handshake. It knows no socket: the session that it guards hands
it what arrives and sends what it returns, and dispatches nothing before it has ``passed``.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from typing import Protocol

from .errors import AuthError, TryAgain

VERSION = 1
NODE, GUEST = 0, 1
NO_MACHINE = 0xFFFF
_MACHINES = 1024
_NONCE = 32
_PROOF = hashlib.sha256().digest_size
_HELLO, _CHALLENGE, _DIALLER_PROOF, _DIALLED_PROOF = 1, 2, 3, 4
_HELLO_FIELDS = struct.Struct(f"<BBBHH{_NONCE}sB")
_CHALLENGE_FIELDS = struct.Struct(f"<BBH{_NONCE}s")
_CONTEXT = b"domi_fast authentication 1\0"


class Guard(Protocol):
    """One side of a handshake, and what a session asks of it.

    :ivar passed: whether the other end has shown that it knows the secret.
    :ivar role: NODE or GUEST: what the other end said that it is.
    :ivar machine: the machine id under which it said so; ``NO_MACHINE`` for a guest.
    :ivar binding: what both ends know of the TLS of this connection, and nobody of another; empty
        without TLS. Who passes a handshake on from one connection to another fails by it.
    """

    passed: bool
    role: int
    machine: int
    binding: bytes

    def step(self, data: bytes) -> bytes:
        """What to send upon this, or nothing.

        Raises AuthError to refuse the other end, and TryAgain where nobody is at fault.
        """


class Dialler:
    """The side that dials.

    :param secret: of the cluster.
    :param cluster: its name; empty, from a guest: whichever it is.
    :param role: NODE or GUEST: what this side is.
    :param own: its machine id; ``NO_MACHINE`` for a guest.
    :param dialled: the machine id that is to answer; ``NO_MACHINE``, from a guest: any.
    """

    def __init__(self, secret: bytes, cluster: str, role: int, own: int, dialled: int) -> None:
        self.passed = False
        self.binding = b""
        self.role = NODE
        self.machine = dialled
        self._secret = secret
        name = cluster.encode()
        self._hello = (
            _HELLO_FIELDS.pack(_HELLO, VERSION, role, own, dialled, os.urandom(_NONCE), len(name))
            + name
        )
        self._challenge = b""

    def hello(self) -> bytes:
        """What to send first."""
        return self._hello

    def step(self, data: bytes) -> bytes:
        """See :class:`Guard`: the proof of this side, then nothing."""
        if not self._challenge:
            self._read_challenge(data)
            return bytes([_DIALLER_PROOF]) + self._proof("dialler")
        _check_proof(data, _DIALLED_PROOF, self._proof("dialled"))
        self.passed = True
        return b""

    def _proof(self, side: str) -> bytes:
        return prove(self._secret, side, self._hello, self._challenge, self.binding)

    def _read_challenge(self, data: bytes) -> None:
        _check_form(data, _CHALLENGE, _CHALLENGE_FIELDS)
        _, version, machine, _ = _CHALLENGE_FIELDS.unpack_from(data)
        _check_version(version)
        if len(data) != _CHALLENGE_FIELDS.size:
            raise AuthError("a challenge that does not end where it should")
        if machine == NO_MACHINE:
            raise TryAgain("it has no machine id at this moment")
        if machine >= _MACHINES or self.machine not in (machine, NO_MACHINE):
            raise AuthError(f"machine {machine} answered where {self.machine} was dialled")
        self.machine = machine
        self._challenge = data


class Dialled:
    """The side that was dialled.

    :param secret: of the cluster.
    :param cluster: its name.
    :param own: the machine id of this node; ``NO_MACHINE`` while it has none.
    """

    def __init__(self, secret: bytes, cluster: str, own: int) -> None:
        self.passed = False
        self.binding = b""
        self.role = NODE
        self.machine = NO_MACHINE
        self._secret = secret
        self._cluster = cluster.encode()
        self._own = own
        self._hello = b""
        self._challenge = b""

    def step(self, data: bytes) -> bytes:
        """See :class:`Guard`: the challenge, then the proof of this side."""
        if not self._hello:
            self._read_hello(data)
            self._challenge = _CHALLENGE_FIELDS.pack(
                _CHALLENGE, VERSION, self._own, os.urandom(_NONCE)
            )
            return self._challenge
        _check_proof(data, _DIALLER_PROOF, self._proof("dialler"))
        self.passed = True
        return bytes([_DIALLED_PROOF]) + self._proof("dialled")

    def _proof(self, side: str) -> bytes:
        return prove(self._secret, side, self._hello, self._challenge, self.binding)

    def _read_hello(self, data: bytes) -> None:
        _check_form(data, _HELLO, _HELLO_FIELDS)
        _, version, role, machine, dialled, _, size = _HELLO_FIELDS.unpack_from(data)
        _check_version(version)
        cluster = data[_HELLO_FIELDS.size :]
        if len(cluster) != size:
            raise AuthError("a hello that does not end where it should")
        if role == NODE:
            if machine >= _MACHINES or machine == self._own:
                raise AuthError(f"it claims to be machine {machine}")
        elif role != GUEST or machine != NO_MACHINE or dialled != NO_MACHINE:
            raise AuthError("it is neither a node nor a guest")
        if cluster != self._cluster and (cluster or role == NODE):
            raise AuthError("it belongs to another cluster")
        if role == NODE and dialled != self._own:
            # The registry has yet to forget a node that was at this address before.
            raise TryAgain(f"it dialled machine {dialled}, and this is {self._own}")
        self.role, self.machine = role, machine
        self._hello = data


def check_claim(guard: Guard, role: int, machine: int) -> None:
    """Raise AuthError unless who passed the guard is who it says now that it is."""
    if (guard.role, guard.machine) != (role, machine):
        raise AuthError(f"it showed the secret as machine {guard.machine}, and is another now")


def prove(secret: bytes, side: str, hello: bytes, challenge: bytes, binding: bytes = b"") -> bytes:
    """The proof of one side, "dialler" or "dialled": HMAC-SHA256 over all that was said."""
    # A key of HMAC is as good with zeros behind it. A secret is not, once it is hashed.
    key = hmac.digest(_CONTEXT, secret, "sha256")
    return hmac.digest(key, _CONTEXT + side.encode() + hello + challenge + binding, "sha256")


def _check_form(data: bytes, step: int, fields: struct.Struct) -> None:
    if data[:1] != bytes([step]) or len(data) < fields.size:
        raise AuthError("not the step of the authentication that was awaited")


def _check_version(version: int) -> None:
    if version != VERSION:
        raise AuthError(f"version {version} of the authentication: this node speaks {VERSION}")


def _check_proof(data: bytes, step: int, wanted: bytes) -> None:
    if data[:1] != bytes([step]) or len(data) != 1 + _PROOF:
        raise AuthError("not the step of the authentication that was awaited")
    if not hmac.compare_digest(data[1:], wanted):
        raise AuthError("it does not know the secret of this cluster")
