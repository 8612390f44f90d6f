"""SFTP on one channel of an SSH connection, as OpenSSH's clients speak it (version 3).

Not by paramiko's `SFTPServer`: it knows names as UTF-8 only, has no word for why something failed,
answers a close before it is done, and hashes for ever at the end of a file (`check-file`).
The protocol: draft-ietf-secsh-filexfer-02, with extensions from OpenSSH's PROTOCOL, section 4.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
from collections.abc import Callable
from typing import Protocol

from heyvm.calls import MAX_DATA_BYTES, Calls, Change, Entry, Facts, Space
from heyvm.errors import BackendFailed, BadRequest

PROTOCOL = 3
MAX_PACKET_BYTES = 256 * 1024  # as OpenSSH's own server
RECEIVE_BYTES = 256 * 1024
MAX_HANDLES = 256
MAX_32 = (1 << 32) - 1
HALF_YEAR_S = 180 * 24 * 3600.0

INIT, VERSION, OPEN, CLOSE, READ, WRITE, LSTAT, FSTAT, SETSTAT, FSETSTAT = range(1, 11)
OPENDIR, READDIR, REMOVE, MKDIR, RMDIR, REALPATH, STAT, RENAME, READLINK, SYMLINK = range(11, 21)
STATUS, HANDLE, DATA, NAME, ATTRS = range(101, 106)
EXTENDED, EXTENDED_REPLY = 200, 201
OK, EOF, NO_SUCH_FILE, PERMISSION_DENIED, FAILURE, BAD_MESSAGE = range(6)
UNSUPPORTED = 8
CODES = {
    errno.ENOENT: NO_SUCH_FILE,
    errno.ENOTDIR: NO_SUCH_FILE,
    errno.EACCES: PERMISSION_DENIED,
    errno.EPERM: PERMISSION_DENIED,
    errno.ENOSYS: UNSUPPORTED,
    errno.ENOTSUP: UNSUPPORTED,
}
# What OpenSSH's client shows as a bare "Failure", and who uses it can do something about.
TELLING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO})
HAS_SIZE, HAS_OWNER, HAS_MODE, HAS_TIMES, HAS_MORE = 1, 2, 4, 8, 1 << 31
FLAGS = {4: os.O_APPEND, 8: os.O_CREAT, 16: os.O_TRUNC, 32: os.O_EXCL}
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()


class Channel(Protocol):
    """What is needed of an SSH channel."""

    def recv(self, nbytes: int) -> bytes:
        """Some bytes; none at the end."""

    def write(self, piece: bytes, *, is_error: bool = False) -> None:
        """All of it, waiting for the client's window. `OSError` where the channel is closed."""


class Malformed(Exception):
    """A request that ends too early."""


def serve(channel: Channel, calls: Calls) -> None:
    """Answer requests until the client has sent its last. `BadRequest` for what is no SFTP,
    `BackendFailed` (the request was answered with it) when the sandbox is gone."""
    requests = Requests(channel)
    first = requests.next()
    if first is None:
        return
    if first[:1] != bytes([INIT]):
        raise BadRequest("this is not SFTP")
    channel.write(packet(VERSION, u32(PROTOCOL) + EXTENSIONS))
    files = Files(calls)
    while (request := requests.next()) is not None:
        channel.write(files.answer(request))
        for words in files.complaints():
            channel.write(f"heyvm: {words}\n".encode(), is_error=True)
        if files.failed is not None:
            raise files.failed


