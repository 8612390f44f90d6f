"""The lock that whoever changes a sandbox holds: `flock` on a file named after its id.

The kernel drops it with its holder, however that one dies. Knows no registry and no backend.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from heyvm.errors import StorageFull, Unavailable

FIRST_PAUSE_S = 0.002
LONGEST_PAUSE_S = 0.05


class SandboxLock:
    """One sandbox's lock, held from the making of this value until `release` or `discard`.

    Two values exclude each other within one process as well (a description of its own each).
    It may be handed to another thread. Made by `try_lock` and `lock`.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor: int | None = descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let the next one have it. Twice is fine."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def discard(self) -> None:
        """Remove the file, then release: for a sandbox that is no more."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
        self.release()


def try_lock(directory: Path, sandbox_id: str) -> SandboxLock | None:
    """The lock if it is free now, else None. Raises `StorageFull` or `Unavailable`."""
    path = directory / sandbox_id
    while True:
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if _is_at(path, descriptor):
            return SandboxLock(path, descriptor)
        # Its last holder removed the file between our open and our flock: what we locked has no
        # name any more, and the next one would lock another file.
        os.close(descriptor)


def lock(
    directory: Path, sandbox_id: str, *, patience: float, busy: Callable[[], str]
) -> SandboxLock:
    """Wait at most `patience` seconds for the lock; then `Unavailable` with what `busy` says."""
    deadline = time.monotonic() + patience
    pause = FIRST_PAUSE_S
    while True:
        held = try_lock(directory, sandbox_id)
        if held is not None:
            return held
        if time.monotonic() >= deadline:
            raise Unavailable(busy(), retry_after=2, sandbox_id=sandbox_id)
        # A blocking flock would stop every greenlet of the process.
        time.sleep(pause)
        pause = min(pause * 1.5, LONGEST_PAUSE_S)


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"no space for a lock in {path.parent}") from error
        raise Unavailable(f"cannot open the lock {path}: {error.strerror}") from error


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(descriptor))
