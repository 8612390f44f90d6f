"""A sandbox's log: what its start command, hooks and executed commands printed.

The agent writes it inside the sandbox, where everything may have been replaced by anything: it is
opened beneath its directory without following or waiting, and read as text from a stranger.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from heyvm.backends.base import Backend
from heyvm.models import LogEntry, LogPage, Sandbox

FILES = ("log.1", "log")  # the older one first
# The agent begins a new file at 2 MiB; the last line of a file may end beyond.
MAX_FILE_BYTES = 2 * 1024 * 1024 + 64 * 1024
MAX_MESSAGE_BYTES = 16 * 1024
# A full log may hold 200,000 empty lines.
YIELD_EVERY = 5000
LINE = re.compile(rb"(\d{1,11}\.\d{3}) ([oe]) (.*)", re.DOTALL)
SOURCES = {b"o": "stdout", b"e": "stderr"}
LEVEL = re.compile(rb"\b(debug|info|warn|warning|error)\b", re.IGNORECASE)


class Sandboxes(Protocol):
    """What is asked of the lifecycle."""

    def get(self, ref: str) -> Sandbox: ...

    def backend_of(self, sandbox: Sandbox) -> Backend: ...


@dataclass(frozen=True)
class Line:
    """A line of the log, not yet decoded: most are only counted."""

    timestamp: float
    source: str
    message: bytes

    def level(self) -> str | None:
        return level_of(self.message)

    def entry(self) -> LogEntry:
        text = self.message.decode("utf-8", "replace")
        return LogEntry(self.timestamp, self.source, text, self.level())


@dataclass(frozen=True)
class Logs:
    """Reads logs. Works whatever state the sandbox is in."""

    lifecycle: Sandboxes

    def read(
        self,
        ref: str,
        limit: int = 100,
        offset: int = 0,
        source: str | None = None,
        level: str | None = None,
    ) -> LogPage:
        """The newest `limit` entries that match, oldest first; `offset` skips the newest."""
        sandbox = self.lifecycle.get(ref)
        directory = self.lifecycle.backend_of(sandbox).open_log(sandbox)
        total = 0
        # No more than is asked for: the sandbox may have written millions of lines.
        newest = deque[Line](maxlen=limit + offset)
        for line in lines(directory) if directory is not None else ():
            if source in (None, line.source) and (level is None or level == line.level()):
                total += 1
                newest.append(line)
        end = max(0, len(newest) - offset)
        entries = [line.entry() for line in islice(newest, max(0, end - limit), end)]
        return LogPage(logs=entries, total=total, limit=limit, offset=offset)


def level_of(message: bytes) -> str | None:
    """The first word in it that names a level."""
    found = LEVEL.search(message)
    if found is None:
        return None
    word = found[1].lower().decode("ascii")
    return "warning" if word == "warn" else word


def lines(directory: int) -> Iterator[Line]:
    """Every line of the log, oldest first. Closes the directory."""
    latest = time.time()
    for count, raw in enumerate(raw_lines(directory)):
        if count % YIELD_EVERY == YIELD_EVERY - 1:
            time.sleep(0)  # the worker has other requests
        if raw:
            yield parsed(raw, latest)


def parsed(raw: bytes, latest: float) -> Line:
    """What the agent did not write that way is shown as it stands; nothing is from the future."""
    found = LINE.fullmatch(raw)
    if found is None:
        return Line(0.0, "stdout", raw[:MAX_MESSAGE_BYTES])
    message = found[3][:MAX_MESSAGE_BYTES]
    return Line(min(float(found[1]), latest), SOURCES[found[2]], message)


def raw_lines(directory: int) -> Iterator[bytes]:
    try:
        for name in FILES:
            yield from content(directory, name).split(b"\n")
    finally:
        os.close(directory)


def content(where: int, name: str) -> bytes:
    """The end of a regular file, as much of it as an agent would write; else nothing."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        if not stat.S_ISREG(os.stat(name, dir_fd=where, follow_symlinks=False).st_mode):
            return b""
        fd = os.open(name, flags, dir_fd=where)
    except OSError:  # rotated away, a link, a socket: nothing that an agent wrote
        return b""
    try:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode):
            return b""
        return os.pread(fd, MAX_FILE_BYTES, max(0, state.st_size - MAX_FILE_BYTES))
    finally:
        os.close(fd)
