"""The host's side of `agent_calls.py`: system calls in a sandbox, one after another.

As everywhere no byte of an agent's is trusted: what is off is a `BackendFailed`, and the
connection is of no use after it. What the sandbox's kernel refuses is an `OSError`, as from `os`.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from heyvm import frames
from heyvm.guest import Conversation, Subject, failed, harmless, nonsense, number, words

if TYPE_CHECKING:
    from heyvm.guest import Fields

CALL_TIMEOUT_S = 60.0
MAX_DATA_BYTES = 255 * 1024  # of one read or write
MAX_PATH_BYTES = 4095
MAX_NAME_BYTES = 255
MAX_ERRNO = 4095
MAX_32 = (1 << 32) - 1
MAX_64 = (1 << 64) - 1


@dataclass(frozen=True)
class Facts:
    """What stat(2) says. A `mode` of 0: nothing is known."""

    mode: int
    size: int
    uid: int
    gid: int
    atime: int
    mtime: int


@dataclass(frozen=True)
class Entry:
    """One of a directory, its link not followed."""

    name: bytes
    facts: Facts


@dataclass(frozen=True)
class Space:
    """What statvfs(3) says, its members in their order (without f_fsid)."""

    bsize: int
    frsize: int
    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    favail: int
    flag: int
    namemax: int


@dataclass(frozen=True)
class Change:
    """New attributes; what is None stays as it is."""

    size: int | None = None
    owner: tuple[int, int] | None = None
    mode: int | None = None
    times: tuple[int, int] | None = None  # of access, of modification

    def fields(self) -> dict[str, frames.Writable]:
        found: dict[str, frames.Writable] = {}
        if self.size is not None:
            found["size"] = self.size
        if self.owner is not None:
            found["uid"], found["gid"] = self.owner
        if self.mode is not None:
            found["mode"] = self.mode
        if self.times is not None:
            found["atime"], found["mtime"] = self.times
        return found


class Calls:
    """A conversation, for one thread at a time. It owns `sock` unless it cannot begin. Paths are
    bytes, relative ones are of `cwd`; handles are numbers that the agent gives."""

    def __init__(self, sock: socket.socket, *, user: str, cwd: str) -> None:
        self._talk = Conversation(sock)
        self._talk.ask({"op": "calls", "user": user, "cwd": cwd})
        self._talk.answer(Subject("SFTP", cwd=cwd, user=user))

    def close(self) -> None:
        """What is open inside is closed as well, and the one who did the calls ends."""
        self.hang_up()
        self._talk.sock.close()

    def hang_up(self) -> None:
        """From any thread: a call under way, and any other, then raises `BackendFailed`."""
        with suppress(OSError):
            self._talk.sock.shutdown(socket.SHUT_RDWR)

    def _call(self, name: str, **fields: frames.Writable) -> Fields:
        try:
            self._talk.send(frames.header({"call": name, **fields}), CALL_TIMEOUT_S)
        except OSError as error:
            raise failed(
                "broken", f"the connection to the sandbox's agent broke: {error}"
            ) from None
        answer = self._talk.header(CALL_TIMEOUT_S)
        if "error" in answer:
            raise OSError(number(answer, "errno", 1, MAX_ERRNO), harmless(words(answer, "message")))
        if answer.get("ok") != 1:
            raise nonsense("a result that is neither good nor bad")
        return answer

    # -- files -----------------------------------------------------------------------------------

    def open(self, path: bytes, flags: int, mode: int = 0o666) -> int:
        """A handle of a file. What is no file is refused: a FIFO or a device is never opened."""
        return handle_of(self._call("open", path=path, flags=flags, mode=mode))

    def close_handle(self, handle: int) -> None:
        self._call("close", handle=handle)

    def read(self, handle: int, offset: int, length: int) -> bytes:
        """At most `MAX_DATA_BYTES`; nothing at the end of the file."""
        length = min(length, MAX_DATA_BYTES)
        found = self._call("read", handle=handle, offset=offset, length=length).get("data")
        if not isinstance(found, bytes) or len(found) > length:
            raise nonsense("what it read is not what was asked for")
        return found

    def write(self, handle: int, offset: int, data: bytes) -> None:
        """All of it, at most `MAX_DATA_BYTES`."""
        self._call("write", handle=handle, offset=offset, data=data)

    def sync(self, handle: int) -> None:
        self._call("sync", handle=handle)

    # -- directories -----------------------------------------------------------------------------

    def opendir(self, path: bytes) -> int:
        return handle_of(self._call("opendir", path=path))

    def readdir(self, handle: int) -> Sequence[Entry]:
        """Some more entries, in no order; none at the end."""
        found = self._call("readdir", handle=handle).get("entries")
        if not isinstance(found, list):
            raise nonsense("entries that are no list")
        return [entry_of(row) for row in found]

    # -- attributes ------------------------------------------------------------------------------

    def stat(self, path: bytes, *, follow: bool = True) -> Facts:
        return facts_of(self._call("stat", path=path, follow=int(follow)).get("facts"))

    def stat_handle(self, handle: int) -> Facts:
        return facts_of(self._call("stat", handle=handle).get("facts"))

    def change(self, path: bytes, change: Change, *, follow: bool = True) -> None:
        self._call("setstat", path=path, follow=int(follow), **change.fields())

    def change_handle(self, handle: int, change: Change) -> None:
        self._call("setstat", handle=handle, **change.fields())

    def space(self, path: bytes) -> Space:
        return space_of(self._call("statvfs", path=path))

    def space_of_handle(self, handle: int) -> Space:
        return space_of(self._call("statvfs", handle=handle))

    # -- names -----------------------------------------------------------------------------------

    def mkdir(self, path: bytes, mode: int = 0o777) -> None:
        self._call("mkdir", path=path, mode=mode)

    def rmdir(self, path: bytes) -> None:
        self._call("rmdir", path=path)

    def remove(self, path: bytes) -> None:
        self._call("remove", path=path)

    def rename(self, path: bytes, to: bytes, *, replace: bool) -> None:
        self._call("rename", path=path, to=to, replace=int(replace))

    def link(self, path: bytes, to: bytes) -> None:
        self._call("link", path=path, to=to)

    def symlink(self, target: bytes, path: bytes) -> None:
        self._call("symlink", target=target, path=path)

    def readlink(self, path: bytes) -> bytes:
        return path_of(self._call("readlink", path=path))

    def realpath(self, path: bytes, *, expand: bool = False) -> bytes:
        """The absolute name, links resolved; its last part may be missing. With `expand` a
        leading `~` is the user's home."""
        found = path_of(self._call("realpath", path=path, expand=int(expand)))
        if not found.startswith(b"/"):
            raise nonsense("a path that is not absolute")
        return found


