"""The SQLite file that every process of the server shares: what exists, and what is wanted.

The only module that speaks SQL. It waits for SQLite's locks by `time.sleep`, which yields in a
gevent process; between BEGIN and COMMIT there is nothing that could switch greenlets.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import hmac
import json
import os
import random
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from heyvm import metrics, slugs
from heyvm.errors import (
    BadRequest,
    Conflict,
    HeyvmError,
    Misconfigured,
    NotFound,
    QuotaExceeded,
    StorageFull,
    Unavailable,
)
from heyvm.models import (
    Endpoint,
    Image,
    ImageConfig,
    Limits,
    Mount,
    Network,
    Page,
    PortMapping,
    Sandbox,
    Status,
    Tunnel,
)

T = TypeVar("T")
Row = tuple[Any, ...]

PATIENCE_S = 10.0
FIRST_PAUSE_S = 0.001
LONGEST_PAUSE_S = 0.02
KEPT_TOMBSTONES_S = 7 * 86_400.0
KEPT_KEYS_S = 86_400.0
# The keeper checkpoints; this is for when there is none. 16 MiB of pages of 4 KiB: far enough that
# a worker does not stop for an fsync.
AUTOCHECKPOINT_PAGES = 4096
WAL_LIMIT_BYTES = 64 * 1024 * 1024
BALLAST_BYTES = 1024 * 1024
DELETED = "deleted by request"  # the reason that goes without saying
APPLICATION_ID = 0x6865796F  # "heyo": tells our file from another program's database

# Applied in order, each in a transaction with its number; never changed once released.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL)",
        "INSERT INTO meta VALUES ('cursor-key', randomblob(16))",
        """CREATE TABLE sandboxes (
            id TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            slug TEXT NOT NULL,
            status TEXT NOT NULL,
            status_changed_at REAL NOT NULL,
            created_at REAL NOT NULL,
            started_at REAL,
            backend_type TEXT NOT NULL,
            image_resolved TEXT NOT NULL,
            ttl_seconds INTEGER,
            ttl_left REAL,
            expires_at REAL,
            expires_boot REAL,
            boot_id TEXT,
            error_message TEXT,
            id_base INTEGER,
            wanted TEXT,
            deleted_at REAL,
            deleted_reason TEXT,
            spec TEXT NOT NULL,
            state TEXT NOT NULL,
            visit TEXT,
            warnings TEXT NOT NULL,
            metadata TEXT NOT NULL
        )""",
        "CREATE UNIQUE INDEX live_slug ON sandboxes (slug) WHERE deleted_at IS NULL",
        "CREATE UNIQUE INDEX live_id_base ON sandboxes (id_base)"
        " WHERE deleted_at IS NULL AND id_base IS NOT NULL",
        "CREATE INDEX live_by_age ON sandboxes (created_at, id) WHERE deleted_at IS NULL",
        "CREATE INDEX due ON sandboxes (expires_boot) WHERE expires_boot IS NOT NULL",
        "CREATE INDEX buried ON sandboxes (slug, deleted_at) WHERE deleted_at IS NOT NULL",
        "CREATE INDEX unsettled ON sandboxes (id) WHERE deleted_at IS NULL AND"
        " (status IN ('provisioning', 'stopping') OR wanted IS NOT NULL OR visit IS NOT NULL)",
        """CREATE TABLE idempotency (
            key TEXT PRIMARY KEY,
            body_hash TEXT NOT NULL,
            sandbox_id TEXT NOT NULL,
            created_at REAL NOT NULL
        ) WITHOUT ROWID""",
    ),
    (
        "ALTER TABLE sandboxes ADD COLUMN status_detail TEXT",
        "ALTER TABLE sandboxes ADD COLUMN oom_kills INTEGER NOT NULL DEFAULT 0",
        """CREATE TABLE images (
            digest TEXT PRIMARY KEY,
            size_bytes INTEGER NOT NULL,
            created_at REAL NOT NULL,
            source TEXT NOT NULL,
            devices INTEGER NOT NULL,
            config TEXT NOT NULL
        ) WITHOUT ROWID""",
        # Without a digest: the name of an image that was here once.
        "CREATE TABLE image_names (name TEXT PRIMARY KEY, digest TEXT) WITHOUT ROWID",
        "CREATE INDEX named ON image_names (digest)",
        "CREATE INDEX live_by_image ON sandboxes (image_resolved) WHERE deleted_at IS NULL",
    ),
    (
        # A row outlives its endpoint, so that no subdomain is given out twice.
        """CREATE TABLE endpoints (
            subdomain TEXT PRIMARY KEY,
            sandbox_id TEXT NOT NULL,
            port INTEGER NOT NULL,
            kind TEXT NOT NULL,
            is_public INTEGER NOT NULL,
            local_port INTEGER,
            created_at REAL NOT NULL,
            warnings TEXT NOT NULL,
            ready INTEGER NOT NULL,
            deleted_at REAL
        ) WITHOUT ROWID""",
        "CREATE INDEX live_endpoints ON endpoints (sandbox_id) WHERE deleted_at IS NULL",
        "CREATE INDEX removed_endpoints ON endpoints (deleted_at) WHERE deleted_at IS NOT NULL",
        "INSERT INTO meta VALUES ('link-key', randomblob(32))",
        # Those whose open_ports were only remembered.
        """INSERT INTO endpoints
            SELECT lower(hex(randomblob(8))), sandboxes.id, value, 'open', 1, NULL, 0, '[]', 1, NULL
            FROM sandboxes, json_each(spec, '$.open_ports') WHERE deleted_at IS NULL""",
        """UPDATE sandboxes SET warnings = (SELECT json_group_array(value)
            FROM json_each(warnings)
            WHERE value != 'open_ports are recorded, but not forwarded yet')""",
    ),
    (
        """CREATE TABLE tunnels (
            id TEXT PRIMARY KEY,
            sandbox_id TEXT NOT NULL,
            kind TEXT NOT NULL,
            secret BLOB NOT NULL,
            created_at REAL NOT NULL,
            expires_at REAL,
            port INTEGER,
            udp_port INTEGER,
            ssh_public_keys TEXT NOT NULL
        ) WITHOUT ROWID""",
        "CREATE UNIQUE INDEX tunnels_of_ports ON tunnels (sandbox_id, port)",
        "CREATE INDEX expiring_tunnels ON tunnels (expires_at) WHERE expires_at IS NOT NULL",
    ),
)
HOST_IMAGE = "host"

_COLUMNS = (
    "id, name, slug, status, status_changed_at, created_at, started_at, backend_type,"
    " image_resolved, ttl_seconds, expires_at, expires_boot, boot_id, error_message, id_base,"
    " spec, state, warnings, metadata, status_detail, oom_kills,"
    " (SELECT json_group_array(json_array(port, local_port)) FROM endpoints"
    " WHERE sandbox_id = sandboxes.id AND deleted_at IS NULL AND kind = 'open'"
    " AND local_port IS NOT NULL)"
)
_ENDPOINT_COLUMNS = "subdomain, sandbox_id, port, created_at, kind, is_public, local_port, warnings"
_TUNNEL_COLUMNS = (
    "id, sandbox_id, kind, secret, created_at, expires_at, port, udp_port, ssh_public_keys"
)
_ENDPOINT = f"SELECT {_ENDPOINT_COLUMNS} FROM endpoints WHERE subdomain = ?"
_IMAGE_COLUMNS = (
    "digest, size_bytes, created_at, source, devices, config,"
    " (SELECT json_group_array(name) FROM image_names"
    " WHERE image_names.digest = images.digest)"
)
_USERS = (
    "SELECT slug FROM sandboxes WHERE image_resolved = ? AND deleted_at IS NULL ORDER BY created_at"
)
_BY_ID = f"SELECT {_COLUMNS} FROM sandboxes WHERE id = ? AND deleted_at IS NULL"
_BY_SLUG = f"SELECT {_COLUMNS} FROM sandboxes WHERE slug = ? AND deleted_at IS NULL"
_IS_UP = "status IN ('running', 'paused')"  # models.UP
# Must stay word for word what the index `unsettled` says: SQLite uses it only then.
_UNSETTLED = (
    "deleted_at IS NULL AND"
    " (status IN ('provisioning', 'stopping') OR wanted IS NOT NULL OR visit IS NOT NULL)"
)
# Leaving `running`: what is left of the time to live is kept, and the clock stands still. After a
# reboot nobody knows when the sandbox ended, so its time starts anew.
_CLOCK_STOPS = (
    "ttl_left = CASE WHEN expires_boot IS NULL THEN ttl_left"
    " WHEN boot_id = :boot_id THEN max(expires_boot - :boot, 0) ELSE ttl_seconds END,"
    " expires_boot = NULL, expires_at = NULL"
)


# For a copy on another machine, or after another boot.
_LOST = (
    "UPDATE sandboxes SET deleted_at = :now, deleted_reason = 'it was not in the backup that was"
    " restored', status = 'stopped', wanted = NULL, visit = NULL, expires_boot = NULL, spec = '{}',"
    " state = '{}', metadata = '{}', error_message = NULL, status_detail = NULL WHERE id = :id"
)
_STILL = (
    "UPDATE sandboxes SET state = '{}', visit = NULL, wanted = NULL, started_at = NULL,"
    " status_detail = NULL,"
    " error_message = CASE WHEN status IN ('stopped', 'failed') THEN error_message"
    " ELSE 'it was ' || status || ' when the backup of ' || :made || ' was made' END,"
    " status_changed_at = CASE WHEN status IN ('stopped', 'failed') THEN status_changed_at"
    " ELSE :now END,"
    " status = CASE WHEN status = 'failed' THEN status ELSE 'stopped' END,"
    " ttl_left = CASE WHEN expires_boot IS NULL THEN ttl_left"
    " ELSE max(expires_at - :made_at, 0) END, expires_boot = NULL, expires_at = NULL"
    " WHERE deleted_at IS NULL"
)


def boottime() -> float:
    """Seconds since this machine booted, time asleep included; no setting of the clock moves it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read_boot_id() -> str:
    """What names this boot of this machine (proc_sys_kernel(5), random/boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass(frozen=True)
class Clock:
    """Where the time comes from: `wall` to be read by people, `boot` to count with."""

    wall: Callable[[], float] = time.time
    boot: Callable[[], float] = boottime
    boot_id: str = field(default_factory=read_boot_id)


@dataclass(frozen=True)
class IdempotencyKey:
    """What a client sent to say that two requests are one. `body_hash` tells them apart."""

    key: str
    body_hash: str


@dataclass(frozen=True)
class Entry:
    """A sandbox with what only its lifecycle looks at.

    `wanted` (`stopped`, `deleted`, `expired`) is what somebody asks of the lock's holder; `visit`
    is the state of a box for work on a stopped one's files; `boot_id` the boot it was started in.
    """

    sandbox: Sandbox
    wanted: str | None
    visit: Mapping[str, Any] | None
    boot_id: str | None


class IdTaken(HeyvmError):
    """The id that was drawn is in use: draw another."""


class ImageGone(HeyvmError):
    """The image was removed between its being found and the sandbox's being written: look again."""


