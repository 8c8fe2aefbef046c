"""Holder: who has a name of the cluster."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Holder:
    """Who holds a name, as the registry has it.

    :ivar id: its machine id.
    :ivar name: the name of its node.
    :ivar value: what it has put there.
    :ivar epoch: larger than that of every earlier holder of the name.
    """

    id: int
    name: str
    value: bytes
    epoch: int
