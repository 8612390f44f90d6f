"""The agent's file operations. Each runs in a forked child that owns its connection and may block.

Every path is walked one component at a time from the opened mount, and links are read and followed
by hand: none leads out of the mount, whatever else changes in the tree meanwhile.
"""

from __future__ import annotations

import errno
import posix
import sys

from heyvm import frames
from heyvm.agent import Refused, make_directories, number, octets, problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable, Iterator
    from typing import TypeAlias

    from heyvm.agent import Fields

    Result: TypeAlias = dict[str, frames.Writable]
    Entry: TypeAlias = tuple[int, bytes, bytes, posix.stat_result]
else:
    import _signal

OUR_PREFIX = b".heyvm-"  # what is half-made, or on its way out; never listed
MAX_LINKS = 40  # as the kernel's own
MAX_PATH_BYTES = 4095
MAX_NAME_BYTES = 255
BATCH_BYTES = 60 * 1024
FLATTEN_DEPTH = 64
RESCANS = 16
BLOCK = 512
MAX_TAR_FIELD_BYTES = 64 * 1024

FLAGS = posix.O_CLOEXEC | posix.O_NOFOLLOW
HANDLE = FLAGS | posix.O_PATH | posix.O_DIRECTORY
DIRECTORY = FLAGS | posix.O_RDONLY | posix.O_DIRECTORY
READ = FLAGS | posix.O_RDONLY | posix.O_NONBLOCK | posix.O_NOCTTY
CREATE = FLAGS | posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL

KIND_MASK, IS_FILE, IS_DIRECTORY, IS_LINK = 0o170000, 0o100000, 0o040000, 0o120000
KINDS = {
    IS_FILE: "file",
    IS_DIRECTORY: "directory",
    IS_LINK: "symlink",
    0o010000: "fifo",
    0o140000: "socket",
    0o020000: "device",
    0o060000: "device",
}


class Gone(Exception):
    """The host closed the connection, or broke the rules of it; or the sandbox is being stopped."""


