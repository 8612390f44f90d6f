"""Remove a directory tree that hostile code has made: any depth, any names, any modes.

Also run as a program of its own (`trees.py PATH...`), by those whose ids a tree's files have: it
says D when all is gone. No import but the standard library's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import sys
import time
from collections.abc import Iterator

PAUSE_EVERY = 256  # entries; a pause lets a worker's other greenlets run
# Pauses are not enough: each call waits for the disk in the kernel, and the process with it. What
# takes longer is left to one of its own (120,000 files held the keeper up for a minute).
SOON_S = 0.1


def remove(path: str) -> None:
    """Delete `path` and all below it. Nothing may run in it any more; a missing one is fine, and so
    are several that remove the same one: each returns when it is gone.

    Directories are moved up to the top before they are emptied: constant depth and path length
    whatever is found, for one rename each.
    """
    if not _remove_within(SOON_S, path) and not _remove_apart(path):
        _remove_within(float("inf"), path)  # that says why it cannot be done


def _remove_within(patience: float, path: str) -> bool:
    """Whether it is gone, rather than begun for so many seconds."""
    try:
        top = _open(path, None)
    except FileNotFoundError:
        return True
    try:
        _take_turn(top)
        _empty(top, time.monotonic() + patience)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(path)
    except _TooLong:
        return False
    finally:
        os.close(top)
    return True


def _remove_apart(path: str) -> bool:
    import subprocess

    program = [sys.executable, "-I", "-S", __file__, path]
    quiet = subprocess.DEVNULL
    done = subprocess.run(program, stdin=quiet, stdout=quiet, stderr=quiet, check=False)
    return done.returncode == 0


class _TooLong(Exception):
    """There is more than could be removed in time."""


def _take_turn(top: int) -> None:
    """Not by waiting in the kernel, which would hold up a worker's other greenlets."""
    while True:
        try:
            fcntl.flock(top, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.005)


def _empty(top: int, deadline: float) -> None:
    pending = list(_directories(top, deadline))
    mark, moved = secrets.token_hex(8), 0
    while pending:
        name = pending.pop()
        below = _open(name, top)
        try:
            for inner in _directories(below, deadline):
                moved += 1
                pending.append(f".{mark}.{moved}")
                _rename(inner, below, pending[-1], top)
        finally:
            os.close(below)
        os.rmdir(name, dir_fd=top)


def _directories(directory: int, deadline: float) -> Iterator[str]:
    """Unlink all that is no directory; yield the names of those that are."""
    with os.scandir(directory) as entries:
        for number, entry in enumerate(entries, 1):
            if time.monotonic() > deadline:
                raise _TooLong
            if number % PAUSE_EVERY == 0:
                time.sleep(0)
            if entry.is_dir(follow_symlinks=False):
                yield entry.name
            else:
                os.unlink(entry.name, dir_fd=directory)


def _open(name: str, parent: int | None) -> int:
    """Open a directory, link refused; an owner who is not root may have lost the right to."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=parent)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=parent)
        return os.open(name, flags, dir_fd=parent)
    if os.geteuid() != 0:
        os.fchmod(descriptor, 0o700)
    return descriptor


def _rename(name: str, source: int, new: str, target: int) -> None:
    """A directory that moves is written to ('..'), which its own mode may forbid to its owner."""
    try:
        os.rename(name, new, src_dir_fd=source, dst_dir_fd=target)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM):
            raise
        os.chmod(name, 0o700, dir_fd=source)
        os.rename(name, new, src_dir_fd=source, dst_dir_fd=target)


if __name__ == "__main__":
    for one in sys.argv[1:]:
        _remove_within(float("inf"), one)
    os.write(sys.stderr.fileno(), b"D")