class Requests:
    """The packets that come."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.buffer = bytearray()

    def next(self) -> bytes | None:
        """The next one without its length; None at the end. Raises `BadRequest`."""
        buffer = self.buffer
        if not self._have(4):
            return None
        end = 4 + int.from_bytes(buffer[:4], "big")
        if not 5 <= end <= 4 + MAX_PACKET_BYTES:
            raise BadRequest(f"a packet of {end - 4} bytes: this is not SFTP")
        if not self._have(end):
            return None
        found = bytes(memoryview(buffer)[4:end])
        del buffer[:end]
        return found

    def _have(self, size: int) -> bool:
        while len(self.buffer) < size:
            received = self.channel.recv(RECEIVE_BYTES)
            if not received:
                return False
            self.buffer += received
        return True


class Fields:
    """What is in a request, from the front."""

    def __init__(self, payload: bytes, at: int) -> None:
        self.payload, self.at = payload, at

    def take(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > len(self.payload):
            raise Malformed
        return self.payload[start : self.at]

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def string(self) -> bytes:
        return self.take(self.u32())

    def change(self) -> Change:
        """Attributes, of which extended ones are nobody's."""
        flags = self.u32()
        size = self.u64() if flags & HAS_SIZE else None
        owner = (self.u32(), self.u32()) if flags & HAS_OWNER else None
        mode = self.u32() & 0o7777 if flags & HAS_MODE else None
        times = (self.u32(), self.u32()) if flags & HAS_TIMES else None
        return Change(size, owner, mode, times)


