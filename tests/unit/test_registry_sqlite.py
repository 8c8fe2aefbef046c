"""What is special to the SQLite registry: the file, other processes, clocks, forks."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import stat
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from domi_fast.registry import (
    Delete,
    LeaseLost,
    Put,
    RegistryError,
    Reset,
    default_url,
    open_registry,
    sqlite,
)
from domi_fast.registry.database import Database
from domi_fast.registry.sqlite import SqliteRegistry
from domi_fast.registry.store import REBOOT_GAP, Store

T = TypeVar("T")

TTL = 0.5


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return asyncio.run(asyncio.wait_for(main(), 30))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "registry.sqlite")


@asynccontextmanager
async def opened(path: str, *, patience: float = 5.0) -> AsyncIterator[SqliteRegistry]:
    registry = SqliteRegistry(path, patience=patience)
    await registry.open()
    try:
        yield registry
    finally:
        await registry.close()


class Child:
    """A process with a registry open. It does one line of a coroutine's body at a time."""

    BODY = textwrap.dedent(
        """
        import asyncio, json, os, sys, time
        from domi_fast.registry.sqlite import SqliteRegistry

        async def main():
            registry = SqliteRegistry(sys.argv[1])
            await registry.open()
            names = {"registry": registry, "time": time, "asyncio": asyncio}
            loop = asyncio.get_running_loop()
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                body = f"async def work():\\n    global lease, claim\\n    {line}"
                exec(body, names)
                try:
                    answer = await names["work"]()
                except Exception as exc:
                    answer = type(exc).__name__
                print(json.dumps(answer), flush=True)
            await registry.close()

        asyncio.run(main())
        """
    )

    def __init__(self, path: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.BODY, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    async def do(self, line: str) -> Any:
        self.send(line)
        return await asyncio.get_running_loop().run_in_executor(None, self.answer)


@contextmanager
def child_of(path: str) -> Iterator[Child]:
    child = Child(path)
    try:
        yield child
    finally:
        # A stopped process dies of SIGKILL too.
        child.process.kill()
        child.process.communicate()


# ---------------------------------------------------------------------------- URLs and files


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://relative/path", "three slashes"),
        ("sqlite:relative", "absolute path"),
        ("sqlite:///", "absolute path"),
        ("sqlite:///tmp/", "absolute path"),
        ("sqlite:////", "absolute path"),
        ("sqlite:////tmp/", "absolute path"),
        ("sqlite:///tmp/x?mode=ro", "no options"),
        ("memory://", "letters"),
        ("memory://a/b", "letters"),
        ("redis://localhost", "sqlite:///absolute/path"),
        ("", "sqlite:///absolute/path"),
        ("/tmp/file", "sqlite:///absolute/path"),
        ("sqlite://[x", "use sqlite:///absolute/path"),
    ],
)
def test_a_url_of_no_known_form_is_refused_with_advice(url: str, message: str) -> None:
    with pytest.raises(RegistryError, match=re.escape(message)) as caught:
        open_registry(url)
    # The value of an option that nobody knows may be a password.
    assert repr(url.replace("=ro", "=***")) in str(caught.value)


def test_a_url_with_odd_characters_leads_to_its_file(tmp_path: Path) -> None:
    async def main() -> None:
        registry = open_registry(f"sqlite://{tmp_path}/a%20b%3Fc%25")
        again = open_registry(registry.url)
        await registry.open()
        await again.open()
        await registry.put("k", b"")
        assert await again.get("k") is not None
        await registry.close()
        await again.close()

    run(main)
    assert [p.name for p in tmp_path.iterdir()] == ["a b?c%"]


def test_four_slashes_are_taken_for_three(tmp_path: Path) -> None:
    async def main() -> None:
        for url in (f"sqlite:///{tmp_path}/file", f"sqlite://///{tmp_path}/file"):
            registry = open_registry(url)
            assert registry.url == f"sqlite://{tmp_path}/file"
            await registry.open()
            await registry.put("k", b"")
            await registry.close()

    run(main)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_default_is_a_private_file_in_the_runtime_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    url = default_url("my.cluster-1_x")
    assert url == f"sqlite://{tmp_path}/domi/my.cluster-1_x.sqlite"
    assert stat.S_IMODE((tmp_path / "domi").stat().st_mode) == 0o700
    assert default_url("my.cluster-1_x") == url
    assert isinstance(open_registry(url), SqliteRegistry)
    for bad in ("", "a/b", "a b", "é", "x" * 65, "a\n", "%2e"):
        with pytest.raises(RegistryError, match="1 to 64 letters"):
            default_url(bad)


