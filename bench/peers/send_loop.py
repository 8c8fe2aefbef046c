"""The anchor of publishing to many: a loop of ``send`` in C, to each of them (``send_loop.c``)."""

from __future__ import annotations

from typing import Any

from bench.peers.c_program import Program, cpu

__all__ = ["SendLoop"]


class SendLoop(Program):
    """The program that sends, once it listens. Use it as a context manager.

    :param sockets: how many receivers will connect to :attr:`port`.
    :param frame: what each of them is sent.
    """

    def __init__(self, sockets: int, frame: bytes, cpu_sender: int | None) -> None:
        arguments = ["--sockets", str(sockets), "--frame", frame.hex(), *cpu(cpu_sender)]
        super().__init__("send_loop", *arguments)
        self._sockets = sockets

    def __enter__(self) -> SendLoop:
        super().__enter__()
        try:
            self.port = int(self.answer()["port"])
        except BaseException:
            self.end()
            raise
        return self

    def wait_connected(self) -> None:
        """Wait until all receivers are there."""
        accepted = self.answer()["accepted"]
        if accepted != self._sockets:
            raise RuntimeError(f"{accepted} of {self._sockets} receivers have connected")

    def measure(self, warm_up: int, rounds: int, frames: int) -> dict[str, Any]:
        """Sends so many frames to each, and waits until they say that all have come.

        :returns: ``sending_ns``, of the sends alone, and ``taken_ns``, until all had come, of each
            round.
        """
        self.say(f"{warm_up} {rounds} {frames}")
        return self.answer()