class BaseTaken(HeyvmError):
    """Somebody else took this range of ids meanwhile: allocate another."""


class Registry:
    """The registry at `path`. Any number of threads, greenlets and processes may use one each.

    Connections are opened at the first use in each process, so that one made before a fork may be
    used after it. Every method raises `Unavailable` when others keep the file busy for `patience`
    seconds, and the writing ones `StorageFull`.
    """

    def __init__(
        self, path: Path, *, clock: Clock | None = None, patience: float = PATIENCE_S
    ) -> None:
        self.path = path
        self.clock = clock or Clock()
        self._file = _File(path, patience)

    # -- reading ---------------------------------------------------------------------------------

    def find(self, ref: str) -> Sandbox | None:
        """The sandbox of this id or slug, as it is now; None if there is none (any more)."""
        if not ref.isascii():
            return None
        rows = self._file.read(_BY_ID if slugs.is_id(ref) else _BY_SLUG, (ref,))
        return self._sandbox(rows[0]) if rows else None

    def get(self, ref: str) -> Sandbox:
        """The sandbox of this id or slug; `NotFound` says when and why it went, where it did."""
        sandbox = self.find(ref)
        if sandbox is None:
            raise NotFound(self._why_not(ref))
        return sandbox

    def entry(self, sandbox_id: str) -> Entry:
        """The sandbox of this id with what its lifecycle looks at, or `NotFound`."""
        rows = self._file.read(
            f"SELECT {_COLUMNS}, wanted, visit, boot_id FROM sandboxes"
            " WHERE id = ? AND deleted_at IS NULL",
            (sandbox_id,),
        )
        if not rows:
            raise NotFound(self._why_not(sandbox_id))
        return self._entry(rows[0])

    def page(
        self,
        statuses: frozenset[Status],
        *,
        name: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Page:
        """Those in one of `statuses`, oldest first. `cursor` is a `Page.cursor` of before: nothing
        that stays is shown twice or left out, whatever comes and goes between two pages."""
        where = [f"status IN ({', '.join('?' * len(statuses))})"]
        values: list[object] = [str(status) for status in sorted(statuses)]
        if name is not None:
            where.append("name = ?")
            values.append(name.encode(errors="replace").decode())
        if cursor is not None:
            where.append("(created_at, id) > (?, ?)")
            values.extend(self._read_cursor(cursor))
        rows = self._file.read(
            f"SELECT {_COLUMNS} FROM sandboxes WHERE deleted_at IS NULL AND {' AND '.join(where)}"
            " ORDER BY created_at, id LIMIT ?",
            (*values, -1 if limit is None else limit + 1),
        )
        found = [self._sandbox(row) for row in rows[:limit]]
        more = limit is not None and len(rows) > limit and bool(found)
        return Page(found, self._cursor(found[-1]) if more else None)

    def running(self) -> Sequence[Entry]:
        """Every sandbox that is said to run, or to be paused."""
        rows = self._file.read(
            f"SELECT {_COLUMNS}, wanted, visit, boot_id FROM sandboxes"
            f" WHERE deleted_at IS NULL AND {_IS_UP}"
        )
        return [self._entry(row) for row in rows]

    def unsettled(self) -> Sequence[str]:
        """The ids of those that somebody is changing, or was when it died."""
        return [row[0] for row in self._file.read(f"SELECT id FROM sandboxes WHERE {_UNSETTLED}")]

    def known_ids(self) -> frozenset[str]:
        """The id of every sandbox that is not deleted."""
        return frozenset(
            row[0] for row in self._file.read("SELECT id FROM sandboxes WHERE deleted_at IS NULL")
        )

    def counts(self) -> Mapping[Status, int]:
        """How many sandboxes there are in each state, nought included."""
        rows = self._file.read(
            "SELECT status, count(*) FROM sandboxes WHERE deleted_at IS NULL GROUP BY status"
        )
        return dict.fromkeys(Status, 0) | {Status(status): number for status, number in rows}

    def id_bases(self) -> frozenset[int]:
        """The bases of every range of ids in use."""
        rows = self._file.read(
            "SELECT id_base FROM sandboxes WHERE deleted_at IS NULL AND id_base IS NOT NULL"
        )
        return frozenset(row[0] for row in rows)

    def changes(self) -> int:
        """A number that moves when another connection has changed anything (costs 5 µs)."""
        return int(self._file.read("PRAGMA data_version")[0][0])

    def replay(self, key: IdempotencyKey) -> str | None:
        """The id of the sandbox that `key` made, if it made one within the last day.

        `Conflict` if it came with another body, or the sandbox is gone.
        """
        rows = self._file.read(*self._key_query(key))
        return self._replayed(rows, key) if rows else None

    # -- writing ---------------------------------------------------------------------------------

    def add(
        self, sandbox: Sandbox, *, limit: int | None = None, key: IdempotencyKey | None = None
    ) -> tuple[Sandbox, bool]:
        """Write a new row, and `key` with it. An empty slug is derived from the name.

        True, with the sandbox of before, where `key` was used already. Raises `QuotaExceeded` where
        there are `limit` sandboxes, `Conflict` for a taken slug, `IdTaken`, `BaseTaken`.
        """

        def work(connection: sqlite3.Connection) -> tuple[Sandbox, bool]:
            if key is not None:
                rows = connection.execute(*self._key_query(key)).fetchall()
                if rows:
                    earlier = self._replayed(rows, key)
                    return self._sandbox(_one(connection, _BY_ID, earlier)), True
            self._admit(connection, sandbox, limit)
            slug = sandbox.slug or self._derive(connection, sandbox)
            self._insert(connection, replace(sandbox, slug=slug))
            self._match_open_ports(connection, sandbox)
            if key is not None:
                self._insert_key(connection, key, sandbox.id)
            return self._sandbox(_one(connection, _BY_ID, sandbox.id)), False

        return self._file.write(work)

    def remove(self, sandbox_id: str) -> None:
        """Forget a sandbox of which nothing was ever made, and its idempotency key."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM sandboxes WHERE id = ?", (sandbox_id,))
            self._end_endpoints(connection, sandbox_id)
            connection.execute("DELETE FROM idempotency WHERE sandbox_id = ?", (sandbox_id,))

        self._file.write(work, vital=True)

    def claim(
        self, sandbox_id: str, *, expect: frozenset[Status], become: Status
    ) -> Sandbox | None:
        """Move to a passing state, if it is in one of `expect` and nobody wants something else."""
        return self._change(
            f"status = :status, status_changed_at = :now, boot_id = :boot_id, {_CLOCK_STOPS}",
            f"status IN ({', '.join(repr(str(status)) for status in expect)})"
            " AND (wanted IS NULL OR (wanted = 'stopped' AND :status = 'stopping'))",
            sandbox_id,
            {"status": become},
        )

    def record(self, sandbox_id: str, state: Mapping[str, Any]) -> bool:
        """Keep the backend's note on a box that is coming up; False if its end is wanted."""
        return (
            self._change(
                "state = :state",
                "status = 'provisioning' AND wanted IS NULL",
                sandbox_id,
                {"state": _dump(state)},
            )
            is not None
        )

    def record_visit(self, sandbox_id: str, state: Mapping[str, Any] | None) -> bool:
        """Keep the backend's note on a visit (None: it is over); False if its end is wanted."""
        return (
            self._change(
                "visit = :visit",
                "(wanted IS NULL OR :visit IS NULL)",
                sandbox_id,
                {"visit": None if state is None else _dump(state)},
            )
            is not None
        )

    def settle_running(self, sandbox_id: str) -> Sandbox | None:
        """From provisioning to running: its time to live begins, or goes on. None if its end is
        wanted."""
        return self._change(
            "status = 'running', status_changed_at = :now, started_at = :now, boot_id = :boot_id,"
            " error_message = NULL, status_detail = NULL,"
            " expires_boot = :boot + ttl_left, expires_at = :now + ttl_left",
            "status = 'provisioning' AND wanted IS NULL",
            sandbox_id,
        )

    def settle_paused(self, sandbox_id: str, paused: bool) -> Sandbox | None:
        """From running to paused, or back; its time to live goes on. None if it was neither, or its
        end is wanted."""
        before, after = ("running", "paused") if paused else ("paused", "running")
        return self._change(
            "status = :after, status_changed_at = :now",
            "status = :before AND wanted IS NULL",
            sandbox_id,
            {"before": before, "after": after},
        )

    def detail(self, sandbox_id: str, text: str | None) -> bool:
        """Say what is being done about it just now; False if its end is wanted."""
        return (
            self._change("status_detail = :text", "wanted IS NULL", sandbox_id, {"text": text})
            is not None
        )

    def resolve(self, sandbox_id: str, change: Callable[[Sandbox], Sandbox]) -> Sandbox:
        """Give a sandbox in the making the image that `change` puts into it; see `amend`.

        `ImageGone` where that image was removed just now.
        """

        def work(connection: sqlite3.Connection) -> Sandbox | None:
            rows = connection.execute(_BY_ID + " AND wanted IS NULL", (sandbox_id,)).fetchall()
            if not rows:
                return None
            after = change(self._sandbox(rows[0]))
            _demand_image(connection, after)
            connection.execute(
                "UPDATE sandboxes SET image_resolved = :image, status_detail = NULL WHERE id = :id",
                {"image": after.image_resolved, "id": sandbox_id},
            )
            connection.execute(_amendment(False), _user_columns(after) | self._times())
            return self._sandbox(_one(connection, _BY_ID, sandbox_id))

        resolved = self._file.write(work)
        if resolved is None:
            raise NotFound(self._why_not(sandbox_id))
        return resolved

    def count_oom(self, sandbox_id: str, kills: int) -> None:
        """Add to the processes that its memory limit has ended."""
        self._change("oom_kills = oom_kills + :kills", "1", sandbox_id, {"kills": kills})

    def settle_stopped(self, sandbox_id: str, *, message: str | None = None) -> Sandbox | None:
        """Nothing of it runs any more, as was asked. None if its end is wanted."""
        return self._change(
            "status = 'stopped', status_changed_at = :now, started_at = NULL, wanted = NULL,"
            " status_detail = NULL,"
            f" error_message = coalesce(:message, error_message), {_CLOCK_STOPS}",
            "(wanted IS NULL OR wanted = 'stopped')",
            sandbox_id,
            {"message": message},
            vital=True,
        )

    def settle_failed(self, sandbox_id: str, message: str) -> Sandbox | None:
        """Nothing of it runs any more, because of `message`. None if its end is wanted."""
        return self._change(
            "status = 'failed', status_changed_at = :now, started_at = NULL, status_detail = NULL,"
            f" error_message = :message, {_CLOCK_STOPS}",
            "wanted IS NULL",
            sandbox_id,
            {"message": message},
            vital=True,
        )

    def want(self, sandbox_id: str, wanted: str, *, reason: str | None = None) -> Entry:
        """Tell whoever changes the sandbox that it is to be `stopped` or `deleted`.

        From then on nobody can record a box for it, settle it as running or renew it. Of two wishes
        the more final one stays. The entry is as it is after that: what it names is all there is.
        """
        self._change(
            "wanted = CASE WHEN wanted IN ('deleted', 'expired') THEN wanted ELSE :wanted END,"
            " deleted_reason = coalesce(deleted_reason, :reason),"
            " status_changed_at = CASE WHEN status IN ('stopped', 'failed', 'stopping')"
            " THEN status_changed_at ELSE :now END,"
            " status = CASE WHEN status IN ('stopped', 'failed') THEN status ELSE 'stopping' END,"
            f" {_CLOCK_STOPS}",
            "1",
            sandbox_id,
            {"wanted": wanted, "reason": reason},
            vital=True,
        )
        return self.entry(sandbox_id)

    def expire_due(self) -> Sequence[str]:
        """Mark those whose time is over; their ids. A renewal before wins, one after is refused."""
        due = f"{_IS_UP} AND expires_boot <= :boot AND boot_id = :boot_id AND deleted_at IS NULL"
        times = self._times()
        if not self._file.read(f"SELECT 1 FROM sandboxes WHERE {due} LIMIT 1", times):
            return []
        update = (
            "UPDATE sandboxes SET wanted = 'expired', deleted_reason = 'expired',"
            f" status = 'stopping', status_changed_at = :now, {_CLOCK_STOPS} WHERE {due}"
            " RETURNING id"
        )
        return self._file.write(
            lambda connection: [row[0] for row in connection.execute(update, times).fetchall()],
            vital=True,
        )

    def bury(self, sandbox_id: str) -> None:
        """Every trace of it is gone. The row stays a week, to say when and why."""
        self._change(
            "deleted_at = :now, deleted_reason = coalesce(deleted_reason, :reason),"
            " status = 'stopped', wanted = NULL, visit = NULL, expires_boot = NULL,"
            # Not needed to say when and why, and it may hold secrets.
            " spec = '{}', state = '{}', metadata = '{}', error_message = NULL,"
            " status_detail = NULL",
            "1",
            sandbox_id,
            {"reason": DELETED},
            vital=True,
            and_then=lambda connection: self._end_endpoints(connection, sandbox_id),
        )

    def amend(
        self, sandbox_id: str, change: Callable[[Sandbox], Sandbox], *, renew: bool = False
    ) -> Sandbox:
        """Replace what a user sets (name, spec, metadata, warnings) by what `change` makes of it.

        `change` runs inside the transaction: it must be pure. `renew`: the result's `ttl_seconds`
        counts from now. `NotFound` if it is gone or about to go.
        """

        def work(connection: sqlite3.Connection) -> Sandbox | None:
            rows = connection.execute(
                _BY_ID + " AND (wanted IS NULL OR wanted = 'stopped')", (sandbox_id,)
            ).fetchall()
            if not rows:
                return None
            after = change(self._sandbox(rows[0]))
            connection.execute(_amendment(renew), _user_columns(after) | self._times())
            self._match_open_ports(connection, after)
            return self._sandbox(_one(connection, _BY_ID, sandbox_id))

        amended = self._file.write(work)
        if amended is None:
            raise NotFound(self._why_not(sandbox_id))
        return amended

    def agree(self, run_dir: Path) -> None:
        """See that whoever uses this registry keeps locks and sockets in the same directory.

        `Misconfigured` while another one holds what is alive: two servers would not see each
        other's locks. A directory that nothing needs any more is forgotten.
        """
        if self._run_dir_rows() == [(str(run_dir),)]:
            return
        self._file.write(lambda connection: self._move_to(connection, str(run_dir)))

    def _run_dir_rows(self) -> list[Row]:
        return self._file.read("SELECT value FROM meta WHERE key = 'run-dir'")

    def _move_to(self, connection: sqlite3.Connection, run_dir: str) -> None:
        rows = connection.execute("SELECT value FROM meta WHERE key = 'run-dir'").fetchall()
        alive = connection.execute(
            "SELECT count(*) FROM sandboxes WHERE deleted_at IS NULL AND boot_id = ?"
            f" AND (status = 'running' OR ({_UNSETTLED}))",
            (self.clock.boot_id,),
        ).fetchall()[0][0]
        if rows and rows[0][0] != run_dir and alive:
            raise Misconfigured(
                f"{alive} sandboxes of {self.path.parent} are alive with their sockets in"
                f" {rows[0][0]}: set HEYVM_RUN_DIR={rows[0][0]} (it is {run_dir} here)"
            )
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('run-dir', ?)", (run_dir,))

    # -- the keeper's chores ---------------------------------------------------------------------

    def purge(self) -> None:
        """Forget tombstones and idempotency keys that are old enough."""
        now = self.clock.wall()

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "DELETE FROM sandboxes WHERE deleted_at < ?", (now - KEPT_TOMBSTONES_S,)
            )
            connection.execute("DELETE FROM idempotency WHERE created_at < ?", (now - KEPT_KEYS_S,))

        self._file.write(work)

    def checkpoint(self) -> None:
        """Move what can be moved from the WAL into the file, so that no request has to."""
        self._file.checkpoint()

    def keep_ballast(self) -> None:
        """Hold some disk that the vital writes may have when there is no other."""
        self._file.keep_ballast()

    def snapshot(self, path: Path) -> None:
        """Write the registry as it is at one moment into a new file, while others go on."""
        self._file.snapshot(path)

    def settle_restored(
        self, sandboxes: frozenset[str], images: frozenset[str], made_at: float
    ) -> Sequence[str]:
        """Make of a copy of `made_at` the registry of a server that has stopped: nothing runs, and
        what is not among `sandboxes` (ids) and `images` (digests) is gone, and every ticket. The
        slugs of those sandboxes."""
        at = self._times() | {"made_at": made_at, "made": rfc3339(made_at)}

        def work(connection: sqlite3.Connection) -> Sequence[str]:
            rows = connection.execute(
                "SELECT id, slug, wanted FROM sandboxes WHERE deleted_at IS NULL"
            ).fetchall()
            goners = [
                (row[0], row[1])
                for row in rows
                if row[0] not in sandboxes or row[2] in ("deleted", "expired")
            ]
            for sandbox_id, _ in goners:
                connection.execute(_LOST, at | {"id": sandbox_id})
                self._end_endpoints(connection, sandbox_id)
            connection.execute(_STILL, at)
            # One that was revoked since would be a way in again, and nobody would know.
            connection.execute("DELETE FROM tunnels")
            connection.execute("DELETE FROM meta WHERE key = 'run-dir'")
            _forget_images(connection, images)
            return [slug for _, slug in goners]

        return self._file.write(work)

    def open(self) -> None:
        """Open and migrate now, so that `Misconfigured` is raised at start."""
        self._file.open()

    def close(self) -> None:
        """Close what this process opened."""
        self._file.close()

    # -- images ----------------------------------------------------------------------------------

    def images(self) -> Sequence[Image]:
        """Every image, those without a name too, oldest first."""
        rows = self._file.read(f"SELECT {_IMAGE_COLUMNS} FROM images ORDER BY created_at, digest")
        return [_image(row) for row in rows]

    def image(self, name: str) -> Image | None:
        """The image of this name or digest."""
        rows = self._file.read(
            f"SELECT {_IMAGE_COLUMNS} FROM images"
            " WHERE digest = coalesce((SELECT digest FROM image_names WHERE name = :name), :name)",
            {"name": name},
        )
        return _image(rows[0]) if rows else None

    def had_image(self, name: str) -> bool:
        """Whether an image of this name is here, or was once."""
        return bool(self._file.read("SELECT 1 FROM image_names WHERE name = ?", (name,)))

    def add_image(self, image: Image) -> Image:
        """Write an image, its files being in their place, and give it its `names`, which others may
        have had. One that is here already keeps what it has and gets the names as well."""

        def work(connection: sqlite3.Connection) -> Image:
            connection.execute(
                "INSERT OR IGNORE INTO images VALUES (?, ?, ?, ?, ?, ?)",
                (
                    image.digest,
                    image.size_bytes,
                    image.created_at,
                    image.source,
                    image.devices,
                    _dump(vars(image.config)),
                ),
            )
            for name in image.names:
                connection.execute(
                    "INSERT OR REPLACE INTO image_names VALUES (?, ?)", (name, image.digest)
                )
            query = f"SELECT {_IMAGE_COLUMNS} FROM images WHERE digest = ?"
            return _image(_one(connection, query, image.digest))

        return self._file.write(work)

    def remove_image(self, name: str) -> str | None:
        """Take away a name, and the image with its last one: the digest of what is to be erased.

        By digest, all its names. `Conflict` naming the sandboxes that use it where that would be
        its end, `NotFound` where there is none.
        """

        def work(connection: sqlite3.Connection) -> str | None:
            rows = connection.execute(
                "SELECT digest, 1 FROM image_names WHERE name = :name AND digest IS NOT NULL"
                " UNION ALL SELECT digest, 0 FROM images WHERE digest = :name",
                {"name": name},
            ).fetchall()
            if not rows:
                raise NotFound(f"Image not found: {name}")
            digest, by_name = rows[0]
            rest = "SELECT 1 FROM image_names WHERE digest = ?" + (
                " AND name != ?" if by_name else " AND 0"
            )
            others = connection.execute(rest, (digest, name) if by_name else (digest,)).fetchall()
            users = _users(connection, digest)
            if users and not others:
                raise Conflict(f"image {name!r} is used by {_enumerated(users)}: delete them first")
            where = "name = ?" if by_name else "digest = ?"
            connection.execute(f"UPDATE image_names SET digest = NULL WHERE {where}", (name,))
            if others:
                return None
            connection.execute("DELETE FROM images WHERE digest = ?", (digest,))
            return str(digest)

        return self._file.write(work, vital=True)

    def prune_images(self, *, nameless: bool) -> Sequence[Image]:
        """Take away every image that no sandbox uses (`nameless`: of those, only the ones without a
        name); what is to be erased."""

        def work(connection: sqlite3.Connection) -> Sequence[Image]:
            rows = connection.execute(f"SELECT {_IMAGE_COLUMNS} FROM images").fetchall()
            goners = [
                image
                for image in map(_image, rows)
                if not (nameless and image.names) and not _users(connection, image.digest)
            ]
            for image in goners:
                connection.execute("DELETE FROM images WHERE digest = ?", (image.digest,))
                connection.execute(
                    "UPDATE image_names SET digest = NULL WHERE digest = ?", (image.digest,)
                )
            return goners

        return self._file.write(work, vital=True)

    def image_users(self, digest: str) -> Sequence[str]:
        """The slugs of the sandboxes that use this image."""
        return [row[0] for row in self._file.read(_USERS, (digest,))]

    # -- endpoints -------------------------------------------------------------------------------

    def endpoints(self, sandbox_id: str | None = None) -> Sequence[Endpoint]:
        """Those of a sandbox, or all, oldest first. One that is still being made is not shown."""
        where, values = ("", ()) if sandbox_id is None else (" AND sandbox_id = ?", (sandbox_id,))
        rows = self._file.read(
            f"SELECT {_ENDPOINT_COLUMNS} FROM endpoints WHERE deleted_at IS NULL AND ready{where}"
            " ORDER BY created_at, subdomain",
            values,
        )
        return [_endpoint(row) for row in rows]

    def endpoint(self, subdomain: str) -> Endpoint | None:
        """The proxy endpoint of this name, wherever it is in its making."""
        query = f"{_ENDPOINT} AND deleted_at IS NULL AND kind = 'proxy'"
        rows = self._file.read(query, (subdomain,)) if subdomain.isascii() else []
        return _endpoint(rows[0]) if rows else None

    def add_endpoint(self, endpoint: Endpoint, *, limit: int, ready: bool = False) -> None:
        """Write its row, not to be shown before `settle_endpoint` unless it is `ready`.

        `QuotaExceeded` where the sandbox has `limit` of them, `NotFound` where it is gone or about
        to go, `IdTaken` where the subdomain was ever in use.
        """

        def work(connection: sqlite3.Connection) -> None:
            self._demand_staying(connection, endpoint.sandbox_id)
            there = connection.execute(
                "SELECT count(*) FROM endpoints WHERE sandbox_id = ? AND deleted_at IS NULL",
                (endpoint.sandbox_id,),
            ).fetchall()[0][0]
            if there >= limit:
                raise QuotaExceeded(f"it has {there} endpoints and open ports: delete some")
            if connection.execute(_ENDPOINT, (endpoint.subdomain,)).fetchall():
                raise IdTaken("this subdomain was in use")
            _insert_endpoint(connection, endpoint, ready)

        self._file.write(work)

    def settle_endpoint(self, subdomain: str) -> Endpoint:
        """Show it from now on."""
        return self._change_endpoint("ready = 1", subdomain)

    def set_public(self, subdomain: str, is_public: bool) -> Endpoint:
        """Say who may use it."""
        return self._change_endpoint("is_public = :is_public", subdomain, {"is_public": is_public})

    def set_local_port(self, subdomain: str, port: int, warning: str | None = None) -> Endpoint:
        """Write which TCP port of 127.0.0.1 it has, and what to know about that."""
        return self._change_endpoint(
            "local_port = :port, warnings = :warnings",
            subdomain,
            {"port": port, "warnings": _dump([warning] if warning else [])},
        )

    def remove_endpoint(self, subdomain: str) -> None:
        """It is there no longer; its subdomain is never given out again."""
        self._file.write(
            lambda connection: connection.execute(
                "UPDATE endpoints SET deleted_at = ?, local_port = NULL WHERE subdomain = ?",
                (self.clock.wall(), subdomain),
            ),
            vital=True,
        )

    def unready_endpoints(self) -> Sequence[Endpoint]:
        """Those that somebody is making, or was when it died."""
        rows = self._file.read(
            f"SELECT {_ENDPOINT_COLUMNS} FROM endpoints WHERE deleted_at IS NULL AND NOT ready"
        )
        return [_endpoint(row) for row in rows]

    def removed_endpoints(self, since: float) -> Sequence[Endpoint]:
        """Those that were removed after this moment, of sandboxes that are still there."""
        rows = self._file.read(
            f"SELECT {_ENDPOINT_COLUMNS} FROM endpoints WHERE deleted_at > ? AND EXISTS"
            " (SELECT 1 FROM sandboxes WHERE id = sandbox_id AND sandboxes.deleted_at IS NULL)",
            (since,),
        )
        return [_endpoint(row) for row in rows]

    def link_key(self) -> bytes:
        """What links and cookies of private endpoints are signed with: 32 bytes, for ever."""
        return bytes(self._file.read("SELECT value FROM meta WHERE key = 'link-key'")[0][0])

    def _change_endpoint(
        self, assignment: str, subdomain: str, values: Mapping[str, object] | None = None
    ) -> Endpoint:
        update = (
            f"UPDATE endpoints SET {assignment} WHERE subdomain = :subdomain"
            f" AND deleted_at IS NULL RETURNING {_ENDPOINT_COLUMNS}"
        )
        bound = {"subdomain": subdomain} | dict(values or {})
        rows = self._file.write(
            lambda connection: connection.execute(update, bound).fetchall(), vital=True
        )
        if not rows:
            raise NotFound(f"there is no endpoint {subdomain!r} (any more)")
        return _endpoint(rows[0])

    def _demand_staying(self, connection: sqlite3.Connection, sandbox_id: str) -> None:
        query = _BY_ID + " AND (wanted IS NULL OR wanted = 'stopped')"
        if not _any(connection, query, sandbox_id):
            raise NotFound(f"Sandbox not found: {sandbox_id}")

    def _match_open_ports(self, connection: sqlite3.Connection, sandbox: Sandbox) -> None:
        """One endpoint of kind `open` for each of its open ports, and none besides."""
        rows = connection.execute(
            "SELECT port, subdomain FROM endpoints WHERE sandbox_id = ? AND kind = 'open'",
            (sandbox.id,),
        ).fetchall()
        there = dict(rows)
        for port in there.keys() - set(sandbox.open_ports):
            connection.execute("DELETE FROM endpoints WHERE subdomain = ?", (there[port],))
        for port in sorted(set(sandbox.open_ports) - there.keys()):
            name = os.urandom(8).hex()
            endpoint = Endpoint(name, sandbox.id, port, self.clock.wall(), kind="open")
            _insert_endpoint(connection, endpoint, ready=True)

    def _end_endpoints(self, connection: sqlite3.Connection, sandbox_id: str) -> None:
        connection.execute(
            "DELETE FROM endpoints WHERE sandbox_id = ? AND kind != 'proxy'", (sandbox_id,)
        )
        connection.execute(
            "UPDATE endpoints SET deleted_at = ?, local_port = NULL"
            " WHERE sandbox_id = ? AND deleted_at IS NULL",
            (self.clock.wall(), sandbox_id),
        )
        connection.execute("DELETE FROM tunnels WHERE sandbox_id = ?", (sandbox_id,))

    # -- tunnels ---------------------------------------------------------------------------------

    def tunnels(self, sandbox_id: str | None = None) -> Sequence[Tunnel]:
        """Those of a sandbox, or all, oldest first; none that has expired."""
        where, values = ("", ()) if sandbox_id is None else (" AND sandbox_id = ?", (sandbox_id,))
        rows = self._file.read(
            f"SELECT {_TUNNEL_COLUMNS} FROM tunnels"
            f" WHERE (expires_at IS NULL OR expires_at > ?){where} ORDER BY created_at, id",
            (self.clock.wall(), *values),
        )
        return [_tunnel(row) for row in rows]

    def add_tunnel(self, tunnel: Tunnel, *, limit: int) -> Tunnel:
        """Write its row. One to a port that has one already is that one.

        `QuotaExceeded` where the sandbox has `limit` of them, `NotFound` where it is gone or about
        to go.
        """

        def work(connection: sqlite3.Connection) -> Tunnel:
            self._demand_staying(connection, tunnel.sandbox_id)
            rows = connection.execute(
                f"SELECT {_TUNNEL_COLUMNS} FROM tunnels WHERE sandbox_id = ? AND port = ?",
                (tunnel.sandbox_id, tunnel.port),
            ).fetchall()
            if rows:
                return _tunnel(rows[0])
            there = connection.execute(
                "SELECT count(*) FROM tunnels WHERE sandbox_id = ?"
                " AND (expires_at IS NULL OR expires_at > ?)",
                (tunnel.sandbox_id, tunnel.created_at),
            ).fetchall()[0][0]
            if there >= limit:
                raise QuotaExceeded(f"it has {there} shell sessions and tunnels: end some")
            connection.execute(
                f"INSERT INTO tunnels ({_TUNNEL_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    tunnel.id,
                    tunnel.sandbox_id,
                    tunnel.kind,
                    tunnel.secret,
                    tunnel.created_at,
                    tunnel.expires_at,
                    tunnel.port,
                    tunnel.udp_port,
                    _dump(list(tunnel.ssh_public_keys)),
                ),
            )
            return tunnel

        return self._file.write(work)

    def set_udp_port(self, tunnel_id: str, port: int) -> None:
        """Write where its endpoint listens: there it will be sought again."""
        self._file.write(
            lambda connection: connection.execute(
                "UPDATE tunnels SET udp_port = ? WHERE id = ?", (port, tunnel_id)
            )
        )

    def remove_tunnel(self, tunnel_id: str) -> bool:
        """Whether it was there."""
        return self._file.write(
            lambda connection: (
                connection.execute("DELETE FROM tunnels WHERE id = ?", (tunnel_id,)).rowcount > 0
            ),
            vital=True,
        )

    def remove_expired_tunnels(self) -> int:
        """How many they were. Reads only, where none has expired."""
        where, now = "WHERE expires_at <= ?", (self.clock.wall(),)
        if not self._file.read(f"SELECT 1 FROM tunnels {where} LIMIT 1", now):
            return 0
        return self._file.write(
            lambda connection: connection.execute(f"DELETE FROM tunnels {where}", now).rowcount,
            vital=True,
        )

    # -- rows ------------------------------------------------------------------------------------

    def _sandbox(self, row: Row) -> Sandbox:
        spec = json.loads(row[15])
        return Sandbox(
            id=row[0],
            name=row[1],
            slug=row[2],
            status=Status(row[3]),
            status_changed_at=row[4],
            created_at=row[5],
            started_at=row[6],
            backend_type=row[7],
            image_resolved=row[8],
            ttl_seconds=row[9],
            expires_at=self._expires_at(row[10], row[11], row[12]),
            error_message=row[13],
            id_base=row[14],
            state=_load(row[16], {}),
            warnings=tuple(_load(row[17], ())),
            metadata=_load(row[18], {}),
            status_detail=row[19],
            oom_kills=row[20],
            port_mappings=_mappings(row[21]),
            **_spec_fields(spec),
        )

    def _entry(self, row: Row) -> Entry:
        wanted, visit, boot_id = row[-3:]
        return Entry(
            self._sandbox(row), wanted, None if visit is None else json.loads(visit), boot_id
        )

    def _expires_at(
        self, written: float | None, expires_boot: float | None, boot_id: str | None
    ) -> float | None:
        """The moment that was written, unless the clock was set since then."""
        if written is None or expires_boot is None or boot_id != self.clock.boot_id:
            return written
        counted = self.clock.wall() + expires_boot - self.clock.boot()
        return written if abs(counted - written) < 1.0 else counted

    def _why_not(self, ref: str) -> str:
        where = "id = ?" if slugs.is_id(ref) else "slug = ? AND deleted_at IS NOT NULL"
        rows = (
            self._file.read(
                "SELECT wanted, deleted_at, deleted_reason, ttl_seconds, status_changed_at"
                f" FROM sandboxes WHERE {where} ORDER BY deleted_at DESC LIMIT 1",
                (ref,),
            )
            if ref.isascii()
            else []
        )
        if not rows:
            return f"Sandbox not found: {ref}"
        wanted, deleted_at, reason, ttl, changed_at = rows[0]
        when = rfc3339(deleted_at or changed_at)
        if "expired" in (wanted, reason):
            return f"sandbox {ref!r} expired at {when}: its ttl_seconds was {ttl}"
        why = "" if reason in (None, DELETED) else f" ({reason})"
        return f"sandbox {ref!r} was deleted at {when}{why}"

    def _admit(self, connection: sqlite3.Connection, sandbox: Sandbox, limit: int | None) -> None:
        if limit is not None:
            count = connection.execute(
                "SELECT count(*) FROM sandboxes WHERE deleted_at IS NULL"
            ).fetchall()[0][0]
            if count >= limit:
                raise QuotaExceeded(
                    f"there are {count} sandboxes and HEYVM_MAX_SANDBOXES is {limit}:"
                    " delete one, or raise the limit"
                )
        if _any(connection, "SELECT 1 FROM sandboxes WHERE id = ?", sandbox.id):
            raise IdTaken(f"the id {sandbox.id} is taken")
        if sandbox.slug and _any(connection, _BY_SLUG, sandbox.slug):
            raise Conflict(f"the slug {sandbox.slug!r} is taken: choose another, or leave it out")
        _demand_image(connection, sandbox)
        if sandbox.id_base is not None and _any(
            connection,
            "SELECT 1 FROM sandboxes WHERE deleted_at IS NULL AND id_base = ?",
            sandbox.id_base,
        ):
            raise BaseTaken(f"the ids from {sandbox.id_base} are taken")

    def _derive(self, connection: sqlite3.Connection, sandbox: Sandbox) -> str:
        def taken(prefix: str) -> frozenset[str]:
            rows = connection.execute(
                "SELECT slug FROM sandboxes WHERE deleted_at IS NULL AND slug >= ? AND slug < ?",
                (prefix, prefix + "\x7f"),
            ).fetchall()
            return frozenset(row[0] for row in rows)

        base = slugs.slugify(sandbox.name) if sandbox.name != sandbox.id else ""
        return slugs.first_free(base, taken) if base else sandbox.id

    def _insert(self, connection: sqlite3.Connection, sandbox: Sandbox) -> None:
        columns = _user_columns(sandbox) | {
            "slug": sandbox.slug,
            "status": sandbox.status,
            "status_changed_at": sandbox.status_changed_at,
            "created_at": sandbox.created_at,
            "backend_type": sandbox.backend_type,
            "image_resolved": sandbox.image_resolved,
            "ttl_left": sandbox.ttl_seconds,
            "boot_id": self.clock.boot_id,
            "id_base": sandbox.id_base,
            "state": _dump(sandbox.state),
        }
        connection.execute(
            f"INSERT INTO sandboxes ({', '.join(columns)})"
            f" VALUES ({', '.join(':' + column for column in columns)})",
            columns,
        )

    # -- idempotency -----------------------------------------------------------------------------

    def _key_query(self, key: IdempotencyKey) -> tuple[str, tuple[object, ...]]:
        return (
            "SELECT body_hash, sandbox_id, sandboxes.id FROM idempotency"
            " LEFT JOIN sandboxes ON sandboxes.id = sandbox_id AND deleted_at IS NULL"
            " WHERE key = ? AND idempotency.created_at >= ?",
            (key.key, self.clock.wall() - KEPT_KEYS_S),
        )

    def _replayed(self, rows: Sequence[Row], key: IdempotencyKey) -> str:
        body_hash, sandbox_id, there = rows[0]
        if body_hash != key.body_hash:
            raise Conflict(
                f"the Idempotency-Key {key.key!r} was used with another body: use a new one"
            )
        if there is None:
            raise Conflict(
                f"the Idempotency-Key {key.key!r} made sandbox {sandbox_id}, which is gone:"
                " use a new one"
            )
        return str(sandbox_id)

    def _insert_key(
        self, connection: sqlite3.Connection, key: IdempotencyKey, sandbox_id: str
    ) -> None:
        connection.execute(
            "INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?)",
            (key.key, key.body_hash, sandbox_id, self.clock.wall()),
        )

    # -- cursors ---------------------------------------------------------------------------------

    def _cursor(self, last: Sandbox) -> str:
        position = struct.pack(">d", last.created_at) + last.id.encode()
        return base64.urlsafe_b64encode(self._seal(position) + position).decode().rstrip("=")

    def _read_cursor(self, cursor: str) -> tuple[float, str]:
        try:
            sealed = base64.urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4))
            seal, position = sealed[:8], sealed[8:]
            if not hmac.compare_digest(seal, self._seal(position)):
                raise ValueError("not one of ours")
            return struct.unpack(">d", position[:8])[0], position[8:].decode()
        except (ValueError, binascii.Error, struct.error) as error:
            raise BadRequest(
                "the cursor is not one that this server gave: begin again without it"
            ) from error

    def _seal(self, position: bytes) -> bytes:
        key = self._file.read("SELECT value FROM meta WHERE key = 'cursor-key'")[0][0]
        return hmac.digest(key, position, hashlib.sha256)[:8]

    # -- the machinery ---------------------------------------------------------------------------

    def _times(self) -> dict[str, object]:
        return {
            "now": self.clock.wall(),
            "boot": self.clock.boot(),
            "boot_id": self.clock.boot_id,
        }

    def _change(
        self,
        assignments: str,
        condition: str,
        sandbox_id: str,
        values: Mapping[str, object] | None = None,
        *,
        vital: bool = False,
        and_then: Callable[[sqlite3.Connection], None] | None = None,
    ) -> Sandbox | None:
        """One conditional UPDATE; the sandbox as it is after it, or None if it did not apply.
        `and_then` is done in the same transaction where it did."""
        update = (
            f"UPDATE sandboxes SET {assignments}"
            f" WHERE id = :id AND deleted_at IS NULL AND {condition} RETURNING {_COLUMNS}"
        )
        bound = {"id": sandbox_id} | self._times() | dict(values or {})

        def work(connection: sqlite3.Connection) -> list[Row]:
            rows = connection.execute(update, bound).fetchall()
            if rows and and_then is not None:
                and_then(connection)
            return rows

        rows = self._file.write(work, vital=vital)
        return self._sandbox(rows[0]) if rows else None


