"""What each figure is to be, by its name: all targets in one place."""

from __future__ import annotations

from bench.figures import Target

FLAT = Target("ratio", 1.2, at_most=True)
TWICE = Target("ratio", 2.0, at_most=True)
MILLISECOND = Target("value", 1e-3, at_most=True)
GUARD = Target("value", 20e-9, at_most=True)

TARGETS: dict[str, Target] = {
    # Latency.
    "round-trip-one-core": Target("ratio", 1.3, at_most=True),
    "round-trip-unix": Target("ratio", 1.5, at_most=True),
    "busy-round-trip": Target("ratio", 1.3, at_most=True),
    "busy-soon-phase": MILLISECOND,
    "busy-timer-phase": MILLISECOND,
    "busy-unix": Target("ratio", 1.5, at_most=True),
    "half-load": Target("tail", 3.0, at_most=True),
    "half-load-arrivals": Target("tail", 3.0, at_most=True),
    # Rates.
    "call-reply": Target("value", 6e6, at_most=False),
    "call-reply-vs-pyzmq": Target("ratio", 10.0, at_most=False),
    "call-reply-lists": Target("value", 9e6, at_most=False),
    "requests-256": Target("value", 9e5, at_most=False),
    "requests-256-vs-nats": Target("ratio", 12.0, at_most=False),
    "requests-256-vs-grpc": Target("ratio", 100.0, at_most=False),
    "notify-16B-vs-pyzmq": Target("ratio", 6.0, at_most=False),
    "notify-1MiB": Target("ratio", 0.95, at_most=False),
    "fan-out": Target("ratio", 0.8, at_most=False),
    "gateway-broadcast": Target("ratio", 0.9, at_most=False),
    "serial-call-reply": Target("value", 4e6, at_most=False),
    "serial-lists": Target("value", 7e6, at_most=False),
    "dispatch": Target("ratio", 0.7, at_most=False),
    "wheel-schedule-cancel": Target("ratio", 8.0, at_most=False),
    # Memory and growth.
    "idle-session": Target("value", 4096, at_most=True),
    "gateway-client-memory": Target("value", 16384, at_most=True),
    "growth-nodes-trip-20": FLAT,
    "growth-nodes-trip-200": FLAT,
    "growth-nodes-call-20": FLAT,
    "growth-nodes-call-200": FLAT,
    "growth-peers-trip-1023": FLAT,
    "growth-peers-call-1023": FLAT,
    "growth-subscriptions-bytes-60000": FLAT,
    # Beside trouble.
    "flood": Target("ratio", 3.0, at_most=True),
    "crowd-nodes": TWICE,
    "crowd-guests": TWICE,
    "stopped-raise-full": TWICE,
    "stopped-raise-half": TWICE,
    "stopped-drop-oldest-full": TWICE,
    "stopped-drop-oldest-half": TWICE,
    "stopped-drop-newest-full": TWICE,
    "stopped-drop-newest-half": TWICE,
    "stopped-disconnect-full": TWICE,
    "stopped-disconnect-half": TWICE,
    "gateway-slow-client": TWICE,
    "serial-thread-waiting": Target("ratio", 1.2, at_most=True),
    "balance-slow-node": Target("ratio", 1 / 3, at_most=True),
    "breaker-cost": GUARD,
    "limits-cost": GUARD,
}

__all__ = ["TARGETS"]
