"""How many descriptors this process may have."""

from __future__ import annotations

import resource
from typing import Final

UNLIMITED: Final = 1 << 20
"""As many as are taken for where nothing limits them."""


def most_descriptors() -> int:
    """How many this process may have at present."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft
