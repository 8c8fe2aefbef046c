"""Says "ping" to the server in both ways: call, whose reply comes on a channel, and request.

In one terminal:    python examples/echo/server.py
In another:         python examples/echo/client.py
"""

import asyncio

from domi_fast import Node

MESSAGE = 50
REPLY = 51


async def main() -> None:
    async with Node("client") as node:
        print("waiting for a server ...", flush=True)
        await node.wait_subscribed(MESSAGE)

        # call: the reply is a message on the channel that is named. The handler of that channel
        # would do, as in the server; here the replies are iterated over instead.
        async with node.watch_channel(REPLY) as replies:
            node.call(MESSAGE, b"ping", REPLY)
            async for ctx in replies:
                print(f"call: {ctx.data.decode()} from node {ctx.sender}")
                break

        # request: the reply is what is awaited, and there is a deadline.
        answer = await node.request(MESSAGE, b"ping", timeout=1.0)
        print(f"request: {answer.decode()}")


if __name__ == "__main__":
    asyncio.run(main())
