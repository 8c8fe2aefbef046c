"""What a run of the tests has said, in log lines and errors, and the secrets that it used."""

from __future__ import annotations

import base64
import contextlib
import functools
import logging
import os
import traceback
from collections.abc import Iterator
from typing import Any

from domi_fast import config, errors
from domi_fast.registry import server_url

# Of a text, so that a megabyte of payload costs nothing.
_MOST = 10_000
# Of a registry's password: a shorter one is a word that is said for other reasons.
_LEAST = 8


class Ear:
    """Hears what is said, and knows what should not be."""

    def __init__(self) -> None:
        self.said: dict[str, str] = {}
        self.secrets: dict[str, str] = {}

    def learn(self, secret: bytes, what: str) -> None:
        """This is not to be heard, in any of the forms that somebody could read it in."""
        for form in (
            secret.decode(errors="replace"),
            repr(secret)[2:-1],
            secret.hex(),
            base64.b64encode(secret).decode().rstrip("="),
            base64.urlsafe_b64encode(secret).decode().rstrip("="),
        ):
            self.secrets[form] = what

    def hear(self, text: str) -> None:
        """This was said, by the test that runs."""
        test = os.environ.get("PYTEST_CURRENT_TEST", "between tests")
        self.said.setdefault(text[:_MOST], test)

    def leaks(self) -> list[str]:
        """Which secrets were said, and by which test; not the secrets themselves."""
        everything = "\n".join(self.said)
        return [
            f"{what}, said by {test}"
            for form, what in self.secrets.items()
            if form in everything
            for text, test in self.said.items()
            if form in text
        ]

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the records of all loggers of this process, and each error of the library when it is
        made, since a test that expects one catches it; learn each secret and token of a node, and
        each password of a registry.
        """
        make = errors.DomiError.__init__
        check_secret, check_token = config.checked_secret, config.check_token
        parse = server_url.parse_server_url

        @functools.wraps(make)
        def made(error: errors.DomiError, *arguments: Any, **facts: Any) -> None:
            make(error, *arguments, **facts)
            self.hear(str(error))

        def checked_secret(what: str, secret: object) -> bytes:
            raw = check_secret(what, secret)
            self.learn(raw, "a cluster's secret")
            return raw

        def checked_token(what: str, token: object) -> None:
            check_token(what, token)
            self.learn(str(token).encode(), "an admin token")

        def parsed(url: str) -> tuple[server_url.Endpoints, str, str]:
            found = parse(url)
            password = found[0].password or ""
            if len(password) >= _LEAST:
                self.learn(password.encode(), "a registry's password")
            return found

        handler = _Handler(self)
        logging.getLogger().addHandler(handler)
        errors.DomiError.__init__ = made  # type: ignore[method-assign]
        config.checked_secret, config.check_token = checked_secret, checked_token
        server_url.parse_server_url = parsed
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)
            errors.DomiError.__init__ = make  # type: ignore[method-assign]
            config.checked_secret, config.check_token = check_secret, check_token
            server_url.parse_server_url = parse


class _Handler(logging.Handler):
    def __init__(self, ear: Ear) -> None:
        super().__init__()
        self._ear = ear

    def emit(self, record: logging.LogRecord) -> None:
        facts = {name: value for name, value in vars(record).items() if name.startswith("domi_")}
        self._ear.hear(f"{record.getMessage()} {facts}")
        if record.exc_info and record.exc_info[1] is not None:
            self._ear.hear("".join(traceback.format_exception_only(record.exc_info[1])))


# Of the whole run, from its configuration to its end.
EAR = Ear()
