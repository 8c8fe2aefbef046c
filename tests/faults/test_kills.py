"""Nodes of a cluster of nine are killed with SIGKILL under load, at random: nothing is mixed up.

Each process has one node (tests/faults/ninth.py), which asks and notifies the others without a
pause. Who is killed is replaced at once by a new incarnation, and may be killed again while it
joins. Three are spared, so that there are survivors of all kills. After each round of kills the
load rests for a moment, and all accounts are compared.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SOAK
from tests.faults.ninth import Journal
from tests.support import Worker, until_now

NODES, SPARED = 9, 3
LOOPS = ["asyncio", "uvloop"]
ROUNDS, KILLS = (10, 10) if SOAK else (2, 3)
# Bytes that a process may have more at the end than after the first round.
GROWTH = 1 << 20
SLOW_BUILD = any(os.environ.get(f"DOMI_{name}") == "1" for name in ("DEBUG", "SANITIZE"))
# Seconds for any one step; what takes so long on a busy machine is not the library.
PATIENCE = 60.0


class Incarnation(Worker):
    """One process and its node, from its start until it is killed."""

    def __init__(self, number: int, loop: str, journal: Path, seed: int, **settings: Any) -> None:
        super().__init__(loop, "tests.faults.ninth")
        self.number = number
        self.name = str(number)
        self.loop = loop
        self.starting = True
        self.tell("start", incarnation=number, seed=seed, journal=str(journal), **settings)

    def started(self) -> None:
        if self.starting:
            self.answer(PATIENCE)
            self.starting = False

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


class Nine:
    """The cluster: who is alive, and the last report of each that ever made one."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.settings = {"registry": f"sqlite://{directory}/registry", "lease_ttl": 1.0}
        self.chance = random.Random(seed)
        self.killed = 0
        self.alive: list[Incarnation] = []
        self.journals: dict[int, Journal] = {}
        self.reports: dict[int, dict[str, Any]] = {}

    def bear(self, loop: str) -> Incarnation:
        number = len(self.journals) + 1
        path = self.directory / f"journal-{number}"
        self.journals[number] = Journal(path)
        return Incarnation(number, loop, path, self.chance.randrange(1 << 32), **self.settings)

    def kill_one(self) -> None:
        place = self.chance.randrange(SPARED, NODES)
        victim = self.alive[place]
        victim.kill()
        self.alive[place] = self.bear(victim.loop)
        self.killed += 1
        victim.reap()

    def all(self, command: str, **arguments: Any) -> list[Any]:
        """The answers of all, who do it at the same time."""
        for each in self.alive:
            each.tell(command, **arguments)
        return [each.answer(PATIENCE) for each in self.alive]

    def settle(self) -> None:
        """Wait until all have found each other."""
        for each in self.alive:
            each.started()
        names = {each.name for each in self.alive}
        for each in self.alive:
            each.tell("wait_others", names=sorted(names - {each.name}), timeout=PATIENCE)
        for each in self.alive:
            each.answer(PATIENCE)

    def rest(self) -> None:
        """Have all report, with nothing under way."""
        self.all("quiet")
        self.reports.update(
            zip([each.number for each in self.alive], self.all("report"), strict=True)
        )

    def descriptors(self, loop: str) -> set[int]:
        return {each.descriptors() for each in self.alive if each.loop == loop}

    def level_descriptors(self, loop: str) -> set[int]:
        """The number that all processes of this loop have, once it is the same."""
        until_now(lambda: len(self.descriptors(loop)) == 1)
        return self.descriptors(loop)

    # -------------------------------------------------------------------------------- the accounts

    def check(self) -> int:
        """Everything adds up; how many sessions between the living were ever lost."""
        for each in self.alive:
            check_report(each.name, self.reports[each.number])
        lost = 0
        for one, other in permutations(self.journals, 2):
            sent = self.journals[one].sent[other]
            received = self.journals[other].received[one]
            told = self.reports.get(one, {"told": {}})["told"].get(str(other), 0)
            # Also of who is dead: what came was sent, and nothing that was told lost has come.
            assert received + told <= sent, (one, other)
        for journal in self.journals.values():
            assert journal.faults[0] == 0
        names = {each.name for each in self.alive}
        for each in self.alive:
            report, journal = self.reports[each.number], self.journals[each.number]
            for name, joined in report["joined"].items():
                assert joined - report["left"].get(name, 0) == (name in names), (each.name, name)
                # A gap is where a session was lost; who died without one has left none.
                if joined == 1 and not report["moved"]:
                    other = int(name)
                    assert journal.received[other] == journal.last[other], (each.name, name)
        for one, other in permutations([each.number for each in self.alive], 2):
            sender, receiver = self.reports[one], self.reports[other]
            if str(other) in sender["left"] or str(one) in receiver["left"]:
                # Only for the loss of a lease, to which a machine with other work may come.
                assert sender["moved"] or receiver["moved"], (one, other, sender["reasons"])
                lost += 1
            else:
                sent = self.journals[one].sent[other]
                told = sender["told"].get(str(other), 0)
                assert (self.journals[other].received[one], told) == (sent, 0), (one, other)
        return lost // 2

    def sum_up(self) -> str:
        """Of all that have ever lived, where they have said it; for people."""
        outcomes: Counter[str] = Counter()
        told = 0
        for report in self.reports.values():
            outcomes.update(report["outcomes"])
            told += sum(report["told"].values())
        sent = sum(sum(journal.sent) for journal in self.journals.values())
        received = sum(sum(journal.received) for journal in self.journals.values())
        return (
            f"{self.killed} kills; {sum(outcomes.values())} requests: {dict(outcomes)}; "
            f"{sent} notifies: {received} received, {told} told lost, "
            f"{sent - received - told} gone with who was killed"
        )


