"""A process by pid *and* start time, so that a number used again is never taken for it."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """`start` is field 22 of /proc/PID/stat: clock ticks since boot."""

    pid: int
    start: int

    def alive(self) -> bool:
        """Whether it runs. A zombie does not."""
        found = stat_of(self.pid)
        return found is not None and found.start == self.start and found.letter not in "ZX"

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to this very process; nothing happens if it is gone."""
        with self._open() as descriptor:
            if descriptor is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, number)

    def wait(self, timeout: float) -> bool:
        """True once it has ended (for pid 1 of a namespace: with all that was in it)."""
        with self._open() as descriptor:
            if descriptor is None:
                return True
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            return bool(poll.poll(timeout * 1000))

    @contextlib.contextmanager
    def _open(self) -> Iterator[int | None]:
        try:
            descriptor = os.pidfd_open(self.pid)
        except OSError as error:
            # EINVAL (before Linux 6.9): it is gone, and its number still names a session.
            if error.errno not in (errno.ESRCH, errno.EINVAL):
                raise
            yield None
            return
        try:
            # Checked after the open: from here on the number cannot come to mean another process.
            found = stat_of(self.pid)
            yield descriptor if found is not None and found.start == self.start else None
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Stat:
    """What /proc/PID/stat says of a process."""

    letter: str
    parent: int
    start: int


def stat_of(pid: int) -> Stat | None:
    """None if there is no such process. The name in it may hold anything, brackets included."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Stat(fields[0].decode(), int(fields[1]), int(fields[19]))


def uid_of(pid: int) -> int | None:
    """The real user of a process, None if there is no such process."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            return int(file.read().partition(b"\nUid:")[2].split(None, 1)[0])
    except (FileNotFoundError, ProcessLookupError):
        return None


def identify(pid: int) -> Process | None:
    """The process that has this number now."""
    found = stat_of(pid)
    return None if found is None else Process(pid, found.start)


def kill_and_wait(processes: list[Process], timeout: float) -> list[Process]:
    """Kill all, wait until they are gone; those that were not in time."""
    for process in processes:
        process.kill()
    end = time.monotonic() + timeout
    return [one for one in processes if not one.wait(max(0.0, end - time.monotonic()))]


@functools.cache
def boot_id() -> str:
    """A name for this boot of the machine (random(4)); no process lives to see another."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
