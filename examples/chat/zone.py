"""A zone of the chat, which holds rooms; several share them out among themselves.

All of the chat is started by    python examples/chat/main.py

A room is a group: its members, the last lines, and who is called what. It moves with ``save`` and
``load`` to the zone that holds it next, and after a crash comes back from its last snapshot.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import deque
from typing import Any

from domi_fast import Node, run
from domi_fast.gateway import LibraryEvent
from domi_fast.stateful import Group, Message, SqliteSnapshots, Zone

JOIN = 50  # {room}; answered with HISTORY
MESSAGE = 51  # {text}; to all members {room, number, user, name, text, time}
LEFT = 52  # nothing: who says it has left
HISTORY = 53  # {room, lines, zone, pid}
PEOPLE = 54  # {room, people: [{user, name, away}]}, whenever it changes

KEPT = 50
MOST_TEXT = 2000


class Room(Group):
    """One room. What it sends says which, as a member of several hears all of them."""

    def __init__(self, id: int, zone: Zone) -> None:
        super().__init__(id, zone)
        self.name = ""
        self.lines: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self.number = 0
        self.names: dict[int, str] = {}
        self.away: set[int] = set()
        self.handle(JOIN, self.join)
        self.handle(MESSAGE, self.say)
        self.handle(LEFT, self.leave)
        self.handle(LibraryEvent.LEAVE, self.leave)
        self.handle(LibraryEvent.AWAY, self.went_away)
        self.handle(LibraryEvent.BACK, self.came_back)

    def join(self, message: Message) -> None:
        self.name = str(json.loads(message.data)["room"])[:40]
        self.names[message.user] = message.identity.decode()
        self.away.discard(message.user)
        self.add_user(message.user)
        history = {
            "room": self.name,
            "lines": list(self.lines),
            "zone": self.zone.node.id,
            "pid": os.getpid(),
        }
        message.reply(HISTORY, json.dumps(history).encode())
        self.tell_people()

    def say(self, message: Message) -> None:
        if message.user not in self.users:
            raise PermissionError("only members may say something")
        self.number += 1
        line = {
            "room": self.name,
            "number": self.number,
            "user": str(message.user),  # beyond what a number is in JavaScript
            "name": message.identity.decode(),
            "text": str(json.loads(message.data)["text"])[:MOST_TEXT],
            "time": time.time(),
        }
        self.lines.append(line)
        self.broadcast(MESSAGE, json.dumps(line).encode())

    def leave(self, message: Message) -> None:
        self.remove_user(message.user)
        self.names.pop(message.user, None)
        self.away.discard(message.user)
        self.tell_people()

    def went_away(self, message: Message) -> None:
        self.away.add(message.user)
        self.tell_people()

    def came_back(self, message: Message) -> None:
        self.away.discard(message.user)
        self.tell_people()

    def tell_people(self) -> None:
        people = [
            {"user": str(user), "name": self.names.get(user, "?"), "away": user in self.away}
            for user in sorted(self.users)
        ]
        self.broadcast(PEOPLE, json.dumps({"room": self.name, "people": people}).encode())

    def save(self) -> bytes:
        names = {str(user): name for user, name in self.names.items() if user in self.users}
        state = {
            "name": self.name,
            "number": self.number,
            "lines": list(self.lines),
            "names": names,
            "away": sorted(self.away),
        }
        return json.dumps(state).encode()

    def load(self, state: bytes) -> None:
        found = json.loads(state)
        self.name, self.number = found["name"], found["number"]
        self.lines.extend(found["lines"])
        self.names = {int(user): name for user, name in found["names"].items()}
        self.away = set(found["away"])


class Ready:
    """Says that what was started before it runs."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def start(self) -> None:
        print(json.dumps({"node": self._node.id}), flush=True)

    async def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description="A zone of the chat: see main.py.")
    parser.add_argument("--registry", required=True, help="URL of the cluster's registry")
    parser.add_argument("--snapshots", required=True, help="file in which rooms outlive a zone")
    options = parser.parse_args()
    node = Node("chat", registry=options.registry)
    snapshots = SqliteSnapshots(options.snapshots)
    try:
        run(Zone(node, Room, snapshots=snapshots, snapshot_interval=0.2), Ready(node))
    finally:
        snapshots.close()


if __name__ == "__main__":
    main()
