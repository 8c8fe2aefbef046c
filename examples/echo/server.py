"""Answers "ping" with "pong", until Ctrl-C.

In one terminal:    python examples/echo/server.py
In another:         python examples/echo/client.py
"""

from domi_fast import Context, Node, run

MESSAGE = 50  # channels are numbers that all nodes agree on, usually in a file of their own

node = Node("server")


@node.subscribe(MESSAGE)
def ping(ctx: Context) -> None:
    print(f"{ctx.data.decode()} from node {ctx.sender}", flush=True)
    ctx.reply(b"pong")  # the same line answers a call and a request


if __name__ == "__main__":
    print("the server waits for messages; Ctrl-C stops it", flush=True)
    run(node)