class Files:
    """What a client has open, and an answer for each of its requests."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.failed: BackendFailed | None = None  # why there can be no further answers
        self._handles: dict[bytes, int] = {}
        self._last = 0
        self._told: dict[int, bool] = {}  # of what is `TELLING`: that it was said aside

    def answer(self, request: bytes) -> bytes:
        """The whole packet."""
        fields = Fields(request, 1)
        try:
            number = fields.take(4)
        except Malformed:
            raise BadRequest("a request without a number: this is not SFTP") from None
        kind, body = self._answered(request[0], fields)
        return packet(kind, number, body)

    def _answered(self, kind: int, fields: Fields) -> tuple[int, bytes]:
        try:
            work = WORK.get(kind)
            return status(UNSUPPORTED) if work is None else work(self, fields)
        except Malformed:
            return status(BAD_MESSAGE)
        except OSError as error:
            if error.errno in TELLING:
                self._told.setdefault(error.errno, False)
            return refusal(error.errno or errno.EIO, error.strerror)
        except BackendFailed as error:
            self.failed = error
            return status(FAILURE, error.detail)

    def complaints(self) -> list[str]:
        """What is to be said beside the answers; everything once."""
        new = [number for number, told in self._told.items() if not told]
        self._told.update(dict.fromkeys(new, True))
        return [os.strerror(number) for number in new]

    # -- files -----------------------------------------------------------------------------------

    def open(self, fields: Fields) -> tuple[int, bytes]:
        path, asked = fields.string(), fields.u32()
        mode = fields.change().mode
        flags = (os.O_RDONLY, os.O_RDONLY, os.O_WRONLY, os.O_RDWR)[asked & 3]
        for flag, meaning in FLAGS.items():
            flags |= meaning if asked & flag else 0
        return self._opened(lambda: self.calls.open(path, flags, 0o666 if mode is None else mode))

    def opendir(self, fields: Fields) -> tuple[int, bytes]:
        path = fields.string()
        return self._opened(lambda: self.calls.opendir(path))

    def _opened(self, call: Callable[[], int]) -> tuple[int, bytes]:
        if len(self._handles) >= MAX_HANDLES:
            raise OSError(errno.EMFILE, f"at most {MAX_HANDLES} files can be open at once")
        handle = call()
        self._last += 1
        name = b"%d" % self._last
        self._handles[name] = handle
        return HANDLE, string(name)

    def _handle(self, fields: Fields, *, take: bool = False) -> int:
        name = fields.string()
        handle = self._handles.pop(name, None) if take else self._handles.get(name)
        if handle is None:
            raise OSError(errno.EBADF, "there is no such handle")
        return handle

    def close(self, fields: Fields) -> tuple[int, bytes]:
        self.calls.close_handle(self._handle(fields, take=True))
        return status(OK)

    def read(self, fields: Fields) -> tuple[int, bytes]:
        handle, offset, length = self._handle(fields), fields.u64(), fields.u32()
        found = self.calls.read(handle, offset, min(length, MAX_DATA_BYTES))
        return (DATA, string(found)) if found else status(EOF)

    def write(self, fields: Fields) -> tuple[int, bytes]:
        handle, offset, content = self._handle(fields), fields.u64(), fields.string()
        for at in range(0, len(content), MAX_DATA_BYTES):
            self.calls.write(handle, offset + at, content[at : at + MAX_DATA_BYTES])
        return status(OK)

    def sync(self, fields: Fields) -> tuple[int, bytes]:
        self.calls.sync(self._handle(fields))
        return status(OK)

    # -- attributes ------------------------------------------------------------------------------

    def stat(self, fields: Fields) -> tuple[int, bytes]:
        return ATTRS, attributes(self.calls.stat(fields.string()))

    def lstat(self, fields: Fields) -> tuple[int, bytes]:
        return ATTRS, attributes(self.calls.stat(fields.string(), follow=False))

    def fstat(self, fields: Fields) -> tuple[int, bytes]:
        return ATTRS, attributes(self.calls.stat_handle(self._handle(fields)))

    def setstat(self, fields: Fields) -> tuple[int, bytes]:
        self.calls.change(fields.string(), fields.change())
        return status(OK)

    def lsetstat(self, fields: Fields) -> tuple[int, bytes]:
        self.calls.change(fields.string(), fields.change(), follow=False)
        return status(OK)

    def fsetstat(self, fields: Fields) -> tuple[int, bytes]:
        self.calls.change_handle(self._handle(fields), fields.change())
        return status(OK)

    def statvfs(self, fields: Fields) -> tuple[int, bytes]:
        return EXTENDED_REPLY, space(self.calls.space(fields.string()))

    def fstatvfs(self, fields: Fields) -> tuple[int, bytes]:
        return EXTENDED_REPLY, space(self.calls.space_of_handle(self._handle(fields)))

    # -- names -----------------------------------------------------------------------------------

    def readdir(self, fields: Fields) -> tuple[int, bytes]:
        entries = self.calls.readdir(self._handle(fields))
        if not entries:
            return status(EOF)
        now = time.time()
        return NAME, u32(len(entries)) + b"".join(listed(entry, now) for entry in entries)

    def remove(self, fields: Fields) -> tuple[int, bytes]:
        self.calls.remove(fields.string())
        return status(OK)

    def mkdir(self, fields: Fields) -> tuple[int, bytes]:
        path, mode = fields.string(), fields.change().mode
        self.calls.mkdir(path, 0o777 if mode is None else mode)
        return status(OK)

    def rmdir(self, fields: Fields) -> tuple[int, bytes]:
        self.calls.rmdir(fields.string())
        return status(OK)

    def rename(self, fields: Fields) -> tuple[int, bytes]:
        self.calls.rename(fields.string(), fields.string(), replace=False)
        return status(OK)

    def posix_rename(self, fields: Fields) -> tuple[int, bytes]:
        self.calls.rename(fields.string(), fields.string(), replace=True)
        return status(OK)

    def hardlink(self, fields: Fields) -> tuple[int, bytes]:
        self.calls.link(fields.string(), fields.string())
        return status(OK)

    def symlink(self, fields: Fields) -> tuple[int, bytes]:
        """The target comes first: the draft says otherwise, and OpenSSH and all others this."""
        self.calls.symlink(fields.string(), fields.string())
        return status(OK)

    def readlink(self, fields: Fields) -> tuple[int, bytes]:
        return one_name(self.calls.readlink(fields.string()))

    def realpath(self, fields: Fields) -> tuple[int, bytes]:
        return one_name(self.calls.realpath(fields.string()))

    def expand_path(self, fields: Fields) -> tuple[int, bytes]:
        return one_name(self.calls.realpath(fields.string(), expand=True))

    # -- extensions ------------------------------------------------------------------------------

    def extended(self, fields: Fields) -> tuple[int, bytes]:
        found = EXTENDED_WORK.get(fields.string())
        return status(UNSUPPORTED) if found is None else found[1](self, fields)

    def limits(self, fields: Fields) -> tuple[int, bytes]:
        """With these a client of today reads and writes 255 KiB at a time, not 32."""
        sizes = (MAX_PACKET_BYTES, MAX_DATA_BYTES, MAX_DATA_BYTES, MAX_HANDLES)
        return EXTENDED_REPLY, struct.pack(">4Q", *sizes)


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def string(value: bytes) -> bytes:
    return u32(len(value)) + value


def packet(kind: int, *parts: bytes) -> bytes:
    return b"".join((u32(1 + sum(map(len, parts))), bytes([kind]), *parts))


def status(code: int, why: str = "") -> tuple[int, bytes]:
    text = why or {OK: "Success", EOF: "End of file", UNSUPPORTED: "Operation unsupported"}.get(
        code, "Bad message"
    )
    return STATUS, u32(code) + string(text.encode("utf-8", "replace")) + string(b"")


def refusal(number: int, why: str | None) -> tuple[int, bytes]:
    """What the sandbox's kernel said: version 3 has few codes, and a text."""
    return status(CODES.get(number, FAILURE), why or os.strerror(number))


