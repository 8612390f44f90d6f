"""Which directories of the host a sandbox may be shown, and as whose. Decided on the opened one."""

from __future__ import annotations

import os
import pwd
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from heyvm.errors import Invalid
from heyvm.models import Mount

NEVER = tuple(Path(path) for path in ("/proc", "/sys", "/dev", "/etc", "/run", "/var/run", "/boot"))
FIRST_USER_ID = 1000  # login.defs(5), UID_MIN on Debian and Ubuntu; below are the system's own
LISTENING = 0x10000  # __SO_ACCEPTCON in the flags of /proc/net/unix
# A line of it: Num, RefCount, Protocol, Flags, Type, St, Inode, Path. A path may hold line breaks.
SOCKET = re.compile(
    rb"^[0-9a-f]+: [0-9A-F]{8} [0-9A-F]{8} ([0-9A-F]{8}) [0-9A-F]{4} [0-9A-F]{2} +[0-9]+ ?",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Policy:
    """Where mounts may lie (`roots`), and what they must not touch (`private`)."""

    roots: tuple[Path, ...]
    private: tuple[Path, ...]
    system_ids: bool = False


@dataclass(frozen=True)
class HostDirectory:
    """A directory that was opened and found good. `uid`, `gid`: whom root inside is mapped to."""

    path: str
    inode: tuple[int, int]
    uid: int | None
    gid: int | None


def check(mount: Mount, policy: Policy) -> HostDirectory:
    """Open the directory and judge what was opened. Raises `Invalid`, naming the mount."""
    try:
        descriptor = os.open(mount.host_path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise _refusal(mount, f"cannot be opened as a directory: {why}") from None
    try:
        real = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        found = os.fstat(descriptor)
        _check_place(mount, real, policy)
        _check_sockets(mount, real)
    finally:
        os.close(descriptor)
    uid, gid = _owner(mount, found, policy)
    return HostDirectory(str(real), (found.st_dev, found.st_ino), uid, gid)


def _refusal(mount: Mount, why: str) -> Invalid:
    text = f"host_path {mount.host_path!r} {why}"
    return Invalid(text, errors={"mounts": [text]})


def _check_place(mount: Mount, real: Path, policy: Policy) -> None:
    for other in (*NEVER, *policy.private):
        other = Path(os.path.realpath(other))
        if real.is_relative_to(other) or other.is_relative_to(real):
            raise _refusal(mount, f"is, holds or lies in {other}, which no sandbox may see")
    if not any(real.is_relative_to(os.path.realpath(root)) for root in policy.roots):
        roots = ":".join(map(str, policy.roots))
        raise _refusal(mount, f"is not below HEYVM_MOUNT_ROOTS ({roots})")


def _check_sockets(mount: Mount, real: Path) -> None:
    """A socket that listens is a door to what runs on the host, the Docker daemon's say."""
    with open("/proc/net/unix", "rb") as file:
        table = file.read()
    for path in listening(table):
        if Path(os.path.realpath(path)).is_relative_to(real) and _is_socket(path):
            raise _refusal(mount, f"holds a socket that something listens on: {path}")


def listening(table: bytes) -> Iterator[str]:
    """The paths of sockets that listen. Every user of the machine chooses names in this table, and
    may make them look like further lines: too many may be given, but none is left out."""
    found = list(SOCKET.finditer(table))
    ends = [one.start() - 1 for one in found[1:]] + [len(table) - 1]
    for one, end in zip(found, ends):
        path = table[one.end() : end]
        if int(one[1], 16) & LISTENING and path.startswith(b"/"):
            yield os.fsdecode(path)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False


def _owner(mount: Mount, found: os.stat_result, policy: Policy) -> tuple[int | None, int | None]:
    """Whom root inside stands for in this directory; never root, nor the system's own users."""
    if os.geteuid() != 0:
        if not mount.read_only and found.st_uid != os.geteuid():
            raise _refusal(mount, "belongs to another user: ask for it with read_only: true")
        return None, None
    low = 1 if policy.system_ids else FIRST_USER_ID
    if found.st_uid < low:
        if mount.read_only:
            return None, None
        raise _refusal(
            mount,
            f"belongs to user {found.st_uid}, whom no sandbox may act for: give it to an ordinary"
            " user, or ask for it with read_only: true",
        )
    return found.st_uid, _group(found, low)


def _group(found: os.stat_result, low: int) -> int:
    if found.st_gid >= low and stat.S_ISDIR(found.st_mode):
        return found.st_gid
    try:
        own = pwd.getpwuid(found.st_uid).pw_gid
    except KeyError:
        own = found.st_uid
    return own or found.st_uid
