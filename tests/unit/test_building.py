"""Building and belonging: the README, 64 bits, the variants, and the Makefile."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

import domi_fast
from domi_fast import (
    Node,
    NodeConfig,
    RingBuffer,
    TimeWheel,
    _core,
    connect,
)
from tests.conftest import LOOPS
from tests.support import (
    forget_records,
    nodes,
)

ROOT = Path(__file__).resolve().parents[2]
NARROW = 2**31 - 1


@pytest.fixture(autouse=True)
def no_records_kept(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    forget_records(caplog)


def program(text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", text, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def absolute_paths() -> str:
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(os.path.abspath(path) for path in paths if path)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As from a shell: nothing of a make that runs these tests is inherited."""
    ours = {
        name: text for name, text in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env=ours,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# ------------------------------------------------------------------------------- what is to be read


def test_everything_public_says_what_it_is() -> None:
    for name in domi_fast.__all__:
        assert getattr(domi_fast, name).__doc__, name


def test_a_nodes_verbs_are_as_documented(registry_url: str) -> None:
    node = Node("a", registry=registry_url)
    signatures = {
        "subscribe": "(channel, handler=Ellipsis, *, batch=False)",
        "unsubscribe": "(channel)",
        "notify": "(channel, data, *, to=None, key=None, policy=None)",
        "publish": "(channel, data, *, to=None)",
        "call": "(channel, data, reply_channel, *, to=None, key=None, policy=None)",
        "ventilator": "(channels, data)",
        "notify_many": "(channel, messages, *, to=None)",
        "publish_many": "(channel, messages, *, to=None)",
        "call_many": "(channel, messages, reply_channel, *, to=None)",
        "reply_many": "(contexts, answers)",
        "drained": "(peer)",
        "counters": "()",
        "subscribers": "(channel)",
    }
    for name, signature in signatures.items():
        verb = getattr(node, name)
        assert str(inspect.signature(verb)) == signature
        assert verb.__doc__
        # The core's own: nothing in Python stands before it.
        assert inspect.isbuiltin(verb)
        assert verb.__self__ is node._router
    assert inspect.isbuiltin(node.request)
    assert node.request.__doc__.startswith("Send to one subscriber, and await its answer")
    parameters = inspect.signature(node.watch_channel).parameters
    assert list(parameters) == ["channel", "maxsize"]
    assert parameters["maxsize"].default == 1024
    for name in ("start", "close", "wait_subscribed", "wait_peers"):
        assert inspect.iscoroutinefunction(getattr(node, name))
        assert getattr(Node, name).__doc__


def test_the_docstring_of_a_node_leads_to_its_settings() -> None:
    text = inspect.getdoc(Node) or ""
    assert text.startswith("A node of the mesh")
    assert "NodeConfig" in text
    described = set(re.findall(r":ivar (\w+):", inspect.getdoc(NodeConfig) or ""))
    assert set(NodeConfig.__dataclass_fields__) <= described


def test_a_wrong_keyword_is_answered_with_the_right_ones(registry_url: str) -> None:
    with pytest.raises(TypeError) as refused:
        Node("a", registry=registry_url, wrong=1)
    text = str(refused.value)
    assert text.startswith("Node has no setting wrong; it has name, version, cluster, host")
    assert all(field in text for field in NodeConfig.__dataclass_fields__)
    # What is right in name and wrong in kind is not mistaken for it.
    with pytest.raises(TypeError, match="port of type str: int is wanted"):
        Node("a", registry=registry_url, port="x")


async def test_a_wrong_keyword_of_a_guest() -> None:
    with pytest.raises(TypeError, match="wrong"):
        await connect("tcp://127.0.0.1:1", wrong=1)


def test_the_first_screen_of_the_readme() -> None:
    """What it is, ten lines of code, two commands: within fifty lines, before any heading."""
    screen = (ROOT / "README.md").read_text().partition("\n## ")[0].splitlines()
    assert len(screen) <= 55
    text = "\n".join(screen)
    assert text.startswith("# domi_fast\n")
    first = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 10
    assert re.search(r"^make demo\b", text, re.MULTILINE)
    assert re.search(r"^make test\b", text, re.MULTILINE)


# ------------------------------------------------------------------------------- 64 bits and builds


def test_a_32_bit_python_may_not_build_it() -> None:
    """No 32-bit interpreter is at hand: sys.maxsize says 2**31-1 once the tools are imported."""
    done = program(
        "import runpy, sys\n"
        "import Cython.Build, setuptools.command.build_ext\n"
        f"sys.maxsize = {NARROW}\n"
        "sys.argv = ['setup.py', '--name']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "64-bit Python" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_32_bit_python_may_not_import_it() -> None:
    """As above; the extension itself was of course built for 64 bits."""
    done = program(
        "import sys\n"
        "import asyncio, logging, weakref, uvloop, packaging.version\n"
        f"sys.maxsize = {NARROW}\n"
        "try:\n"
        "    import domi_fast\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "else:\n"
        "    print('imported')\n",
        PYTHONPATH=absolute_paths(),
    )
    assert done.returncode == 0, done.stderr
    assert "64-bit Python" in done.stdout


@pytest.mark.parametrize("name", ["DOMI_DEBUG", "DOMI_SANITIZE"])
def test_a_variant_is_switched_by_0_or_1(name: str) -> None:
    done = program(
        "import runpy, sys; sys.argv = ['setup.py', '--name'];"
        "runpy.run_path('setup.py', run_name='__main__')",
        **{name: "yes"},
    )
    assert done.returncode == 1
    assert f"{name} is 'yes': set it to 1, or to 0." in done.stderr


def test_the_build_under_test_is_the_one_that_was_asked_for() -> None:
    """The targets of the Makefile say by the environment which build they test."""
    path = _core.__file__
    assert path is not None
    if os.environ.get("DOMI_DEBUG") == "1":
        assert _core.is_debug_build()
    if os.environ.get("DOMI_SANITIZE") == "1":
        code = Path(path).read_bytes()
        assert b"__asan_init" in code
        assert b"__ubsan_handle" in code
        assert "libasan" in Path("/proc/self/maps").read_text()


async def test_a_debug_build_counts_what_lives(registry_url: str) -> None:
    """And a release counts nothing. That nothing is left is asserted after every test."""
    before = _core.live_objects()
    assert set(before) == {"sessions", "segments", "tails", "large_frames", "timers", "rings"}
    wheel = TimeWheel()
    wheel.call_later(1.0, print)
    reader = _core.FrameReader()
    reader.feed(_core.encode_frame(50, bytes(100))[:-1])
    large = _core.FrameReader()
    large.feed(_core.encode_frame(50, bytes(100_000))[:50_000])
    queue = _core.WriteQueue()
    queue.push(50, b"data")
    ring = RingBuffer()
    async with nodes(registry_url, "a", "b"):
        now = _core.live_objects()
        grown = {name for name, count in now.items() if count > before[name]}
        if _core.is_debug_build():
            assert grown == set(before)
            assert now["sessions"] - before["sessions"] == 4  # two ends, and two loop-backs
        else:
            assert not grown
            assert not any(now.values())
    del reader, large, queue, ring
    wheel.clear()
    del wheel


# ------------------------------------------------------------------------------------- the workshop


async def test_coroutine_tests_run_on_both_loops(loop_kind: str) -> None:
    assert set(LOOPS) == {"asyncio", "uvloop"}
    loop = asyncio.get_running_loop()
    assert isinstance(loop, uvloop.Loop) == (loop_kind == "uvloop")
    assert isinstance(loop, asyncio.SelectorEventLoop) == (loop_kind == "asyncio")


def test_warnings_and_unknown_markers_are_errors(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("filterwarnings")[0] == "error"
    assert {"--strict-markers", "--strict-config"} <= set(pytestconfig.getini("addopts"))
    assert pytestconfig.getini("xfail_strict") is True


def test_make_help_names_every_target() -> None:
    done = make("help")
    assert done.returncode == 0, done.stderr
    listed = dict(re.findall(r"^  ([a-z-]+)\s+(\S.*)$", done.stdout, re.MULTILINE))
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert set(listed) == set(phony[1].replace("\\\n", " ").split())
    assert {"demo", "test", "lint", "bench", "soak", "test-debug", "test-asan"} <= set(listed)
    # And it is what make says when it is not told anything.
    assert make().stdout == done.stdout


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        ("sys.version_info = (3, 9, 18, 'final', 0)", "is Python 3.9; 3.10 or later is needed"),
        (f"sys.maxsize = {NARROW}", "is a 32-bit Python; a 64-bit one is needed"),
        ("sys.modules['venv'] = None", "cannot make virtual environments"),
        ("os.environ['CC'] = '/nonexistent/cc'", "there is no C compiler"),
    ],
)
def test_make_says_what_a_machine_lacks(tmp_path: Path, fake: str, message: str) -> None:
    """With a Python that says of itself what a machine may come with."""
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport os, sys\n{fake}\n"
        "assert sys.argv[1] == '-c'\nexec(sys.argv[2])\n"
    )
    python.chmod(0o755)
    done = make("setup", f"PYTHON={python}", f"VENV={tmp_path}/venv")
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "venv").exists()


