"""What is measured: a figure, its rounds, its anchor and its target; and how it is written."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["LEAST_FOR_P999", "Figure", "Target", "spread", "tick", "write"]


@dataclass(frozen=True)
class Target:
    """What a figure is to be.

    :ivar of: whose median over the rounds is judged: the ``value``, its ``ratio`` to the anchor's,
        or the ``tail``, which is what the p99 is to the p50.
    """

    of: str
    bound: float
    at_most: bool

    def judged(self, figure: Figure) -> list[float]:
        """Of each round, what is held against the bound."""
        if self.of == "value":
            return figure.judged
        return figure.tails if self.of == "tail" else figure.ratios

    def is_met(self, figure: Figure) -> bool:
        measured = statistics.median(self.judged(figure))
        return measured <= self.bound if self.at_most else measured >= self.bound


@dataclass
class Figure:
    """One line of the table. Times are in seconds, sizes in bytes.

    :ivar unit: of the values: ``s``, ``/s``, ``B/s`` or ``B``.
    :ivar values: a round's p50, or its rate.
    :ivar p99: a round's, where it has several measurements; ``p999`` where it has 1,000 of them.
    :ivar by: which of them is compared with the anchor, and with the target: ``p50`` or ``p99``.
    :ivar anchor: what the anchor is; ``anchor_values`` stand beside ``values``, round by round, and
        its p99 and p99.9 beside theirs.
    :ivar anchor_is_ours: it is domi_fast, too, under other circumstances: nobody who could win.
    :ivar remark: a sentence of what else there is to know of this run.
    :ivar void: why the target cannot be judged by this run, if so.
    :ivar samples: how many single measurements a round has, where that is what it has.
    :ivar level: what is measured: single operations, one process, or several.
    :ivar detail: more of it; a ``curve`` has ``x``, ``y``, ``x_title`` and ``y_title``.
    """

    name: str
    title: str
    unit: str
    values: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    p999: list[float] = field(default_factory=list)
    by: str = "p50"
    samples: int = 0
    anchor: str = ""
    anchor_values: list[float] = field(default_factory=list)
    anchor_p99: list[float] = field(default_factory=list)
    anchor_p999: list[float] = field(default_factory=list)
    anchor_is_ours: bool = False
    target: Target | None = None
    remark: str = ""
    void: str = ""
    level: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, list[float]]:
        """Ours, as far as there are any, by what they are of."""
        return _present(self.values, self.p99, self.p999)

    @property
    def anchor_columns(self) -> dict[str, list[float]]:
        return _present(self.anchor_values, self.anchor_p99, self.anchor_p999)

    @property
    def judged(self) -> list[float]:
        """Of each round, what is compared."""
        return self.columns.get(self.by, [])

    @property
    def ratios(self) -> list[float]:
        """To the anchor of the same round."""
        anchors = self.anchor_columns.get(self.by, [])
        if not anchors:
            return []
        return [value / anchor for value, anchor in zip(self.judged, anchors, strict=True)]

    @property
    def tails(self) -> list[float]:
        """What the p99 is to the p50 of the same round."""
        return [p99 / p50 for p99, p50 in zip(self.p99, self.values, strict=True)]

    @property
    def is_met(self) -> bool | None:
        """None without a target, or where this run cannot tell."""
        if self.target is None or self.void or not self.target.judged(self):
            return None
        return self.target.is_met(self)

    @property
    def work(self) -> str:
        """The title without whom it is beside, which is said apart."""
        return self.title.removesuffix(f", beside {self.anchor}")

    @property
    def is_compared(self) -> bool:
        """With what somebody else has made."""
        return bool(self.anchor_values) and not self.anchor_is_ours

    @property
    def less_is_better(self) -> bool:
        return self.unit in ("s", "B")

    @property
    def other_wins(self) -> bool:
        """In every round."""
        return self.is_compared and all(map(self.is_lost_at, self.ratios))

    @property
    def is_undecided(self) -> bool:
        """The other wins in some rounds, and not in all."""
        return self.is_compared and len(set(map(self.is_lost_at, self.ratios))) == 2

    def is_lost_at(self, ratio: float) -> bool:
        """Whether that is the worse side of 1."""
        return ratio > 1.0 if self.less_is_better else ratio < 1.0

    def add_percentiles(self, measured: dict[str, Any]) -> None:
        """A round of them, in nanoseconds."""
        _append(measured, self.values, self.p99, self.p999)
        self.samples = measured["count"]

    def add_anchor_percentiles(self, measured: dict[str, Any]) -> None:
        _append(measured, self.anchor_values, self.anchor_p99, self.anchor_p999)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratios": self.ratios, "met": self.is_met}

    @classmethod
    def from_json(cls, read: dict[str, Any]) -> Figure:
        """Of an older run, too, which lacks what has been added since."""
        fields = {name: read[name] for name in cls.__dataclass_fields__ if name in read}
        if fields["target"] is not None:
            fields["target"] = Target(**fields["target"])
        return cls(**fields)

    def measured(self) -> str:
        """p50 / p99 / p99.9, or a rate or size: each the median over the rounds."""
        return self._written(self.columns)

    def spread(self) -> str:
        """Lowest and highest of the rounds, with the median between, of what is compared."""
        return spread(self.judged, self.unit) if self.judged else ""

    def anchored(self) -> str:
        columns = self.anchor_columns
        return f"{self.anchor}: {self._written(columns)}" if columns else ""

    def _written(self, columns: dict[str, list[float]]) -> str:
        return " / ".join(write(statistics.median(each), self.unit) for each in columns.values())

    def ratio(self) -> str:
        """The median of the rounds' ratios, with the lowest and the highest."""
        ratios = self.tails if self.target and self.target.of == "tail" else self.ratios
        if not ratios:
            return ""
        lowest, middle, highest = map(
            _digits, (min(ratios), statistics.median(ratios), max(ratios))
        )
        return f"{middle}× ({lowest}–{highest})"

    def wanted(self) -> str:
        target = self.target
        if target is None:
            return ""
        bound = write(target.bound, self.unit) if target.of == "value" else f"{target.bound:.3g}×"
        return f"{'≤' if target.at_most else '≥'} {bound}{' the p50' * (target.of == 'tail')}"