def attributes(facts: Facts) -> bytes:
    if not facts.mode:
        return u32(0)
    flags = HAS_SIZE | HAS_OWNER | HAS_MODE | HAS_TIMES
    owner = (facts.uid, facts.gid)
    times = (within_32(facts.atime), within_32(facts.mtime))
    return struct.pack(">IQIIIII", flags, facts.size, *owner, facts.mode, *times)


def within_32(seconds: int) -> int:
    """Version 3 knows no time before 1970 and none after 2106."""
    return max(0, min(seconds, MAX_32))


def listed(entry: Entry, now: float) -> bytes:
    name = string(entry.name)
    return name + string(long_name(entry, now)) + attributes(entry.facts)


def long_name(entry: Entry, now: float) -> bytes:
    """As `ls -l` would show it, in UTC and with numbers for names."""
    facts = entry.facts
    mtime = within_32(facts.mtime)
    when = time.gmtime(mtime)
    near = now - HALF_YEAR_S < mtime < now + HALF_YEAR_S
    hour = f"{when.tm_hour:02}:{when.tm_min:02}" if near else f"{when.tm_year:5}"
    date = f"{MONTHS[when.tm_mon - 1]} {when.tm_mday:2} {hour}"
    what = f"{stat.filemode(facts.mode)} {1:4} {facts.uid:<8} {facts.gid:<8} {facts.size:>8} {date}"
    return what.encode() + b" " + entry.name


def one_name(path: bytes) -> tuple[int, bytes]:
    return NAME, u32(1) + string(path) * 2 + u32(0)


def space(found: Space) -> bytes:
    sizes = (found.bsize, found.frsize, found.blocks, found.bfree, found.bavail)
    counts = (found.files, found.ffree, found.favail)
    # Of the flags the protocol knows the first two, read-only and nosuid, by statvfs's own numbers.
    return struct.pack(">11Q", *sizes, *counts, 0, found.flag & 3, found.namemax)


Work = Callable[[Files, Fields], tuple[int, bytes]]
WORK: dict[int, Work] = {
    OPEN: Files.open,
    CLOSE: Files.close,
    READ: Files.read,
    WRITE: Files.write,
    LSTAT: Files.lstat,
    FSTAT: Files.fstat,
    SETSTAT: Files.setstat,
    FSETSTAT: Files.fsetstat,
    OPENDIR: Files.opendir,
    READDIR: Files.readdir,
    REMOVE: Files.remove,
    MKDIR: Files.mkdir,
    RMDIR: Files.rmdir,
    REALPATH: Files.realpath,
    STAT: Files.stat,
    RENAME: Files.rename,
    READLINK: Files.readlink,
    SYMLINK: Files.symlink,
    EXTENDED: Files.extended,
}
EXTENDED_WORK: dict[bytes, tuple[bytes, Work]] = {
    b"posix-rename@openssh.com": (b"1", Files.posix_rename),
    b"statvfs@openssh.com": (b"2", Files.statvfs),
    b"fstatvfs@openssh.com": (b"2", Files.fstatvfs),
    b"hardlink@openssh.com": (b"1", Files.hardlink),
    b"fsync@openssh.com": (b"1", Files.sync),
    b"lsetstat@openssh.com": (b"1", Files.lsetstat),
    b"limits@openssh.com": (b"1", Files.limits),
    b"expand-path@openssh.com": (b"1", Files.expand_path),
}
EXTENSIONS = b"".join(string(name) + string(row[0]) for name, row in EXTENDED_WORK.items())
