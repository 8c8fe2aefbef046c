"""Settings: what is allowed, and what is said of everything else."""

from __future__ import annotations

import functools
import re
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from domi_fast import (
    DomiError,
    Node,
    NodeConfig,
    RegistryError,
    Serial,
    SerialConfig,
    connect,
)
from tests.support import echo, forget_records, nodes

MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


async def awaited(error: DomiError, frame: Any) -> None:
    """Nobody awaits it."""


class Awaited:
    async def __call__(self, error: DomiError, frame: Any) -> None:
        """Nobody awaits it."""


# ----------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("name", ""),
        ("name", "x" * 256),
        ("name", b"bytes"),
        ("version", "one"),
        ("version", ""),
        ("version", None),
        ("cluster", ""),
        ("cluster", "a/b"),
        ("cluster", "x" * 65),
        ("cluster", None),
        ("host", ""),
        ("host", None),
        ("host", "0.0.0.0"),
        ("host", "::"),
        ("host", "192.168.1.1"),
        ("host", "example.com"),
        ("port", -1),
        ("port", 65536),
        ("port", "80"),
        ("port", 1.5),
        ("port", None),
        ("unix_path", "/tmp/" + "x" * 103),
        ("unix_path", 5),
        ("heartbeat_interval", 0.05),
        ("heartbeat_interval", 0),
        ("heartbeat_interval", float("nan")),
        ("heartbeat_interval", "5"),
        ("heartbeat_interval", 3601),
        ("heartbeat_interval", 10.0),
        ("heartbeat_timeout", 5.0),
        ("heartbeat_timeout", 1.0),
        ("heartbeat_timeout", 86401),
        ("heartbeat_timeout", None),
        ("phi_threshold", 0.5),
        ("phi_threshold", 101),
        ("phi_threshold", "8"),
        ("phi_threshold", float("nan")),
        ("handshake_timeout", 0),
        ("handshake_timeout", 61),
        ("request_timeout", 0),
        ("request_timeout", -1),
        ("request_timeout", float("inf")),
        ("request_timeout", None),
        ("start_timeout", -0.1),
        ("start_timeout", float("nan")),
        ("drain_timeout", -1),
        ("lease_ttl", 0.05),
        ("lease_ttl", float("inf")),
        ("queue_limit", 65535),
        ("queue_limit", 0),
        ("queue_limit", None),
        ("frame_limit", 4095),
        ("frame_limit", 1 << 32),
        ("registry", "sqlite://relative/path"),
        ("registry", "redis://localhost"),
        ("registry", "consul://one,two"),
        ("registry", 5),
        ("on_error", 5),
        ("secret", "hush"),
        ("handshakes_per_address", 0),
        ("handshakes_per_address", 1.5),
        ("secret", b""),
        ("tls", object()),
        ("busy_poll", 1.5),
        ("busy_poll", -0.1),
        ("busy_poll", "1"),
    ],
)
def test_settings_that_are_refused(registry_url: str, setting: str, value: Any) -> None:
    settings: dict[str, Any] = {"name": "a", "registry": registry_url, setting: value}
    with pytest.raises((ValueError, TypeError, DomiError)) as refused:
        Node(**settings)
    # The message says which setting it is about.
    assert setting in str(refused.value) or isinstance(refused.value, RegistryError)


def test_a_setting_that_does_not_exist(registry_url: str) -> None:
    with pytest.raises(TypeError, match=r"no setting colour.*heartbeat_interval"):
        Node("a", registry=registry_url, colour="red")


def test_the_defaults_are_the_documented_ones() -> None:
    config = NodeConfig("a")
    assert (config.heartbeat_interval, config.heartbeat_timeout, config.lease_ttl) == (5, 10, 3)
    assert (config.queue_limit, config.frame_limit) == (16 * MIB, 16 * MIB)
    with pytest.raises(AttributeError):
        config.name = "b"  # type: ignore[misc]