def test_what_a_change_must_pass() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    lists = re.findall(
        r"^step .* at_once (.*)$|make --no-print-directory ([a-z.].*?)(?: \|\||$)",
        script,
        re.MULTILINE,
    )
    functions = re.findall(r"^(\w+)\(\) \{$", script, re.MULTILINE)
    targets = {*" ".join(map(" ".join, lists)).split()} - {*functions}
    assert {
        *(
            "lint",
            "test-alone",
            "test-together",
            "test-debug",
            "test-asan",
            "test-oldest",
            "test-newest",
        ),
        *("check-sdist", "bench-smoke", "guard", "demo", "fuzz"),
    } <= targets
    rules = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{re.escape(t)}:", rules, re.MULTILINE) for t in targets)
    # The two halves of the tests are all of them.
    (alone,) = re.findall(r"^ALONE := (.*)$", rules, re.MULTILINE)
    assert all((ROOT / folder).is_dir() for folder in alone.split())
    assert "$(PY) $(PYTEST) $(ALONE) tests/test_secrecy.py $(ARGS)" in rules
    assert "$(PY) $(PYTEST) tests $(addprefix --ignore=,$(ALONE)) $(ARGS)" in rules
    recipe = rules.partition("\nlint:")[2].partition("\n\n")[0]
    for tool in ("ruff check", "ruff format --check", "cython-lint", "mypy", "stubtest"):
        assert tool in recipe
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=False).returncode == 0


@pytest.mark.parametrize(
    ("parts", "result"),
    [
        ("good slow", "ok"),
        ("slow bad good", "FAILED"),
        ("good no-such-target", "FAILED"),
    ],
)
def test_parts_at_once_fail_if_one_does(tmp_path: Path, parts: str, result: str) -> None:
    """Under the options of the script, whose steps are replaced by one."""
    script, steps, _ = (ROOT / ".ci" / "run").read_text().partition("\nstep prepare ")
    assert steps
    copy = tmp_path / ".ci" / "run"
    copy.parent.mkdir()
    copy.write_text(
        f"{script}\ngood() {{ echo said by the good; }}\nbad() {{ return 3; }}\n"
        f"slow() {{ sleep 0.2; }}\nstep all at_once {parts}\ncomplete=yes\n"
    )
    done = subprocess.run(
        ["bash", copy],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert re.search(rf"^{result} +all +[0-9]+ s$", done.stdout, re.MULTILINE), done.stdout
    assert (done.returncode == 0) == (result == "ok")
    assert ("all steps passed" in done.stdout) == (result == "ok")
    assert "--- good\nsaid by the good\n" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [".ci"]  # nothing is left behind
