"""Whose certificates are good: TLS 1.3 between nodes and guests, both of whom show one.

How bytes are enciphered is the core's (``tls.pxi``); here are the settings, the contexts that are
made of them, again when the files have changed, and whom a certificate is for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import time
from dataclasses import dataclass
from typing import Any

from .errors import AuthError, DomiError

log = logging.getLogger(__name__)

_OF_NO_PATH = ("\0", "\n", "\r", "-----BEGIN")

StrPath = str | os.PathLike[str]
Stamp = tuple[int, ...] | None

# Seconds between two looks into files that could not be read, and that have not changed since.
READ_AGAIN = 1.0


@dataclass(frozen=True)
class Tls:
    """TLS 1.3, where both ends show a certificate: ``tls=`` of nodes and guests.

    Each certificate is signed by the authority that the whole cluster has in common. That of a
    node has the node's name as a DNS name among its subject alternative names, and is for servers
    and for clients (``extendedKeyUsage``, if there is one). The files are PEM; they are read again
    when they have changed, for the connections that are made from then on.

    :ivar certificate: the file with the certificate, then those between it and the authority's.
    :ivar key: the file with its private key, which is not encrypted.
    :ivar authority: the file with the certificates of those whose signature is good.
    :raises TypeError, ValueError: one of them is no path, but perhaps what is in a file; it is not
        repeated.
    """

    certificate: StrPath
    key: StrPath
    authority: StrPath

    def __post_init__(self) -> None:
        for field in ("certificate", "key", "authority"):
            given = getattr(self, field)
            if not isinstance(given, (str, os.PathLike)):
                raise TypeError(
                    f"{field} of type {type(given).__name__}: the path of a PEM file is wanted"
                )
            path = os.fsdecode(given)
            if not path or any(sign in path for sign in _OF_NO_PATH):
                raise ValueError(
                    f"{field} of {len(path)} characters: the path of a PEM file is wanted, which "
                    "is one line"
                )
            # Absolute, so that they are found again after a chdir.
            object.__setattr__(self, field, os.path.abspath(path))


class Certificates:
    """What this process shows of itself, and by what it judges others. Belongs to one thread.

    :param tls: the files.
    :param name: of the node that they are for; None for a guest.
    :raises DomiError: a file cannot be read, they do not fit together, or the certificate is for
        another name: which, and why.
    """

    def __init__(self, tls: Tls, name: str | None) -> None:
        self._tls = tls
        self._name = name
        # Of the files that were read, and of those that could not be.
        self._stamp = self._look()
        self._failed: tuple[Stamp, ...] | None = None
        self._again = 0.0
        self._server, self._client = self._read()

    def server(self) -> ssl.SSLContext:
        """The context of the side that was dialled."""
        self._renew()
        return self._server

    def client(self) -> ssl.SSLContext:
        """The context of the side that dials."""
        self._renew()
        return self._client

    def _renew(self) -> None:
        stamp = self._look()
        if stamp == self._stamp:
            return
        known = stamp == self._failed
        if known and time.monotonic() < self._again:
            return
        try:
            self._server, self._client = self._read()
        except DomiError as error:
            # Perhaps only one of the files has been replaced yet, or there was no descriptor.
            self._failed, self._again = stamp, time.monotonic() + READ_AGAIN
            if not known:
                log.warning("%s; the certificate that was read before stays", error)
        else:
            self._stamp = stamp
            log.info("%s has been read again", self._tls.certificate)

    def _look(self) -> tuple[Stamp, ...]:
        tls = self._tls
        return tuple(map(_stamp, (tls.certificate, tls.key, tls.authority)))

    def _read(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        server = self._context(ssl.PROTOCOL_TLS_SERVER)
        server.num_tickets = 0  # sessions are not resumed
        client = self._context(ssl.PROTOCOL_TLS_CLIENT)
        # A guest's certificate need not be good for a server.
        dialler = client if self._name is not None else self._context(ssl.PROTOCOL_TLS_CLIENT)
        dialler.verify_mode = ssl.CERT_REQUIRED if self._name is not None else ssl.CERT_NONE
        shown = self._tls.certificate
        try:
            names = _names_shown(server, dialler)
        except (ssl.SSLError, ValueError) as error:
            raise DomiError(
                f"tls: {shown} would be refused by who has authority {self._tls.authority}: "
                f"{_why(error)}"
            ) from None
        if self._name is not None and not _is_among(self._name, names):
            raise DomiError(
                f"tls: {shown} is for {listed(names)}, and this node is {self._name!r}: its name "
                "has to be a DNS name among the certificate's subject alternative names"
            )
        return server, client

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the name is the node's, which check_name() looks for
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the authority may have one itself
        tls = self._tls
        path = ""
        try:
            for path in map(str, (tls.certificate, tls.key, tls.authority)):
                with open(path, "rb") as file:
                    file.read(1)
            context.load_verify_locations(tls.authority)
            path = f"{tls.certificate} with key {tls.key}"
            context.load_cert_chain(tls.certificate, tls.key, password=_refuse_password)
        except (OSError, ValueError) as error:
            raise DomiError(f"tls: cannot use {path}: {_why(error)}") from None
        return context


def _why(error: Exception) -> str:
    """What is wrong, without the line of the ssl module's source."""
    if isinstance(error, ssl.SSLError):
        verified: str | None = getattr(error, "verify_message", None)
        if verified or error.reason:
            return verified or str(error.reason).lower().replace("_", " ")
        return "it is not PEM, or not of the kind that is wanted"
    return str(getattr(error, "strerror", None) or error)


def _is_among(name: str, names: frozenset[str]) -> bool:
    """Whether it is one of them, without regard to case; of DNS names, all are ASCII."""
    return name.isascii() and name.lower() in names


def _stamp(path: StrPath) -> Stamp:
    """What changes with the file, and with who may read it; None while there is none."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino
    return None


def _refuse_password() -> str:
    # Without it, OpenSSL would ask whoever is at the terminal.
    raise ValueError("it is encrypted, and nobody is there to be asked for a password")


def _names_shown(server: ssl.SSLContext, client: ssl.SSLContext) -> frozenset[str]:
    """Whom the certificate of the two is for, once each has accepted the other in memory."""
    upward, downward = ssl.MemoryBIO(), ssl.MemoryBIO()
    dialled = server.wrap_bio(upward, downward, server_side=True)
    dialler = client.wrap_bio(downward, upward)
    unfinished = [dialler, dialled]
    while unfinished:
        end = unfinished.pop(0)
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            unfinished.append(end)
    return names_of(dialled.getpeercert())


def names_of(certificate: dict[str, Any] | None) -> frozenset[str]:
    """The DNS names among the subject alternative names, in lower case."""
    found = (certificate or {}).get("subjectAltName", ())
    return frozenset(name.lower() for kind, name in found if kind == "DNS")


def check_name(certificate: dict[str, Any] | None, name: str, peer: int | None = None) -> None:
    """Raise AuthError unless the certificate is for the node of this name."""
    names = names_of(certificate)
    if not _is_among(name, names):
        raise AuthError(
            f"it says that it is {name!r}, and its certificate is for {listed(names)}", peer=peer
        )


def listed(names: frozenset[str]) -> str:
    """The names, for people."""
    return ", ".join(map(repr, sorted(names))) or "no name"
