"""What the workers call the channels that they talk on."""

from __future__ import annotations

PING = 50  # answered with what it was sent
PONG = 51  # where the replies to calls arrive
SINK = 53  # counted by the server
FEED = 54  # published to the subscribers
COUNTS = 55  # answered with what SINK has counted so far; on the same lane as it, of two
EXPECT = 56  # how many messages of FEED the subscribers shall wait for
ALL_HERE = 57  # a subscriber's word that they have arrived
QUIET = 58  # subscribed to, and asked for nothing but whether what came before it was heard
PING_LISTS = 59  # as PING, by a handler of lists
HOLD = 61  # holds up who handles it in the way that it says, and is answered with the same
# Counted by the server, each by itself, and asked on the same channel for what has come so far; on
# as many lanes, if there are four.
BULK = (64, 65, 66, 67)

PING_DATA = b"ping"
HOLD_SECONDS = 0.05
