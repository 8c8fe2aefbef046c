"""Real registry servers, each on free loopback ports and with a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


_ZOOKEEPER = "/usr/share/java/zookeeper.jar"


def missing(program: str, package: str) -> None:
    """Skip, with the reason, what needs a program that is not here; on CI that is a failure."""
    if shutil.which(program) is None:
        absent(program, package)


def absent(what: str, package: str) -> NoReturn:
    reason = f"{what} is not installed (on Debian: apt-get install {package})"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def make_certificate(cert: Path, key: Path) -> None:
    """For 127.0.0.1, signed by itself."""
    missing("openssl", "openssl")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )


class Server:
    """A process that is started, hung and killed.

    :ivar port: where it takes calls.
    """

    port: int

    def __init__(self, log: Path, command: list[str]) -> None:
        self._log = log
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def is_healthy(self) -> bool:
        raise NotImplementedError

    def start(self) -> None:
        """Returns when it takes calls."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def wait(self) -> None:
        """Returns when it takes calls."""
        assert self._process is not None
        end = time.monotonic() + 20.0
        while not self.is_healthy():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < end, f"it is not ready: {self._log.read_text()}"
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        if number == signal.SIGSTOP:
            os.waitpid(self._process.pid, os.WUNTRACED)  # it goes on for a moment

    def kill(self) -> None:
        """As a crash does; what it had said is on its disk."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Etcd(Server):
    """One etcd, or one member of a cluster, whose data outlives its process.

    :param tls: it takes only clients with its own certificate, ``cert`` with ``key``.
    :param members: the ports of a cluster's members for each other, by name.
    :param name: its own among them.
    :param options: further ones of its command line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tls: bool = False,
        members: Mapping[str, int] | None = None,
        name: str = "test",
        options: Sequence[str] = (),
    ) -> None:
        missing("etcd", "etcd-server")
        folder.mkdir(exist_ok=True)
        self.port, peer, self._health = free_ports(3)
        members = members or {name: peer}
        self.url = f"etcd://127.0.0.1:{self.port}"
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        client = f"http{'s' * tls}://127.0.0.1:{self.port}"
        addresses = {each: f"http://127.0.0.1:{port}" for each, port in members.items()}
        command = [
            "etcd", "--data-dir", str(folder / "etcd"), "--name", name,
            "--listen-client-urls", client, "--advertise-client-urls", client,
            "--listen-peer-urls", addresses[name], "--initial-advertise-peer-urls", addresses[name],
            "--initial-cluster", ",".join(f"{each}={url}" for each, url in addresses.items()),
            "--unsafe-no-fsync", "--log-level", "error",
            "--listen-metrics-urls", f"http://127.0.0.1:{self._health}",
            *options,
        ]  # fmt: skip
        if tls:
            make_certificate(self.cert, self.key)
            for option, file in (("cert", self.cert), ("key", self.key), ("trusted-ca", self.cert)):
                command += [f"--{option}-file", str(file)]
            command.append("--client-cert-auth")
        super().__init__(folder / "etcd.log", command)

    def is_healthy(self) -> bool:
        request = b"GET /health HTTP/1.0\r\n\r\n"
        try:
            with socket.create_connection(("127.0.0.1", self._health), 1.0) as connection:
                connection.sendall(request)
                return b'"true"' in connection.makefile("rb").read()
        except OSError:
            return False


def etcd_cluster(folder: Path, count: int) -> list[Etcd]:
    """The members of a cluster of etcds, started."""
    members = {f"member{number}": port for number, port in enumerate(free_ports(count))}
    servers = [Etcd(folder / name, members=members, name=name) for name in members]
    for server in servers:
        server.launch()
    for server in servers:
        server.wait()
    return servers


