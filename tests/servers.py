"""Real registry servers, each on free loopback ports and with a folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def missing(program: str, package: str) -> None:
    """Skip, with the reason, what needs a server that is not here; on CI that is a failure."""
    if shutil.which(program) is None:
        reason = f"{program} is not installed (on Debian: apt-get install {package})"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


class Etcd:
    """One etcd, whose data outlives its process.

    :param tls: it takes only clients with its own certificate, ``cert`` with ``key``.
    """

    def __init__(self, folder: Path, *, tls: bool = False) -> None:
        missing("etcd", "etcd-server")
        self.port, peer, self._health = free_ports(3)
        self.url = f"etcd://127.0.0.1:{self.port}"
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        self._log = folder / "etcd.log"
        client, member = f"http{'s' * tls}://127.0.0.1:{self.port}", f"http://127.0.0.1:{peer}"
        self._command = [
            "etcd", "--data-dir", str(folder / "etcd"), "--name", "test",
            "--listen-client-urls", client, "--advertise-client-urls", client,
            "--listen-peer-urls", member, "--initial-advertise-peer-urls", member,
            "--initial-cluster", f"test={member}", "--unsafe-no-fsync", "--log-level", "error",
            "--listen-metrics-urls", f"http://127.0.0.1:{self._health}",
        ]  # fmt: skip
        if tls:
            missing("openssl", "openssl")
            subprocess.run(
                [
                    *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
                    *("-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"),
                    *("-keyout", str(self.key), "-out", str(self.cert)),
                ],
                check=True,
                capture_output=True,
            )
            for option, file in (("cert", self.cert), ("key", self.key), ("trusted-ca", self.cert)):
                self._command += [f"--{option}-file", str(file)]
            self._command.append("--client-cert-auth")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it takes calls."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        end = time.monotonic() + 20.0
        while not self._is_healthy():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < end, f"etcd is not ready: {self._log.read_text()}"
            time.sleep(0.02)

    def _is_healthy(self) -> bool:
        request = b"GET /health HTTP/1.0\r\n\r\n"
        try:
            with socket.create_connection(("127.0.0.1", self._health), 1.0) as connection:
                connection.sendall(request)
                return b'"true"' in connection.makefile("rb").read()
        except OSError:
            return False

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """As a crash does; what it had said is on its disk."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
