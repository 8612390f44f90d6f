"""The keeper's end of the tunnels' process (tunnels.py): starts it, asks it, ends it."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from heyvm import control, lives
from heyvm.errors import Unavailable

KILL_S = 3.0
POLL_S = 0.05
SILENT = "the tunnels' process does not answer: try again"


class TunnelProcess:
    """At most one of it. Safe from any number of greenlets; they take turns."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._turn = threading.Lock()
        self._child: _Child | None = None
        self._wanted = False
        self._over = False

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Its answer within so many seconds; it is started where it does not run. Raises the domain
        error that it answers with. One that does not answer is killed, and `Unavailable` raised."""
        deadline = time.monotonic() + timeout
        with self._my_turn(timeout):
            child = self._running()
            try:
                line = control.exchange(child.sock, request, deadline)
            except (OSError, control.Broken):
                child.end(patience=KILL_S if self._over else 0.0)
                raise Unavailable(SILENT) from None
        return control.result_of(line)

    def is_needed_again(self) -> bool:
        """It was started, not ended, and does not run: what it served is served by nobody."""
        child = self._child
        return self._wanted and (child is None or not child.runs())

    def is_running(self) -> bool:
        child = self._child
        return child is not None and child.runs()

    def end_unless(self, is_needed: Callable[[], bool]) -> None:
        """It ends if it is not needed, which is asked when nobody else can start it: whoever wrote
        a row before that is seen, and whoever writes one later, starts it anew."""
        with self._my_turn(KILL_S):
            if not is_needed():
                self._end()

    def close(self) -> None:
        """It tells its clients, and ends, whoever waits for an answer of it. There is no other."""
        self._over = True
        child = self._child
        if child is not None:
            child.hang_up()  # and who has the turn is done with it soon
        with suppress(Unavailable), self._my_turn(2 * KILL_S):
            self._end()

    @contextmanager
    def _my_turn(self, timeout: float) -> Iterator[None]:
        if not self._turn.acquire(timeout=timeout):
            raise Unavailable(SILENT)
        try:
            yield
        finally:
            self._turn.release()

    def _running(self) -> _Child:
        if self._child is None or not self._child.runs():
            self._end()
            if self._over:
                raise Unavailable("the keeper is ending: try again")
            try:
                self._child = _Child(self._environment)
            except OSError as error:
                raise Unavailable(f"the tunnels' process cannot be started: {error}") from None
            self._wanted = True
        return self._child

    def _end(self) -> None:
        child, self._child, self._wanted = self._child, None, False
        if child is not None:
            child.end(patience=KILL_S)


class _Child:
    """One process, from its start."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.sock, theirs = socket.socketpair()
        self._has_ended = False
        with theirs:
            try:
                question = (os.POSIX_SPAWN_DUP2, theirs.fileno(), 0)
                self._pid = lives.spawn_module("heyvm.tunnels", environment, question)
            except BaseException:
                self.sock.close()
                raise

    def runs(self) -> bool:
        if not self._has_ended:
            try:
                self._has_ended = os.waitpid(self._pid, os.WNOHANG)[0] != 0
            except ChildProcessError:  # gevent was quicker
                self._has_ended = True
        return not self._has_ended

    def hang_up(self) -> None:
        """To it this is the end of the keeper."""
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def end(self, *, patience: float) -> None:
        """It has so many seconds. Twice is fine."""
        self.hang_up()
        deadline = time.monotonic() + patience
        while self.runs() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if self.runs():
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            while self.runs():  # a thread of its may be about to leave a system call
                time.sleep(POLL_S)
        self.sock.close()
