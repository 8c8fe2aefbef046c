"""``scheme://[user:password@]host[:port],host[:port]...[/root][?ca=file&cert=file&key=file]``.

What the URLs of all registries on servers have in common. Consul's has one host, and a token in
place of user and password.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from ..errors import RegistryError, masked

ROOT: Final = "domi_fast"
PORTS: Final = {"etcd": 2379, "zookeeper": 2181, "consul": 8500}
"""Each such scheme, with the port of its servers."""

_AGENT: Final = "consul"

_HOST: Final = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?"
)
_ROOT: Final = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")
_OPTIONS: Final = ("ca", "cert", "key")


@dataclass(frozen=True)
class Endpoints:
    """Where the servers of a registry are, and how they are spoken to.

    :ivar addresses: ``(host, port)`` of each server, tried in this order.
    :ivar ca: path of the certificate authority's file; with it, TLS.
    :ivar cert: path of the client's certificate, with ``key``.
    :ivar password: of the user; without one, a token.
    """

    addresses: tuple[tuple[str, int], ...]
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    ca: str | None = None
    cert: str | None = None
    key: str | None = None


def parse_server_url(url: str) -> tuple[Endpoints, str, str]:
    """Where it is, what its keys begin with, and the URL as it may be shown.

    Raises :class:`~domi_fast.errors.RegistryError` for whatever is not of this form.
    """
    parts = urlsplit(url)
    default = PORTS[parts.scheme]
    login, at, hosts = parts.netloc.rpartition("@")
    alone = parts.scheme == _AGENT
    user, colon, password = ("", "", login) if alone else login.partition(":")
    shown = masked(url)
    form = f"{parts.scheme}://host:{default}" + ("" if alone else f",host:{default}")

    # No part of the URL is repeated: a password with a slash in it ends up in any of them.
    def wrong(why: str) -> RegistryError:
        if "@" in url and not at:
            why += (
                " (what stands before '@' is percent-encoded: '/' as %2F, '?' as %3F, '#' as %23)"
            )
        return RegistryError(f"registry URL {shown!r}: {why}; use {form}")

    if at and alone and (not login or ":" in login):
        raise wrong("a token stands before '@' alone, percent-encoded")
    if at and not alone and not (user and colon and password):
        raise wrong("a user and a password go together, as user:password@")
    if alone and "," in hosts:
        raise wrong("there is one agent; it knows the others")
    addresses = []
    for host in hosts.split(","):
        found = _HOST.fullmatch(host)
        port = int(found["port"] or default) if found else 0
        if found is None or not 1 <= port <= 65535:
            raise wrong("there is what is no host:port")
        addresses.append((found["v6"] or found["name"], port))
    root = parts.path.strip("/") or ROOT
    if not _ROOT.fullmatch(root) or {".", ".."} & set(root.split("/")):
        raise wrong("the root must be of letters, digits, '.', '_', '-' and '/'")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if set(options) - set(_OPTIONS) or parts.fragment:
        raise wrong(f"there is no option but {', '.join(_OPTIONS)}")
    if ("cert" in options) != ("key" in options) or ("cert" in options and "ca" not in options):
        raise wrong("TLS wants ca=, and cert= and key= together")
    endpoints = Endpoints(
        tuple(addresses),
        unquote(user) if user else None,
        unquote(password) if at else None,
        options.get("ca"),
        options.get("cert"),
        options.get("key"),
    )
    return endpoints, root, shown
