"""No log line and no error of the whole run has a secret in it: these tests are the last to run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from domi_fast import DomiError, NodeConfig, PeerLost, RegistryError, connect
from domi_fast.registry import open_registry
from tests.certificates import Authority
from tests.overheard import EAR, Ear
from tests.support import forget_records, nodes

OURS, THEIRS = "the secret of the last of the tests", b"another, with \x00 and \xff in it"
PASSWORD = "the-password-of-the-last-of-the-tests"
TOKEN = "the-token-of-the-last-of-the-tests"
PLANTED = b"a planted secret \x80\xff"

log = logging.getLogger("domi_fast.mesh")


async def test_secrets_are_used(
    registry_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rightly and wrongly, also where nothing but this file is run."""
    authority = Authority(tmp_path)
    stranger = Authority(tmp_path / "stranger").issue("a")
    right: dict[str, Any]
    wrong: dict[str, Any]
    for right in ({"secret": OURS}, {"secret": OURS, "tls": authority.issue("a")}):
        async with nodes(registry_url, "a", http_port=0, admin_token=TOKEN, **right) as (a,):
            url = f"tcp://127.0.0.1:{a.port}"
            async with await connect(url, **right):
                pass
            for wrong in ({}, {"secret": THEIRS}, {"secret": OURS, "tls": stranger}):
                with pytest.raises(PeerLost):
                    await connect(url, **wrong)
            assert a.counters()["protocol_errors"] >= 2
    for url in (f"etcd://me:{PASSWORD}@one", f"ectd://me:{PASSWORD}@one"):
        with contextlib.suppress(RegistryError):
            log.warning("%r %r", NodeConfig("a", registry=url), open_registry(url).url)
    forget_records(caplog)


@pytest.mark.parametrize(
    "say",
    [
        lambda: log.warning("%r", PLANTED),
        lambda: log.warning("so", extra={"domi_fact": PLANTED.hex()}),
        lambda: log.error("so", exc_info=ValueError(PLANTED.decode(errors="replace"))),
        lambda: DomiError("YSBwbGFudGVkIHNlY3JldCCA/w"),
        lambda: PeerLost("it said YSBwbGFudGVkIHNlY3JldCCA_w==", peer=1),
    ],
)
def test_what_is_said_is_heard(say: Callable[[], object], caplog: pytest.LogCaptureFixture) -> None:
    ear = Ear()
    with ear.listening():
        log.warning("nothing of it")
        assert ear.leaks() == []
        ear.learn(PLANTED, "a planted secret")
        say()
        (leak,) = set(ear.leaks())
        assert leak.startswith("a planted secret, said by tests/test_secrecy.py::test_what_is_said")
    say()
    assert len(set(ear.leaks())) == 1
    forget_records(caplog)


def test_no_secret_was_said() -> None:
    """In the log and the errors of this process, and on the standard error of the commands."""
    kinds = {"a cluster's secret", "an admin token", "a key", "a registry's password"}
    assert kinds <= set(EAR.secrets.values())
    assert "it does not know the secret of this cluster" in EAR.said
    assert EAR.leaks() == []