@contextmanager
def nine(directory: Path, seed: int) -> Iterator[Nine]:
    cluster = Nine(directory, seed)
    try:
        for number in range(NODES):
            cluster.alive.append(cluster.bear(LOOPS[number % 2]))
        cluster.settle()
        yield cluster
    finally:
        for each in cluster.alive:
            each.reap()


def check_report(name: str, report: dict[str, Any]) -> None:
    """What one process says of itself adds up."""
    assert (report["wrong"], report["problems"]) == ({}, [])
    outcomes = report["outcomes"]
    assert set(outcomes) <= {"answer", "PeerLost"}
    assert sum(outcomes.values()) == report["asked"]
    assert (report["open"], report["in_flight"], report["late_answers"]) == (0, 0, 0)
    assert report["handler_errors"] == 0
    # Nothing is lost but what concerns those that it has lost; itself, when its id went to another.
    lost = set(report["left"]) | ({name} if report["moved"] else set())
    assert set(report["lost_by"]) - {"0"} <= lost
    assert set(report["unanswered"]) <= lost
    assert set(report["told"]) <= lost
    assert set(report["refused"]) <= {"PeerLost"}


@pytest.mark.timeout(3600 if SOAK else 240)
def test_nine_nodes_that_are_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Outcomes add up, order holds, nothing doubles, and the survivors grow by nothing."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    descriptors: dict[str, set[int]] = {}
    memory: dict[int, int] = {}
    lost = 0
    with nine(tmp_path, seed) as cluster:
        spared = cluster.alive[:SPARED]
        for _ in range(ROUNDS):
            for _ in range(KILLS):
                # Some die together, and some while they start.
                count = cluster.chance.choice([0, cluster.chance.randrange(300)])
                spared[0].ask("wait_answers", wait=PATIENCE, count=count, timeout=PATIENCE)
                cluster.kill_one()
            cluster.settle()
            spared[0].ask("wait_answers", wait=PATIENCE, count=100, timeout=PATIENCE)
            cluster.rest()
            lost = cluster.check()
            # Of one loop, the oldest has as many as the youngest, and as many as at first.
            for loop in LOOPS:
                if loop not in descriptors:
                    descriptors[loop] = cluster.level_descriptors(loop)
                until_now(lambda loop=loop: cluster.descriptors(loop) == descriptors[loop])
            for each in spared:
                memory.setdefault(each.number, cluster.reports[each.number]["memory"])
            cluster.all("go_on")
    grown = [cluster.reports[number]["memory"] - first for number, first in memory.items()]
    with capsys.disabled():
        print(
            f"\n{cluster.sum_up()}; {lost} sessions of survivors lost; descriptors {descriptors}, "
            f"memory grown by {max(grown) >> 10} KiB at most"
        )
    assert cluster.killed == ROUNDS * KILLS
    # The kills were felt.
    assert sum(report["outcomes"].get("PeerLost", 0) for report in cluster.reports.values())
    if not SLOW_BUILD:
        assert max(grown) <= GROWTH
