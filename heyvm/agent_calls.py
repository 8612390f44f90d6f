"""The agent's system calls for SFTP: a forked child that does one after another as the host asks.

It is the sandbox's default user, with that user's view and rights, and nothing is walked by hand
here: whoever asks may run commands there, and so reach whatever these calls reach.
"""

from __future__ import annotations

import errno
import posix

from heyvm import frames
from heyvm.agent import number, octets, refused_before_exec, request_of
from heyvm.agent_files import IS_DIRECTORY, IS_FILE, Gone, Peer, kind_of, leave

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable, Iterator
    from typing import TypeAlias

    from heyvm.agent import Account, Fields, Plan

    Result: TypeAlias = dict[str, frames.Writable]
    Scan: TypeAlias = Iterator[posix.DirEntry[bytes]]
else:
    import _signal

MAX_HANDLES = 256
MAX_DATA_BYTES = 255 * 1024  # of one read or write: with its header it fits a frame
BATCH_BYTES = 60 * 1024
HOW = posix.O_ACCMODE | posix.O_APPEND | posix.O_CREAT | posix.O_EXCL | posix.O_TRUNC
# Nothing that is no file is opened on purpose; one that takes a file's place must not hold us up.
ALWAYS = posix.O_CLOEXEC | posix.O_NONBLOCK | posix.O_NOCTTY
MEMORY = b"/mem"


def serve(fd: int, splitter: frames.Splitter, plan: Plan) -> None:
    """Answer until the host closes the connection, then exit."""
    _signal.signal(_signal.SIGTERM, leave)
    try:
        peer = Peer(fd, splitter)
        peer.send(frames.header(begin(plan)))
        caller = Caller(plan.environment[b"HOME"])
        while True:
            peer.send(frames.header(caller.answer(request_of(*peer.receive()))))
    except (Gone, frames.FrameError):
        pass
    finally:
        posix._exit(0)


def begin(plan: Plan) -> Result:
    try:
        become(plan.account)
    except OSError as error:
        refused = refused_before_exec(error.errno or 0)
        return {"error": refused.code, "message": refused.message}
    try:
        posix.chdir(plan.cwd)
    except OSError:  # it may be what somebody has come to mend
        posix.chdir(b"/")
    return {"ok": 1}


def become(account: Account) -> None:
    """Whoever commands run as: the saved id too, which is the agent's own as long as it is kept."""
    if account.ids is None:
        uid = posix.getuid()
    else:
        uid, gid = account.ids
        posix.setgroups(account.groups)
        posix.setresgid(gid, gid, gid)
    posix.setresuid(uid, uid, uid)


