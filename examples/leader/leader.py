"""Of several processes one leads, and counts; when it goes, another leads in its place.

In two or more terminals:    python examples/leader/leader.py

Ctrl-C hands the leadership on at once. Kill the leader instead (kill -9), and another leads within
three seconds; stop it (kill -STOP) for longer than that and let it go on (kill -CONT), and it says
that it was replaced.
"""

import asyncio
import contextlib
from itertools import count

from domi_fast import Leadership, LeadershipLost, Node


async def work(leadership: Leadership) -> None:
    """What only one process may do at a time."""
    for number in count(1):
        leadership.check()  # before each thing that must not be done twice
        print(f"  {number}", flush=True)
        await asyncio.sleep(1.0)


async def lead(node: Node) -> None:
    """Wait until this node leads, and work for as long as it does."""
    try:
        async with node.cluster.elect("count") as leadership:
            print(f"node {node.id} leads, token {leadership.token}", flush=True)
            await work(leadership)
    except LeadershipLost as lost:
        print(lost, flush=True)


async def main() -> None:
    async with Node("counter") as node:
        leader = await node.cluster.leader("count")
        print(f"node {leader.id} leads" if leader else "nobody leads yet", flush=True)
        while True:
            await lead(node)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