class _File:
    """SQLite's side of a registry: connections, patience, transactions, migrations, full disks."""

    def __init__(self, path: Path, patience: float) -> None:
        self.path = path
        self._patience = patience
        self._ballast = path.with_name(path.name + ".ballast")
        self._carried_over: list[object] = []
        self._start_afresh()

    def open(self) -> None:
        self.read("PRAGMA data_version")
        self._writer()

    def close(self) -> None:
        for connection in self._connections().values():
            connection.close()
        self._open.clear()

    def read(self, query: str, values: Sequence[object] | Mapping[str, object] = ()) -> list[Row]:
        deadline = self._deadline()

        def act() -> list[Row]:
            connection = self._connections().get("reader") or self._connect("reader", deadline)
            with self._read_lock:
                return connection.execute(query, values).fetchall()

        return self._patiently(deadline, act)

    def write(self, work: Callable[[sqlite3.Connection], T], *, vital: bool = False) -> T:
        """Run `work` in one transaction. It must not do I/O of its own, nor sleep.

        `vital`: what frees disk or says the truth about a sandbox may have the ballast.
        """
        try:
            return self._transact(work)
        except StorageFull:
            if not vital or not self._drop_ballast():
                raise
        return self._transact(work)

    def snapshot(self, path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        target = sqlite3.connect(path, isolation_level=None)
        try:
            source = self._new_connection()
            try:
                # In one step: others may write, and it never has to begin again.
                self._patiently(self._deadline(), lambda: source.backup(target, pages=-1))
            finally:
                source.close()
        finally:
            target.close()

    def checkpoint(self) -> None:
        with self._turn():
            self._patiently(
                self._deadline(),
                lambda: self._writer().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall(),
            )

    def keep_ballast(self) -> None:
        if self._ballast.exists():
            return
        descriptor = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, BALLAST_BYTES)
        except OSError:
            self._ballast.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def _transact(self, work: Callable[[sqlite3.Connection], T]) -> T:
        deadline = self._deadline()
        with self._turn():
            connection = self._writer()
            try:
                self._patiently(deadline, lambda: connection.execute("BEGIN IMMEDIATE"))
                result = work(connection)
                self._patiently(deadline, lambda: connection.execute("COMMIT"))
                return result
            except sqlite3.Error as error:
                raise self._translated(error) from error
            finally:
                if connection.in_transaction:
                    with suppress(sqlite3.Error):
                        connection.execute("ROLLBACK")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The one writing connection is for one at a time."""
        if not self._write_lock.acquire(timeout=self._patience):
            raise Unavailable("the registry is busy: try again")
        try:
            yield
        finally:
            self._write_lock.release()

    def _patiently(self, deadline: float, act: Callable[[], T]) -> T:
        """Do `act` again while others are in the way. SQLite's own wait sleeps in C: it would stop
        every greenlet of the process."""
        try:
            return act()
        except sqlite3.Error as error:
            if not _is_busy(error):
                raise self._translated(error) from error
        began = time.monotonic()
        try:
            return self._more_patiently(deadline, act)
        finally:
            metrics.here().waited(time.monotonic() - began)

    def _more_patiently(self, deadline: float, act: Callable[[], T]) -> T:
        pause = FIRST_PAUSE_S
        while True:
            if time.monotonic() >= deadline:
                raise Unavailable("the registry is busy: try again")
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, LONGEST_PAUSE_S)
            metrics.here().retried()
            try:
                return act()
            except sqlite3.Error as error:
                if not _is_busy(error):
                    raise self._translated(error) from error

    def _deadline(self) -> float:
        return time.monotonic() + self._patience

    def _writer(self) -> sqlite3.Connection:
        return self._connections().get("writer") or self._connect("writer", self._deadline())

    def _connections(self) -> dict[str, sqlite3.Connection]:
        if self._pid != os.getpid():
            # A connection carried across fork() corrupts the file, and closing one removes the
            # parent's WAL: it is kept for ever, untouched.
            self._carried_over.append(self._open)
            self._start_afresh()
        return self._open

    def _start_afresh(self) -> None:
        self._pid = os.getpid()
        self._open: dict[str, sqlite3.Connection] = {}
        self._read_lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._open_lock = threading.Lock()

    def _connect(self, role: str, deadline: float) -> sqlite3.Connection:
        with self._open_lock:
            there = self._open.get(role)
            if there is not None:
                return there
            connection = self._patiently(deadline, self._new_connection)
            try:
                self._patiently(deadline, lambda: _refuse_foreign(connection, self.path))
                self._patiently(deadline, lambda: _tune(connection, self.path))
                self._migrate(connection, deadline)
            except BaseException:
                connection.close()
                raise
            self._open[role] = connection
            return connection

    def _new_connection(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite gives the WAL the file's mode. Only a new file is opened here: closing any
            # descriptor of one in use would drop the record locks that SQLite holds on it.
            with suppress(FileExistsError):
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                os.close(os.open(self.path, flags, 0o600))
        except OSError as error:
            raise _translated_os(error, self.path) from error
        return sqlite3.connect(
            self.path,
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )

    def _migrate(self, connection: sqlite3.Connection, deadline: float) -> None:
        while self._patiently(deadline, lambda: _version(connection)) < len(MIGRATIONS):
            self._patiently(deadline, lambda: connection.execute("BEGIN IMMEDIATE"))
            try:
                version = _version(connection)
                # Another process may have done this one while we waited for the lock.
                for statement in MIGRATIONS[version] if version < len(MIGRATIONS) else ():
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {min(version + 1, len(MIGRATIONS))}")
                self._patiently(deadline, lambda: connection.execute("COMMIT"))
            except sqlite3.Error as error:
                raise self._translated(error) from error
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def _translated(self, error: sqlite3.Error) -> Exception:
        match _code(error):
            case sqlite3.SQLITE_FULL | sqlite3.SQLITE_IOERR:
                return StorageFull(f"the registry {self.path} cannot be written: {error}")
            case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_NOMEM | sqlite3.SQLITE_READONLY:
                return Unavailable(f"the registry {self.path} cannot be opened: {error}")
            case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
                return Misconfigured(
                    f"{self.path} is not a registry of heyvm ({error}): move it away, or set"
                    " HEYVM_DATA_DIR"
                )
        return error

    def _drop_ballast(self) -> bool:
        try:
            self._ballast.unlink()
        except FileNotFoundError:
            return False
        return True


def rfc3339(moment: float) -> str:
    """`moment` in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def _enumerated(slugs_: Sequence[str], most: int = 5) -> str:
    more = f" and {len(slugs_) - most} more" if len(slugs_) > most else ""
    return ", ".join(map(repr, slugs_[:most])) + more


