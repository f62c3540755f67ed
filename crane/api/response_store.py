"""Where /v1/responses keeps what it may be asked for again: a bounded SQLite file.

All workers of one server share it, so it is a file and not memory of any of them; it lies in
the server's private run folder and is removed with the server's other notes when that ends.
"""

import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from crane.errors import EngineError
from crane.runtime import launch
from crane.runtime.settings import Settings

MAX_RECORDS = 4096
BUSY_S = 5.0
_TABLE = """
CREATE TABLE IF NOT EXISTS responses
    (place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, tenant TEXT, size INTEGER, record BLOB)
"""
_SIZES = "CREATE INDEX IF NOT EXISTS sizes ON responses (place, size)"
_TOTALS = "SELECT COUNT(*), SUM(size) FROM responses"
_PUT = "INSERT OR REPLACE INTO responses (id, tenant, size, record) VALUES (?, ?, ?, ?)"
_DROP_OLDEST = "DELETE FROM responses WHERE place = (SELECT MIN(place) FROM responses) RETURNING size"

log = logging.getLogger("crane.api")


class ResponseStore:
    """Records by id, the newest `max_bytes` of them (and MAX_RECORDS at most). Any process and thread may use it.

    tenant: whose a record is, "" without keys; for others it is not there.
    """

    def __init__(self, path: Path, max_bytes: int):
        self._path = path
        self._max_bytes = max_bytes

    @classmethod
    def of(cls, settings: Settings) -> "ResponseStore":
        """The store of the server that this process belongs to."""
        pid = launch.own_arbiter()
        path = launch.run_dir() / f"{pid}-{launch.process_start(pid)}.responses"
        return cls(path, settings.response_store)

    def put(self, record_id: str, tenant: str, record: bytes) -> None:
        """Keeps a record; older ones make room. What cannot be kept is logged: its answer is already out."""
        if len(record) > self._max_bytes:
            log.warning("response %s of %d bytes is larger than the store", record_id, len(record))
            return
        try:
            with self._open() as database:
                values = (record_id, tenant, len(record), record)
                database.execute(_PUT, values)
                count, size = database.execute(_TOTALS).fetchone()
                while count > MAX_RECORDS or size > self._max_bytes:
                    count, size = count - 1, size - database.execute(_DROP_OLDEST).fetchone()[0]
        except EngineError as error:
            log.error("response %s is not stored: %s", record_id, error)

    def get(self, record_id: str, tenant: str) -> bytes | None:
        """The record, or None when there is none (any more). Raises EngineError when the store is broken."""
        if not self._path.exists():
            return None
        with self._open() as database:
            query = "SELECT record FROM responses WHERE id = ? AND tenant = ?"
            row = database.execute(query, (record_id, tenant)).fetchone()
        return row and row[0]

    def delete(self, record_id: str, tenant: str) -> bool:
        """Whether there was such a record. Raises EngineError when the store is broken."""
        if not self._path.exists():
            return False
        with self._open() as database:
            query = "DELETE FROM responses WHERE id = ? AND tenant = ?"
            return database.execute(query, (record_id, tenant)).rowcount > 0

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection in a transaction. One per use: connections survive neither forks nor other threads."""
        try:
            self._path.touch(mode=0o600)
            database = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None)
            with contextlib.closing(database):
                database.execute("PRAGMA synchronous = OFF")  # it need not outlive the machine
                database.execute("BEGIN IMMEDIATE")
                database.execute(_TABLE)
                database.execute(_SIZES)
                yield database
                database.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise EngineError("internal", f"the store of responses is broken: {error}") from error
