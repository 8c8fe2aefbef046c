"""Runs the Autobahn test suite against a WebSocket server that echoes, and reads its report.

The suite runs on Python 2.7 and is installed by ``install.sh``. Its cases come in groups: 1 to 7
and 10 are the protocol, 9 limits and performance, 12 and 13 compression; :data:`BEYOND` has
those that are beyond the protocol.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BEYOND", "PASSED", "AutobahnError", "Outcome", "command", "run"]

BEYOND = ("9.*", "12.*", "13.*")
"""Limits and performance, and compression: 270 of the 517 cases, which leaves 247."""

PASSED = frozenset({"OK", "NON-STRICT", "INFORMATIONAL"})
"""The behaviours that the standard allows."""

_INSTALL = Path(__file__).with_name("install.sh")
_AGENT = "server"


class AutobahnError(Exception):
    """The suite is not installed, or did not come to its end."""


@dataclass(frozen=True)
class Outcome:
    """Of one case.

    :ivar behavior: OK, NON-STRICT, INFORMATIONAL, UNIMPLEMENTED or FAILED.
    :ivar behavior_close: the same of how the connection was closed, and UNCLEAN, WRONG CODE.
    :ivar close_code: that the server sent, if it did.
    """

    behavior: str
    behavior_close: str
    close_code: int | None

    @property
    def passed(self) -> bool:
        return self.behavior in PASSED and self.behavior_close in PASSED


def command() -> str:
    """Where the installed suite is.

    :raises AutobahnError: it is not installed; says how to.
    """
    found = subprocess.run(
        ["sh", str(_INSTALL), "--where"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise AutobahnError(found.stderr.strip())
    return found.stdout.strip()


def run(
    url: str,
    folder: Path,
    cases: Sequence[str] = ("*",),
    exclude: Sequence[str] = BEYOND,
    *,
    timeout: float = 1800.0,
) -> dict[str, Outcome]:
    """Run cases one after the other against the server, which must echo every message.

    :param url: begins with ws://.
    :param folder: where the report goes, a page for each case; made if it is not there.
    :param cases: patterns such as ``"5.*"``.
    :param exclude: patterns of cases to leave out.
    :param timeout: seconds for all of it.
    :raises AutobahnError: it is not installed, took too long, or the server went away.
    """
    if not url.startswith("ws://"):
        raise AutobahnError(f"{url}: a URL that begins with ws:// is allowed")
    program = command()
    folder.mkdir(parents=True, exist_ok=True)
    spec, log, index = folder / "spec.json", folder / "log.txt", folder / "index.json"
    index.unlink(missing_ok=True)
    wanted = {
        "outdir": str(folder.resolve()),
        "servers": [{"agent": _AGENT, "url": url}],
        "cases": list(cases),
        "exclude-cases": list(exclude),
        "exclude-agent-cases": {},
    }
    spec.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
    with log.open("w", encoding="utf-8") as output:
        try:
            ended = subprocess.run(
                [program, "-m", "fuzzingclient", "-s", str(spec.resolve())],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise AutobahnError(f"not done after {timeout:g} s; see {log}") from None
    said = log.read_text(encoding="utf-8", errors="replace")
    # The suite ends well, with a report of what there was, when the server is gone.
    failed = [line for line in said.splitlines() if line.startswith("Connection to ")]
    if ended.returncode or failed or not index.exists():
        raise AutobahnError(f"{failed[0] if failed else 'the suite failed'}; see {log}")
    found = json.loads(index.read_text(encoding="utf-8")).get(_AGENT, {})
    if not found:
        raise AutobahnError(f"no case matches {', '.join(cases)}")
    return {
        case: Outcome(each["behavior"], each["behaviorClose"], each["remoteCloseCode"])
        for case, each in sorted(found.items(), key=lambda item: _number(item[0]))
    }


def _number(case: str) -> list[int]:
    return [int(part) for part in case.split(".")]


def main() -> int:
    """Exit code 1 when a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.autobahn.suite", description=__doc__)
    parser.add_argument("url", help="of a server that echoes, for example ws://127.0.0.1:9001")
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--exclude", nargs="*", default=list(BEYOND), metavar="PATTERN")
    parser.add_argument("--folder", type=Path, help="keep the report there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="domi-") as scratch:
        try:
            found = run(given.url, given.folder or Path(scratch), given.cases, given.exclude)
        except AutobahnError as error:
            print(f"domi_fast: {error}", file=sys.stderr)
            return 2
    for case, each in found.items():
        if not each.passed:
            print(f"{case}: {each.behavior}, closing {each.behavior_close} ({each.close_code})")
    counted = Counter(each.behavior for each in found.values())
    passed = sum(each.passed for each in found.values())
    details = ", ".join(f"{number} {behavior}" for behavior, number in counted.most_common())
    print(f"{passed}/{len(found)} passed ({details})")
    return int(passed < len(found))


if __name__ == "__main__":
    sys.exit(main())