class ZooKeeper(Server):
    """One ZooKeeper, or one member of an ensemble, whose data outlives its process.

    :param tls: it takes only clients with its own certificate, ``cert`` with ``key``.
    :param member: its number in an ensemble.
    :param options: further lines of its configuration.
    """

    TICK = 0.5
    """Seconds of its tick; sessions last two to twenty of them."""

    def __init__(
        self,
        folder: Path,
        *,
        tls: bool = False,
        member: int | None = None,
        options: Sequence[str] = (),
    ) -> None:
        missing("java", "default-jre-headless")
        if not Path(_ZOOKEEPER).exists():
            absent(_ZOOKEEPER, "libzookeeper-java")
        (folder / "data").mkdir(parents=True)
        if member is not None:
            (folder / "data" / "myid").write_text(str(member))
        (self.port,) = free_ports(1)
        self.url = f"zookeeper://127.0.0.1:{self.port}"
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        self._tls = tls
        port = "secureClientPort" if tls else "clientPort"
        lines = [
            f"dataDir={folder}/data",
            f"tickTime={self.TICK * 1000:.0f}",
            f"{port}Address=127.0.0.1",
            f"{port}={self.port}",
            "admin.enableServer=false",
            "4lw.commands.whitelist=srvr",
            "maxClientCnxns=0",
            *options,
        ]
        if tls:
            make_certificate(self.cert, self.key)
            store = folder / "store.pem"
            store.write_text(self.key.read_text() + self.cert.read_text())
            lines += [
                "serverCnxnFactory=org.apache.zookeeper.server.NettyServerCnxnFactory",
                f"ssl.keyStore.location={store}",
                f"ssl.trustStore.location={self.cert}",
            ]
        java = Path(_ZOOKEEPER).parent
        config = folder / "zoo.cfg"
        config.write_text("\n".join(lines) + "\n")
        super().__init__(
            folder / "zookeeper.log",
            [
                *(
                    "java",
                    "-Xmx128m",
                    "-XX:+UseSerialGC",
                    "-XX:TieredStopAtLevel=1",
                    "-Xshare:auto",
                ),
                *("-Dzookeeper.forceSync=no", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"),
                *("-cp", f"{_ZOOKEEPER}:{java}/slf4j-simple.jar:{java}/netty-codec.jar"),
                *("org.apache.zookeeper.server.quorum.QuorumPeerMain", str(config)),
            ],
        )

    def is_healthy(self) -> bool:
        return b"Mode: " in self._says()

    def leads(self) -> bool:
        return b"Mode: leader" in self._says()

    def _says(self) -> bytes:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1.0) as connection:
                if self._tls:
                    return b"Mode: unknown"
                connection.sendall(b"srvr")
                return connection.makefile("rb").read()
        except OSError:
            return b""


class Consul(Server):
    """One Consul agent, whose data outlives its process.

    It takes sessions of less than the 10 s that are the default.

    :param tls: it takes only clients with its own certificate, ``cert`` with ``key``.
    :param acl: nothing is allowed without a token; ``token`` is allowed everything.
    :param server: the server that this one asks; without it, it is the only server itself.
    """

    token = "5e5a4e00-0000-4000-8000-000000000001"

    def __init__(
        self, folder: Path, *, tls: bool = False, acl: bool = False, server: Consul | None = None
    ) -> None:
        agent = consul_agent()
        if not agent.exists():
            # No package has it and its build takes minutes, so that CI does not insist on it.
            pytest.skip("no Consul agent: make consul-agent builds it (needs Go)")
        self.port, plain, rpc, self.gossip = free_ports(4)
        self.url = f"consul://127.0.0.1:{self.port}"
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        self._plain = f"127.0.0.1:{plain if tls else self.port}"
        self._node = "test" if server is None else "client"
        unused = dict.fromkeys(("dns", "grpc", "grpc_tls", "serf_wan"), -1)
        ports = unused | {"server": rpc, "serf_lan": self.gossip}
        ports |= {"http": plain, "https": self.port} if tls else {"http": self.port}
        settings: dict[str, object] = {
            "bind_addr": "127.0.0.1", "data_dir": str(folder / "consul"), "ports": ports,
            "node_name": self._node, "log_level": "warn", "disable_update_check": True,
        }  # fmt: skip
        if server is None:
            settings |= {
                "server": True, "bootstrap_expect": 1, "performance": {"raft_multiplier": 1},
                "session_ttl_min": "1s", "connect": {"enabled": False},
            }  # fmt: skip
        else:
            settings["retry_join"] = [f"127.0.0.1:{server.gossip}"]
        if acl:
            tokens = {"initial_management": self.token, "agent": self.token}
            settings["acl"] = {"enabled": True, "default_policy": "deny", "tokens": tokens}
        if tls:
            make_certificate(self.cert, self.key)
            files = {f"{name}_file": str(self.cert) for name in ("ca", "cert")}
            https = {**files, "key_file": str(self.key), "verify_incoming": True}
            settings["tls"] = {"https": https}
        file = folder / "consul.json"
        file.write_text(json.dumps(settings))
        command = [str(agent), "agent", "-config-file", str(file)]
        super().__init__(folder / "consul.log", command)

    def is_healthy(self) -> bool:
        """Whether it has a leader, and its node is known."""
        try:
            return self._ask("GET", f"/v1/catalog/node/{self._node}?consistent") is not None
        except OSError:
            return False

    def put(self, path: str, body: object) -> Any:
        """What its API answers."""
        return self._ask("PUT", path, json.dumps(body).encode())

    def _ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        request = urllib.request.Request(
            f"http://{self._plain}{path}", body, {"X-Consul-Token": self.token}, method=method
        )
        with urllib.request.urlopen(request, timeout=1.0) as answer:
            return json.load(answer)


def consul_agent() -> Path:
    """Where ``make consul-agent`` puts it."""
    native = Path(__file__).parent / "native" / "consul"
    done = subprocess.run(
        ["sh", str(native / "build.sh"), "--where"], check=True, capture_output=True, text=True
    )
    return Path(done.stdout.strip())
