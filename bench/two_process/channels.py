"""What the workers call the channels that they talk on."""

from __future__ import annotations

PING = 50  # answered with PONG_DATA
PONG = 51  # where the replies to calls arrive
ECHO = 52  # answered with what it was sent
SINK = 53  # counted by the server
COUNTS = 54  # answered with what SINK has counted so far
FEED = 55  # published to the subscribers
EXPECT = 56  # how many messages of FEED the subscribers shall wait for
ALL_HERE = 57  # a subscriber's word that they have arrived
QUIET = 58  # subscribed to, and never sent to

PING_DATA = b"ping"
PONG_DATA = b"pong"
