"""The URL of a registry in etcd, and what is said when it cannot be used."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from domi_fast.registry import RegistryError
from domi_fast.registry.server_url import parse_server_url
from tests.support import ROOT


def test_what_a_url_says() -> None:
    endpoints, root, shown = parse_server_url("etcd://one:1,two,[::1]:3")
    assert endpoints.addresses == (("one", 1), ("two", 2379), ("::1", 3))
    assert (endpoints.user, endpoints.password, endpoints.ca) == (None, None, None)
    assert root == "domi_fast"
    assert shown == "etcd://one:1,two,[::1]:3"
    url = "etcd://me:se%3Acret@one/clusters/a?ca=/ca.pem&cert=/c.pem&key=/k.pem"
    endpoints, root, shown = parse_server_url(url)
    assert (endpoints.user, endpoints.password) == ("me", "se:cret")
    assert (endpoints.ca, endpoints.cert, endpoints.key) == ("/ca.pem", "/c.pem", "/k.pem")
    assert root == "clusters/a"
    assert "cret" not in shown


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("etcd://", "no host:port"),
        ("etcd://one:0", "no host:port"),
        ("etcd://one:70000", "no host:port"),
        ("etcd://one,,two", "no host:port"),
        ("etcd://me@one", "go together"),
        ("etcd://one/a b", "the root"),
        ("etcd://one?tls=1", "no option"),
        ("etcd://one?cert=/c", "cert= and key="),
        ("etcd://one?cert=/c&key=/k", "wants ca="),
    ],
)
def test_a_url_that_is_not_of_the_form(url: str, message: str) -> None:
    with pytest.raises(RegistryError, match=re.escape(message)) as caught:
        parse_server_url(url)
    assert "etcd://host:2379" in str(caught.value)


def test_a_missing_package_is_named_with_its_extra() -> None:
    script = """
import sys
sys.modules["etcd3"] = None
from domi_fast.registry import open_registry
open_registry("etcd://localhost:2379")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "pip install 'domi-fast[etcd]'" in done.stderr.splitlines()[-1]
