"""Three departments, each a node with a pace of its own, say what they know of four orders.

In one terminal:    python examples/serial_join/desk.py
In another:         python examples/serial_join/departments.py
"""

import asyncio

from domi_fast import Node

ORDERS, PAYMENTS, STOCK = 70, 71, 72


async def tell(name: str, channel: int, pause: float, messages: list[str]) -> None:
    async with Node(name) as node:
        await node.wait_subscribed(channel)
        for message in messages[:-1]:
            node.notify(channel, message.encode())
            await asyncio.sleep(pause)
        # The last is a request: its answer says that all have been dealt with.
        await node.request(channel, messages[-1].encode())


async def main() -> None:
    print("waiting for the desk ...", flush=True)
    await asyncio.gather(
        tell("orders", ORDERS, 0.0, ["order 1", "order 2", "order 3", "order 4"]),
        tell("payments", PAYMENTS, 0.1, ["paid", "declined", "paid", "paid"]),
        tell("stock", STOCK, 0.05, ["7", "3", "0", "1"]),
    )
    print("all four orders have been dealt with")


if __name__ == "__main__":
    asyncio.run(main())