class Caller:
    """What is open, and who does the calls. Each takes a request and gives what its answer says."""

    def __init__(self, home: bytes) -> None:
        self.home = home
        self.files: dict[int, int] = {}
        self.scans: dict[int, Scan] = {}
        self.last = 0

    def answer(self, request: Fields) -> Result:
        call = CALLS.get(octets(request, "call", b""))
        try:
            if call is None:
                raise OSError(errno.ENOSYS, "there is no such call")
            return {"ok": 1, **call(self, request)}
        except frames.FrameError:
            raise
        except OSError as error:
            return failure(error.errno or errno.EIO, error.strerror or "failed")
        except NotImplementedError:
            return failure(errno.ENOTSUP, posix.strerror(errno.ENOTSUP))
        except (ValueError, OverflowError):  # a NUL byte, a number that is no offset
            return failure(errno.EINVAL, posix.strerror(errno.EINVAL))

    # -- handles ---------------------------------------------------------------------------------

    def open(self, request: Fields) -> Result:
        self._demand_room()
        path = octets(request, "path", b"")
        try:
            demand_file(posix.stat(path))
        except FileNotFoundError:
            pass
        flags = number(request, "flags", 0) & HOW | ALWAYS
        fd = posix.open(path, flags, number(request, "mode", 0o666) & 0o7777)
        try:
            demand_file(posix.fstat(fd))
            demand_foreign(fd)
        except OSError:
            posix.close(fd)
            raise
        self.files[self._next()] = fd
        return {"handle": self.last}

    def opendir(self, request: Fields) -> Result:
        self._demand_room()
        self.scans[self._next()] = posix.scandir(octets(request, "path", b""))
        return {"handle": self.last}

    def _demand_room(self) -> None:
        if len(self.files) + len(self.scans) >= MAX_HANDLES:
            raise OSError(errno.EMFILE, f"at most {MAX_HANDLES} files can be open at once")

    def _next(self) -> int:
        self.last += 1
        return self.last

    def file(self, request: Fields) -> int:
        fd = self.files.get(number(request, "handle", 0))
        if fd is None:
            raise OSError(errno.EBADF, posix.strerror(errno.EBADF))
        return fd

    def target(self, request: Fields) -> int | bytes:
        """What a call is about that takes a handle or a path."""
        return self.file(request) if "handle" in request else octets(request, "path", b"")

    def close(self, request: Fields) -> Result:
        handle = number(request, "handle", 0)
        scan = self.scans.pop(handle, None)
        if scan is not None:
            scan.close()  # type: ignore[attr-defined]
            return {}
        fd = self.file(request)
        del self.files[handle]
        posix.close(fd)
        return {}

    def read(self, request: Fields) -> Result:
        length = min(number(request, "length", 0), MAX_DATA_BYTES)
        return {"data": posix.pread(self.file(request), length, number(request, "offset", 0))}

    def write(self, request: Fields) -> Result:
        fd, offset = self.file(request), number(request, "offset", 0)
        view = memoryview(octets(request, "data", b""))
        while view:
            written = posix.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written
        return {}

    def sync(self, request: Fields) -> Result:
        posix.fsync(self.file(request))
        return {}

    def readdir(self, request: Fields) -> Result:
        """The next entries; none at the end."""
        scan = self.scans.get(number(request, "handle", 0))
        if scan is None:
            raise OSError(errno.EBADF, posix.strerror(errno.EBADF))
        batch: list[frames.Writable] = []
        size = 0
        for entry in scan:
            facts = facts_of(entry)
            if facts is not None:
                batch.append([entry.name, *facts])
                size += len(entry.name) + 60
            if size > BATCH_BYTES:
                break
        return {"entries": batch}

    # -- attributes ------------------------------------------------------------------------------

    def stat(self, request: Fields) -> Result:
        target = self.target(request)
        if isinstance(target, int):
            return {"facts": facts(posix.fstat(target))}
        return {"facts": facts(posix.stat(target, follow_symlinks=follows(request)))}

    def setstat(self, request: Fields) -> Result:
        """All that is asked for, even when a part fails; the first failure is told. Owner before
        mode: a change of owner takes setuid away."""
        failed: OSError | None = None
        for change in (set_size, set_owner, set_mode, set_times):
            try:
                change(self.target(request), request)
            except OSError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return {}

    def statvfs(self, request: Fields) -> Result:
        found = posix.statvfs(self.target(request))
        return {
            "bsize": found.f_bsize,
            "frsize": found.f_frsize,
            "blocks": found.f_blocks,
            "bfree": found.f_bfree,
            "bavail": found.f_bavail,
            "files": found.f_files,
            "ffree": found.f_ffree,
            "favail": found.f_favail,
            "flag": found.f_flag,
            "namemax": found.f_namemax,
        }

    # -- names -----------------------------------------------------------------------------------

    def mkdir(self, request: Fields) -> Result:
        posix.mkdir(octets(request, "path", b""), number(request, "mode", 0o777) & 0o7777)
        return {}

    def rmdir(self, request: Fields) -> Result:
        posix.rmdir(octets(request, "path", b""))
        return {}

    def remove(self, request: Fields) -> Result:
        posix.unlink(octets(request, "path", b""))
        return {}

    def rename(self, request: Fields) -> Result:
        old, new = octets(request, "path", b""), octets(request, "to", b"")
        if number(request, "replace", 0) == 1 or not moved_by_link(old, new):
            posix.rename(old, new)
        return {}

    def link(self, request: Fields) -> Result:
        posix.link(octets(request, "path", b""), octets(request, "to", b""), follow_symlinks=False)
        return {}

    def symlink(self, request: Fields) -> Result:
        posix.symlink(octets(request, "target", b""), octets(request, "path", b""))
        return {}

    def readlink(self, request: Fields) -> Result:
        return {"path": posix.readlink(octets(request, "path", b""))}

    def realpath(self, request: Fields) -> Result:
        """The one absolute name; the last part may be missing. With `expand` `~` is the home."""
        path = octets(request, "path", b"") or b"."
        if number(request, "expand", 0) == 1 and path.split(b"/")[0] == b"~":
            path = self.home + path[1:]
        try:
            return {"path": name_of(path)}
        except FileNotFoundError:
            before, slash, last = path.rpartition(b"/")
            if last in (b"", b".", b".."):
                raise
            above = name_of(before + slash or b".")
            return {"path": above.rstrip(b"/") + b"/" + last}


