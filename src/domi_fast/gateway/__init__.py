"""Client connections: WebSocket and TCP clients, their sessions, and their way to groups."""
