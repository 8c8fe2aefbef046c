"""Peers and works in one table: what ours is to each, or why a peer does not do a work."""

from __future__ import annotations

import statistics

from bench.figures import Figure, write
from bench.peers.peer import PEERS, Peer
from bench.peers_suite import DONE_BY
from bench.report import Report

SAID = (
    "What ours is to each, by the median of the ratios: of a rate so many times it, of a "
    "time or a size such a part. In heavy type where the other wins in every round."
)

__all__ = ["matrix"]


def matrix(report: Report) -> list[str]:
    """Lines of Markdown, of the works that the run has beside any peer; none without any."""
    figures = {figure.name: figure for figure in report.figures if figure.ratios}
    works: dict[str, str] = {}
    for work in DONE_BY:
        beside = [figures[f"{work}-vs-{p.name}"] for p in PEERS if f"{work}-vs-{p.name}" in figures]
        if beside:
            works[work] = beside[0].work
    if not works:
        return []
    lines = [
        SAID,
        "",
        f"| | {' | '.join(peer.title for peer in PEERS)} |",
        "|---" * (1 + len(PEERS)) + "|",
    ]
    for work, title in works.items():
        cells = [_cell(figures.get(f"{work}-vs-{p.name}"), work, p, report) for p in PEERS]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _cell(figure: Figure | None, work: str, peer: Peer, report: Report) -> str:
    if figure is None:
        absent = "left out" if peer.title in report.left_out else "not in this run"
        return peer.does_not.get(DONE_BY[work], absent)
    ratio = write(statistics.median(figure.ratios), "×")
    if figure.is_undecided:
        return f"{ratio}, not decided"
    return f"**{ratio}**" if figure.other_wins else ratio
