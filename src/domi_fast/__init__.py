"""Brokerless messaging and clustering, with a compiled hot path."""

from ._core import (
    Context,
    Frame,
    FrameReader,
    JoinContext,
    Request,
    RingBuffer,
    Timer,
    TimeWheel,
    encode_frame,
)
from .app import Master, run
from .channels import LibraryChannel
from .client import Client, connect
from .cluster import Cluster, Leader, Leadership
from .config import NodeConfig, SerialConfig
from .errors import (
    AlreadyReplied,
    AuthError,
    CircuitOpen,
    ClusterFull,
    DeadlineExceeded,
    DomiError,
    FrameError,
    LeadershipLost,
    NameTaken,
    NoSubscriber,
    Overloaded,
    PeerLost,
    RegistryError,
    RemoteError,
    RingFull,
    VersionTooOld,
)
from .events import Event, Events
from .holder import Holder
from .names import Name, Names
from .node import Node
from .peer import Peer
from .serial import Serial
from .tls import Tls
from .wings import Wing

__all__ = [
    "AlreadyReplied",
    "AuthError",
    "CircuitOpen",
    "Client",
    "Cluster",
    "ClusterFull",
    "Context",
    "DeadlineExceeded",
    "DomiError",
    "Event",
    "Events",
    "Frame",
    "FrameError",
    "FrameReader",
    "Holder",
    "JoinContext",
    "Leader",
    "Leadership",
    "LeadershipLost",
    "LibraryChannel",
    "Master",
    "Name",
    "NameTaken",
    "Names",
    "NoSubscriber",
    "Node",
    "NodeConfig",
    "Overloaded",
    "Peer",
    "PeerLost",
    "RegistryError",
    "RemoteError",
    "Request",
    "RingBuffer",
    "RingFull",
    "Serial",
    "SerialConfig",
    "TimeWheel",
    "Timer",
    "Tls",
    "VersionTooOld",
    "Wing",
    "connect",
    "encode_frame",
    "run",
]