@pytest.mark.parametrize("runtime", ["", "relative", "/nonexistent"])
def test_without_a_runtime_directory_one_is_made_under_tmp(
    runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    assert default_url("c") == f"sqlite:///tmp/domi-{os.geteuid()}/c.sqlite"


def test_a_runtime_directory_that_is_not_ours_alone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    directory = tmp_path / "domi"
    directory.mkdir()
    directory.chmod(0o750)
    with pytest.raises(RegistryError, match="0750"):
        default_url("c")
    directory.rmdir()
    directory.symlink_to(tempfile.gettempdir())
    with pytest.raises(RegistryError, match="not a directory"):
        default_url("c")
    directory.unlink()
    directory.mkdir(0o700)
    owner = os.geteuid()
    # The runtime directory itself still counts as ours: only the one inside is another user's.
    real = os.lstat
    monkeypatch.setattr(os, "lstat", lambda p: _with_owner(real(p), owner + 1))
    with pytest.raises(RegistryError, match=f"belongs to user {owner + 1}"):
        default_url("c")


def _with_owner(found: os.stat_result, owner: int) -> os.stat_result:
    fields = list(found)
    fields[stat.ST_UID] = owner
    return os.stat_result(fields)


def test_the_files_are_for_their_user_alone(path: str) -> None:
    async def main() -> None:
        async with opened(path) as registry:
            await registry.put("k", b"")
            for tail in ("", "-wal", "-shm"):
                assert stat.S_IMODE(os.stat(path + tail).st_mode) == 0o600

    before = os.umask(0)
    try:
        run(main)
    finally:
        os.umask(before)


def test_a_file_that_is_no_registry_is_refused_and_left_alone(tmp_path: Path) -> None:
    text, foreign, newer, short = (
        tmp_path / name for name in ("text", "foreign", "newer", "short")
    )
    text.write_bytes(b"not a database, but long enough to be mistaken for the head of one" * 99)
    short.write_bytes(b"x")
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()

    async def make() -> None:
        async with opened(str(newer)) as registry:
            await registry.put("k", b"")

    run(make)
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()

    async def refuse(path: Path, message: str) -> None:
        registry = SqliteRegistry(str(path))
        with pytest.raises(RegistryError, match=message) as caught:
            await registry.open()
        assert str(path) in str(caught.value)
        await registry.close()

    for path, message in (
        (text, "choose another path"),
        (short, "choose another path"),
        (foreign, "choose another path"),
        (newer, "version 99"),
        (tmp_path, "cannot open"),
        (tmp_path / "missing" / "file", "directory must exist"),
    ):
        before = path.read_bytes() if path.is_file() else None
        run(lambda path=path, message=message: refuse(path, message))  # type: ignore[misc]
        assert (path.read_bytes() if path.is_file() else None) == before
    assert {p.name for p in tmp_path.iterdir()} == {"text", "foreign", "newer", "short"}


def test_a_file_that_breaks_under_way_gives_a_clear_error(path: str) -> None:
    async def main() -> None:
        async with opened(path) as registry:
            with sqlite3.connect(path) as db:
                db.execute("DROP TABLE entry")
            db.close()
            with pytest.raises(RegistryError, match=f"{path}: no such table"):
                await registry.put("k", b"")

    run(main)


def test_a_file_that_was_removed_is_made_anew_and_its_leases_are_lost(path: str) -> None:
    async def main() -> None:
        async with opened(path) as one, opened(path) as two:
            lease = await one.grant(TTL)
            claim = await one.claim(["id/1"], b"", lease)
            watch = two.watch("", since=(await two.list("")).cursor)
            waiting = asyncio.ensure_future(watch.__anext__())
            os.unlink(path)
            await asyncio.wait_for(lease.lost.wait(), 5)
            with pytest.raises(LeaseLost):
                await claim.update(b"")
            # What `two` is granted before it has noticed as well is lost with the old file.
            assert isinstance(await asyncio.wait_for(waiting, 5), Reset)
            heir = await two.claim(["id/1"], b"", await two.grant(TTL))
            assert heir.key == "id/1"
            assert await one.get("id/1") is not None

    run(main)


# ---------------------------------------------------------------------------- two processes


def test_two_processes_share_the_registry(path: str) -> None:
    async def main() -> None:
        with child_of(path) as child:
            async with opened(path) as registry:
                assert await child.do("lease = await registry.grant(0.5)") is None
                await child.do("claim = await registry.claim(['id/0', 'id/1'], b'c', lease)")
                own = await registry.claim(["id/0", "id/1"], b"p", await registry.grant(TTL))
                assert own.key == "id/1"
                await own.release()
                # Killed, it keeps its key until its lease is over, and no longer.
                watch = registry.watch("id/0", since=(await registry.list("")).cursor)
                killed = time.monotonic()
                child.process.kill()
                event = await asyncio.wait_for(watch.__anext__(), 5)
                assert isinstance(event, Delete)
                assert TTL / 2 < time.monotonic() - killed < TTL + 0.25

    run(main)


def test_a_change_is_seen_by_another_process_within_100_ms(path: str) -> None:
    async def main() -> None:
        with child_of(path) as child:
            async with opened(path) as registry:
                watch = registry.watch("k", since=(await registry.list("")).cursor)
                delays = []
                for i in range(20):
                    child.send(
                        f"await asyncio.sleep({i / 1000}); "
                        "await registry.put('k', str(time.monotonic()).encode())"
                    )
                    event = await asyncio.wait_for(watch.__anext__(), 5)
                    assert isinstance(event, Put)
                    # From before the write began: more than what is promised.
                    delays.append(time.monotonic() - float(event.entry.value))
                    await asyncio.get_running_loop().run_in_executor(None, child.answer)
                assert statistics.median(delays) < 0.050
                # One may be late through no fault of ours: the machine has other work.
                assert sorted(delays)[-2] < 0.100, delays

    run(main)


def test_an_idle_registry_wakes_its_loop_only_for_changes(path: str) -> None:
    async def main() -> None:
        async with opened(path) as one, opened(path) as two:
            await one.grant(TTL)
            await two.grant(TTL)
            watch = one.watch("k", since=(await one.list("")).cursor)
            waiting = asyncio.ensure_future(watch.__anext__())
            await asyncio.sleep(0)
            woken = 0
            wake = one._wake

            def count() -> None:
                nonlocal woken
                woken += 1
                wake()

            one._wake = count  # type: ignore[method-assign]
            done, _ = await asyncio.wait([waiting], timeout=2 * TTL)
            # Meanwhile both have renewed their leases several times.
            assert not done
            assert woken == 0
            await two.put("k", b"")
            await waiting
            assert woken == 1

    run(main)


def test_an_idle_registry_leaves_its_thread_asleep(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time that it wakes, it takes the interpreter from the loop."""
    turns = 0
    turn = sqlite._Worker._turn

    def count(worker: sqlite._Worker) -> None:
        nonlocal turns
        turns += 1
        turn(worker)

    monkeypatch.setattr(sqlite._Worker, "_turn", count)

    async def main() -> None:
        async with opened(path):
            # It has seen what opening has changed.
            await asyncio.sleep((sqlite.LOOKS + 5) * sqlite.POLL)
            before = turns
            await asyncio.sleep(2 * sqlite.LOOK)
            # Without a sign of a change, but for one that began before.
            assert turns - before <= 3

    run(main)


def test_a_change_that_was_long_in_the_log_is_seen_within_100_ms(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer may be held up between writing the log and making it seen, which shows nowhere."""
    stamp = "before"
    monkeypatch.setattr(sqlite, "_stamp", lambda path: stamp)
    monkeypatch.setattr(sqlite, "LOOK", 30.0)

    async def main() -> None:
        nonlocal stamp
        async with opened(path) as one, opened(path) as two:
            watch = one.watch("k", since=(await one.list("")).cursor)
            waiting = asyncio.ensure_future(watch.__anext__())
            await asyncio.sleep((sqlite.LOOKS + 5) * sqlite.POLL)
            stamp = "in the log"
            await asyncio.sleep(0.2)
            began = time.monotonic()
            await two.put("k", b"1")
            await asyncio.wait_for(waiting, 5)
            assert time.monotonic() - began < 0.1

    run(main)


def test_a_change_that_the_file_does_not_show_is_seen_all_the_same(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written within a tick of the kernel has the same time: the thread looks by itself."""
    monkeypatch.setattr(sqlite, "_stamp", lambda path: None)

    async def main() -> None:
        async with opened(path) as one, opened(path) as two:
            watch = one.watch("k", since=(await one.list("")).cursor)
            await asyncio.sleep((sqlite.LOOKS + 5) * sqlite.POLL)
            await two.put("k", b"1")
            event = await asyncio.wait_for(watch.__anext__(), 2 * sqlite.LOOK + 1)
            assert isinstance(event, Put)

    run(main)


def test_its_log_stays_small(path: str) -> None:
    """The write-ahead log is written back now and again, where there are pauses between changes."""

    async def main() -> None:
        async with opened(path) as registry:
            for number in range(300):
                await registry.put("a", str(number).encode())
                await asyncio.sleep(0.002)
            assert os.stat(path + "-wal").st_size < 2 << 20
        async with opened(path) as again:
            entry = await again.get("a")
            assert entry is not None
            assert entry.value == b"299"

    run(main)


def test_a_holder_stopped_beyond_its_lease_finds_it_lost(path: str) -> None:
    async def main() -> None:
        with child_of(path) as child:
            async with opened(path) as registry:
                await child.do("lease = await registry.grant(0.5)")
                await child.do("claim = await registry.claim(['id/0'], b'old', lease)")
                old = await child.do("return claim.epoch")
                watch = registry.watch("id/0", since=(await registry.list("")).cursor)
                child.process.send_signal(signal.SIGSTOP)
                assert isinstance(await asyncio.wait_for(watch.__anext__(), 5), Delete)
                heir = await registry.claim(["id/0"], b"new", await registry.grant(TTL))
                assert heir.epoch > old
                # Its next line is read as soon as it goes on, before any timer of its loop.
                child.send("await claim.update(b'from the grave')")
                child.process.send_signal(signal.SIGCONT)
                loop = asyncio.get_running_loop()
                assert await loop.run_in_executor(None, child.answer) == "LeaseLost"
                await child.do("await asyncio.wait_for(lease.lost.wait(), 5)")
                assert await child.do("return lease.lost.is_set()") is True
                entry = await registry.get("id/0")
                assert entry is not None
                assert entry.value == b"new"

    run(main)


def test_a_process_stopped_inside_a_write_is_outlived(path: str) -> None:
    hold = (
        "import sqlite3, sys, signal, os; db = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "db.execute('BEGIN IMMEDIATE'); db.execute('DELETE FROM entry');"
        "print('held', flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
    )

    async def main() -> None:
        async with opened(path, patience=0.3) as registry:
            entry = await registry.put("k", b"1")
            lease = await registry.grant(TTL)
            process = subprocess.Popen(
                [sys.executable, "-c", hold, path], stdout=subprocess.PIPE, text=True
            )
            try:
                assert process.stdout is not None
                loop = asyncio.get_running_loop()
                assert await loop.run_in_executor(None, process.stdout.readline) == "held\n"
                writing = asyncio.ensure_future(registry.put("k", b"2"))
                # Reads go on while the write waits.
                assert await registry.get("k") == entry
                with pytest.raises(RegistryError, match="locked by another process"):
                    await writing
                with pytest.raises(RegistryError, match="locked"):
                    await SqliteRegistry(path, patience=0.1).open()
                # Nobody can renew, so the lease is over when its time has come.
                await asyncio.wait_for(lease.lost.wait(), 5)
                assert time.monotonic() < lease.valid_until + 0.25
            finally:
                process.kill()
                process.communicate()
            assert await registry.get("k") == entry
            assert (await registry.put("k", b"3")).epoch == entry.epoch

    run(main)


# ---------------------------------------------------------------------------- clocks


def test_a_reboot_ends_all_leases_and_keeps_the_epochs_growing(path: str) -> None:
    async def main() -> None:
        one = SqliteRegistry(path)
        await one.open()
        lease = await one.grant(3600.0)
        claim = await one.claim(["id/0"], b"", lease)
        lasting = await one.put("settings", b"x")
        cursor = (await one.list("")).cursor
        await one._halt()
        with sqlite3.connect(path) as db:
            db.execute("UPDATE meta SET boot_id = 'another boot'")
        db.close()
        async with opened(path) as two:
            assert (await two.list("")).entries == (lasting,)
            event = await asyncio.wait_for(two.watch("", since=cursor).__anext__(), 5)
            assert isinstance(event, Delete)
            assert event.key == "id/0"
            heir = await two.claim(["id/0"], b"", await two.grant(TTL))
            assert heir.epoch > claim.epoch + REBOOT_GAP - 1

    run(main)


def test_the_wall_clock_has_no_say(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> float:
        raise AssertionError("the wall clock was read")

    async def main() -> None:
        monkeypatch.setattr(time, "time", never)
        monkeypatch.setattr(time, "time_ns", never)
        async with opened(path) as one, opened(path) as two:
            lease = await one.grant(TTL)
            await one.put("k", b"", lease=lease)
            watch = two.watch("k", since=(await two.list("")).cursor)
            one._keep_alive = False
            assert isinstance(await asyncio.wait_for(watch.__anext__(), 5), Delete)
            assert lease.lost.is_set() or time.monotonic() >= lease.valid_until

    run(main)
    # Nor does SQLite's: nothing in the schema asks for the time.
    with sqlite3.connect(path) as db:
        (schema,) = db.execute("SELECT group_concat(sql) FROM sqlite_master").fetchone()
    db.close()
    assert not re.search(r"CURRENT_|datetime|strftime|unixepoch", schema)


# ---------------------------------------------------------------------------- the log


def test_a_cursor_older_than_the_log_gives_a_reset() -> None:
    db = sqlite3.connect(":memory:", isolation_level=None)
    store = Store(Database(db, "here"), log_events=10, log_bytes=1000)
    store.prepare("boot")
    cursors = [store.list("").cursor]
    for i in range(30):
        store.put("k", str(i).encode(), None, None)
        cursors.append(store.list("").cursor)
    for cursor in cursors[:20]:
        (event,) = store.events("", cursor, 99).events
        assert isinstance(event, Reset)
        assert event.snapshot.cursor == cursors[-1]
    for seen, cursor in enumerate(cursors[20:], 20):
        events = store.events("", cursor, 99).events
        values = [e.entry.value for e in events if isinstance(e, Put)]
        assert values == [str(i).encode() for i in range(seen, 30)]
    # Large values count by their size.
    before = store.list("").cursor
    store.put("large", bytes(600), None, None)
    assert len(store.events("", before, 99).events) == 1
    store.put("large", bytes(600), None, None)
    (event,) = store.events("", before, 99).events
    assert isinstance(event, Reset)
    assert db.execute("SELECT count(*) FROM log").fetchone() == (1,)
    store.close()


def test_a_watch_that_fell_behind_gets_a_reset(path: str) -> None:
    async def main() -> None:
        async with opened(path) as registry:
            watch = registry.watch("k", since=(await registry.list("")).cursor)

            def flood(store: Store) -> None:
                store._max_events = 10

            await registry._write(flood)
            for i in range(20):
                await registry.put("k", str(i).encode())
            event = await asyncio.wait_for(watch.__anext__(), 5)
            assert isinstance(event, Reset)
            assert [e.value for e in event.snapshot.entries] == [b"19"]
            await registry.put("k", b"20")
            assert isinstance(await asyncio.wait_for(watch.__anext__(), 5), Put)

    run(main)


# ---------------------------------------------------------------------------- forks and exits


def test_a_forked_child_cannot_use_the_registry_and_does_it_no_harm(path: str) -> None:
    program = textwrap.dedent(
        """
        import asyncio, gc, os, sys, warnings
        from domi_fast.registry import RegistryError
        from domi_fast.registry.sqlite import SqliteRegistry

        async def main():
            registry = SqliteRegistry(sys.argv[1])
            await registry.open()
            lease = await registry.grant(0.5)
            claim = await registry.claim(["id/0"], b"", lease)
            for _ in range(10):
                writing = asyncio.ensure_future(registry.put("k", b"x" * 1000))
                await asyncio.sleep(0)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)
                    pid = os.fork()
                if pid == 0:
                    refused = 0
                    for call in (registry.get("k"), claim.update(b""), lease.revoke(),
                                 claim.release(), registry.close()):
                        try:
                            call.send(None)
                        except RegistryError as exc:
                            refused += "fork" in str(exc)
                    writing = registry = lease = claim = None
                    gc.collect()
                    os._exit(refused)
                _, status = os.waitpid(pid, 0)
                print(os.waitstatus_to_exitcode(status))
                await writing
            await claim.update(b"still mine")
            await registry.close()

        asyncio.run(main())
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", program, path],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout.split() == ["5"] * 10
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()


def test_a_loop_that_ends_without_closing_its_registry_frees_what_it_held(path: str) -> None:
    async def leave() -> SqliteRegistry:
        registry = SqliteRegistry(path)
        await registry.open()
        await registry.claim(["id/0"], b"", await registry.grant(3600.0))
        return registry

    left = run(leave)
    assert left._worker is not None
    left._worker.join(5)
    assert not left._worker.is_alive()

    async def main() -> None:
        async with opened(path) as registry:
            assert (await registry.list("")).entries == ()

    run(main)
