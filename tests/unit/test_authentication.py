"""The two sides of the authentication, without sockets: who passes, and who does not."""

from __future__ import annotations

import os
from typing import Any

import pytest

from domi_fast import AuthError, Client, Node, connect
from domi_fast.authentication import (
    GUEST,
    NO_MACHINE,
    NODE,
    Dialled,
    Dialler,
    Guard,
    check_claim,
    prove,
)
from domi_fast.callers import _host
from domi_fast.cli.cluster import Where
from domi_fast.errors import TryAgain
from tests import reference

SECRET = b"the secret of this test"


def node(secret: bytes = SECRET, cluster: str = "one", own: int = 7, dialled: int = 3) -> Dialler:
    return Dialler(secret, cluster, NODE, own, dialled)


def guest(secret: bytes = SECRET, cluster: str = "") -> Dialler:
    return Dialler(secret, cluster, GUEST, NO_MACHINE, NO_MACHINE)


def dialled(secret: bytes = SECRET, cluster: str = "one", own: int = 3) -> Dialled:
    return Dialled(secret, cluster, own)


def passed(*sides: Guard) -> list[bool]:
    return [side.passed for side in sides]


def meet(dialler: Dialler, answerer: Dialled) -> list[bytes]:
    """Carry what they say from one to the other; the four messages."""
    said = [dialler.hello()]
    said.append(answerer.step(said[-1]))
    said.append(dialler.step(said[-1]))
    assert passed(dialler, answerer) == [False, False]
    said.append(answerer.step(said[-1]))
    assert passed(dialler, answerer) == [False, True]
    assert dialler.step(said[-1]) == b""
    return said


@pytest.mark.parametrize("dialler", [node(), guest(), guest(cluster="one")])
def test_who_knows_the_secret_passes(dialler: Dialler) -> None:
    answerer = dialled()
    said = meet(dialler, answerer)
    assert passed(dialler, answerer) == [True, True]
    assert all(8 + len(message) <= 256 for message in said)
    check_claim(dialler, NODE, 3)
    role = GUEST if answerer.machine == NO_MACHINE else NODE
    check_claim(answerer, role, NO_MACHINE if role == GUEST else 7)


@pytest.mark.parametrize(
    "claim", [(NODE, 8), (GUEST, 7), (GUEST, NO_MACHINE), (NODE, NO_MACHINE), (NODE, 3)]
)
def test_who_passed_may_not_be_another_afterwards(claim: tuple[int, int]) -> None:
    answerer = dialled()
    meet(node(), answerer)
    with pytest.raises(AuthError):
        check_claim(answerer, *claim)


@pytest.mark.parametrize(
    ("dialler", "answerer"),
    [
        (node(cluster="two"), dialled()),
        (guest(cluster="two"), dialled()),
        (node(cluster=""), dialled()),
        (node(cluster="two", dialled=4), dialled()),
        (node(own=3), dialled()),
        (node(own=1024), dialled()),
        (node(own=NO_MACHINE), dialled()),
        (Dialler(SECRET, "one", GUEST, 7, NO_MACHINE), dialled()),
        (Dialler(SECRET, "one", GUEST, NO_MACHINE, 3), dialled()),
        (Dialler(SECRET, "one", 2, NO_MACHINE, NO_MACHINE), dialled()),
    ],
)
def test_a_hello_that_is_refused(dialler: Dialler, answerer: Dialled) -> None:
    with pytest.raises(AuthError):
        answerer.step(dialler.hello())
    assert not answerer.passed


@pytest.mark.parametrize("given", [4, NO_MACHINE])
def test_a_node_that_was_there_before_is_not_this_one(given: int) -> None:
    """The registry may not have forgotten it yet: nobody's fault."""
    answerer = dialled()
    with pytest.raises(TryAgain, match=f"dialled machine {given}"):
        answerer.step(node(dialled=given).hello())
    assert not answerer.passed


