"""The URLs of registries on servers, and what is said when one cannot be used."""

from __future__ import annotations

import re
import subprocess
import sys
import traceback

import pytest

from domi_fast.registry import RegistryError, open_registry
from domi_fast.registry.server_url import PORTS, parse_server_url
from tests.support import ROOT


def test_what_a_url_says() -> None:
    endpoints, root, shown = parse_server_url("etcd://one:1,two,[::1]:3")
    assert endpoints.addresses == (("one", 1), ("two", 2379), ("::1", 3))
    assert (endpoints.user, endpoints.password, endpoints.ca) == (None, None, None)
    assert root == "domi_fast"
    assert shown == "etcd://one:1,two,[::1]:3"
    assert parse_server_url("zookeeper://one/a")[0].addresses == (("one", 2181),)
    url = "etcd://me:se%3Acret@one/clusters/a?ca=/ca.pem&cert=/c.pem&key=/k.pem"
    endpoints, root, shown = parse_server_url(url)
    assert (endpoints.user, endpoints.password) == ("me", "se:cret")
    assert (endpoints.ca, endpoints.cert, endpoints.key) == ("/ca.pem", "/c.pem", "/k.pem")
    assert root == "clusters/a"
    assert shown == "etcd://***@one/clusters/a?ca=/ca.pem&cert=/c.pem&key=/k.pem"
    assert "cret" not in repr(endpoints)


def test_what_the_url_of_an_agent_says() -> None:
    endpoints, root, shown = parse_server_url("consul://one")
    assert endpoints.addresses == (("one", 8500),)
    assert (endpoints.password, endpoints.ca, root) == (None, None, "domi_fast")
    url = "consul://se%3Acret@[::1]:3/clusters/a?ca=/ca.pem&cert=/c.pem&key=/k.pem"
    endpoints, root, shown = parse_server_url(url)
    assert endpoints.addresses == (("::1", 3),)
    assert (endpoints.user, endpoints.password) == (None, "se:cret")
    assert (endpoints.ca, endpoints.cert, endpoints.key) == ("/ca.pem", "/c.pem", "/k.pem")
    assert root == "clusters/a"
    assert shown == "consul://***@[::1]:3/clusters/a?ca=/ca.pem&cert=/c.pem&key=/k.pem"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("etcd://", "no host:port"),
        ("etcd://one:0", "no host:port"),
        ("etcd://one:70000", "no host:port"),
        ("etcd://one,,two", "no host:port"),
        ("etcd://me@one", "go together"),
        ("etcd://one/a b", "the root"),
        ("etcd://one/a/../b", "the root"),
        ("etcd://one?tls=1", "no option"),
        ("etcd://one?cert=/c", "cert= and key="),
        ("etcd://one?cert=/c&key=/k", "wants ca="),
        ("zookeeper://one,two:x", "no host:port"),
        ("zookeeper://one/../two", "the root"),
        ("consul://one,two", "one agent"),
        ("consul://@one", "a token"),
        ("consul://me:cret@one", "a token"),
        ("consul://one/..", "the root"),
    ],
)
def test_a_url_that_is_not_of_the_form(url: str, message: str) -> None:
    with pytest.raises(RegistryError, match=re.escape(message)) as caught:
        parse_server_url(url)
    scheme = url.partition(":")[0]
    assert f"{scheme}://host:{PORTS[scheme]}" in str(caught.value)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "ectd://me:s3cret@one",
        "etcd//me:s3cret@one",
        "etcd:/me:s3cret@one",
        "etcd:me:s3cret@one",
        "://me:s3cret@one",
        " ectd://me:s3cret@one",
        "sqlite://me:s3cret@one/a",
        "sqlite://me:s3cret@one/a?b=c",
        "memory://me:s3cret@one",
        "etcd://me:s3cret[@one",
        "etcd://me:s3cret\u2100@one",
        *(f"{scheme}://me:s3cret@one:x" for scheme in PORTS),
        *(f"{scheme}://me:s3cret@one/a b" for scheme in PORTS),
        *(f"etcd://me:{password}@one" for password in ("a/s3cret", "a#s3cret", "a?s3cret")),
        *(f"etcd://me:{password}@one" for password in ("1/s3cret", "1#s3cret", "1?s3cret")),
        *(f"etcd://me:{password}@one" for password in ("s3cret/a", "s3cret#a", "s3cret?a")),
        "etcd://me:a@s3cret@one/a b",
        "etcd://me:a://s3cret@one:x",
        "consul://s3cret/a@one",
        "consul://s3cret@one,two",
        "consul://one?token=s3cret",
        "etcd://one?ca=/ca.pem&password=s3cret",
        "redis://one?a=b&password=s3cret",
    ],
)
def test_a_mistyped_url_gives_no_secret_away(url: str) -> None:
    with pytest.raises(RegistryError, match="registry URL") as caught:
        open_registry(url)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("etcd://me:a/b@one", "etcd://***@one"),
        ("ectd://me:a@b@one:1/c?ca=/d", "ectd://***@one:1/c?ca=/d"),
        ("etcd//me:a@one", "***@one"),
        ("consul://one?token=a&ca=/d", "consul://one?token=***&ca=/d"),
    ],
)
def test_what_is_no_secret_is_shown(url: str, shown: str) -> None:
    with pytest.raises(RegistryError, match=re.escape(f"registry URL {shown!r}")):
        open_registry(url)


def test_what_a_password_may_not_have_is_said() -> None:
    with pytest.raises(RegistryError, match=r"before '@'.*percent-encoded"):
        open_registry("etcd://me:a/b@one")


@pytest.mark.parametrize(
    ("scheme", "package"), [("etcd", "etcd3"), ("zookeeper", "kazoo"), ("consul", "consul")]
)
def test_a_missing_package_is_named_with_its_extra(scheme: str, package: str) -> None:
    script = f"""
import sys
sys.modules[{package!r}] = None
from domi_fast.registry import open_registry
open_registry("{scheme}://localhost")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"pip install 'domi-fast[{scheme}]'" in done.stderr.splitlines()[-1]
