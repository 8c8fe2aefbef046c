"""The settings of TLS: which files are good, and what is said of those that are not."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from domi_fast import DomiError, Node, Tls, connect
from domi_fast.config import GuestConfig, NodeConfig
from domi_fast.tls import Certificates
from tests.certificates import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


def made(tls: Any, name: str = "node") -> Node:
    return Node(name, registry="memory://tls", tls=tls)


def test_paths_are_absolute_and_of_any_kind(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = authority.issue("node")
    monkeypatch.chdir(tmp_path)
    relative = Tls(
        Path(given.certificate).relative_to(tmp_path),
        str(Path(given.key).relative_to(tmp_path)),
        Path(given.authority).relative_to(tmp_path),
    )
    assert relative == given
    made(relative)


@pytest.mark.parametrize("field", ["certificate", "key", "authority"])
def test_each_file_has_to_be_there_and_to_be_pem(authority: Authority, field: str) -> None:
    tls = authority.issue("node")
    path = Path(getattr(tls, field))
    path.write_bytes(b"no PEM at all")
    with pytest.raises(DomiError, match=str(path)):
        made(tls)
    path.unlink()
    with pytest.raises(DomiError, match=rf"{path}.*No such file"):
        made(tls)


def test_a_path_is_wanted() -> None:
    with pytest.raises(TypeError, match="key of type int: the path of a PEM file"):
        Tls("a", 5, "b")  # type: ignore[arg-type]
    for path in ("", "a\0b"):
        with pytest.raises(ValueError, match=r"authority .*: the path of a PEM file"):
            Tls("a", "b", path)


@pytest.mark.parametrize("field", ["certificate", "key", "authority"])
@pytest.mark.parametrize("kind", [str, str.encode, Path, lambda text: text.replace("\n", " ")])
def test_what_is_in_a_file_is_no_path(
    authority: Authority, field: str, kind: Callable[[str], Any]
) -> None:
    """The usual mistake: nothing of it is repeated."""
    text = Path(authority.issue("node").key).read_text()
    paths = dict.fromkeys(("certificate", "key", "authority"), "/a.pem")
    with pytest.raises((TypeError, ValueError), match=f"{field} of .*: the path of a") as refused:
        Tls(**{**paths, field: kind(text)})
    assert "-----" not in str(refused.value)
    assert text.splitlines()[1] not in str(refused.value)


@pytest.mark.parametrize("config", [lambda **given: NodeConfig("a", **given), GuestConfig])
@pytest.mark.parametrize("kind", [str, str.encode, lambda text: ("a.pem", text, "b.pem")])
def test_what_is_in_a_file_is_no_tls(
    authority: Authority, config: Callable[..., object], kind: Callable[[str], Any]
) -> None:
    text = Path(authority.issue("node").key).read_text()
    with pytest.raises(TypeError, match=r"tls of type \w+: Tls is wanted") as refused:
        config(tls=kind(text))
    assert text.splitlines()[1] not in str(refused.value)


@pytest.mark.parametrize("tls", [True, "node.pem", ("a", "b", "c"), {"certificate": "a"}])
def test_nothing_but_tls_is_taken(tls: Any) -> None:
    with pytest.raises(TypeError, match="Tls is wanted"):
        NodeConfig("node", tls=tls)
    with pytest.raises(TypeError, match="Tls is wanted"):
        GuestConfig(tls=tls)


def test_a_key_of_another_certificate(authority: Authority) -> None:
    one, other = authority.issue("node"), authority.issue("node")
    with pytest.raises(DomiError, match="key values mismatch"):
        made(Tls(one.certificate, other.key, one.authority))
    with pytest.raises(DomiError, match="it is not PEM, or not of the kind"):
        made(Tls(one.key, one.certificate, one.authority))


def test_a_key_with_a_password(authority: Authority) -> None:
    """Nobody at a terminal is asked for it."""
    tls = authority.issue("node")
    encrypted = f"{tls.key}.encrypted"
    subprocess.run(
        ["openssl", "ec", "-in", tls.key, "-out", encrypted, "-aes256", "-passout", "pass:hush"],
        check=True,
        capture_output=True,
    )
    with pytest.raises(DomiError, match="encrypted"):
        made(Tls(tls.certificate, encrypted, tls.authority))


def test_a_certificate_that_others_would_refuse(tmp_path: Path, authority: Authority) -> None:
    over = authority.issue("node", days=-1)
    with pytest.raises(DomiError, match="expired"):
        made(over)
    foreign = Authority(tmp_path / "foreign").issue("node")
    with pytest.raises(DomiError, match=r"would be refused.*issuer"):
        made(Tls(foreign.certificate, foreign.key, str(authority.file)))


def test_the_certificate_is_for_the_nodes_name(authority: Authority) -> None:
    with pytest.raises(DomiError, match=r"for 'other', 'third', and this node is 'node'"):
        made(authority.issue("other", "third"))
    made(authority.issue("third", "node"))
    made(authority.issue("node"), "NODE")
    with pytest.raises(DomiError, match="this node is '\u212aafka'"):
        made(authority.issue("kafka"), "\u212aafka")  # a Kelvin sign, which is a k in lower case


async def test_a_guest_is_told_of_its_files(authority: Authority) -> None:
    tls = authority.issue("tool")
    Path(tls.key).unlink()
    with pytest.raises(DomiError, match="No such file"):
        await connect("tcp://127.0.0.1:1", tls=tls)


def test_with_it_a_node_may_listen_anywhere(authority: Authority) -> None:
    NodeConfig("node", host="0.0.0.0", tls=authority.issue("node"))
    with pytest.raises(DomiError, match="secret= or tls="):
        NodeConfig("node", host="0.0.0.0")


# -------------------------------------------------------------------------------- files that change


@contextlib.contextmanager
def no_descriptor() -> Iterator[None]:
    """A stretch in which this process gets no descriptor more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull, "rb") as lowest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno(), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_files_that_could_not_be_read_are_tried_again(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without another touch of them; once a second, with one warning, however many connect."""
    clock = [100.0]
    monkeypatch.setattr("domi_fast.tls.time", SimpleNamespace(monotonic=lambda: clock[0]))
    tls = authority.issue("node")
    certificates = Certificates(tls, "node")
    before = certificates.server()
    authority.write(tls, "node")
    reads = counted_reads(certificates, monkeypatch)
    with no_descriptor():
        for clock[0] in (100.0, 100.5, 101.0, 101.9, 102.1):
            assert certificates.server() is before
            assert certificates.client() is not None
    assert len(reads) == 3
    (told,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "Too many open files" in told
    clock[0] = 103.2
    after = certificates.server()
    assert after is not before
    assert certificates.server() is after
    assert len(reads) == 4


def counted_reads(certificates: Any, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One for each time that the files are read."""
    reads: list[None] = []
    read = certificates._read

    def counted() -> object:
        reads.append(None)
        return read()

    monkeypatch.setattr(certificates, "_read", counted)
    return reads


def test_files_that_change_once_more_are_read_at_once(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the certificate comes first and then its key: each such state is warned of once."""
    tls, other = authority.issue("node"), authority.issue("node")
    certificates = Certificates(tls, "node")
    before = certificates.server()
    shutil.copy(other.certificate, tls.certificate)
    assert certificates.server() is before
    Path(tls.key).write_bytes(b"half of it")
    assert certificates.server() is before
    warned = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 2
    shutil.copy(other.key, tls.key)
    assert certificates.server() is not before


def test_who_may_read_them_is_a_change_too(authority: Authority) -> None:
    """It changes neither the size nor the time of what is written in a file."""
    tls = authority.issue("node")
    certificates = Certificates(tls, "node")
    before = certificates.server()
    os.chmod(tls.key, 0o640)
    after = certificates.server()
    assert after is not before
    assert certificates.server() is after
