"""Files in a sandbox's mounts, running or stopped. Streams; knows paths and nothing of HTTP."""

from __future__ import annotations

import posixpath
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol

from heyvm import guest
from heyvm.errors import BadRequest, Conflict, NotFound
from heyvm.models import Download, FileInfo, Sandbox

WORKSPACE = "/workspace"
MAX_PATH_BYTES = 4095
MAX_NAME_BYTES = 255


class Sandboxes(Protocol):
    """What is asked of the lifecycle."""

    def get(self, ref: str) -> Sandbox: ...

    def visit(self, ref: str) -> AbstractContextManager[Callable[[], socket.socket]]: ...


@dataclass(frozen=True)
class Place:
    """A path in one mount of one sandbox, checked."""

    sandbox: Sandbox
    mount: str
    path: str


@dataclass(frozen=True)
class Files:
    """Each call is one conversation with the agent. `mount_path` is `/workspace` or a mount's
    `sandbox_path`; a path is relative to it, or absolute and below it."""

    lifecycle: Sandboxes

    def list(self, ref: str, mount_path: str, path: str, recursive: bool) -> list[FileInfo]:
        """The entries of a directory, sorted by path."""
        place = self._place(ref, mount_path, path)
        with self.lifecycle.visit(place.sandbox.id) as connect, connect() as sock:
            return guest.list_files(sock, place.mount, place.path, recursive=recursive)

    def stat(self, ref: str, mount_path: str, path: str) -> Download:
        """As `open`, of which nothing is read."""
        found = self.open(ref, mount_path, path, 0, 0)
        return Download(found.info, found.size, found.etag, iter(()))

    def open(
        self, ref: str, mount_path: str, path: str, offset: int = 0, length: int | None = None
    ) -> Download:
        """A file's bytes from `offset` on, `length` of them at most; its size is the whole file's.

        The iterator raises when the file becomes shorter than it was.
        """
        place = self._place(ref, mount_path, path)
        with ExitStack() as visit:
            sock = self._conversation(visit, place)
            head, chunks = guest.read(sock, place.mount, place.path, offset=offset, length=length)
            info = info_of(place, head)
            if length == 0:
                chunks = iter(tuple(chunks))
                return Download(info, head.size, etag(head), chunks)
            return Download(info, head.size, etag(head), Chunks(chunks, visit.pop_all()))

    def open_tar(self, ref: str, mount_path: str, path: str) -> Download:
        """A directory's contents as a tar archive, made while it is read."""
        place = self._place(ref, mount_path, path)
        with ExitStack() as visit:
            sock = self._conversation(visit, place)
            head, chunks = guest.read_tar(sock, place.mount, place.path)
            return Download(info_of(place, head), None, None, Chunks(chunks, visit.pop_all()))

    def upload(self, ref: str, mount_path: str, path: str, chunks: Iterator[bytes]) -> int:
        """Write a file, making its parents. It takes the old one's place when all has come, and
        not at all when `chunks` raises. The number of bytes."""
        return self._write(self._place(ref, mount_path, path), chunks, tar=False)

    def upload_tar(self, ref: str, mount_path: str, path: str, chunks: Iterator[bytes]) -> int:
        """Unpack a tar archive into a directory, made where missing. The number of bytes in it."""
        return self._write(self._place(ref, mount_path, path), chunks, tar=True)

    def delete(self, ref: str, mount_path: str, path: str, recursive: bool) -> None:
        """Remove one entry, following no link; a directory that is not empty only `recursive`ly."""
        place = self._place(ref, mount_path, path)
        demand_writable(place)
        if not place.path:
            raise BadRequest(f"{place.mount!r} is a mount: delete what is in it instead")
        with self.lifecycle.visit(place.sandbox.id) as connect, connect() as sock:
            guest.delete(sock, place.mount, place.path, recursive=recursive)

    def _write(self, place: Place, chunks: Iterator[bytes], *, tar: bool) -> int:
        demand_writable(place)
        with self.lifecycle.visit(place.sandbox.id) as connect, connect() as sock:
            return guest.write(sock, place.mount, place.path, chunks, tar=tar)

    def _conversation(self, visit: ExitStack, place: Place) -> socket.socket:
        connect = visit.enter_context(self.lifecycle.visit(place.sandbox.id))
        return visit.enter_context(connect())

    def _place(self, ref: str, mount_path: str, path: str) -> Place:
        sandbox = self.lifecycle.get(ref)
        mount = mount_of(sandbox, mount_path)
        return Place(sandbox, mount, relative(mount, path))


class Chunks:
    """Bytes on their way out. Lets go of the sandbox at the end, on failure, and when closed."""

    def __init__(self, chunks: Iterator[bytes], visit: ExitStack) -> None:
        self._chunks, self._visit = chunks, visit

    def __iter__(self) -> Chunks:
        return self

    def __next__(self) -> bytes:
        try:
            return next(self._chunks)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._visit.close()


def mount_of(sandbox: Sandbox, mount_path: str) -> str:
    """The mount that is meant, as the sandbox knows it."""
    available = mounts_of(sandbox)
    wanted = mount_path.rstrip("/") or "/"
    if wanted not in available:
        raise NotFound(f"Mount not found: {mount_path} (available mounts: {available})")
    return wanted


def mounts_of(sandbox: Sandbox) -> list[str]:
    paths = [mount.sandbox_path for mount in sandbox.mounts if not mount.pending]
    return list(dict.fromkeys([WORKSPACE, *paths]))


def relative(mount: str, path: str) -> str:
    """The path from the mount on. Raises `BadRequest` for what is none."""
    if "\0" in path or "\n" in path:
        raise BadRequest("a path has no NUL byte and no newline in it")
    if path.startswith("/"):
        path = below(mount, path)
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise BadRequest(f"{path!r} is not a path below its mount: it has .. in it")
    found = posixpath.join("", *parts)
    demand_fits(found, parts)
    return found


def below(mount: str, path: str) -> str:
    normal = "/" + "/".join(part for part in path.split("/") if part not in ("", "."))
    if normal != mount and not normal.startswith(mount.rstrip("/") + "/"):
        raise BadRequest(f"{path!r} does not lie in the mount {mount!r}")
    return normal[len(mount.rstrip("/")) + 1 :]


def demand_fits(path: str, parts: list[str]) -> None:
    if any(size(part) > MAX_NAME_BYTES for part in parts):
        raise BadRequest(f"a name in a path has at most {MAX_NAME_BYTES} bytes")
    if size(path) > MAX_PATH_BYTES:
        raise BadRequest(f"a path has at most {MAX_PATH_BYTES} bytes")


def size(path: str) -> int:
    try:
        return len(path.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        raise BadRequest("a path has a character in it that no file name can have") from None


def demand_writable(place: Place) -> None:
    for mount in place.sandbox.mounts:
        if mount.sandbox_path == place.mount and mount.read_only and not mount.pending:
            raise Conflict(f"the mount {place.mount!r} is read-only")


def info_of(place: Place, head: guest.FileHead) -> FileInfo:
    name = posixpath.basename(place.path) or posixpath.basename(place.mount)
    return FileInfo(name, place.path, head.type, head.size, head.mode, head.modified_at)


def etag(head: guest.FileHead) -> str:
    """Changes whenever the file is written or replaced."""
    return f'"{head.ino:x}-{head.mtime_ns:x}-{head.size:x}"'
