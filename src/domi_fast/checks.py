"""Checks of what a program gives: what was given and what is allowed, said alike everywhere."""

from __future__ import annotations

from typing import TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is an int or a float; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_number(what: str, value: object, low: float, high: float) -> None:
    """Raise ValueError unless it is an int or float from ``low`` to ``high``."""
    if not is_number(value) or not low <= value <= high:
        raise ValueError(f"{what} {value!r}: a number from {low} to {high} is wanted")
