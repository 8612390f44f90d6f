"""The keeper's end of the tunnels' process (tunnels.py): starts it, asks it, ends it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from heyvm import control
from heyvm.errors import Unavailable

KILL_S = 3.0
POLL_S = 0.05


class TunnelProcess:
    """At most one of it. Safe from any number of greenlets; they take turns."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._turn = threading.Lock()
        self._pid: int | None = None
        self._sock: socket.socket | None = None

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Its answer; it is started where it does not run. Raises the domain error that it answers
        with. One that does not answer is killed, and `Unavailable` raised."""
        with self._turn:
            if not self._runs():
                self._start()
            try:
                line = control.exchange(self._connection, request, time.monotonic() + timeout)
            except (OSError, control.Broken):
                self._end(now=True)
                raise Unavailable("the tunnels' process does not answer: try again") from None
        return control.result_of(line)

    def is_needed_again(self) -> bool:
        """It was started and has died: what it served is served by nobody."""
        return self._pid is not None and not self._runs()

    def end(self) -> None:
        """It tells its clients, and ends."""
        with self._turn:
            self._end()

    @property
    def _connection(self) -> socket.socket:
        assert self._sock is not None
        return self._sock

    def _runs(self) -> bool:
        if self._pid is None:
            return False
        try:
            ended, _ = os.waitpid(self._pid, os.WNOHANG)
        except ChildProcessError:
            return False
        return not ended

    def _start(self) -> None:
        self._end()
        ours, theirs = socket.socketpair()
        kept = {0, 1, 2}
        actions: list[tuple[object, ...]] = [
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0),
            (os.POSIX_SPAWN_DUP2, 2, 1),
        ]
        others = {int(name) for name in os.listdir("/proc/self/fd")} - kept
        actions += [(os.POSIX_SPAWN_CLOSE, number) for number in sorted(others)]
        with theirs:
            self._pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-m", "heyvm.tunnels"],
                self._environment,
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD),
            )
        self._sock = ours

    def _end(self, *, now: bool = False) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._pid is None:
            return
        deadline = time.monotonic() + (0 if now else KILL_S)
        while self._runs() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if self._runs():
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(self._pid, 0)
        self._pid = None
