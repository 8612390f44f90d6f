"""A sandbox's disk: a sparse file with an ext4 in it, on a loop device while somebody uses it.

Imported by `launcher.py`, which stands alone: no import but the standard library's. A device goes
by itself (autoclear) when its last user has gone, however that ended.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time

# linux/loop.h
LOOP_GET_STATUS64, LOOP_CONFIGURE, LOOP_CTL_GET_FREE = 0x4C05, 0x4C0A, 0x4C82
LO_FLAGS_AUTOCLEAR = 4
INFO = struct.Struct("=5Q4I64s64s32s2Q")  # struct loop_info64; device and inode come first
CONFIG = struct.Struct("=2I232s64x")  # struct loop_config: the file, its block size, the info
JOURNAL_MIB = 16
TRIES = 100
PAUSE_S = 0.01
# Inode tables are neither zeroed now nor later, or a sparse file would not stay sparse; what is
# deleted inside is given back to the disk outside.
OPTIONS = "noinit_itable,discard,errors=remount-ro"


def make(path: str, size: int, mkfs: str, owner: int) -> None:
    """Write an empty file system of `size` bytes, whose root directory is `owner`'s."""
    with open(path, "xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(size)
    lazy = f"lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner={owner}:{owner}"
    journal = f"size={JOURNAL_MIB}"
    told = [mkfs, "-q", "-F", "-t", "ext4", "-m", "0", "-J", journal, "-E", lazy, path]
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    quiet = [(os.POSIX_SPAWN_DUP2, null, number) for number in (0, 1, 2)]
    _, status = os.waitpid(os.posix_spawn(mkfs, told, {}, file_actions=quiet), 0)
    os.close(null)
    if status != 0:
        raise OSError(errno.EIO, f"{mkfs} failed")


def attach(path: str) -> tuple[int, str]:
    """The loop device that holds this file: a descriptor that keeps it until it is closed, and its
    path. There is never a second one, on which a second file system would ruin the first."""
    with open(path, "rb") as turn, open(path, "r+b") as file:
        # A description of its own: the device keeps the other one open, and would keep its lock.
        fcntl.flock(turn, fcntl.LOCK_EX)
        return _attached(os.fstat(file.fileno())) or _attach_anew(file.fileno())


def in_use(found: os.stat_result) -> bool:
    """Whether a loop device still holds this file (the file of a `stat`)."""
    there = _attached(found)
    if there is None:
        return False
    os.close(there[0])
    return True


def _attached(found: os.stat_result) -> tuple[int, str] | None:
    for name in os.listdir("/sys/block"):
        if not name.startswith("loop") or not os.path.exists(f"/sys/block/{name}/loop"):
            continue
        try:
            device = os.open(f"/dev/{name}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # it is going at this very moment
            continue
        # From here on it stays as it is.
        if _holds(device, found):
            return device, f"/dev/{name}"
        os.close(device)
    return None


def _holds(device: int, found: os.stat_result) -> bool:
    info = bytearray(INFO.size)
    try:
        fcntl.ioctl(device, LOOP_GET_STATUS64, info, True)
    except OSError:
        return False
    number, inode = struct.unpack_from("=2Q", info)
    return (number, inode) == (_encoded(found.st_dev), found.st_ino)


def _encoded(device: int) -> int:
    """As the kernel writes a device's number (new_encode_dev, linux/kdev_t.h)."""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def _attach_anew(file: int) -> tuple[int, str]:
    info = INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, LO_FLAGS_AUTOCLEAR, b"", b"", b"", 0, 0)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(TRIES):
            path = f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}"
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, LOOP_CONFIGURE, CONFIG.pack(file, 0, info))
                return device, path
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # somebody else took it
                    raise
            time.sleep(PAUSE_S)
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no free loop device was found")
