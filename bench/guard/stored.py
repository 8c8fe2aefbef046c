"""What the paths may cost: the figures in ``stored.json``, and a count held against them.

The figures are those of one environment, and of another they say nothing: another compiler, or
other headers of Python, make other instructions of the same source.

Each figure has a seal over itself, its reason, its environment and its path: one that was changed
by hand, and would keep the reason of another, is not read.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sysconfig
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

from bench import compiler
from bench.guard.measure import Count

FILE = Path(__file__).with_name("stored.json")
TOLERANCE = 0.05

GREW, SHRANK, KEPT, MISSING = "grew", "shrank", "", "no stored figure"

__all__ = [
    "FILE",
    "GREW",
    "KEPT",
    "MISSING",
    "SHRANK",
    "TOLERANCE",
    "Comparison",
    "Edited",
    "Figure",
    "Stored",
    "environment",
    "read",
    "updated",
    "write",
]


@dataclass(frozen=True)
class Figure:
    """What an operation is allowed to cost, as :class:`~bench.guard.measure.Count` has it.

    :ivar cython: what had made C of the core; not a part of the environment, for what it makes
        dearer is dearer for users as well.
    :ivar reason: why the figure is what it is.
    """

    instructions: float
    calls: float
    cython: str
    reason: str

    def seal(self, place: str, name: str) -> str:
        """Of this environment and path."""
        sealed = json.dumps([place, name, asdict(self)])
        return hashlib.blake2b(sealed.encode(), digest_size=8).hexdigest()


KEYS = {field.name for field in fields(Figure)}
Figures = dict[str, Figure]  # by the name of the path


class Edited(Exception):
    """A figure or a reason is not what was stored."""


@dataclass(frozen=True)
class Stored:
    """What stands in the file.

    :ivar figures: of each environment, those that are as they were stored.
    :ivar edited: by environment and path, the reasons beside those that are not.
    """

    figures: dict[str, Figures]
    edited: dict[tuple[str, str], str]

    def reasons(self, place: str) -> dict[str, str]:
        """Beside each figure of the environment, edited or not."""
        edited = {name: reason for (of, name), reason in self.edited.items() if of == place}
        return edited | {name: each.reason for name, each in self.figures.get(place, {}).items()}


@dataclass(frozen=True)
class Comparison:
    """A path's count beside its figure; None where there is none for this environment."""

    name: str
    now: Count
    stored: Figure | None

    @property
    def changes(self) -> tuple[float, ...]:
        """Of the instructions and of the calls: 0.05 is five per cent more.

        Of less than one call it is five per cent of one: in a batch, some are made only once.
        """
        if self.stored is None:
            return ()
        return (
            self.now.instructions / self.stored.instructions - 1.0,
            (self.now.calls - self.stored.calls) / max(self.stored.calls, 1.0),
        )

    @property
    def verdict(self) -> str:
        if self.stored is None:
            return MISSING
        if max(self.changes) > TOLERANCE:
            return GREW
        return SHRANK if min(self.changes) < -TOLERANCE else KEPT


def environment(core: str) -> str:
    """What decides which instructions are made of the core's source, in words."""
    flags = re.findall(
        r"(?<!\S)-(?![a-z]+-prefix-map)[fmO]\S+", sysconfig.get_config_var("CFLAGS") or ""
    )
    return ", ".join(
        [
            platform.machine(),
            f"{platform.python_implementation()} {'.'.join(platform.python_version_tuple()[:2])}",
            compiler.names_in(Path(core).read_bytes()),
            " ".join(dict.fromkeys(flags)),
        ]
    )


def cython() -> str:
    try:
        return metadata.version("Cython")
    except metadata.PackageNotFoundError:
        return "unknown"


def read(path: Path, anew: Collection[tuple[str, str]] = ()) -> Stored:
    """Raises Edited.

    :param anew: environments and paths that may have been edited: they are about to be stored.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    found = Stored({place: {} for place in document}, {})
    for place, entries in document.items():
        for name, entry in entries.items():
            seal = entry.pop("seal", None)
            if entry.keys() == KEYS and Figure(**entry).seal(place, name) == seal:
                found.figures[place][name] = Figure(**entry)
            elif (place, name) in anew:
                found.edited[place, name] = str(entry.get("reason"))
            else:
                raise Edited(
                    f"{path.name}: {name} was not stored as it stands there, of {place}. A figure "
                    "changes together with its reason: take the change back, or store it there: "
                    f'python -m bench.guard --only {name} --store "..."'
                )
    return found


def write(stored: Mapping[str, Figures], path: Path) -> None:
    document = {
        place: {
            name: {**asdict(figure), "seal": figure.seal(place, name)}
            for name, figure in figures.items()
        }
        for place, figures in stored.items()
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def updated(
    figures: Mapping[str, Figure], compared: Iterable[Comparison], reason: str, *, every: bool
) -> Figures:
    """The figures with the counts in the place of those that they are too far from.

    One that is near enough stays, with its reason: many small growths would otherwise pass as none.

    :param every: those that are near enough too.
    """
    fresh = {
        each.name: Figure(
            round(each.now.instructions, 1), round(each.now.calls, 2), cython(), reason
        )
        for each in compared
        if every or each.verdict != KEPT
    }
    return {**figures, **fresh}
