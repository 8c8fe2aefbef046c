"""What commands print: tables for people, JSON for programs, bytes in the form that was chosen."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Wider than any table: what is piped is not cut to the width of a screen.
UNLIMITED = 10_000


class Output:
    """The standard output of one command.

    :ivar json: print JSON, one document a line, and nothing else.
    """

    def __init__(self, as_json: bool) -> None:
        self.json = as_json
        tty = sys.stdout.isatty()
        self.console = Console(highlight=False, width=None if tty else UNLIMITED)

    def document(self, found: Any) -> None:
        """One line of JSON, at once."""
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()

    def line(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        self.console.print(self.make_table(columns, rows), soft_wrap=False)

    def make_table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
        """A table; numbers stand at the right, and what a peer chose to say is shown as text."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        known = list(rows)
        for place, column in enumerate(columns):
            cells = [row[place] for row in known if row[place] is not None]
            numbers = bool(cells) and all(isinstance(cell, (int, float)) for cell in cells)
            table.add_column(
                column,
                justify="right" if numbers else "left",
                no_wrap=numbers,
                overflow="fold",
                min_width=len(column),
            )
        for row in known:
            table.add_row(*(Text(printable(_cell(cell))) for cell in row))
        return table


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


def printable(text: str, keep: str = "") -> str:
    """The text without what would steer a terminal; what is taken out shows as its escape."""
    return "".join(
        sign
        if sign.isprintable() or sign in keep
        else sign.encode("unicode_escape", "surrogatepass").decode()
        for sign in text
    )


def text_of(data: bytes, form: str, keep: str = "") -> str:
    """Bytes as a person reads them; ``form`` is ``utf8`` or ``hex``."""
    if form == "hex":
        return data.hex()
    return printable(data.decode(errors="backslashreplace"), keep)


def fields_of(data: bytes, form: str) -> dict[str, str]:
    """Bytes in JSON: as text where they are that and it was not asked for otherwise, else hex."""
    if form == "utf8":
        try:
            return {"data": data.decode(), "encoding": "utf8"}
        except UnicodeDecodeError:
            pass
    return {"data": data.hex(), "encoding": "hex"}
