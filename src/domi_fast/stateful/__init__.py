"""Groups with state, of users at many gateways, in zones that share them out."""

from ..gateway.events import LibraryEvent
from .group import Group, Message
from .snapshots import SnapshotStore, SqliteSnapshots
from .zone import Zone

__all__ = ["Group", "LibraryEvent", "Message", "SnapshotStore", "SqliteSnapshots", "Zone"]
