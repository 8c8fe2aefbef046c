"""Fixtures of every test: coroutine tests run on both loops, and must leave nothing behind.

``--loop`` chooses one of them, where both would take too long and differ in nothing.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import re
import signal
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, settings

from domi_fast import _core
from tests.overheard import EAR

SOAK = os.environ.get("DOMI_SOAK") == "1"
DEADLINE = 600.0 if SOAK else 60.0
# The folders whose tests are of what stands on a node.
WINGS = {"browser", "gateway", "rooms", "stateful"}

settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=200
)
settings.register_profile("soak", parent=settings.get_profile("default"), max_examples=10_000)
settings.load_profile("soak" if SOAK else "default")

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--loop",
        choices=["both", *LOOPS],
        default="both",
        help="the event loop that coroutine tests run on; both unless given",
    )


def pytest_configure(config: pytest.Config) -> None:
    # What a script starts in the background ignores SIGINT, and so would all that tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    listening = EAR.listening()
    listening.__enter__()
    config.add_cleanup(lambda: listening.__exit__(None, None, None))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if WINGS.intersection(item.path.parts):
            item.add_marker("wing")
    items.sort(key=lambda item: item.path.name == "test_secrecy.py")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for _, text in report.sections:
        EAR.hear(text)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many tests of the registries' contract have run, for each backend."""
    ran: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            found = re.search(r"test_registry_contract\.py::\w+\[(\w+)", report.nodeid)
            if found and report.when == "call":
                ran[found[1]] += 1
    if ran:
        counts = ", ".join(f"{name} {count}" for name, count in ran.items())
        terminalreporter.write_line(f"tests of the registries' contract: {counts}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if inspect.iscoroutinefunction(metafunc.function):
        chosen = metafunc.config.getoption("--loop")
        metafunc.fixturenames.append("loop_kind")
        metafunc.parametrize("loop_kind", list(LOOPS) if chosen == "both" else [chosen])


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    kind = str(pyfuncitem.callspec.params["loop_kind"])
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names if name in pyfuncitem.funcargs}
    run_on(kind, pyfuncitem.obj(**arguments))
    return True


def run_on(kind: str, work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on a new loop of this kind; fail when it hangs or leaves tasks behind."""
    loop = LOOPS[kind]()
    # asyncio's debug mode would tell of callbacks that the machine was slow with.
    loop.slow_callback_duration = DEADLINE
    problems: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: problems.append(context))
    try:
        result = loop.run_until_complete(asyncio.wait_for(work, DEADLINE))
        # Callbacks that the test's last steps have scheduled still belong to it.
        loop.run_until_complete(asyncio.sleep(0))
        left = [task for task in asyncio.all_tasks(loop) if not task.done()]
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()
    assert not problems, f"the loop's exception handler was called: {problems}"
    assert not left, f"tasks left behind: {left}"
    return result


@pytest.fixture(autouse=True, scope="module")
def older_objects_are_not_searched() -> None:
    """Each test collects garbage: it need not look for it in what other modules have left."""
    gc.collect()
    gc.freeze()


def collect() -> None:
    # Twice: the core's objects are not tracked, so a cycle through one takes two rounds to free.
    gc.collect()
    gc.collect()


@pytest.fixture(autouse=True)
def nothing_left_in_the_core() -> Iterator[None]:
    """A debug build counts the core's live objects: after each test there are no new ones."""
    collect()
    before = _core.live_objects()
    yield
    collect()
    assert _core.live_objects() == before


@pytest.fixture
def registry_url() -> str:
    """A registry of this test alone, inside this process."""
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A registry file of this test alone, for several processes."""
    return f"sqlite://{tmp_path}/registry.db"
