"""Browsers: headless Chromium, each with a profile of its own, driven by WebDriver."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.servers import missing

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

SIZE = (1200, 880)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Callable[[], Chrome]]:
    """Starts a browser; all are closed after the test."""
    missing("chromium", "chromium")
    missing("chromedriver", "chromium-driver")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    started: list[Chrome] = []

    def start() -> Chrome:
        options = ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for flag in (
            *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
            *("disable-background-networking", "disable-component-update", "disable-sync"),
            "disable-dev-shm-usage",
            f"user-data-dir={tmp_path}/browser-{len(started)}",
            f"window-size={SIZE[0]},{SIZE[1]}",
        ):
            options.add_argument(f"--{flag}")
        # Named, so that it looks for no other driver, and asks nobody for one.
        service = Service(
            executable_path=shutil.which("chromedriver"),
            log_output=str(tmp_path / f"chromedriver-{len(started)}.log"),
        )
        started.append(Chrome(options, service))
        return started[-1]

    yield start
    for each in started:
        each.quit()
