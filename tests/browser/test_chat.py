"""The chat of the examples, in two browsers at two gateways."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30.0
PICTURE = os.environ.get("DOMI_CHAT_PICTURE")
"""Where the picture of the page goes; the test's own folder unless it is set."""

T = TypeVar("T")

pytestmark = pytest.mark.browser


def until(what: Callable[[], T], why: Callable[[], object]) -> T:
    """Wait for something true, and return it."""
    end = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < end, why()
        time.sleep(0.02)
    return found


class Page:
    """The chat as somebody sees it."""

    def __init__(self, driver: Chrome, url: str) -> None:
        self.driver = driver
        driver.get(url)

    def enter(self, name: str, room: str) -> None:
        self.fill("name", name)
        self.fill("first", room)
        self.driver.find_element("css selector", "#enter button").click()

    def fill(self, id: str, text: str) -> None:
        element = self.driver.find_element("id", id)
        element.clear()
        element.send_keys(text)

    def say(self, text: str) -> None:
        until(lambda: self.driver.find_element("id", "text").is_enabled(), self.seen)
        self.fill("text", text)
        self.driver.find_element("css selector", "#say button").click()

    def text_of(self, selector: str) -> list[str]:
        """The texts of all elements that are found, in one look at the page."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return list(self.driver.execute_script(script, selector))  # type: ignore[no-untyped-call]

    @property
    def said(self) -> list[str]:
        return self.text_of("#lines .text")

    @property
    def notices(self) -> list[str]:
        return self.text_of("#lines .notice")

    @property
    def badge(self) -> str:
        return self.text_of("#badge")[0]

    @property
    def people(self) -> list[str]:
        return self.text_of("#people li")

    @property
    def user(self) -> str:
        return str(self.driver.execute_script("return document.body.dataset.user"))  # type: ignore[no-untyped-call]

    @property
    def zone(self) -> int:
        """The process that holds the room; 0 while the page knows none."""
        pid = self.driver.execute_script("return document.getElementById('zone').dataset.pid")  # type: ignore[no-untyped-call]
        return int(pid or 0)

    def note_badges(self) -> None:
        """Have each text of the badge noted from now on."""
        self.driver.execute_script(  # type: ignore[no-untyped-call]
            "window.noted = []; new MutationObserver(() => noted.push(badge.textContent))"
            ".observe(document.getElementById('badge'), {childList: true})"
        )

    @property
    def badges(self) -> list[str]:
        return list(self.driver.execute_script("return window.noted"))  # type: ignore[no-untyped-call]

    def seen(self) -> object:
        return self.badge, self.said, self.notices, self.people, self.driver.get_log("browser")

    def hears(self, *texts: str) -> None:
        """Wait until the last texts are these."""
        until(lambda: tuple(self.said[-len(texts) :]) == texts, self.seen)


class Chat:
    """The example, started as a reader would."""

    def __init__(self, tmp_path: Path) -> None:
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(ROOT / path) for path in paths if path),
            "COLUMNS": "120",
            "TMPDIR": str(tmp_path),
        }
        self._folder = tmp_path
        self.log = tmp_path / "chat.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "examples/chat/main.py", "--port", "0"],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )

    def urls(self) -> list[str]:
        """Of the page, at each gateway."""

        def found() -> list[str]:
            assert self.process.poll() is None, self.log.read_text()
            text = self.log.read_text()
            return re.findall(r"http://\S+", text) if "Ctrl-C" in text else []

        return until(found, self.log.read_text)

    def pid(self, name: str) -> int:
        """Of one of its processes, as its table has it."""
        found = re.search(rf"{name}\D+\d+\D+(\d+)", self.log.read_text())
        assert found is not None, self.log.read_text()
        return int(found[1])

    def is_kept(self, text: str) -> bool:
        """Whether the snapshot of a room has this."""
        (file,) = self._folder.glob("domi-chat-*/rooms.sqlite")
        with contextlib.closing(sqlite3.connect(file)) as snapshots:
            rows = snapshots.execute("SELECT data FROM snapshots").fetchall()
        return any(text.encode() in row[0] for row in rows)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Chat]:
    started = Chat(tmp_path)
    try:
        yield started
        started.stop()
    finally:
        started.process.kill()
        started.process.wait()


def test_rooms_over_two_gateways(chat: Chat, browser: Callable[[], Chrome], tmp_path: Path) -> None:
    urls = chat.urls()
    ada, ben = (Page(browser(), url) for url in urls)
    ada.enter("Ada", "lobby")
    ben.enter("Ben", "lobby")
    ada.say("Good morning!")
    ben.hears("Good morning!")
    ben.say("Hello Ada, from the other gateway.")
    ada.hears("Good morning!", "Hello Ada, from the other gateway.")
    until(lambda: ada.people == ["Ada (you)", "Ben"], ada.seen)
    until(lambda: ben.people == ["Ada", "Ben (you)"], ben.seen)
    assert ada.badge == "Connected to gateway 0"
    assert ben.badge == "Connected to gateway 1"

    # A page that is gone for a moment is the same user again, and has missed nothing.
    before = ben.user
    address = ben.driver.current_url
    ben.driver.get("about:blank")
    until(lambda: ada.people == ["Ada (you)", "Ben, away"], ada.seen)
    ada.say("Are you still there?")
    ada.hears("Are you still there?")
    ben.driver.get(address)
    until(lambda: ben.badge == "Resumed at gateway 1", ben.seen)
    ben.hears("Are you still there?")
    assert ben.user == before
    ben.driver.refresh()
    ada.say("While you load the page again.")
    texts = [
        "Good morning!",
        "Hello Ada, from the other gateway.",
        "Are you still there?",
        "While you load the page again.",
    ]
    ben.hears(*texts)
    ben.say("I am, and have missed nothing.")
    texts.append("I am, and have missed nothing.")
    ada.hears(*texts)
    ben.hears(*texts)
    assert ben.said == ada.said == texts
    assert ben.user == before

    # The process that holds the room is killed: it comes back at the other zone.
    zone = ada.zone
    assert ben.zone == zone
    until(lambda: chat.is_kept(texts[-1]), chat.log.read_text)
    for page in (ada, ben):
        page.note_badges()
    os.kill(zone, signal.SIGKILL)
    for page in (ada, ben):
        until(lambda page=page: page.zone not in (0, zone), page.seen)
        page.hears(*texts)
        assert page.badges == ["Room lost, joining again …", page.badge]
        assert page.badge.startswith("Connected to gateway")
    ada.say("What was that?")
    ben.hears(*texts, "What was that?")
    ben.say("A zone was killed. We are at the other one.")
    texts += ["What was that?", "A zone was killed. We are at the other one."]
    ada.hears(*texts)
    assert ada.said == ben.said == texts
    until(lambda: sorted(ada.people) == ["Ada (you)", "Ben"], ada.seen)

    picture = Path(PICTURE) if PICTURE else tmp_path / "chat.png"
    assert ada.driver.save_screenshot(str(picture))
    assert picture.stat().st_size > 10_000
    for page in (ada, ben):
        complaints = [
            entry
            for entry in page.driver.get_log("browser")
            if entry["level"] == "SEVERE" and "WebSocket" not in entry["message"]
        ]
        assert not complaints


def test_a_page_goes_to_another_gateway_when_its_own_is_killed(
    chat: Chat, browser: Callable[[], Chrome]
) -> None:
    urls = chat.urls()
    page = Page(browser(), urls[1])
    page.enter("Ada", "lobby")
    page.say("At the first gateway.")
    page.hears("At the first gateway.")
    before = page.user
    os.kill(chat.pid("gateway 1"), signal.SIGKILL)
    until(lambda: page.badge == "Connected to gateway 0", page.seen)
    page.say("At the second.")
    page.hears("At the first gateway.", "At the second.")
    assert page.user != before
    until(lambda: page.people == ["Ada (you)"], page.seen)
    assert "gateway 1 (pid" in chat.log.read_text()


def test_a_name_that_the_gateway_refuses_is_asked_for_again(
    chat: Chat, browser: Callable[[], Chrome]
) -> None:
    page = Page(browser(), chat.urls()[0])
    page.enter("   ", "lobby")
    until(lambda: page.text_of("#problem") == ["a name of 1 to 24 letters is wanted"], page.seen)
    page.enter("Ada", "lobby")
    page.say("Now it knows me.")
    page.hears("Now it knows me.")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in paths if p)}
    return subprocess.run(
        [sys.executable, "examples/chat/main.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_the_chat_says_how_it_is_used() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "python examples/chat/main.py --gateways 3 --zones 5" in done.stdout


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("--port", str(port))
    assert done.returncode == 1
    assert f"no chat: port {port}" in done.stderr
    assert "give --port another, or 0" in done.stderr