def failure(number: int, message: str) -> Result:
    return {"error": "failed", "errno": number, "message": message[:200]}


def demand_file(state: posix.stat_result) -> None:
    """Before it is opened, which can do things to a device and wake the other end of a FIFO."""
    kind = kind_of(state)
    if kind == IS_DIRECTORY:
        raise OSError(errno.EISDIR, posix.strerror(errno.EISDIR))
    if kind != IS_FILE:
        raise OSError(errno.EACCES, "it is no file: devices, FIFOs and sockets are not opened")


def demand_foreign(fd: int) -> None:
    """Not our own memory, which the kernel keeps from everybody else: we would become whatever is
    written there."""
    name = posix.readlink(b"/proc/self/fd/%d" % fd)
    if name.endswith(b"/%d%b" % (posix.getpid(), MEMORY)):
        raise OSError(errno.EACCES, posix.strerror(errno.EACCES))


def follows(request: Fields) -> bool:
    return number(request, "follow", 1) == 1


def facts(state: posix.stat_result) -> list[frames.Writable]:
    return [
        *(state.st_mode, state.st_size, state.st_uid, state.st_gid),
        *(int(state.st_atime), int(state.st_mtime)),
    ]


def facts_of(entry: posix.DirEntry[bytes]) -> list[frames.Writable] | None:
    """None where it has gone since; a mode of 0 where nothing can be known of it."""
    try:
        return facts(entry.stat(follow_symlinks=False))
    except FileNotFoundError:
        return None
    except OSError:
        return [0] * 6


def set_size(target: int | bytes, request: Fields) -> None:
    if "size" in request:
        posix.truncate(target, number(request, "size", 0))


def set_owner(target: int | bytes, request: Fields) -> None:
    if "uid" in request:
        ids = (number(request, "uid", 0), number(request, "gid", 0))
        posix.chown(target, *ids, **how(target, request))


def set_mode(target: int | bytes, request: Fields) -> None:
    if "mode" in request:
        mode = number(request, "mode", 0) & 0o7777
        try:
            posix.chmod(target, mode, **how(target, request))
        except NotImplementedError:  # of a link itself, which has none
            raise OSError(errno.ENOTSUP, posix.strerror(errno.ENOTSUP)) from None


def set_times(target: int | bytes, request: Fields) -> None:
    if "mtime" in request:
        times = (number(request, "atime", 0), number(request, "mtime", 0))
        if isinstance(target, int):
            posix.utime(target, times)
        else:
            posix.utime(target, times, follow_symlinks=follows(request))


def how(target: int | bytes, request: Fields) -> dict[str, bool]:
    return {} if isinstance(target, int) else {"follow_symlinks": follows(request)}


def moved_by_link(old: bytes, new: bytes) -> bool:
    """Move a file without replacing anything. False: it is to be renamed, and nothing is there."""
    try:
        if kind_of(posix.lstat(old)) == IS_FILE:
            posix.link(old, new, follow_symlinks=False)
            posix.unlink(old)
            return True
    except FileExistsError:
        raise
    except OSError as error:  # a file system without hard links, or somebody else's file
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV):
            raise
    try:
        posix.lstat(new)
    except FileNotFoundError:
        return False
    raise FileExistsError(errno.EEXIST, posix.strerror(errno.EEXIST))


def name_of(path: bytes) -> bytes:
    """As the kernel knows it."""
    fd = posix.open(path, posix.O_PATH | posix.O_CLOEXEC)
    try:
        name = posix.readlink(b"/proc/self/fd/%d" % fd)
        links = posix.fstat(fd).st_nlink
    finally:
        posix.close(fd)
    if not name.startswith(b"/") or not links:  # a pipe, say; or removed, and then it has no name
        raise OSError(errno.ENOENT, posix.strerror(errno.ENOENT))
    return name


CALLS: dict[bytes, Callable[[Caller, Fields], Result]] = {
    b"open": Caller.open,
    b"opendir": Caller.opendir,
    b"close": Caller.close,
    b"read": Caller.read,
    b"write": Caller.write,
    b"sync": Caller.sync,
    b"readdir": Caller.readdir,
    b"stat": Caller.stat,
    b"setstat": Caller.setstat,
    b"statvfs": Caller.statvfs,
    b"mkdir": Caller.mkdir,
    b"rmdir": Caller.rmdir,
    b"remove": Caller.remove,
    b"rename": Caller.rename,
    b"link": Caller.link,
    b"symlink": Caller.symlink,
    b"readlink": Caller.readlink,
    b"realpath": Caller.realpath,
}
