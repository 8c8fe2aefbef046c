"""A pipeline of three stages: each works on the text and hands it to the next.

In one terminal:    python examples/pipeline/stages.py
In another:         python examples/pipeline/send.py "  some words "  "and a few more words"

That runs all three stages in one process. Each can have its own, or several:

    python examples/pipeline/stages.py strip &
    python examples/pipeline/stages.py title & python examples/pipeline/stages.py title &
    python examples/pipeline/stages.py count
"""

import argparse

from domi_fast import Context, Node, run

STRIP, TITLE, COUNT = 60, 61, 62


def strip(ctx: Context) -> None:
    ctx.next(ctx.data.strip())


def title(ctx: Context) -> None:
    ctx.next(ctx.data.title())


def count(ctx: Context) -> None:
    words = len(ctx.data.split())
    ctx.next(b"%b (%d words)" % (ctx.data, words))


STAGES = {"strip": (STRIP, strip), "title": (TITLE, title), "count": (COUNT, count)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Serves stages of the pipeline until Ctrl-C.",
        epilog='Then, in another terminal: python examples/pipeline/send.py "some words"',
    )
    parser.add_argument(
        "stages",
        nargs="*",
        metavar="STAGE",
        help=f"which stages this process serves: {', '.join(STAGES)} (default: all of them)",
    )
    names = parser.parse_args().stages or list(STAGES)
    if unknown := set(names) - set(STAGES):
        parser.error(f"there is no stage {', '.join(sorted(unknown))}")
    nodes = []
    for name in names:
        node = Node(name)
        node.subscribe(*STAGES[name])
        nodes.append(node)
    print(f"serving {', '.join(names)}; Ctrl-C stops it", flush=True)
    run(*nodes)


if __name__ == "__main__":
    main()
