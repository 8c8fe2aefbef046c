"""What a gateway may be told, and what is said of what it may not."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import Any

import pytest

from domi_fast import DomiError, Node
from domi_fast.gateway import Gateway, GatewayConfig
from tests.gateway.nodes import gateway_of


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"prot": 1}, TypeError, "Gateway has no setting prot; it has host, port, "),
        ({"port": 65536}, ValueError, "port 65536: 0 (the system chooses) to 65535 are allowed"),
        ({"port": "80"}, TypeError, "port of type str: int is wanted"),
        ({"port": None, "tcp_port": None}, ValueError, "a gateway listens on one of them"),
        ({"tls": "cert.pem"}, TypeError, "tls of type str: SSLContext is wanted"),
        ({"service": b"room"}, TypeError, "service of type bytes: str is wanted"),
        ({"authenticate": "yes"}, TypeError, "authenticate 'yes' is not callable"),
        ({"authenticate": lambda login: (yield)}, TypeError, "authenticate is a generator"),
        ({"origins": "https://a.example"}, TypeError, "a list of origins is wanted, or '*'"),
        ({"origins": ["a.example"]}, ValueError, "origin 'a.example': a scheme and a host"),
        ({"origins": ["https://a.example/x"]}, ValueError, "for example https://example.com"),
        ({"origins": [7]}, ValueError, "origin 7: a scheme and a host are wanted"),
        ({"message_limit": 16 << 20}, ValueError, "the node's frame_limit of 16777216 has to be"),
        ({"held_bytes": 1}, ValueError, "held_bytes 1: a number from 4096 to"),
        ({"handler_limit": 0}, ValueError, "handler_limit 0: a number from 1 to"),
        ({"origins": ["http://["]}, ValueError, "origin 'http://[': a scheme and a host"),
        ({"message_limit": 63}, ValueError, "message_limit 63: a number from 64 to"),
        ({"message_limit": 1.5}, TypeError, "message_limit of type float: int is wanted"),
        ({"rate": 0}, ValueError, "rate 0: a number from 0.001 to"),
        ({"burst": 0}, ValueError, "burst 0: a number from 1 to"),
        ({"grace": -1}, ValueError, "grace -1: a number from 0.0 to 86400"),
        ({"ping_interval": float("nan")}, ValueError, "ping_interval nan: a number from 0.05"),
        ({"history": -1}, ValueError, "history -1: a number from 0 to"),
        ({"client_limit": 0}, ValueError, "client_limit 0: a number from 1 to"),
        ({"place_timeout": True}, ValueError, "place_timeout True: a number from 0.05"),
    ],
)
def test_what_may_not_be_is_said(settings: dict[str, Any], error: type, said: str) -> None:
    with pytest.raises(error) as raised:
        gateway_of(**settings)
    assert said in str(raised.value)


def test_a_gateway_is_of_a_node() -> None:
    with pytest.raises(TypeError, match="node 'gate': a Node is wanted"):
        Gateway("gate")


def test_what_is_given_is_what_there_is() -> None:
    config = GatewayConfig(origins=["HTTPS://A.example:8443"])
    assert config.origins == {"https://a.example:8443"}
    assert config.allows("https://A.EXAMPLE:8443", "whatever")
    assert GatewayConfig().allows("http://here:1", "HERE:1")
    assert not GatewayConfig().allows("http://here:1", "")
    assert not GatewayConfig().allows("null", "")


@pytest.mark.parametrize("setting", ["port", "tcp_port", "http_port"])
async def test_a_port_that_is_taken_is_named(setting: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        gate = gateway_of(**{setting: taken.getsockname()[1]})
        with pytest.raises(OSError, match=f"{setting}: "):
            await gate.start()
        assert gate.node.state == "closed"
        assert gate.state == "closed"


@pytest.mark.parametrize(
    ("event", "error"), [(49, ValueError), (65536, ValueError), (True, TypeError), ("x", TypeError)]
)
def test_events_of_programs(event: Any, error: type) -> None:
    gate = gateway_of()
    with pytest.raises(error, match="event"):
        gate.handle(event, print)
    with pytest.raises(error, match="event"):
        gate.send(1, event, b"")


def test_one_handler_for_an_event() -> None:
    gate = gateway_of()

    @gate.handle(60)
    def first(message: Any) -> None: ...

    with pytest.raises(DomiError, match="event 60 has a handler already"):
        gate.handle(60, print)
    with pytest.raises(TypeError, match="is not callable"):
        gate.handle(61, 7)
    assert first.__name__ == "first"


def test_before_the_start_nobody_is_there() -> None:
    gate = gateway_of(http_port=0)
    assert (gate.state, gate.clients, gate.users) == ("new", 0, frozenset())
    assert (gate.port, gate.tcp_port, gate.http_port) == (None, None, None)
    assert not gate.send(1, 60, b"")
    assert not gate.disconnect(1, "x")
    assert "new" in repr(gate)


async def test_a_gateway_that_never_started_can_be_closed() -> None:
    node = Node("gate", registry="memory://never")
    gate = Gateway(node)
    await gate.close()
    assert gate.state == "closed"


@pytest.mark.parametrize(
    ("module", "settings"), [("websockets", ""), ("aiohttp", "port=None, tcp_port=0, http_port=0")]
)
def test_what_is_not_installed_is_named(module: str, settings: str) -> None:
    said = printed(
        f"import sys; sys.modules[{module!r}] = None",
        "from domi_fast import DomiError, Node",
        "from domi_fast.gateway import Gateway",
        "node = Node('gate', registry='memory://gate')",
        f"try:\n    Gateway(node, {settings})",
        "except DomiError as error:\n    print(error)",
    )
    assert "pip install 'domi-fast[gateway]'" in said


def test_what_needs_no_extra_imports_none() -> None:
    said = printed(
        "import sys, domi_fast.gateway, domi_fast.stateful",
        "domi_fast.gateway.Gateway(domi_fast.Node('x'), port=None, tcp_port=0)",
        "print([name for name in ('websockets', 'aiohttp') if name in sys.modules])",
    )
    assert said.strip() == "[]"


def test_importing_the_package_imports_no_wing() -> None:
    said = printed(
        "import sys, domi_fast",
        "wings = ('domi_fast.gateway', 'domi_fast.stateful')",
        "print([name for name in sys.modules if name.startswith(wings)])",
    )
    assert said.strip() == "[]"


def printed(*lines: str) -> str:
    """What a program of these lines prints."""
    program = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(program, capture_output=True, text=True, check=True).stdout