@pytest.mark.parametrize(
    ("dialler", "answers", "kind"),
    [
        (node(), 4, AuthError),
        (node(), 1024, AuthError),
        (guest(), 1024, AuthError),
        (node(), NO_MACHINE, TryAgain),
        (guest(), NO_MACHINE, TryAgain),
    ],
)
def test_a_challenge_that_is_refused(dialler: Dialler, answers: int, kind: type[Exception]) -> None:
    """By somebody who answers for another machine, whatever it was told."""
    with pytest.raises(kind):
        dialler.step(Dialled(SECRET, "one", answers).step(guest().hello()))
    assert not dialler.passed


def test_another_secret_passes_neither_way() -> None:
    for secret in (b"another secret of a test", SECRET + b"\0", SECRET[:-1]):
        dialler, answerer = node(secret), dialled()
        proof = dialler.step(answerer.step(dialler.hello()))
        with pytest.raises(AuthError, match="does not know the secret"):
            answerer.step(proof)
        # And an answerer that lets everybody in is found out.
        hello, challenge = dialler._hello, dialler._challenge
        with pytest.raises(AuthError, match="does not know the secret"):
            dialler.step(b"\x04" + prove(SECRET, "dialled", hello, challenge))
        assert passed(dialler, answerer) == [False, False]


def test_what_was_said_before_is_no_proof() -> None:
    """A recorded handshake, played again to a node and to a dialler."""
    said = meet(node(), dialled())
    again = dialled()
    again.step(said[0])
    with pytest.raises(AuthError):
        again.step(said[2])
    dialler = node()
    dialler.hello()
    dialler.step(said[1])
    with pytest.raises(AuthError):
        dialler.step(said[3])


def test_a_proof_is_good_for_one_side_only() -> None:
    """A challenge that is handed back to who made it, or to another node of the cluster."""
    dialler, answerer = node(), dialled()
    challenge = answerer.step(dialler.hello())
    proof = dialler.step(challenge)
    # The dialler's own proof does not show it that the other knows the secret.
    with pytest.raises(AuthError):
        dialler.step(b"\x04" + proof[1:])
    # Nor does that of a node which is asked to answer for the attacker: both name the ends.
    other = Dialler(SECRET, "one", NODE, 3, 7)
    with pytest.raises(AuthError):
        other.step(challenge)
    # A challenge is no hello, and a hello no challenge.
    with pytest.raises(AuthError):
        dialled().step(challenge)
    with pytest.raises(AuthError):
        node().step(node().hello())


