"""A user at a terminal: a program with a pty of its own, and what it shows."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from tests.server import PATIENCE, wait_until

TIMEOUT_S = 20.0 * PATIENCE


class Seat:
    """`typed` is there before the program runs. Leaving fails if the terminal is not as it was."""

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        *,
        typed: bytes = b"",
        size: tuple[int, int] = (80, 24),
    ) -> None:
        self.shown = b""
        self.master, self.slave = pty.openpty()
        self.resize(*size)
        self.before = termios.tcgetattr(self.slave)
        os.write(self.master, typed)
        self.process = subprocess.Popen(
            command,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=dict(environ),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def __enter__(self) -> Seat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: object, __: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        after = termios.tcgetattr(self.slave)
        os.close(self.master)
        os.close(self.slave)
        if kind is None:
            assert after == self.before, "the terminal is not as it was"

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait_until_raw(self) -> None:
        def is_raw() -> bool:
            return not termios.tcgetattr(self.slave)[3] & termios.ECHO

        wait_until(is_raw, "the terminal is raw")

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def read(self, wait: float = 0.1) -> None:
        if select.select([self.master], [], [], wait)[0]:
            self.shown += os.read(self.master, 65536)

    def until(self, text: bytes) -> None:
        """Read until this has been shown."""
        end = time.monotonic() + TIMEOUT_S
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            assert self.process.poll() is None or self._is_more(), self.shown
            self.read()

    def _is_more(self) -> bool:
        return bool(select.select([self.master], [], [], 0)[0])

    def exit_code(self) -> int:
        end = time.monotonic() + TIMEOUT_S
        while self.process.poll() is None:
            assert time.monotonic() < end, self.shown
            self.read()
        while self._is_more():
            with contextlib.suppress(OSError):
                self.read(0)
        return self.process.wait()
