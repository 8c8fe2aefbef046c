"""A fuzz target: what parses the bytes of a peer that has yet to show who it is.

An input is a byte that chooses the parser, and what it is given: an offer, a welcome, a lane, or
the steps of the authentication, each behind its size. The random bytes of the authentication are
always the same, so that a proof that is right is known, and can be handed to the input to spoil.
"""

from __future__ import annotations

import os
import sys

import atheris

with atheris.instrument_imports(include=["domi_fast.authentication", "domi_fast.handshake"]):
    from domi_fast import handshake
from domi_fast.authentication import GUEST, NO_MACHINE, NODE, Dialled, Dialler, Guard
from domi_fast.errors import AuthError, FrameError, TryAgain
from domi_fast.handshake import Offer
from tests import reference
from tests.reference import Refused

SECRET = b"the secret of the fuzzed"
CLUSTER = "default"
OWN = 258
NONCE = bytes(range(32))
STEPS = 4


def offer(data: bytes) -> None:
    compare(Offer.decode, reference.decode_offer, data)


def welcome(data: bytes) -> None:
    compare(handshake.decode_welcome, with_ticket, data)


def with_ticket(data: bytes) -> tuple[int, reference.Offer, bytes]:
    return *reference.decode_welcome(data), reference.ticket_of(data)


def lane(data: bytes) -> None:
    compare(handshake.decode_lane, reference.decode_lane, data)


def compare(decode: object, judge: object, data: bytes) -> None:
    """Both refuse it, or read the same."""
    try:
        expected = judge(data)  # type: ignore[operator]
    except Refused:
        expected = None
    try:
        found = decode(data)  # type: ignore[operator]
    except FrameError:
        found = None
    assert facts(found) == facts(expected), data


def facts(read: object) -> object:
    if isinstance(read, tuple) and not isinstance(read, reference.Offer):
        return [facts(each) for each in read]
    if read is None or isinstance(read, (int, bytes)):
        return read
    return [
        getattr(read, name)
        for name in ("name", "version", "cluster", "epoch", "instance", "features")
    ]


def steps(data: bytes) -> list[tuple[bool, bytes]]:
    """What is said, and whether it is what spoils the right proof; each behind its size."""
    found: list[tuple[bool, bytes]] = []
    while data and len(found) < STEPS:
        size = data[0] & 127
        found.append((data[0] > 127, data[1 : 1 + size]))
        data = data[1 + size :]
    return found


def spoilt(proof: bytes, by: bytes) -> bytes:
    """The proof, with these bytes over its first ones, and the rest of them behind it."""
    over = by[: len(proof)].ljust(len(proof), b"\0")
    changed = bytes(one ^ other for one, other in zip(proof, over, strict=True))
    return changed + by[len(proof) :]


def dialled(data: bytes) -> None:
    guard = Dialled(SECRET, CLUSTER, OWN)
    said: list[bytes] = []
    for number, (spoils, step) in enumerate(steps(data)):
        if spoils and number == 1:
            step = spoilt(reference.auth_proof(3, SECRET, said[0], said[1]), step)
        answer = take(guard, step)
        if answer is None:
            return
        said += [step, answer]
        if number == 0:
            assert not guard.passed
            assert answer == reference.auth_challenge(OWN, NONCE)
            assert (guard.role, guard.machine < 1024) in ((NODE, True), (GUEST, False))
            continue
        assert guard.passed
        assert step == reference.auth_proof(3, SECRET, said[0], said[1])
        assert answer == reference.auth_proof(4, SECRET, said[0], said[1])
        return


def dialler(data: bytes) -> None:
    guests = bool(data[:1] > b"\x7f")
    if guests:
        guard = Dialler(SECRET, "", GUEST, NO_MACHINE, NO_MACHINE)
    else:
        guard = Dialler(SECRET, CLUSTER, NODE, 7, OWN)
    hello = guard.hello()
    challenge = b""
    for number, (spoils, step) in enumerate(steps(data[1:])):
        if spoils and number == 1:
            step = spoilt(reference.auth_proof(4, SECRET, hello, challenge), step)
        answer = take(guard, step)
        if answer is None:
            return
        if number == 0:
            challenge = step
            assert not guard.passed
            assert guard.machine < 1024 if guests else guard.machine == OWN
            assert answer == reference.auth_proof(3, SECRET, hello, challenge)
            continue
        assert guard.passed
        assert answer == b""
        assert step == reference.auth_proof(4, SECRET, hello, challenge)
        return


def take(guard: Guard, step: bytes) -> bytes | None:
    """Its answer, or None: it was refused, and does not pass."""
    try:
        return guard.step(step)
    except (AuthError, TryAgain):
        assert not guard.passed
        return None


PARSERS = (offer, welcome, dialled, dialler, lane)


def target(data: bytes) -> None:
    if data:
        PARSERS[data[0] % len(PARSERS)](data[1:])


def same(size: int) -> bytes:
    return NONCE[:size]


if __name__ == "__main__":
    os.urandom = same
    # The command by which libFuzzer runs this again, in a shell, when it merges.
    again = f"{sys.executable} -m tests.fuzz.handshake"
    atheris.Setup([again, *sys.argv[1:]], target)
    atheris.Fuzz()
