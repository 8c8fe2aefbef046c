"""Brokerless messaging and clustering, with a compiled hot path."""

from ._core import (
    Context,
    Frame,
    FrameReader,
    Request,
    RingBuffer,
    Timer,
    TimeWheel,
    encode_frame,
)
from .app import Master, run
from .channels import LibraryChannel
from .client import Client, connect
from .config import NodeConfig
from .errors import (
    AlreadyReplied,
    AuthError,
    CircuitOpen,
    ClusterFull,
    DeadlineExceeded,
    DomiError,
    FrameError,
    NoSubscriber,
    Overloaded,
    PeerLost,
    RegistryError,
    RemoteError,
    RingFull,
    VersionTooOld,
)
from .mesh import Peer
from .node import Node

__all__ = [
    "AlreadyReplied",
    "AuthError",
    "CircuitOpen",
    "Client",
    "ClusterFull",
    "Context",
    "DeadlineExceeded",
    "DomiError",
    "Frame",
    "FrameError",
    "FrameReader",
    "LibraryChannel",
    "Master",
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
    "TimeWheel",
    "Timer",
    "VersionTooOld",
    "connect",
    "encode_frame",
    "run",
]
