"""The trail of every call that changes something: lines that are only ever added.

A call is two lines in `<data_dir>/audit/<YYYY-MM>.jsonl`: `begin` before it acts, and `end`, which
says all, after; or one, `refused`. A `begin` without an `end` is a call that is under way, or whose
process was killed. Knows no HTTP.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heyvm import lives, slugs
from heyvm.errors import HeyvmError, Invalid, StorageFull, Unavailable
from heyvm.journal import moment

DIRECTORY = "audit"
MONTH = re.compile(r"[0-9]{4}-[0-9]{2}")
CURSOR = re.compile(r"([0-9]{4}-[0-9]{2})\.([0-9]{1,15})\.((?:[0-9a-f]{12})*)")
OPENING = b'{"audit":"'
MOST_PATH = 2400
MOST_TEXT = 300
MOST_LINE = 4096
BLOCK_BYTES = 128 * 1024
PAGE_BYTES = 4 * 1024 * 1024
# So many calls may be under way where a page ends: their ids are in its cursor, and a request line
# has 8190 bytes.
MOST_OPEN = 500
MOST_OWED = 1000
HOUR_S = 3600.0
SLACK_S = 60.0  # clocks are set back, a little
RESERVE_BYTES = 1 << 20
LOW_BYTES = 1 << 16
KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE of fallocate(2)

ANSWERED, UNDER_WAY, INTERRUPTED = "answered", "in progress", "interrupted"


@dataclass(frozen=True)
class Entry:
    """A call as it comes in. `action` is None where there is no such route; `ref` is the sandbox as
    the path names it."""

    time: float
    request_id: str
    method: str
    path: str
    action: str | None
    client: str | None
    subject: str | None = None
    ref: str | None = None


@dataclass(frozen=True)
class Ending:
    """How it went, and the sandbox that it turned out to be about."""

    status: int
    duration_ms: float
    sandbox_id: str | None = None
    slug: str | None = None


@dataclass(frozen=True)
class Wanted:
    """Which records, and how many at most. `sandbox` is an id or a slug; times are of the call's
    beginning, in seconds since the epoch."""

    limit: int
    cursor: str | None = None
    sandbox: str | None = None
    subject: str | None = None
    since: float | None = None
    until: float | None = None


@dataclass(frozen=True)
class Page:
    """Records, newest first. Short, even empty, with a `cursor`: there may be more."""

    records: Sequence[Mapping[str, Any]]
    cursor: str | None


@dataclass(frozen=True)
class Begun:
    """A call of which the trail says that it has begun."""

    name: str
    told: Mapping[str, Any]


class Trail:
    """Any number of processes may write and read one directory at once."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self._directory = directory
        self._clock = clock
        self._owed: deque[bytes] = deque(maxlen=MOST_OWED)
        self._reserved: dict[str, int] = {}
        self._month, self._until = "", 0.0  # which month it is, until then

    # -- writing ---------------------------------------------------------------------------------

    def begin(self, entry: Entry) -> Begun:
        """Say that a call is about to act; what `end` takes. `StorageFull`, or `Unavailable`, where
        that cannot be written: then it must not act."""
        begun = Begun(os.urandom(6).hex(), _told(entry))
        try:
            self._append(_line("begin", begun.name, {**begun.told, "process": lives.own()}))
        except OSError as error:
            raise _refusal(error) from error
        return begun

    def end(self, begun: Begun, ending: Ending) -> bool:
        """Say how it went. False where that could not be written yet; it is tried again."""
        return self._end(_line("end", begun.name, {**begun.told, **_ended(ending)}))

    def refuse(self, entry: Entry, ending: Ending) -> bool:
        """Say of a call that was not begun how it went; as `end`."""
        return self._end(_line("refused", os.urandom(6).hex(), _told(entry) | _ended(ending)))

    def _end(self, line: bytes) -> bool:
        try:
            self._append(line)
        except OSError:
            self._owed.append(line)
            return False
        return True

    def _append(self, line: bytes) -> None:
        month = self._this_month()
        # Opened each time: a file that somebody has moved away is not written any further.
        descriptor = self._open(os.path.join(self._directory, f"{month}.jsonl"))
        try:
            while self._owed:
                _write(descriptor, self._owed[0])
                self._owed.popleft()
            _write(descriptor, line)
            self._reserve(descriptor, month)
        finally:
            os.close(descriptor)

    def _this_month(self) -> str:
        now = self._clock()
        if not 0 < self._until - now <= HOUR_S:
            self._until = now - now % HOUR_S + HOUR_S
            self._month = time.strftime("%Y-%m", time.gmtime(now))
        return self._month

    def _open(self, path: str) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(path, flags, 0o600)

    def _reserve(self, descriptor: int, month: str) -> None:
        """Room behind the end of the file, so that on a full disk there is still a trail of what is
        done about that."""
        at = os.lseek(descriptor, 0, os.SEEK_CUR)
        if at + LOW_BYTES > self._reserved.get(month, 0):
            done = _fallocate(descriptor, at, RESERVE_BYTES)
            self._reserved = {month: at + (RESERVE_BYTES if done else 2 * LOW_BYTES)}

    # -- reading ---------------------------------------------------------------------------------

    def page(self, wanted: Wanted) -> Page:
        """Records, newest first: those that ended by their end. Reads a bounded number of bytes."""
        month, at, ended = _position(wanted.cursor)
        reading = _Reading(wanted, ended)
        budget = PAGE_BYTES
        for name in self._months(month):
            end = at if name == month and at is not None else None
            for start, line in _backwards(self._directory / f"{name}.jsonl", end):
                done = reading.take(line)
                budget -= len(line) + 1
                if done or budget <= 0 or len(reading.records) >= wanted.limit:
                    cursor = None if done else reading.cursor(name, start)
                    return Page(reading.records, cursor)
        return Page(reading.records, None)

    def _months(self, last: str | None) -> list[str]:
        names = [path.stem for path in self._directory.glob("*.jsonl")]
        known = (one for one in names if MONTH.fullmatch(one) and (last is None or one <= last))
        return sorted(known, reverse=True)