def _amendment(renew: bool) -> str:
    counted = (
        ", ttl_left = :ttl_seconds,"
        f" expires_boot = CASE WHEN {_IS_UP} THEN :boot + :ttl_seconds END,"
        f" expires_at = CASE WHEN {_IS_UP} THEN :now + :ttl_seconds END"
    )
    return (
        "UPDATE sandboxes SET name = :name, ttl_seconds = :ttl_seconds, spec = :spec,"
        " warnings = :warnings, metadata = :metadata"
        + (counted if renew else "")
        + " WHERE id = :id"
    )


def _user_columns(sandbox: Sandbox) -> dict[str, object]:
    return {
        "id": sandbox.id,
        "name": sandbox.name,
        "ttl_seconds": sandbox.ttl_seconds,
        "spec": _dump(
            {
                "sandbox_type": sandbox.sandbox_type,
                "image": sandbox.image,
                "start_command": sandbox.start_command,
                "working_directory": sandbox.working_directory,
                "open_ports": sandbox.open_ports,
                "env_vars": dict(sandbox.env_vars),
                "setup_hooks": sandbox.setup_hooks,
                "mounts": [vars(mount) for mount in sandbox.mounts],
                "network": vars(sandbox.network),
                "limits": vars(sandbox.limits),
                "size_class": sandbox.size_class,
                "image_config": vars(sandbox.image_config),
                "ids": sandbox.ids,
            }
        ),
        "warnings": _dump(sandbox.warnings),
        "metadata": _dump(dict(sandbox.metadata)),
    }