def handle_of(fields: Fields) -> int:
    return number(fields, "handle", 1, MAX_32)


def path_of(fields: Fields) -> bytes:
    found = fields.get("path")
    if not isinstance(found, bytes) or b"\0" in found or not 0 < len(found) <= MAX_PATH_BYTES + 256:
        raise nonsense("a path that can be none")
    return found


def facts_of(row: object) -> Facts:
    if not isinstance(row, list) or len(row) != 6:
        raise nonsense("attributes that are none")
    mode, size, uid, gid, atime, mtime = (whole(value) for value in row)
    if not 0 <= mode <= 0o177777 or not 0 <= size <= MAX_64 or not 0 <= uid <= MAX_32:
        raise nonsense("attributes that can be none")
    if not 0 <= gid <= MAX_32:
        raise nonsense("attributes that can be none")
    return Facts(mode, size, uid, gid, atime, mtime)


def whole(value: object) -> int:
    if not isinstance(value, int):
        raise nonsense("an attribute that is no number")
    return value


def entry_of(row: object) -> Entry:
    if not isinstance(row, list) or not row or not isinstance(row[0], bytes):
        raise nonsense("an entry that is none")
    if not is_name(row[0]):
        raise nonsense("a name that can be none")
    return Entry(row[0], facts_of(row[1:]))


def is_name(name: bytes) -> bool:
    """One that a client can put behind a directory's without going elsewhere."""
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        return False
    return len(name) <= MAX_NAME_BYTES


def space_of(fields: Fields) -> Space:
    return Space(*(number(fields, key, 0, MAX_64) for key in Space.__dataclass_fields__))
