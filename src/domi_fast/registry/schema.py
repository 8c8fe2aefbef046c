"""The tables of a registry's database. What must hold in them is said in ``store``."""

from __future__ import annotations

from typing import Final

APPLICATION_ID: Final = 0x444F4D49
SCHEMA_VERSION: Final = 1

SCHEMA: Final = (
    """CREATE TABLE meta (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        incarnation TEXT NOT NULL,
        boot_id TEXT NOT NULL,
        revision INTEGER NOT NULL,
        log_start INTEGER NOT NULL,
        log_count INTEGER NOT NULL,
        log_bytes INTEGER NOT NULL
    )""",
    "CREATE TABLE lease (id INTEGER PRIMARY KEY, expires INTEGER NOT NULL)",
    "CREATE INDEX lease_expires ON lease (expires)",
    """CREATE TABLE entry (
        key TEXT PRIMARY KEY,
        value BLOB NOT NULL,
        epoch INTEGER NOT NULL,
        revision INTEGER NOT NULL,
        lease INTEGER,
        claim INTEGER
    )""",
    "CREATE INDEX entry_lease ON entry (lease) WHERE lease IS NOT NULL",
    "CREATE INDEX entry_claim ON entry (claim) WHERE claim IS NOT NULL",
    """CREATE TABLE waiter (
        place INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL,
        lease INTEGER NOT NULL,
        claim INTEGER NOT NULL UNIQUE,
        value BLOB NOT NULL
    )""",
    "CREATE INDEX waiter_name ON waiter (name, place)",
    "CREATE INDEX waiter_lease ON waiter (lease)",
    """CREATE TABLE log (
        revision INTEGER PRIMARY KEY,
        key TEXT NOT NULL,
        value BLOB,
        epoch INTEGER NOT NULL
    )""",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
