"""The terminal that a user sits at: raw while a shell has it, and as it was before afterwards.

Runs on the user's own machine and imports next to nothing: what is typed before the terminal is raw
is echoed twice.
"""

from __future__ import annotations

import array
import fcntl
import os
import signal
import termios
import tty
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum
from typing import Any

DEFAULT_SIZE = (80, 24)
INTERRUPT = b"\x03"
ESCAPE = b"~"
NEWLINES = b"\r\n"
HELP = """\
Supported escape sequences (after a newline):
 ~.   end the connection
 ~^Z  suspend heyvm
 ~?   this message
 ~~   send the escape character
"""


class Escape(Enum):
    """What a user tells this program, and not the shell."""

    DISCONNECT = b"."
    SUSPEND = b"\x1a"
    HELP = b"?"


class Screen:
    """The terminal on a descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.cooked: int = 0  # bytes that were typed before the terminal was raw
        self._before: list[Any] | None = None

    def enter(self) -> None:
        """Make it raw (again). Nothing that was typed is lost."""
        try:
            before = termios.tcgetattr(self.fd)
        except termios.error:
            return
        # TCSAFLUSH, which tty.setraw takes unless told, throws away what was typed early.
        tty.setraw(self.fd, termios.TCSANOW)
        if self._before is None:
            self._before = before
            self.cooked = pending(self.fd)

    def restore(self) -> None:
        """As it was at the first `enter`. Never waits, and may be called twice."""
        before, self._before = self._before, None
        if before is None:
            return
        # From the background this would stop the process instead.
        was = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(self.fd, termios.TCSANOW, before)
        signal.signal(signal.SIGTTOU, was)

    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        try:
            columns, rows = os.get_terminal_size(self.fd)
        except OSError:
            return DEFAULT_SIZE
        return (columns, rows) if columns and rows else DEFAULT_SIZE

    def as_typed(self, data: bytes) -> bytes:
        """What keys sent: a terminal that is not raw makes newlines of carriage returns, and keeps
        a ^D as a zero."""
        early, data = data[: self.cooked], data[self.cooked :]
        self.cooked -= len(early)
        return early.replace(b"\n", b"\r").replace(b"\0", b"\x04") + data


def pending(fd: int) -> int:
    """Bytes that can be read at once."""
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


class Escapes:
    """Finds what is meant for this program in what is typed: `~` and a letter after a newline."""

    def __init__(self) -> None:
        self._after_newline = True
        self._after_tilde = False

    def take(self, data: bytes) -> Iterator[bytes | Escape]:
        """What is to be sent, and what is to be done, in this order. A `~` that may be the
        beginning of something is held back."""
        if ESCAPE not in data and not self._after_tilde:
            self._after_newline = data[-1:] in NEWLINES
            yield data
            return
        kept = bytearray()
        for number in data:
            found = self._take(bytes([number]))
            if isinstance(found, bytes):
                kept += found
                continue
            if kept:
                yield bytes(kept)
                kept.clear()
            yield found
        if kept:
            yield bytes(kept)

    def _take(self, key: bytes) -> bytes | Escape:
        if self._after_tilde:
            self._after_tilde = False
            return self._escaped(key)
        if self._after_newline and key == ESCAPE:
            self._after_tilde = True
            return b""
        self._after_newline = key in NEWLINES
        return key

    def _escaped(self, key: bytes) -> bytes | Escape:
        with suppress(ValueError):
            return Escape(key)
        self._after_newline = key in NEWLINES
        return key if key == ESCAPE else ESCAPE + key
