"""Checks of what a program gives: what was given and what is allowed, said alike everywhere."""

from __future__ import annotations

import re
from typing import Final, TypeGuard

_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# The files of TLS may be shown; whatever else has a name may be a token or a password.
_OPTION: Final = re.compile(r"([?&](?!(?:ca|cert|key)=)[^=&#]*=)[^&#]*")


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is an int or a float; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_number(what: str, value: object, low: float, high: float) -> None:
    """Raise ValueError unless it is an int or float from ``low`` to ``high``."""
    if not is_number(value) or not low <= value <= high:
        raise ValueError(f"{what} {value!r}: a number from {low} to {high} is wanted")


def masked(url: str) -> str:
    """The URL as it may be shown, whatever is wrong with it: without what stands before an ``@``.

    It is not parsed, since a mistyped one has its password in another place.
    """
    scheme = _SCHEME.match(url)
    start = scheme.end() if scheme else 0
    _, at, place = url[start:].rpartition("@")
    return _OPTION.sub(r"\1***", f"{url[:start]}***@{place}" if at else url)