# Of fewer single measurements it is nothing but the longest.
LEAST_FOR_P999 = 1000


def _append(
    measured: dict[str, Any], p50: list[float], p99: list[float], p999: list[float]
) -> None:
    p50.append(measured["p50_ns"] * 1e-9)
    p99.append(measured["p99_ns"] * 1e-9)
    if measured["count"] >= LEAST_FOR_P999:
        p999.append(measured["p999_ns"] * 1e-9)


def _present(p50: list[float], p99: list[float], p999: list[float]) -> dict[str, list[float]]:
    columns = {"p50": p50, "p99": p99, "p99.9": p999}
    return {of: rounds for of, rounds in columns.items() if rounds}


SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")),
    "/s": ((1e6, "M/s"), (1e3, "k/s"), (1.0, "/s")),
    "B": ((2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
    "B/s": ((1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s"), (1.0, "B/s")),
    "×": ((1.0, "×"),),
}


def spread(values: Sequence[float], unit: str) -> str:
    """Lowest, median and highest in the unit that suits the median."""
    middle = statistics.median(values)
    scale, name = _scale(middle, unit)
    ends = (min(values), middle, max(values))
    return "–".join(_digits(value / scale) for value in ends) + f" {name}"


def write(value: float, unit: str) -> str:
    """For people: three digits or so, and a unit that suits them."""
    scale, name = _scale(value, unit)
    return f"{_digits(value / scale)}{_after(name)}"


def tick(value: float, unit: str) -> str:
    """A round number beside an axis."""
    scale, name = _scale(value, unit)
    return f"{value / scale:g}{_after(name)}" if value else "0"


def _scale(value: float, unit: str) -> tuple[float, str]:
    scales = SCALES[unit]
    # 1e-6 may have come out of a multiplication as a little less.
    return next((pair for pair in scales if abs(value) >= pair[0] * (1 - 1e-9)), scales[-1])


def _after(name: str) -> str:
    return name if name == "×" else f" {name}"


def _digits(value: float) -> str:
    if 0.0 < abs(value) < 0.1:
        return f"{value:.2g}"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
