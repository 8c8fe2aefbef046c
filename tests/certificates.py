"""Certificates for tests: an authority of their own, and what it has signed."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import trustme

from domi_fast import Tls
from tests.overheard import EAR


class Authority:
    """Signs certificates, and writes them into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._signer = trustme.CA()
        self._issued = 0
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "authority.pem"
        self._signer.cert_pem.write_to_path(str(self.file))

    def issue(self, *names: str, days: float = 1.0) -> Tls:
        """A certificate for these names, good for so many days; one that is over for -1."""
        self._issued += 1
        stem = self._folder / f"{'-'.join(names)}-{self._issued}"
        tls = Tls(f"{stem}.pem", f"{stem}.key", str(self.file))
        self.write(tls, *names, days=days)
        return tls

    def write(self, tls: Tls, *names: str, days: float = 1.0) -> None:
        """Put a new certificate, and its key, in the place of these files."""
        now = datetime.datetime.now(datetime.timezone.utc)
        issued = self._signer.issue_cert(
            *names,
            not_before=now - datetime.timedelta(days=2),
            not_after=now + datetime.timedelta(days=days),
        )
        Path(tls.certificate).write_bytes(b"".join(b.bytes() for b in issued.cert_chain_pems))
        key = issued.private_key_pem.bytes()
        Path(tls.key).write_bytes(key)
        EAR.learn(key.splitlines()[1], "a key")

    def issue_for_clients(self, name: str) -> Tls:
        """One that is good for nobody who is dialled."""
        self._signer.private_key_pem.write_to_path(str(self._folder / "authority.key"))
        (self._folder / "extensions").write_text(
            f"subjectAltName = DNS:{name}\nextendedKeyUsage = clientAuth\n"
        )
        new = "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {0}.key -out {0}.csr"
        sign = (
            "x509 -req -days 1 -in {0}.csr -CA authority.pem -CAkey authority.key -CAcreateserial "
            "-extfile extensions -out {0}.pem"
        )
        for command in (new + f" -subj /CN={name}", sign):
            words = command.format(name).split()
            subprocess.run(["openssl", *words], check=True, cwd=self._folder, capture_output=True)
        return Tls(self._folder / f"{name}.pem", self._folder / f"{name}.key", self.file)
