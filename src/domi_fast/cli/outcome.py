"""How a command ends: the exit codes that scripts may rely on, and the one line that says why."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DeadlineExceeded, DomiError, NoSubscriber, RegistryError, RemoteError

OK = 0
FAILED = 1
USAGE = 2
UNREACHABLE = 3
NOT_FOUND = 4
TIMEOUT = 5
INTERRUPTED = 130

MEANINGS = {
    OK: "done",
    FAILED: "the operation failed",
    USAGE: "the command line is wrong",
    UNREACHABLE: "the registry, the cluster or the node cannot be reached",
    NOT_FOUND: "no such node, or nobody subscribes to the channel",
    TIMEOUT: "not done in time",
    INTERRUPTED: "interrupted by Ctrl-C",
}


class Failure(Exception):
    """Why a command ends: an exit code, and what was given, what is allowed, what to do."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


@contextmanager
def explained() -> Iterator[None]:
    """Make a :class:`Failure` of what the library raises."""
    try:
        yield
    except NoSubscriber as error:
        raise Failure(NOT_FOUND, str(error)) from error
    except (DeadlineExceeded, asyncio.TimeoutError) as error:
        raise Failure(TIMEOUT, str(error) or "it was not done in time") from error
    except RegistryError as error:
        raise Failure(UNREACHABLE, str(error)) from error
    except RemoteError as error:
        raise Failure(FAILED, f"the handler failed: {error}") from error
    except DomiError as error:
        raise Failure(FAILED, str(error)) from error
