"""Large messages are copied by the kernel, which takes them from the sender's bytes object and puts
them into the receiver's; all but little of them nowhere else.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support import ROOT, compile_c

pytestmark = pytest.mark.native

PROGRAM = """
    import asyncio, ctypes
    from domi_fast import Node, Serial

    SIZE, RECEIVE_SIZE, HEADER, MOST = 1 << 20, 1 << 16, 8, 1 << 16
    BEFORE_DATA = bytes.__basicsize__ - 1
    LISTS, SERIAL, THREAD, ECHO, REPLIES = 51, 52, 53, 54, 55

    class Transfer(ctypes.Structure):
        _fields_ = [(name, ctypes.c_long) for name in ("where", "size", "asked", "sent")]

    preloaded = ctypes.CDLL(None)
    transfers = (Transfer * MOST).in_dll(preloaded, "transfers")
    transfer_count = ctypes.c_long.in_dll(preloaded, "transfer_count")

    def noted(sent):
        assert transfer_count.value < MOST
        return [each for each in transfers[:transfer_count.value] if each.sent == sent]

    def by_kernel(data, sent):
        begin = id(data) + BEFORE_DATA
        end = begin + len(data)
        return sum(each.size for each in noted(sent)
                   if begin <= each.where and each.where + each.size <= end)

    def check_growth():
        # Of the first message: what a resize may copy is what has come by then.
        have, capacity, may_be_copied = -HEADER, 0, 0
        for each in noted(False):
            if have > 0 and have < SIZE and have + each.asked > capacity:
                may_be_copied += have if capacity else 0
                capacity = have + each.asked
                assert capacity <= 2 * have, (capacity, have)
            have += each.size
        assert capacity == SIZE, capacity
        assert 0 < may_be_copied < 2 * SIZE, may_be_copied

    async def main():
        arrived = asyncio.Queue()
        loop = asyncio.get_running_loop()
        one, answer = bytes([1]) * SIZE, bytes([2]) * SIZE
        many = [bytes([number]) * SIZE for number in range(3, 9)]

        def put(context):
            loop.call_soon_threadsafe(arrived.put_nowait, context.data)

        def echo(context):
            put(context)
            context.reply(answer)

        async def come(number):
            return [await asyncio.wait_for(arrived.get(), 10) for _ in range(number)]

        def check(*messages):
            for sent, received in messages:
                assert received == sent and received is not sent
                assert by_kernel(sent, True) == SIZE, by_kernel(sent, True)
                came = by_kernel(received, False)
                assert SIZE - RECEIVE_SIZE < came < SIZE, came

        async with Node("a", registry="memory://copies") as a, \\
                Node("b", registry="memory://copies") as b, \\
                Serial(b) as serial, Serial(b, thread=True) as thread:
            b.subscribe(50, put)
            b.subscribe(LISTS, lambda contexts: [put(each) for each in contexts], batch=True)
            serial.subscribe(SERIAL, put)
            thread.subscribe(THREAD, put)
            b.subscribe(ECHO, echo)
            a.subscribe(REPLIES, put)
            for channel in (50, LISTS, SERIAL, THREAD, ECHO):
                await a.wait_subscribed(channel, timeout=10)

            transfer_count.value = 0
            a.notify(50, one)
            assert await come(1) == [one]
            check_growth()
            assert await a.request(ECHO, one) == answer     # the first one the other way
            assert await come(1) == [one]

            for channel in (50, LISTS, SERIAL, THREAD):
                transfer_count.value = 0
                a.notify(channel, one)
                check((one, *await come(1)))
            transfer_count.value = 0
            a.publish(50, one)
            check((one, *await come(1)))
            transfer_count.value = 0
            a.notify_many(50, many)
            check(*zip(many, await come(len(many))))
            transfer_count.value = 0
            answered = await a.request(ECHO, one)
            check((one, *await come(1)), (answer, answered))
            transfer_count.value = 0
            a.call(ECHO, one, REPLIES)
            check(*zip((one, answer), await come(2)))
        print("whole")

    asyncio.run(main())
"""


def test_a_large_message_is_copied_by_the_kernel_alone(tmp_path: Path) -> None:
    """A preloaded library keeps the addresses of what the core sends and receives: the sender's
    are in the bytes object that the verb was given, the receiver's in that which the handler gets.
    """
    source = ROOT / "tests" / "native" / "transfers.c"
    shim = compile_c(source, tmp_path / "transfers.so", "-shared", "-fPIC", "-ldl")
    preloaded = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), str(shim)]))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        env={**os.environ, "LD_PRELOAD": preloaded},
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("whole\n", "", 0)