def meet_but_for(place: int, bit: int) -> None:
    """Carry the messages, one bit of which changes on its way."""
    dialler, answerer = node(), dialled()
    said = bytearray(dialler.hello())
    sides: list[Guard] = [answerer, dialler, answerer, dialler]
    for turn, side in enumerate(sides):
        if turn == place:
            said[bit // 8] ^= 1 << bit % 8
        said = bytearray(side.step(bytes(said)))


@pytest.mark.parametrize("place", range(4))
def test_every_bit_counts(place: int) -> None:
    """Whatever is changed on the way, one side refuses the other."""
    meet_but_for(-1, 0)
    for bit in range(len(meet(node(), dialled())[place]) * 8):
        with pytest.raises((AuthError, TryAgain)):
            meet_but_for(place, bit)


@pytest.mark.parametrize("place", range(4))
def test_messages_that_are_cut_or_have_more(place: int) -> None:
    whole = meet(node(), dialled())[place]
    for wrong in [whole[:size] for size in range(len(whole))] + [whole + b"x", b""]:
        dialler, answerer = node(), dialled()
        side: Guard = dialler if place % 2 else answerer
        said = dialler.hello()
        for turn in range(place):
            said = (dialler if turn % 2 else answerer).step(said)
        with pytest.raises(AuthError):
            side.step(wrong)
        assert not side.passed


def test_a_proof_is_for_one_connection() -> None:
    """Where the connection has something of its own, as one by TLS has."""
    for bindings in ((b"one", b"other"), (b"one", b""), (b"", b"other")):
        dialler, dialled = node(), Dialled(SECRET, "one", 3)
        challenge = dialled.step(dialler.hello())
        dialler.binding, dialled.binding = bindings
        with pytest.raises(AuthError, match="does not know the secret"):
            dialled.step(dialler.step(challenge))
    dialler, dialled = node(), Dialled(SECRET, "one", 3)
    challenge = dialled.step(dialler.hello())
    dialler.binding = dialled.binding = b"one"
    dialler.step(dialled.step(dialler.step(challenge)))
    assert dialler.passed
    assert dialled.passed


def test_nothing_is_said_twice() -> None:
    seen = set()
    for _ in range(100):
        for message in meet(node(), dialled()):
            assert message not in seen
            seen.add(message)


def test_the_bytes_are_those_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library and the reference codec, which the page's vectors are checked against."""
    monkeypatch.setattr(os, "urandom", lambda size: bytes(range(size)))
    dialler, answerer = node(), dialled()
    hello, challenge, *proofs = meet(dialler, answerer)
    nonce = bytes(range(32))
    assert hello == reference.auth_hello(0, 7, 3, nonce, "one")
    assert challenge == reference.auth_challenge(3, nonce)
    assert proofs == [reference.auth_proof(n, SECRET, hello, challenge) for n in (3, 4)]
    assert guest().hello() == reference.auth_hello(1, 65535, 65535, nonce, "")


# ---------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("secret", "kind"),
    [
        ("", ValueError),
        (b"", ValueError),
        ("fifteen bytes..", ValueError),
        (b"x" * 1025, ValueError),
        ("\ud800" * 20, ValueError),
        (5, TypeError),
        (bytearray(b"x" * 20), TypeError),
    ],
)
async def test_secrets_that_are_refused(
    registry_url: str, secret: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="secret") as refused:
        Node("a", registry=registry_url, secret=secret)
    assert repr(secret) not in str(refused.value) or not secret
    with pytest.raises(kind, match="secret"):
        await connect("tcp://127.0.0.1:1", secret=secret)


def test_the_environments_secret(registry_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOMI_SECRET", "of the environment")
    assert Node("a", registry=registry_url).config.secret == b"of the environment"
    given = Node("a", registry=registry_url, secret=SECRET.decode()).config
    assert given.secret == SECRET
    monkeypatch.setenv("DOMI_SECRET", "")
    with pytest.raises(ValueError, match="DOMI_SECRET of 0 bytes"):
        Node("a", registry=registry_url)
    raw = bytes(range(128, 160))
    monkeypatch.setitem(os.environb, b"DOMI_SECRET", raw)
    assert Node("a", registry=registry_url).config.secret == raw


def test_a_secret_is_in_no_text_about_a_node(registry_url: str) -> None:
    node = Node("a", registry=registry_url, secret=SECRET)
    guest = Client("tcp://127.0.0.1:1", secret=SECRET)
    where = Where("default", secret=SECRET)
    for shown in (node, node.config, guest, guest.config, where):
        assert SECRET.decode() not in f"{shown!r} {shown}"


def test_listening_on_anything_but_loopback_needs_one(registry_url: str) -> None:
    with pytest.raises(Exception, match="secret="):
        Node("a", registry=registry_url, host="0.0.0.0")
    Node("a", registry=registry_url, host="0.0.0.0", secret=SECRET)
    Node("a", registry=registry_url, host="0.0.0.0", insecure=True)


# ------------------------------------------------------------------------------------- who calls


def test_an_address_is_a_caller() -> None:
    """Of IPv6 a network of 64 bits is one, for whoever has one address of it has all."""
    one = "2001:db8:0:1::1"
    same = ["2001:db8:0:1::1:7000", "2001:db8:0:1:ffff::2:7001"]
    assert {_host(address) for address in same} == {"2001:db8:0:1::/64"}
    assert _host("2001:db8:0:2::1:7000") != _host(f"{one}:7000")
    assert _host("fe80::1%eth0:7000") == "fe80::/64"
    assert _host("127.0.0.2:7000") == _host("::ffff:127.0.0.2:7000") == "127.0.0.2"
    assert _host("unix:/run/a:b") == "unix:/run/a:b"
