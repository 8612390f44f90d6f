"""Blocks of user and group ids that belong to the sandboxes of one data directory and nobody else.

Reserved by lines of their own in /etc/subuid and /etc/subgid: an ordinary user whose sub-ids
overlapped them could act on a sandbox's processes and files from outside.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from heyvm.errors import Unavailable

SIZE = 65536
RANGES_PER_BLOCK = 256
BLOCK = SIZE * RANGES_PER_BLOCK
# Above what useradd (SUB_UID_MAX, 600100000) and systemd-nspawn (up to 0x6fffffff) hand out.
LOWEST, HIGHEST = 0x70000000, 0xFFF00000
FILES = ("subuid", "subgid")


@dataclass(frozen=True)
class SubIds:
    """What an ordinary user was given beside the own id: for users and groups, the first and how
    many."""

    uid: tuple[int, int]
    gid: tuple[int, int]

    def hold(self, others: SubIds) -> bool:
        """Whether all of theirs mean the same here."""
        pairs = ((self.uid, others.uid), (self.gid, others.gid))
        return all(own[0] == other[0] and own[1] >= other[1] for own, other in pairs)


def sub_ids(uid: int, etc: str = "/etc") -> SubIds | None:
    """The first line for this user in each of /etc/subuid and /etc/subgid (subuid(5): by name or
    by number); None without. No more of them than a range of our own has."""
    owners = {str(uid)}
    try:
        owners.add(pwd.getpwuid(uid).pw_name)
    except KeyError:
        pass
    found = []
    for name in FILES:
        lines = _lines(f"{etc}/{name}")
        mine = [(start, count) for owner, start, count in lines if owner in owners and count > 0]
        if not mine:
            return None
        found.append((mine[0][0], min(mine[0][1], SIZE - 1)))
    return SubIds(*found)


def free(mark: str, taken: frozenset[int], etc: str = "/etc") -> int:
    """The lowest base of `mark`'s blocks that is not in `taken`; reserves a block if it must."""
    for start in _blocks(mark, etc):
        for base in range(start, start + BLOCK, SIZE):
            if base not in taken:
                return base
    _change(etc, lambda: _reserve(mark, etc))
    return free(mark, taken, etc)


def claim(mark: str, bases: frozenset[int], etc: str = "/etc") -> None:
    """Reserve the blocks that these bases lie in, for sandboxes that were restored with them.

    `Unavailable` where somebody else has ids in one; then nothing is reserved.
    """
    wanted = {base - (base - LOWEST) % BLOCK for base in bases}
    _change(etc, lambda: _claim(mark, wanted, etc))


def _claim(mark: str, wanted: set[int], etc: str) -> None:
    own = set(_blocks(mark, etc))
    for start in sorted(wanted - own):
        for low, high in _used(etc, name_of(mark)):
            if low < start + BLOCK and start < high:
                raise Unavailable(
                    f"ids {start} to {start + BLOCK - 1} are its sandboxes', and here somebody"
                    f" else has {low} to {high - 1} (/etc/subuid, /etc/subgid, /etc/passwd):"
                    " free these first; another heyvm's go with its `heyvm purge`"
                )
    _write_lines(mark, etc, sorted(own | wanted))


def release(mark: str, etc: str = "/etc") -> None:
    """Give back all of `mark`'s blocks."""
    _change(etc, lambda: _write_lines(mark, etc, []))


def name_of(mark: str) -> str:
    """The owner that the lines name; no such user exists."""
    return f"heyvm-{mark}"


def _blocks(mark: str, etc: str) -> list[int]:
    """Only what stands in both files counts: a reservation may have been cut short."""
    owned = [
        {
            start
            for owner, start, count in _lines(f"{etc}/{name}")
            if (owner, count) == (name_of(mark), BLOCK)
        }
        for name in FILES
    ]
    return sorted(owned[0] & owned[1])


def _reserve(mark: str, etc: str) -> None:
    used = sorted(_used(etc, name_of(mark)))
    mine = set(_blocks(mark, etc))
    for start in range(LOWEST, HIGHEST - BLOCK, BLOCK):
        end = start + BLOCK
        if start not in mine and not any(low < end and start < high for low, high in used):
            _write_lines(mark, etc, [*sorted(mine), start])
            return
    raise Unavailable("every id that sandboxes could have is reserved: see /etc/subuid")


def _used(etc: str, own: str) -> Iterator[tuple[int, int]]:
    for name in FILES:
        for owner, start, count in _lines(f"{etc}/{name}"):
            if owner != own:
                yield start, start + count
    for name in ("passwd", "group"):
        for fields in _fields(f"{etc}/{name}"):
            if len(fields) > 2 and fields[2].isdigit():
                yield int(fields[2]), int(fields[2]) + 1


def _lines(path: str) -> Iterator[tuple[str, int, int]]:
    for fields in _fields(path):
        if len(fields) == 3 and fields[1].isdigit() and fields[2].isdigit():
            yield fields[0], int(fields[1]), int(fields[2])


def _fields(path: str) -> list[list[str]]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return [line.strip().split(":") for line in file]
    except FileNotFoundError:
        return []


def _write_lines(mark: str, etc: str, starts: list[int]) -> None:
    for name in FILES:
        _rewrite(f"{etc}/{name}", mark, starts)


def _rewrite(path: str, mark: str, starts: list[int]) -> None:
    """Replace `mark`'s lines, in a new file that takes the old one's place."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = [line for line in file if line.split(":")[0] != name_of(mark)]
    except FileNotFoundError:
        lines = []
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    lines += [f"{name_of(mark)}:{start}:{BLOCK}\n" for start in starts]
    new = path + ".heyvm"
    with open(new, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(lines)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())
    os.rename(new, path)


def _change(etc: str, act: Callable[[], None]) -> None:
    """Under the lock that useradd and usermod take (lckpwdf(3)); 15 s is their own patience."""
    descriptor = os.open(f"{etc}/.pwd.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        end = time.monotonic() + 15
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > end:
                    raise Unavailable("/etc/.pwd.lock is held by another program") from None
                time.sleep(0.01)
        act()
    except OSError as error:
        raise Unavailable(
            f"cannot reserve ids for sandboxes in {etc}/subuid and {etc}/subgid: {error.strerror}"
        ) from None
    finally:
        os.close(descriptor)