class _Reading:
    """One page as it is read, from the last line to the first."""

    def __init__(self, wanted: Wanted, ended: Sequence[str]) -> None:
        self.records: list[Mapping[str, Any]] = []
        self._wanted = wanted
        self._ended = dict.fromkeys(ended)  # whose end was read, and whose begin is still to come
        self._alive: dict[str, bool] = {}

    def take(self, line: bytes) -> bool:
        """Look at one line. True: what is before it is older than what is wanted."""
        found = _parsed(line)
        if found is None:
            return False
        name, fields = found
        if fields["audit"] != "begin":
            if fields["audit"] == "end":
                self._ended[name] = None
            self._offer(_record(fields, ANSWERED))
        elif name in self._ended:
            del self._ended[name]
        else:
            self._offer(_record(fields, self._fate(fields["process"])))
        since = self._wanted.since
        return since is not None and fields["at"] < since - SLACK_S

    def cursor(self, month: str, at: int) -> str:
        newest = list(self._ended)[-MOST_OPEN:]
        return f"{month}.{at}.{''.join(newest)}"

    def _fate(self, process: str) -> str:
        if process not in self._alive:
            self._alive[process] = lives.is_alive(process)
        return UNDER_WAY if self._alive[process] else INTERRUPTED

    def _offer(self, record: Mapping[str, Any]) -> None:
        wanted = self._wanted
        if (
            wanted.sandbox in (None, record["sandbox_id"], record["sandbox_slug"])
            and wanted.subject in (None, record["subject"])
            and (wanted.since is None or record["at"] >= wanted.since)
            and (wanted.until is None or record["at"] <= wanted.until)
        ):
            self.records.append(record)


def _line(kind: str, name: str, fields: Mapping[str, Any]) -> bytes:
    return _encode({"audit": kind, "id": name, **fields}).encode("ascii") + b"\n"


_encode = json.JSONEncoder(separators=(",", ":")).encode


