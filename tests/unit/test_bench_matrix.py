"""Peers and works in one table: each cell has a ratio, or a reason."""

from __future__ import annotations

import pytest

from bench.figures import Figure
from bench.matrix import matrix
from bench.peers.peer import PEERS, Peer
from bench.peers_suite import DONE_BY
from bench.report import Report

NAMES = {peer.title: peer.name for peer in PEERS}


def beside_all(*ratios: float) -> list[Figure]:
    """A whole run, in which each ratio of a round is one of these."""
    return [
        Figure(
            f"{work}-vs-{peer.name}",
            f"{work}, beside {peer.title}",
            "/s",
            values=list(ratios),
            anchor=peer.title,
            anchor_values=[1.0] * len(ratios),
        )
        for work, do in DONE_BY.items()
        for peer in PEERS
        if do in peer.does
    ]


def cells(figures: list[Figure], **left_out: str) -> dict[tuple[str, str], str]:
    """By work and peer."""
    lines = matrix(Report({}, {}, figures, left_out=left_out))
    _, header, _, *rows = [line for line in lines if line]
    titles = header.strip("| ").split(" | ")
    found = {}
    for row in rows:
        work, *of_peers = row[2:-2].split(" | ")
        for title, cell in zip(titles, of_peers, strict=True):
            found[work, NAMES[title]] = cell
    return found


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_what_a_peer_does_not_do_has_a_reason(peer: Peer) -> None:
    assert peer.does | peer.does_not.keys() == set(DONE_BY.values())
    assert not peer.does & peer.does_not.keys()
    assert all(peer.does_not.values())


def test_every_cell_has_a_ratio_or_a_reason() -> None:
    found = cells(beside_all(2.0, 3.0, 4.0))
    assert list(found) == [(work, peer.name) for work in DONE_BY for peer in PEERS]
    reasons = {(peer.name, do): reason for peer in PEERS for do, reason in peer.does_not.items()}
    for (work, peer), cell in found.items():
        assert cell == reasons.get((peer, DONE_BY[work]), "3.00×")
    assert found["publish-1", "grpc"] == "no publish of its own"


def test_a_cell_says_who_wins_or_that_nobody_does() -> None:
    assert cells(beside_all(0.2, 0.4, 0.8))["call-reply", "pyzmq"] == "**0.40×**"
    assert cells(beside_all(0.2, 0.4, 1.8))["call-reply", "pyzmq"] == "0.40×, not decided"


def test_what_a_run_has_not_measured_is_said() -> None:
    figures = [f for f in beside_all(2.0) if f.name in {"call-reply-vs-nats", "call-reply-vs-grpc"}]
    found = cells(figures, pyzmq="it is not there")
    assert found == {
        ("call-reply", "uvloop"): "not in this run",
        ("call-reply", "pyzmq"): "left out",
        ("call-reply", "pyzmq-asyncio"): "see pyzmq, which is faster",
        ("call-reply", "nats"): "2.00×",
        ("call-reply", "grpc"): "2.00×",
        ("call-reply", "aiohttp"): "not in this run",
        ("call-reply", "ray"): "not in this run",
    }


def test_without_any_peer_there_is_no_table() -> None:
    assert matrix(Report({}, {}, [Figure("call-reply", "", "/s", values=[1.0])])) == []