def _spec_fields(spec: dict[str, Any]) -> dict[str, Any]:
    for name in ("open_ports", "setup_hooks"):
        spec[name] = tuple(spec.get(name, ()))
    spec["mounts"] = tuple(Mount(**mount) for mount in spec.get("mounts", ()))
    if "network" in spec:
        spec["network"] = Network(**{k: _frozen(v) for k, v in spec["network"].items()})
        spec["limits"] = Limits(**spec["limits"])
        spec["image_config"] = _image_config(spec["image_config"])
    elif spec:
        # Made by a version that knew no networks: it had none.
        spec["network"] = Network("none")
    return spec


def _image_config(fields: Mapping[str, Any]) -> ImageConfig:
    return ImageConfig(**{name: _frozen(value) for name, value in fields.items()})


def _image(row: Row) -> Image:
    return Image(
        digest=row[0],
        size_bytes=row[1],
        created_at=row[2],
        source=row[3],
        devices=row[4],
        config=_image_config(json.loads(row[5])),
        names=tuple(sorted(json.loads(row[6]))),
    )


def _mappings(text: str) -> tuple[PortMapping, ...]:
    pairs: list[list[int]] = _load(text, [])
    return tuple(PortMapping(host, guest) for guest, host in sorted(pairs))


def _endpoint(row: Row) -> Endpoint:
    return Endpoint(
        subdomain=row[0],
        sandbox_id=row[1],
        port=row[2],
        created_at=row[3],
        kind=row[4],
        is_public=bool(row[5]),
        local_port=row[6],
        warnings=tuple(_load(row[7], [])),
    )