class Peer:
    """The connection, blocking."""

    def __init__(self, fd: int, splitter: frames.Splitter) -> None:
        self.fd, self.splitter = fd, splitter
        posix.set_blocking(fd, True)

    def send(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[posix.write(self.fd, view) :]
        except OSError as error:
            raise Gone from error

    def receive(self) -> tuple[int, bytes]:
        try:
            while (found := self.splitter.next()) is None:
                received = posix.read(self.fd, frames.MAX_PAYLOAD_BYTES)
                if not received:
                    raise Gone
                self.splitter.feed(received)
        except (OSError, frames.FrameError) as error:
            raise Gone from error
        return found


class Body:
    """The `D` frames of a request as one stream of bytes."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.ended = False
        self.rest = b""

    def chunk(self) -> bytes:
        """What has come next; empty at the end."""
        rest, self.rest = self.rest, b""
        while not rest and not self.ended:
            kind, rest = self.peer.receive()
            if kind not in (frames.DATA, frames.END):
                raise Gone
            self.ended = kind == frames.END
        return rest

    def some(self, size: int) -> bytes:
        """At least one byte and at most so many; empty at the end."""
        found = self.chunk()
        self.rest = found[size:]
        return found[:size]

    def exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = self.some(size)
            if not part:
                raise Refused("bad-archive", "the archive ends in the middle")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def serve(
    fd: int, splitter: frames.Splitter, work: Callable[[Peer, Fields], Result], request: Fields
) -> None:
    """Do it, say how it went, and exit."""
    _signal.signal(_signal.SIGTERM, leave)
    try:
        peer = Peer(fd, splitter)
        peer.send(frames.header(attempt(work, peer, request)))
    except Gone:
        pass
    finally:
        posix._exit(0)


def attempt(work: Callable[[Peer, Fields], Result], peer: Peer, request: Fields) -> Result:
    try:
        return work(peer, request)
    except Refused as refused:
        return {"error": refused.code, "message": refused.message}
    except frames.FrameError as error:
        raise Gone from error
    except (OSError, ValueError) as error:
        return problem(error)


def leave(_number: int, _frame: object) -> None:
    raise Gone


class Tree:
    """A mount, opened once. What `resolve` returns lies in it."""

    def __init__(self, mount: bytes) -> None:
        if not mount.startswith(b"/") or b"\0" in mount:
            raise Refused("bad-path", "a mount's path is absolute")
        self.mount = [part for part in mount.split(b"/") if part]
        self.root = posix.open(mount, posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)

    def resolve(self, path: list[bytes], *, follow: bool, make: bool = False) -> tuple[int, bytes]:
        """The opened directory that holds what `path` names, and its name there (`.`: itself).

        The name may not exist. With `follow` it is no link, or has become one since; without, it
        may be any kind. `make`: parents are made where missing.
        """
        above, todo, links = [self.root], path[::-1], 0
        while todo:
            part = todo.pop()
            if part == b"..":
                self._climb(above)
                continue
            if not todo and not follow:
                return above[-1], part
            target = link_target(above[-1], part)
            if target is not None:
                links += 1
                todo += self._follow(above, target, links)[::-1]
            elif not todo:
                return above[-1], part
            else:
                above.append(enter(above[-1], part, make))
        return above[-1], b"."

    def _climb(self, above: list[int]) -> None:
        if len(above) == 1:
            raise Refused("outside", "a link leads out of the mount")
        posix.close(above.pop())

    def _follow(self, above: list[int], target: bytes, links: int) -> list[bytes]:
        if links > MAX_LINKS:
            raise Refused("outside", "too many links")
        parts = [part for part in target.split(b"/") if part not in (b"", b".")]
        if not target.startswith(b"/"):
            return parts
        if parts[: len(self.mount)] != self.mount:
            raise Refused("outside", "a link leads out of the mount")
        while len(above) > 1:
            posix.close(above.pop())
        return parts[len(self.mount) :]

    def directory(self, path: list[bytes], *, make: bool = False) -> int:
        """Opened for reading."""
        at, name = self.resolve(path, follow=True, make=make)
        if make and name != b".":
            make_entry(at, name)
        return posix.open(name, DIRECTORY, dir_fd=at)


def link_target(at: int, name: bytes) -> bytes | None:
    try:
        return posix.readlink(name, dir_fd=at)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return None
        raise


def enter(at: int, name: bytes, make: bool) -> int:
    if make:
        make_entry(at, name)
    return posix.open(name, HANDLE, dir_fd=at)


def make_entry(at: int, name: bytes) -> None:
    try:
        posix.mkdir(name, 0o755, dir_fd=at)
    except FileExistsError:
        pass


def tree_of(request: Fields) -> Tree:
    return Tree(octets(request, "mount", b""))


def path_of(request: Fields) -> list[bytes]:
    """The components of the asked path. Raises `Refused`: it is relative and does not climb."""
    path = octets(request, "path", b"")
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if path.startswith(b"/") or b".." in parts or b"\0" in path or len(path) > MAX_PATH_BYTES:
        raise Refused("bad-path", "a path is relative to its mount and does not climb")
    if any(len(part) > MAX_NAME_BYTES for part in parts):
        raise Refused("bad-path", "a name has at most 255 bytes")
    return parts


def kind_of(state: posix.stat_result) -> int:
    return state.st_mode & KIND_MASK


def look(at: int, name: bytes) -> posix.stat_result:
    return posix.stat(name, dir_fd=at, follow_symlinks=False)


def fresh_name() -> bytes:
    return OUR_PREFIX + posix.getrandom(8).hex().encode()


def ours(name: bytes) -> bool:
    return name.startswith(OUR_PREFIX) and len(name) == len(OUR_PREFIX) + 16


def encoded(name: str) -> bytes:
    """scandir of a descriptor gives text; these are the file's bytes again."""
    return name.encode(sys.getfilesystemencoding(), sys.getfilesystemencodeerrors())


def walk(top: int, prefix: bytes, recursive: bool) -> Iterator[Entry]:
    """Every entry below an opened directory, a directory before what is in it.

    What lies deeper than a path can say is left out: nobody could ask for it.
    """
    stack = [(top, prefix, posix.scandir(top))]
    while stack:
        at, before, entries = stack[-1]
        entry = next(entries, None)
        if entry is None:
            entries.close()
            posix.close(stack.pop()[0])
            continue
        name = encoded(entry.name)
        try:
            state = look(at, name)
            if ours(name):
                continue
            yield at, name, before + name, state
            if recursive and kind_of(state) == IS_DIRECTORY:
                below = before + name + b"/"
                if len(below) < MAX_PATH_BYTES:
                    opened = posix.open(name, DIRECTORY, dir_fd=at)
                    stack.append((opened, below, posix.scandir(opened)))
        except FileNotFoundError:  # removed since
            continue


def list_files(peer: Peer, request: Fields) -> Result:
    path = path_of(request)
    top = tree_of(request).directory(path)
    prefix = b"".join(part + b"/" for part in path)
    batch: list[frames.Writable] = []
    size = 0
    for _, name, full, state in walk(top, prefix, number(request, "recursive", 0) == 1):
        batch.append({"name": name, "path": full, **facts(state)})
        size += len(name) + len(full) + 100
        if size > BATCH_BYTES:
            peer.send(frames.frame(frames.DATA, frames.encode(batch)))
            batch, size = [], 0
    if batch:
        peer.send(frames.frame(frames.DATA, frames.encode(batch)))
    return {"ok": 1}


def facts(state: posix.stat_result) -> Result:
    return {
        "type": KINDS.get(kind_of(state), "device"),
        "size": state.st_size,
        "mode": state.st_mode & 0o7777,
        "mtime_ns": state.st_mtime_ns,
        "ino": state.st_ino,
    }


def read(peer: Peer, request: Fields) -> Result:
    if number(request, "tar", 0) == 1:
        return read_tar(peer, request)
    fd, state = open_file(tree_of(request), path_of(request))
    offset, length = number(request, "offset", 0), number(request, "length", -1)
    rest = max(0, state.st_size - offset)
    if length >= 0:
        rest = min(rest, length)
    peer.send(frames.header(facts(state)))
    copy_out(peer, fd, offset, rest)
    peer.send(frames.frame(frames.END))
    return {"ok": 1}


def open_file(tree: Tree, path: list[bytes]) -> tuple[int, posix.stat_result]:
    """Looked at before it is opened (opening a device can do things), and again afterwards."""
    at, name = tree.resolve(path, follow=True)
    demand_file(look(at, name))
    fd = posix.open(name, READ, dir_fd=at)
    state = posix.fstat(fd)
    demand_file(state)
    return fd, state


def demand_file(state: posix.stat_result) -> None:
    if kind_of(state) == IS_DIRECTORY:
        raise Refused("is-directory", "it is a directory")
    if kind_of(state) != IS_FILE:
        raise Refused("not-regular", f"it is a {KINDS.get(kind_of(state), 'device')}")


def copy_out(peer: Peer, fd: int, offset: int, rest: int) -> None:
    """Exactly so many bytes, or a failure: what was promised is never padded."""
    while rest:
        chunk = posix.pread(fd, min(rest, frames.MAX_PAYLOAD_BYTES), offset)
        if not chunk:
            raise Refused("failed", "the file became shorter while it was read")
        peer.send(frames.frame(frames.DATA, chunk))
        offset += len(chunk)
        rest -= len(chunk)


def write(peer: Peer, request: Fields) -> Result:
    body = Body(peer)
    if number(request, "tar", 0) == 1:
        return write_tar(body, request)
    path = path_of(request)
    if not path:
        raise Refused("is-directory", "it is the mount itself")
    at, name = tree_of(request).resolve(path, follow=False, make=True)
    before = existing(at, name)
    temporary = fresh_name()
    fd = posix.open(temporary, CREATE, 0o600, dir_fd=at)
    try:
        size = copy_in(body, fd)
        inherit(fd, before)
        posix.rename(temporary, name, src_dir_fd=at, dst_dir_fd=at)
    except BaseException:
        posix.unlink(temporary, dir_fd=at)
        raise
    return {"ok": 1, "size": size}


def existing(at: int, name: bytes) -> posix.stat_result | None:
    try:
        state = look(at, name)
    except FileNotFoundError:
        return None
    if kind_of(state) == IS_DIRECTORY:
        raise Refused("is-directory", "it is a directory")
    return state if kind_of(state) == IS_FILE else None


def copy_in(body: Body, fd: int) -> int:
    size = 0
    while chunk := body.chunk():
        write_all(fd, chunk)
        size += len(chunk)
    return size


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[posix.write(fd, view) :]


def inherit(fd: int, before: posix.stat_result | None) -> None:
    """A file that takes another's place keeps its owner and its mode, but for setuid and setgid."""
    if before is not None:
        try:
            posix.fchown(fd, before.st_uid, before.st_gid)
        except OSError:  # an id that this sandbox has no name for: it becomes root's
            pass
    posix.fchmod(fd, before.st_mode & 0o777 if before is not None else 0o644)


def delete(peer: Peer, request: Fields) -> Result:
    path = path_of(request)
    if not path:
        raise Refused("bad-path", "the mount itself stays")
    at, name = tree_of(request).resolve(path, follow=False)
    if kind_of(look(at, name)) != IS_DIRECTORY:
        posix.unlink(name, dir_fd=at)
    elif number(request, "recursive", 0) == 1:
        remove_tree(at, name)
    else:
        posix.rmdir(name, dir_fd=at)
    return {"ok": 1}


class Level:
    """A directory that is being emptied."""

    def __init__(self, parent: int, name: bytes) -> None:
        self.parent, self.name = parent, name
        self.fd = posix.open(name, DIRECTORY, dir_fd=parent)
        self.patience = RESCANS
        self.entries = posix.scandir(self.fd)

    def removed(self) -> bool:
        """Try to remove it. Entries may have been missed by the scan, or made since."""
        self.entries.close()
        try:
            posix.rmdir(self.name, dir_fd=self.parent)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or not self.patience:
                raise
            self.patience -= 1
            self.entries = posix.scandir(self.fd)
            return False
        posix.close(self.fd)
        return True


def remove_tree(at: int, name: bytes) -> None:
    """Remove a directory and all that is in it, following nothing.

    Where it is deep, directories are moved up to the top before they are emptied: the descriptors
    that are open at once stay few.
    """
    levels = [Level(at, name)]
    while levels:
        level = levels[-1]
        entry = next(level.entries, None)
        if entry is None:
            if level.removed():
                levels.pop()
        elif not entry.is_dir(follow_symlinks=False):
            remove_entry(level.fd, encoded(entry.name))
        elif len(levels) <= FLATTEN_DEPTH or not moved_up(level, encoded(entry.name), levels[0]):
            levels.append(Level(level.fd, encoded(entry.name)))


def remove_entry(at: int, name: bytes) -> None:
    try:
        posix.unlink(name, dir_fd=at)
    except FileNotFoundError:
        pass


def moved_up(level: Level, name: bytes, top: Level) -> bool:
    try:
        posix.rename(name, fresh_name(), src_dir_fd=level.fd, dst_dir_fd=top.fd)
    except OSError:  # EXDEV: a directory of an overlay's lower layer cannot be moved
        return False
    top.patience = RESCANS
    return True


def mkdir(peer: Peer, request: Fields) -> Result:
    path = octets(request, "path", b"")
    if not path.startswith(b"/") or b".." in path.split(b"/"):
        raise Refused("bad-path", "not an absolute path")
    make_directories(path)
    return {"ok": 1}


def read_tar(peer: Peer, request: Fields) -> Result:
    """Files, directories and links; what is neither (sockets, devices) has no place in a tar."""
    top = tree_of(request).directory(path_of(request))
    peer.send(frames.header(facts(posix.fstat(top))))
    for at, name, path, state in walk(top, b"", True):
        kind = kind_of(state)
        if kind == IS_DIRECTORY:
            send_member(peer, tar_header(path + b"/", state, b"5"))
        elif kind == IS_LINK:
            send_member(peer, tar_header(path, state, b"2", link=posix.readlink(name, dir_fd=at)))
        elif kind == IS_FILE:
            tar_file(peer, at, name, path)
    send_member(peer, bytes(2 * BLOCK))
    peer.send(frames.frame(frames.END))
    return {"ok": 1}


def send_member(peer: Peer, blocks: bytes) -> None:
    peer.send(frames.frame(frames.DATA, blocks))


def tar_file(peer: Peer, at: int, name: bytes, path: bytes) -> None:
    fd = posix.open(name, READ, dir_fd=at)
    try:
        state = posix.fstat(fd)
        if kind_of(state) != IS_FILE:
            return
        send_member(peer, tar_header(path, state, b"0", size=state.st_size))
        copy_out(peer, fd, 0, state.st_size)
        if state.st_size % BLOCK:
            send_member(peer, bytes(BLOCK - state.st_size % BLOCK))
    finally:
        posix.close(fd)


def tar_header(
    name: bytes, state: posix.stat_result, kind: bytes, *, size: int = 0, link: bytes = b""
) -> bytes:
    """In GNU's form: names are bytes there, of any length, with no encoding to fail."""
    before = b""
    if len(name) > 100:
        before += long_field(name, b"L")
    if len(link) > 100:
        before += long_field(link, b"K")
    seconds = max(0, state.st_mtime_ns // 1_000_000_000)
    numbers = (state.st_mode & 0o7777, state.st_uid, state.st_gid)
    return before + tar_block(name, kind, link, numbers, (size, seconds))


def long_field(value: bytes, kind: bytes) -> bytes:
    value += b"\0"
    block = tar_block(b"././@LongLink", kind, b"", (0o644, 0, 0), (len(value), 0))
    return block + value + bytes(-len(value) % BLOCK)


def tar_block(
    name: bytes, kind: bytes, link: bytes, short: tuple[int, ...], wide: tuple[int, ...]
) -> bytes:
    head = name[:100].ljust(100, b"\0") + b"".join(tar_number(value, 8) for value in short)
    head += b"".join(tar_number(value, 12) for value in wide)
    tail = kind + link[:100].ljust(100, b"\0") + b"ustar  \0"
    total = sum(head) + sum(tail) + 8 * 32  # the sum counts its own field as spaces
    return (head + b"%06o\0 " % total + tail).ljust(BLOCK, b"\0")


def tar_number(value: int, width: int) -> bytes:
    if value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return b"\x80" + value.to_bytes(width - 1, "big")


class Member:
    """One entry of an archive, checked: its path neither climbs nor is absolute."""

    def __init__(self, block: bytes, extra: dict[bytes, bytes]) -> None:
        self.kind = block[156:157]
        self.size = tar_value(block[124:136])
        self.mode = tar_value(block[100:108]) & 0o777  # no setuid comes out of an archive
        self.mtime_ns = tar_value(block[136:148]) * 1_000_000_000
        name = until_nul(block[:100])
        if block[257:263] == b"ustar\0" and (before := until_nul(block[345:500])):
            name = before + b"/" + name
        self.name = extra.get(b"path", name)
        self.link = extra.get(b"linkpath", until_nul(block[157:257]))
        if b"size" in extra:
            self.size = decimal(extra[b"size"])
        if b"mtime" in extra:
            self.mtime_ns = decimal(extra[b"mtime"].partition(b".")[0]) * 1_000_000_000

    @property
    def padded(self) -> int:
        return self.size + -self.size % BLOCK

    def path(self) -> list[bytes]:
        return archive_path(self.name)


def archive_path(name: bytes) -> list[bytes]:
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if name.startswith(b"/") or b".." in parts or b"\0" in name:
        raise Refused("bad-archive", f"an entry leads out of the directory: {shown(name)}")
    if len(name) > MAX_PATH_BYTES or any(len(part) > MAX_NAME_BYTES for part in parts):
        raise Refused("bad-archive", f"an entry's name is too long: {shown(name)}")
    return parts


def shown(name: bytes) -> str:
    return repr(frames.text(name[:100]))


def until_nul(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def decimal(value: bytes) -> int:
    if not value.isdigit() or len(value) > 18:
        raise Refused("bad-archive", "a number that is none")
    return int(value)


def tar_value(field: bytes) -> int:
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        return value if not field[0] & 0x40 else 0  # a time before 1970
    digits = field.strip(b" \0")
    try:
        return int(digits or b"0", 8)
    except ValueError:
        raise Refused("bad-archive", "a number that is none") from None


def members(body: Body) -> Iterator[Member]:
    """The archive's entries. Who takes one reads its `size` bytes and the padding first."""
    extra: dict[bytes, bytes] = {}
    while True:
        block = body.exactly(BLOCK)
        if block == bytes(BLOCK):
            break
        if sum(block[:148]) + 256 + sum(block[156:]) != tar_value(block[148:156]):
            raise Refused("bad-archive", "this is not a tar archive (a checksum is wrong)")
        member = Member(block, extra)
        if member.kind in (b"L", b"K", b"x", b"g"):
            extra |= tar_extra(body, member)
            continue
        extra = {}
        yield member
    while body.chunk():  # an archive is padded with zeros, as long as its writer likes
        pass


def tar_extra(body: Body, member: Member) -> dict[bytes, bytes]:
    size = tar_value_of_extra(member)
    content = body.exactly(size + -size % BLOCK)[:size]
    if member.kind == b"L":
        return {b"path": until_nul(content)}
    if member.kind == b"K":
        return {b"linkpath": until_nul(content)}
    return pax_records(content) if member.kind == b"x" else {}


def tar_value_of_extra(member: Member) -> int:
    if member.size > MAX_TAR_FIELD_BYTES:
        raise Refused("bad-archive", "a name or an extended header that is too long")
    return member.size


def pax_records(content: bytes) -> dict[bytes, bytes]:
    """`<length> <key>=<value>\\n`, the length counting the whole record (POSIX pax)."""
    found = {}
    while content:
        digits = content.partition(b" ")[0]
        length = decimal(digits)
        key, equals, value = content[len(digits) + 1 : length].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise Refused("bad-archive", "an extended header is broken")
        found[key] = value[:-1]
        content = content[length:]
    if any(key.startswith(b"GNU.sparse") for key in found):
        raise Refused("bad-archive", "sparse entries are not understood")
    return found


def write_tar(body: Body, request: Fields) -> Result:
    """Unpack beside, then move in: until the archive has come whole nothing is changed but that
    the directory itself is made."""
    path = path_of(request)
    tree = tree_of(request)
    target = tree.directory(path, make=True)
    temporary = fresh_name()
    posix.mkdir(temporary, 0o700, dir_fd=target)
    try:
        inside = posix.open(temporary, DIRECTORY, dir_fd=target)
        size = Unpacking(inside, path, tree).unpack(body)
        for apply in (False, True):
            merge(inside, target, apply)
    finally:
        remove_tree(target, temporary)
    return {"ok": 1, "size": size}


class Unpacking:
    """An archive on its way into a fresh directory."""

    def __init__(self, top: int, above: list[bytes], tree: Tree) -> None:
        self.top, self.above, self.tree = top, above, tree
        self.at_path: list[bytes] = []
        self.at = top

    def unpack(self, body: Body) -> int:
        size = 0
        for member in members(body):
            size += member.size
            self._place(member, body)
        return size

    def _place(self, member: Member, body: Body) -> None:
        path = member.path()
        if member.kind == b"5" and not path:
            return
        if not path:
            raise Refused("bad-archive", "an entry without a name")
        self._go(path[:-1])
        if member.kind in (b"0", b"\0", b"7"):
            self._file(member, path[-1], body)
        elif member.kind == b"5":
            self._directory(member, path[-1])
        elif member.kind == b"2":
            self._link(member, path)
        elif member.kind == b"1":
            self._hard_link(member, path[-1])
        else:
            raise Refused("bad-archive", f"an entry of a kind not taken: {shown(member.name)}")

    def _go(self, path: list[bytes]) -> None:
        if path != self.at_path:
            self._leave()
            self.at, self.at_path = self._enter(path, make=True), path

    def _leave(self) -> None:
        if self.at != self.top:
            posix.close(self.at)

    def _enter(self, path: list[bytes], make: bool) -> int:
        at = self.top
        for part in path:
            try:
                below = enter(at, part, make)
            except NotADirectoryError:
                raise Refused(
                    "bad-archive", "an entry below something else than a directory"
                ) from None
            finally:
                if at != self.top:
                    posix.close(at)
            at = below
        return at

    def _file(self, member: Member, name: bytes, body: Body) -> None:
        self._clear(name)
        fd = posix.open(name, CREATE, 0o600, dir_fd=self.at)
        try:
            rest = member.size
            while rest:
                chunk = body.some(rest)
                if not chunk:
                    raise Refused("bad-archive", "the archive ends in the middle")
                write_all(fd, chunk)
                rest -= len(chunk)
            body.exactly(member.padded - member.size)
            posix.fchmod(fd, member.mode)
            posix.utime(fd, ns=(member.mtime_ns, member.mtime_ns))
        finally:
            posix.close(fd)

    def _directory(self, member: Member, name: bytes) -> None:
        make_entry(self.at, name)
        posix.close(posix.open(name, HANDLE, dir_fd=self.at))
        posix.chmod(name, member.mode, dir_fd=self.at)

    def _link(self, member: Member, path: list[bytes]) -> None:
        self._check_link(member, [*self.above, *path[:-1]])
        self._clear(path[-1])
        posix.symlink(member.link, path[-1], dir_fd=self.at)

    def _check_link(self, member: Member, directory: list[bytes]) -> None:
        """Does its text stay in the mount? (Following it would be checked again.)"""
        where = self.tree.mount + directory if not member.link.startswith(b"/") else []
        for part in member.link.split(b"/"):
            if part == b"..":
                del where[-1:]
            elif part not in (b"", b"."):
                where.append(part)
            if not member.link.startswith(b"/") and not self._inside(where):
                break
        if not self._inside(where) or not member.link or b"\0" in member.link:
            raise Refused("outside", f"a link leads out of the mount: {shown(member.name)}")

    def _inside(self, where: list[bytes]) -> bool:
        return where[: len(self.tree.mount)] == self.tree.mount

    def _hard_link(self, member: Member, name: bytes) -> None:
        """To an earlier entry of the same archive, and nothing else."""
        *before, last = archive_path(member.link) or [b""]
        at = self._enter(before, make=False)
        try:
            if kind_of(look(at, last)) != IS_FILE:
                raise Refused("bad-archive", "a hard link to something else than a file")
            self._clear(name)
            posix.link(last, name, src_dir_fd=at, dst_dir_fd=self.at, follow_symlinks=False)
        except FileNotFoundError:
            raise Refused("outside", f"a link to what is not here: {shown(member.name)}") from None
        finally:
            if at != self.top:
                posix.close(at)

    def _clear(self, name: bytes) -> None:
        """An archive may name a thing twice: the last one counts."""
        remove_entry(self.at, name)


def merge(source: int, target: int, apply: bool) -> None:
    """Move what is in one directory into another; without `apply`, only see whether it can be."""
    stack = [(source, target, posix.scandir(source))]
    while stack:
        here, there, entries = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
            close_pair(here, there, entries, top=not stack)
            continue
        name = encoded(entry.name)
        if merge_entry(here, there, name, apply):
            below = posix.open(name, DIRECTORY, dir_fd=here)
            beside = posix.open(name, DIRECTORY, dir_fd=there)
            stack.append((below, beside, posix.scandir(below)))


def close_pair(here: int, there: int, entries: object, *, top: bool) -> None:
    if not top:
        posix.close(here)
        posix.close(there)


def merge_entry(here: int, there: int, name: bytes, apply: bool) -> bool:
    """Move one entry. True: both are directories, and what is in them is to be merged."""
    try:
        present = kind_of(look(there, name))
    except FileNotFoundError:
        present = None
    directory = kind_of(look(here, name)) == IS_DIRECTORY
    if present is not None and (present == IS_DIRECTORY) != directory:
        code = "is-directory" if present == IS_DIRECTORY else "not-directory"
        raise Refused(code, f"an entry would take the place of another kind: {shown(name)}")
    if directory and present is not None:
        return True
    if apply:
        posix.rename(name, name, src_dir_fd=here, dst_dir_fd=there)
    return False


OPERATIONS: dict[bytes, Callable[[Peer, Fields], Result]] = {
    b"list": list_files,
    b"read": read,
    b"write": write,
    b"delete": delete,
    b"mkdir": mkdir,
}