def test_a_registrys_password_is_not_shown() -> None:
    url = "etcd://me:s3cret@one"
    config = NodeConfig("a", registry=url)
    assert config.registry == url
    assert "s3cret" not in repr(config)
    with pytest.raises(TypeError, match="registry of type bytes: str is wanted"):
        NodeConfig("a", registry=url.encode())  # type: ignore[arg-type]


def test_an_open_address_needs_a_word(registry_url: str) -> None:
    with pytest.raises(DomiError, match="insecure=True"):
        Node("a", registry=registry_url, host="0.0.0.0")
    Node("a", registry=registry_url, host="0.0.0.0", insecure=True)
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        Node("a", registry=registry_url, host=host)


@pytest.fixture
def led_astray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver says of localhost that it is every address of this machine."""
    resolve = socket.getaddrinfo

    def astray(host: Any, *given: Any, **named: Any) -> Any:
        return resolve("0.0.0.0" if host == "localhost" else host, *given, **named)

    monkeypatch.setattr(socket, "getaddrinfo", astray)


@pytest.mark.usefixtures("led_astray")
async def test_localhost_is_loopback_whatever_the_resolver_says(registry_url: str) -> None:
    """Nothing keeps strangers out there, so nobody else may be able to come."""
    async with Node("a", registry=registry_url, host="localhost", http_port=0) as a:
        assert a._admin is not None
        for listener in (a._mesh._listeners[0], a._admin):
            assert listener._sock is not None
            assert ip_address(listener._sock.getsockname()[0]).is_loopback
        async with (
            Node("b", registry=registry_url, host="localhost") as b,
            await connect(f"tcp://localhost:{a.port}") as guest,
        ):
            await b.wait_peers(1, 5)
            assert guest.connected


@pytest.mark.usefixtures("led_astray")
async def test_a_port_of_localhost_that_is_taken(registry_url: str) -> None:
    async with Node("a", registry=registry_url, host="localhost") as a:
        other = Node("b", registry=registry_url, host="localhost", port=a.port)
        with pytest.raises(OSError, match=f"localhost:{a.port}"):
            await other.start()


async def test_a_port_that_is_taken(registry_url: str) -> None:
    async with nodes(registry_url, "a") as (a,):
        other = Node("b", registry=registry_url, port=a.port)
        with pytest.raises(OSError, match=str(a.port)):
            await other.start()
        with pytest.raises(DomiError):
            other.notify(50, b"")


async def test_a_node_on_a_unix_socket(registry_url: str, tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    async with nodes(registry_url, "a", unix_path=path) as (a,):
        assert Path(path).is_socket()
        async with Node("b", registry=registry_url) as b:
            await b.wait_peers(1, 5)
            assert b.peers[a.id].address == f"unix:{path}"
            a.subscribe(50, echo)
            await b.wait_subscribed(50, timeout=5)
            assert await b.request(50, bytes(100_000)) == bytes(100_000)
    assert not Path(path).exists()


async def test_a_unix_socket_that_somebody_serves(registry_url: str, tmp_path: Path) -> None:
    path = str(tmp_path / "a.sock")
    async with nodes(registry_url, "a", unix_path=path):
        other = Node("b", registry=registry_url, unix_path=path)
        with pytest.raises(OSError, match=re.escape(path)):
            await other.start()
        assert Path(path).is_socket()


# ------------------------------------------------------------------- settings that are put in order


@pytest.mark.parametrize(
    ("setting", "value", "kind", "words"),
    [
        ("on_error", awaited, TypeError, "async def"),
        ("on_error", functools.partial(awaited), TypeError, "async def"),
        ("on_error", Awaited(), TypeError, "async def"),
        ("registry", "", ValueError, "None"),
        ("unix_path", "", ValueError, "1 to 107 bytes"),
        ("unix_path", "/tmp/a\0b", ValueError, "NUL"),
        ("unix_path", "\0abstract", ValueError, "NUL"),
        ("unix_path", "/tmp/\ud800", ValueError, "1 to 107 bytes"),
        ("unix_path", "x" * 107, ValueError, "absolute path"),
        ("host", "[::1", ValueError, "::1"),
        ("host", "::1]", ValueError, "::1"),
        ("host", "[]", ValueError, "::1"),
        ("host", "[localhost]", ValueError, "127.0.0.1"),
        ("host", "", ValueError, "127.0.0.1"),
        ("host", "127.0.0.1\0", ValueError, "127.0.0.1"),
        ("host", "127.0.0.1 ", ValueError, "127.0.0.1"),
        ("name", "\ud800", ValueError, "1 to 255 bytes"),
        ("version", "1" * 256, ValueError, "255"),
        ("request_timeout", True, ValueError, "0.001 to 86400"),
        ("request_timeout", 10**400, ValueError, "0.001 to 86400"),
        ("frame_limit", 1, ValueError, "4096 to 4294967295"),
    ],
)
def test_settings_that_are_refused_with_advice(
    registry_url: str, setting: str, value: Any, kind: type[Exception], words: str
) -> None:
    given: dict[str, Any] = {"name": "a", "registry": registry_url, "insecure": True}
    with pytest.raises(kind, match=f"(?s)^{setting} .*{re.escape(words)}"):
        Node(**given | {setting: value})


async def test_an_ipv6_host_may_have_brackets(registry_url: str) -> None:
    assert NodeConfig("a", host="[::]", insecure=True).host == "::"
    node = Node("a", registry=registry_url, host="[::1]")
    assert node.config.host == "::1"
    addresses = Path("/proc/net/if_inet6")
    if addresses.exists() and f"{1:032x}" in addresses.read_text():
        async with node, Node("b", registry=registry_url, host="::1") as other:
            await other.wait_peers(1, 5)


async def test_a_relative_unix_path_outlives_a_chdir(
    registry_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    node = Node("a", registry=registry_url, unix_path="a.sock")
    assert node.config.unix_path == str(tmp_path / "a.sock")
    monkeypatch.chdir("elsewhere")
    async with node, Node("b", registry=registry_url) as other:
        await other.wait_peers(1, 5)
        assert (tmp_path / "a.sock").is_socket()
        assert other.peers[node.id].address == f"unix:{tmp_path}/a.sock"
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_the_order_of_a_nodes_settings_is_public() -> None:
    config = NodeConfig("a", "1.0", "cluster", "localhost", 7000)
    assert (config.version, config.cluster, config.host, config.port) == (
        "1.0",
        "cluster",
        "localhost",
        7000,
    )


# -------------------------------------------------------------------------------------- serial mode


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"ring_size": 5000}, ValueError, "a power of two from 4096 to 1073741824"),
        ({"ring_size": 2.0**21}, TypeError, "int is wanted"),
        ({"tick": 0.000001}, ValueError, "tick 1e-06: a number from 1e-05 to 1"),
        ({"tick": 2}, ValueError, "a number from 1e-05 to 1"),
        ({"max_pending": 0}, ValueError, "max_pending 0: a number from 1"),
        ({"max_pending": 1.5}, TypeError, "int is wanted"),
        ({"drain_budget": 0}, ValueError, "drain_budget 0: a number from 1e-05 to 1"),
        ({"timer_budget": 5.0}, ValueError, "timer_budget 5.0: a number from 1e-05 to 1"),
        ({"colour": 1}, TypeError, "Serial has no setting colour; it has ring_size, tick"),
        ({"thread": 1}, TypeError, "thread of type int: bool is wanted"),
        ({"busy_poll": 1.5}, ValueError, "busy_poll 1.5: a number from 0.0 to 1.0"),
    ],
)
def test_serial_settings_that_are_not_allowed(
    settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Serial(Node("a", registry="memory://unused"), **settings)


def test_serial_mode_of_what_is_no_node() -> None:
    with pytest.raises(TypeError, match="a Node is wanted"):
        Serial("node")  # type: ignore[arg-type]


def test_the_default_settings_of_serial_mode() -> None:
    config = Serial(Node("a", registry="memory://unused")).config
    assert config == SerialConfig(2 * 1024 * 1024, 0.001, False)
    assert config.max_pending == 65536
