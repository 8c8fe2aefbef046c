"""Calls of a Ray actor, whose cluster is of this machine alone and ends with the server.

The server is pinned before Ray is started, so all that Ray starts is on its processor too: the
actor, its daemons, and the workers that it keeps in stock.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import deque
from functools import partial
from typing import Any

from bench.peers import loads, program, ray_cluster
from bench.two_process.channels import PING_DATA
from bench.two_process.commands import check, serve

MIB = 1024 * 1024
AHEAD = 64 * MIB  # one way: so much, and so many calls, have not been waited for at a time
CALLS_AHEAD = 1_000


class Echo:
    """The actor. It imports nothing of the benchmarks, which its process might not find."""

    def __init__(self) -> None:
        self._count = self._size = 0
        self._last = b""

    def echo(self, data: bytes) -> bytes:
        return data

    def sink(self, data: bytes) -> None:
        self._count += 1
        self._size += len(data)
        self._last = data

    def told(self) -> tuple[int, int, bytes]:
        """How much has come, and the last of it; it begins anew."""
        told = self._count, self._size, self._last
        self._count = self._size = 0
        return told


async def server(given: argparse.Namespace) -> None:
    # The paths of Ray's sockets are long, and may not be longer than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray = ray_cluster.join(
            num_cpus=2, include_dashboard=False, object_store_memory=256 * MIB, _temp_dir=folder
        )
        try:
            actor = ray.remote(Echo).options(name="echo").remote()
            check(ray.get(actor.echo.remote(PING_DATA)) == PING_DATA, "a wrong answer")
            await serve({}, address=ray.get_runtime_context().gcs_address)
        finally:
            ray.shutdown()


class Client:
    def __init__(self, ray: Any) -> None:
        actor = ray.get_actor("echo")
        self._get = ray.get
        self._echo = actor.echo.remote
        self._sink = actor.sink.remote
        self._told = actor.told.remote
        self._under_way: deque[Any] = deque()

    async def ask(self, data: bytes) -> bytes:
        answer: bytes = await self._echo(data)
        return answer

    async def ask_alone(self, data: bytes) -> bytes:
        """It blocks, which is faster where nobody else has anything to do."""
        answer: bytes = self._get(self._echo(data))
        return answer

    async def calls(self, window: int, seconds: float) -> dict[str, Any]:
        """``window`` calls, and then all of their answers, and again; at least once."""
        self._batch([PING_DATA] * (window // 10))
        data = [PING_DATA] * window
        count = 0
        answers: list[bytes] = []
        began = time.perf_counter()
        while count == 0 or time.perf_counter() - began < seconds:
            answers = self._batch(data)
            count += len(answers)
        taken = time.perf_counter() - began
        loads.check_last(answers[-1])
        check(self._batch(loads.SENT) == loads.SENT, "answers were mixed up")
        return {"rate": count / taken}

    def _batch(self, data: list[bytes]) -> list[bytes]:
        under_way = [self._echo(each) for each in data]
        answers: list[bytes] = self._get(under_way, timeout=loads.PATIENCE)
        return answers

    async def send(self, data: bytes) -> None:
        under_way = self._under_way
        under_way.append(self._sink(data))
        if len(under_way) > min(CALLS_AHEAD, AHEAD // len(data)):
            self._get(under_way.popleft(), timeout=loads.PATIENCE)

    async def counted(self) -> bytes:
        self._get(list(self._under_way), timeout=loads.PATIENCE)
        self._under_way.clear()
        return loads.tally(*self._get(self._told(), timeout=loads.PATIENCE))


async def client(given: argparse.Namespace) -> None:
    ray = ray_cluster.join(address=given.address)
    try:
        work = Client(ray)
        stream = loads.Stream(work.send, work.counted)
        await serve(
            {
                **loads.asking(work.ask, work.ask_alone),
                "calls": work.calls,
                "notifies": partial(loads.notifies, lambda: stream),
            }
        )
    finally:
        ray.shutdown()


if __name__ == "__main__":
    program.main(__doc__, server=server, client=client)