def _told(entry: Entry) -> dict[str, Any]:
    return {
        "time": moment(entry.time),
        "at": round(entry.time, 3),
        "request_id": entry.request_id,
        "subject": _cut(entry.subject, MOST_TEXT),
        "client": _cut(entry.client, MOST_TEXT),
        "action": entry.action,
        "method": _cut(entry.method, MOST_TEXT),
        "path": _cut(entry.path, MOST_PATH),
        **_named(entry.ref),
    }


def _named(ref: str | None) -> dict[str, str]:
    """Whether there is such a sandbox or not."""
    if ref is None or not slugs.is_slug(ref):
        return {}
    return {"sandbox_id": ref} if slugs.is_id(ref) else {"sandbox_slug": ref}


def _ended(ending: Ending) -> dict[str, Any]:
    known = {"sandbox_id": ending.sandbox_id, "sandbox_slug": ending.slug}
    return {
        **(known if ending.sandbox_id else {}),
        "status": ending.status,
        "duration_ms": round(ending.duration_ms, 1),
    }


def _cut(text: str | None, most: int) -> str | None:
    """At most some `most` bytes as JSON, where a character may take twelve."""
    if text is None or len(text) * 12 <= most or len(json.dumps(text)) <= most + 2:
        return text
    return text[: most // (2 if text.isascii() else 12)] + "..."


def _write(descriptor: int, line: bytes) -> None:
    # One write is one line, whoever else appends. What a full disk or a kill has cut short stays
    # as it is: the reader finds where the next one begins.
    if os.write(descriptor, line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _refusal(error: OSError) -> HeyvmError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull("no space for the audit trail, so nothing is changed: delete something")
    return Unavailable(f"the audit trail cannot be written: {error.strerror}")


def _fallocate(descriptor: int, at: int, size: int) -> bool:
    libc = ctypes.CDLL(None)
    numbers = (ctypes.c_int(KEEP_SIZE), ctypes.c_int64(at), ctypes.c_int64(size))
    return bool(libc.fallocate64(ctypes.c_int(descriptor), *numbers) == 0)


def _position(cursor: str | None) -> tuple[str | None, int | None, Sequence[str]]:
    if cursor is None:
        return None, None, ()
    found = CURSOR.fullmatch(cursor)
    if found is None:
        complaint = "that is no cursor of this route"
        raise Invalid(complaint, errors={"cursor": [complaint]})
    names = found[3]
    return found[1], int(found[2]), [names[at : at + 12] for at in range(0, len(names), 12)]


def _backwards(path: Path, end: int | None) -> Iterator[tuple[int, bytes]]:
    """Each line that begins before `end`, the last one first, with where it begins."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = size if end is None else min(end, size)
        rest = b""
        while at > 0:
            start = max(0, at - BLOCK_BYTES)
            block = os.pread(file.fileno(), at - start, start) + rest
            first, *lines = block.split(b"\n")
            places = itertools.accumulate((len(line) + 1 for line in lines), initial=len(first) + 1)
            yield from reversed([(start + at, line) for at, line in zip(places, lines)])
            # Longer than any of ours: nothing is kept of it but its end.
            rest, at = first[-2 * MOST_LINE :] if start else first, start
            if not start:
                yield 0, rest
            time.sleep(0)  # other requests have their turn


def _parsed(line: bytes) -> tuple[str, dict[str, Any]] | None:
    """None for what is no whole line of ours. One that was cut short may stand before it."""
    begins = line.rfind(OPENING)
    if begins < 0:
        return None
    try:
        fields = json.loads(line[begins:])
        return str(fields["id"]), {**BLANK, **fields, "at": float(fields["at"])}
    except (ValueError, KeyError, TypeError):
        return None


BLANK: Mapping[str, Any] = {
    "request_id": None,
    "subject": None,
    "client": None,
    "action": None,
    "method": "",
    "path": "",
    "sandbox_id": None,
    "sandbox_slug": None,
    "status": None,
    "duration_ms": None,
    "process": "",
}


def _record(fields: Mapping[str, Any], outcome: str) -> Mapping[str, Any]:
    shown = {name: fields[name] for name in BLANK if name != "process"}
    return {"id": fields["id"], "time": fields["time"], "at": fields["at"], **shown,
            "outcome": outcome}  # fmt: skip
