"""How Ray is begun and joined: quietly, and for this machine alone."""

from __future__ import annotations

import logging
import os
from typing import Any

# Nobody else shall reach the cluster, hence it has addresses of the loopback device: on Linux Ray
# has them only where clusters of several machines are off. Then it wants no token, either, which it
# would leave in the user's home.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "disabled",
}

__all__ = ["join"]


def join(**more: Any) -> Any:
    """The module ``ray``, once a cluster was begun or, with an ``address``, joined."""
    os.environ.update(ENVIRONMENT)
    import ray

    ray.init(namespace="bench", logging_level=logging.ERROR, log_to_driver=False, **more)
    return ray