def _tunnel(row: Row) -> Tunnel:
    return Tunnel(
        id=row[0],
        sandbox_id=row[1],
        kind=row[2],
        secret=row[3],
        created_at=row[4],
        expires_at=row[5],
        port=row[6],
        udp_port=row[7],
        ssh_public_keys=tuple(_load(row[8], [])),
    )


def _insert_endpoint(connection: sqlite3.Connection, endpoint: Endpoint, ready: bool) -> None:
    connection.execute(
        "INSERT INTO endpoints VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
        (
            endpoint.subdomain,
            endpoint.sandbox_id,
            endpoint.port,
            endpoint.kind,
            endpoint.is_public,
            endpoint.local_port,
            endpoint.created_at,
            _dump(endpoint.warnings),
            ready,
        ),
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _demand_image(connection: sqlite3.Connection, sandbox: Sandbox) -> None:
    if sandbox.image_resolved in ("", HOST_IMAGE):
        return
    if not _any(connection, "SELECT 1 FROM images WHERE digest = ?", sandbox.image_resolved):
        raise ImageGone(f"image {sandbox.image!r} ({sandbox.image_resolved}) was removed just now")


def _users(connection: sqlite3.Connection, digest: str) -> list[str]:
    return [row[0] for row in connection.execute(_USERS, (digest,)).fetchall()]


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _load(text: str, empty: T) -> T:
    # Most are empty, and the read of a sandbox is on the way of every request.
    return empty if text in ("{}", "[]") else json.loads(text)


def _forget_images(connection: sqlite3.Connection, kept: frozenset[str]) -> None:
    for (digest,) in connection.execute("SELECT digest FROM images").fetchall():
        if digest not in kept:
            connection.execute("DELETE FROM images WHERE digest = ?", (digest,))
            connection.execute("UPDATE image_names SET digest = NULL WHERE digest = ?", (digest,))


def _one(connection: sqlite3.Connection, query: str, value: object) -> Row:
    row: Row = connection.execute(query, (value,)).fetchall()[0]
    return row


def _any(connection: sqlite3.Connection, query: str, value: object) -> bool:
    return bool(connection.execute(query, (value,)).fetchall())


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchall()[0][0])


