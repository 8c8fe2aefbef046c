"""The URLs of registries on servers, and what is said when one cannot be used."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from domi_fast.registry import RegistryError
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
    assert "cret" not in shown


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
