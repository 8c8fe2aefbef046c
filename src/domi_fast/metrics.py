"""A node's figures in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Protocol

from .config import NodeConfig
from .peer import STATES as RUNNING
from .peer import Peer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES = ("starting", *RUNNING.values(), "closed")

GAUGES = {"in_flight": "Requests of this node that have not ended."}
COUNTERS = {
    "frames_in": "Frames received.",
    "frames_out": "Frames sent.",
    "bytes_in": "Bytes received.",
    "bytes_out": "Bytes sent.",
    "accepts_put_off": "Times that callers were left waiting, because there were no descriptors.",
    "answers_lost": "Answers that could not be sent: the asker is gone, or its queue is full.",
    "broadcasts": "Broadcasts of zones that this gateway has passed on to its clients.",
    "broadcasts_for_lost_groups": "Broadcasts of groups that this gateway knows no more.",
    "call_errors": "Errors that a call, which has no form for them, could not be told.",
    "circuits_closed": "Circuits of peers that have answered a ping.",
    "circuits_opened": "Circuits of peers that left too many requests without an answer.",
    "client_messages_refused": "Messages of clients that no group or handler has taken.",
    "clients_cut": "Connections of clients that were closed for what they did, or failed to do.",
    "clients_refused": "Clients that authenticate has refused.",
    "clients_silent": "Connections of clients that gave no sign of life.",
    "clients_slow": "Connections of clients that were cut because too much waited for them.",
    "dropped_extend_too_long": "Messages for guests whose extend has no room for the sender.",
    "dropped_no_subscriber": "Messages of channels that nobody here subscribes to.",
    "dropped_not_negotiated": "Frames of library channels that their session has no use for.",
    "dropped_slow_peer": "Messages that were dropped because their receiver was slow.",
    "frames_for_lost_users": "Messages of zones to users that have no session here any more.",
    "gateway_handler_errors": "Handlers of a gateway's own events that raised.",
    "group_handler_errors": "Handlers of groups that raised.",
    "group_save_errors": "Snapshots of groups that could not be saved.",
    "groups_lost": "Groups that were lost with their zone while they had members here.",
    "handler_errors": "Handlers that raised.",
    "handlers_overloaded": "Messages that were refused because too many wait for their handler.",
    "handlers_without_answer": "Requests whose handler let go of them unanswered.",
    "handshakes_put_off": "Handshakes that ended without anybody's fault: there will be others.",
    "joins_overloaded": "Messages that were refused because too many wait to be joined.",
    "late_answers": "Answers to requests that had ended.",
    "lingers_cut_short": "Connections of slow peers that made room for others before their time.",
    "outbound_full": "Messages of a serial thread that found its outbound ring full.",
    "peers_silent": "Peers that were lost because nothing was heard of them.",
    "protocol_errors": "Sessions that were closed because of bad input.",
    "refused_admin_callers": "Requests to the admin pages by who may not, answered 401 or 403.",
    "refused_admin_connections": "Connections to the admin pages beyond their limit.",
    "refused_auth": "Connections whose other end could not show that it belongs here.",
    "refused_channels": "Subscriptions here to more channels than a node may have.",
    "refused_frame_limit": "Messages of this node that were larger than a frame may be.",
    "refused_guest_queue_full": "Messages for guests whose queue was full.",
    "refused_guest_requests": "Requests of guests that had too many in flight.",
    "refused_handshakes": "Connections that were closed because of too many incomplete handshakes.",
    "refused_queue_full": "Messages for peers whose queue was full.",
    "refused_rate": "Messages that were more than the limits of bytes a second let pass.",
    "refused_requests": "Requests of a node that had too many in flight.",
    "refused_sessions": "Connections beyond the limit of sessions, of all or of one address.",
    "refused_subscribers": "Guests of a channel that has as many as may subscribe to it.",
    "rejected": "Messages of this node that a peer refused.",
    "rejects_lost": "Refusals that could not be told to the sender.",
    "relay_errors": "Messages of guests that were not sent on, because a policy raised.",
    "replies_for_lost_guests": "Replies to guests that have gone.",
    "ring_full": "Messages that found the ring of serial mode full.",
    "sessions_expired": "Clients that wanted to resume a session which is over.",
    "sessions_resumed": "Sessions that were resumed.",
    "timer_errors": "Timers of serial mode that raised.",
    "zone_messages_bad": "Messages between gateways and zones that could not be read.",
}


def check_counter(name: str) -> None:
    """Raise ValueError unless the page can show a counter of this name."""
    fits = isinstance(name, str) and name.isascii() and name.isidentifier()
    if not fits or name in GAUGES:
        raise ValueError(
            f"counter {name!r}: letters, digits and '_' are allowed, no digit in front, and none "
            f"of {sorted(GAUGES)}"
        )


class Measured(Protocol):
    """What is asked of a node; its own attributes, of these names."""

    config: NodeConfig

    @property
    def id(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def registered(self) -> bool: ...
    @property
    def channels(self) -> frozenset[int]: ...
    @property
    def peers(self) -> Mapping[int, Peer]: ...
    def counters(self) -> dict[str, int]: ...
    def drops(self) -> dict[tuple[int, int], int]: ...


def rss() -> int:
    """Bytes of memory that this process has resident."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def render(node: Measured) -> str:
    """Every figure, each family with its HELP and TYPE; labelled with cluster, node and id."""
    page = _Page({"cluster": node.config.cluster, "node": node.config.name, "id": str(node.id)})
    page.gauge(
        "state",
        "1 for the state that the node is in.",
        [({"state": state}, int(state == node.state)) for state in STATES],
    )
    held = "1 while the registry's lease on the machine id holds."
    page.gauge("registered", held, [({}, int(node.registered))])
    page.gauge("peers", "Connected peers.", [({}, len(node.peers))])
    page.gauge("channels", "Channels that are subscribed here.", [({}, len(node.channels))])
    page.gauge(
        "peer_queued_bytes",
        "Bytes that wait to be sent to the peer.",
        [
            ({"peer": str(peer.id), "peer_name": peer.name}, peer.queued)
            for peer in sorted(node.peers.values(), key=lambda peer: peer.id)
        ],
    )
    page.family(
        "counter",
        "dropped_frames_total",
        "Messages that were dropped because this peer was slow (guests: -1), by channel.",
        [
            ({"peer": str(peer), "channel": str(channel)}, count)
            for (peer, channel), count in sorted(node.drops().items())
        ],
    )
    page.gauge("process_resident_memory_bytes", "Memory of the process.", [({}, rss())])
    found = dict.fromkeys((*GAUGES, *COUNTERS), 0) | node.counters()
    for name, value in found.items():
        if name in GAUGES:
            page.gauge(name, GAUGES[name], [({}, value)])
        else:
            text = COUNTERS.get(name, f"The node's counter {name}.")
            page.family("counter", f"{name}_total", text, [({}, value)])
    return page.text()


class _Page:
    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = labels
        self._lines: list[str] = []

    def gauge(self, name: str, text: str, samples: Iterable[tuple[dict[str, str], int]]) -> None:
        self.family("gauge", name, text, samples)

    def family(
        self, kind: str, name: str, text: str, samples: Iterable[tuple[dict[str, str], int]]
    ) -> None:
        self._lines += [f"# HELP domi_{name} {text}", f"# TYPE domi_{name} {kind}"]
        for labels, value in samples:
            pairs = ",".join(
                f'{label}="{_escaped(said)}"' for label, said in {**self._labels, **labels}.items()
            )
            self._lines.append(f"domi_{name}{{{pairs}}} {value}")

    def text(self) -> str:
        return "\n".join([*self._lines, ""])


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
