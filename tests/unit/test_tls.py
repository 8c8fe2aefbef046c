"""The settings of TLS: which files are good, and what is said of those that are not."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from domi_fast import DomiError, Node, Tls, connect
from domi_fast.config import GuestConfig, NodeConfig
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
    with pytest.raises(TypeError, match="key 5: the path of a PEM file"):
        Tls("a", 5, "b")  # type: ignore[arg-type]
    for path in ("", "a\0b"):
        with pytest.raises(ValueError, match=r"authority '.*': the path of a PEM file"):
            Tls("a", "b", path)


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