def _refuse_foreign(connection: sqlite3.Connection, path: Path) -> None:
    # In this order: a first server that migrates between the two makes both ours at once.
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchall()[0][0]
    application = connection.execute("PRAGMA application_id").fetchall()[0][0]
    if application != APPLICATION_ID and (application or tables):
        raise Misconfigured(
            f"{path} is another program's database: move it away, or set HEYVM_DATA_DIR"
        )
    if _version(connection) > len(MIGRATIONS):
        raise Misconfigured(
            f"{path} was written by a newer heyvm (its version is {_version(connection)}, this one"
            f" knows {len(MIGRATIONS)}): install that one, or set HEYVM_DATA_DIR"
        )


def _tune(connection: sqlite3.Connection, path: Path) -> None:
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchall()[0][0]
    if mode != "wal":
        raise Misconfigured(f"the file system of {path} cannot hold the registry (no WAL)")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {AUTOCHECKPOINT_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT_BYTES}")


def _code(error: sqlite3.Error) -> int | None:
    """The primary result code: the low byte (sqlite.org/rescode.html)."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _is_busy(error: sqlite3.Error) -> bool:
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)


def _translated_os(error: OSError, path: Path) -> HeyvmError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"no space for the registry {path}")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return Unavailable("too many open files: try again")
    return Misconfigured(f"the registry {path} cannot be made: {error.strerror}")
