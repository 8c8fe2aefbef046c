"""Client connections: WebSocket and TCP clients, their sessions, and their way to groups."""

from .. import AuthError
from .config import GatewayConfig, Login
from .events import CloseCode, LibraryEvent, Refusal
from .gateway import ClientMessage, Gateway

__all__ = [
    "AuthError",
    "ClientMessage",
    "CloseCode",
    "Gateway",
    "GatewayConfig",
    "LibraryEvent",
    "Login",
    "Refusal",
]
