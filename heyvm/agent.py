"""Pid 1 of a sandbox: runs its commands, keeps its log, reaps its orphans, serves its files.

Lives with the code that the sandbox is there to contain, and so expects anything of it: one loop
that never blocks and never grows, and a failure that ends a connection, not the agent. Imports no
more than it must (`json`, `socket` and `signal` alone would triple its start), and nothing of
heyvm but `frames`; `agent_files` and `agent_ports` follow with the first operation of theirs.
"""

from __future__ import annotations

import _posixsubprocess
import _socket
import errno
import posix
import select
import sys
import time

from heyvm import frames

TYPE_CHECKING = False  # as in `typing`, whose import would cost 5 ms
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable, Generator, Iterator
    from typing import Protocol, TypeAlias

    from heyvm.agent_ports import Ports
    from heyvm.agent_terminals import Terminals

    Fields: TypeAlias = dict[str, frames.Value]

    class Child(Protocol):
        """A process that is started for the host."""

        marker: int
        failure: bytes

        def exited(self, status: int) -> None: ...

        def explain(self, plan: Plan) -> int: ...
else:
    import _signal

GO_TIMEOUT_S = 10.0
LONGEST_TURN_S = 24 * 60 * 60.0  # epoll_wait(2) takes an int of milliseconds: not 25 days
MAX_CONNECTIONS = 256
MAX_WORKERS = 64
MAX_PENDING_BYTES = 256 * 1024
FULL_PAUSE_S = 0.1
# What may still be read of a pipe once its command has ended: the largest that a pipe can be made.
DRAIN_BYTES = 1024 * 1024
REAPS_PER_TURN = 512
PROCESSES_PER_TURN = 256
MAX_FILES = 65536
MAX_GROUPS = 64

LINE_BYTES = 16 * 1024
LOG_BYTES = 2 * 1024 * 1024

REPLACE_GRACE_S = 2.0
KILL_LIMIT_S = 5.0
CALM_PASSES = 3
CALM_S = 0.2
FOREVER = float("inf")
TIMED_OUT, NOT_EXECUTABLE, NOT_FOUND = 124, 126, 127
OOM_SCORE = b"500"  # between an agent's 0 and the kernel's 1000: commands go first
RLIMIT_LOCKS = 10  # unused since Linux 2.4.25, inherited by everything, shown to everybody
DEFAULT_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
READ_BITS = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP
GONE_BITS = select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
CWD_ERRORS = (*MISSING, errno.EACCES, errno.ELOOP)


class Refused(Exception):
    """An operation that cannot be done: `code` is one of the contract's words."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Loop:
    """epoll with timers. Descriptors are closed between turns, so that no event of one turn can
    meet another descriptor of the same number."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.timers: dict[object, tuple[float, Callable[[], None]]] = {}
        self.closing: list[int] = []
        self.after_turn: list[Callable[[], None]] = []

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        if fd in self.handlers:
            self.epoll.modify(fd, events)
        else:
            self.epoll.register(fd, events)
        self.handlers[fd] = handler

    def forget(self, fd: int) -> None:
        if self.handlers.pop(fd, None) is not None:
            self.epoll.unregister(fd)

    def close(self, fd: int) -> None:
        self.forget(fd)
        self.closing.append(fd)

    def at(self, when: float, call: Callable[[], None]) -> object:
        key = object()
        self.timers[key] = (when, call)
        return key

    def after(self, delay: float, call: Callable[[], None]) -> object:
        return self.at(time.monotonic() + delay, call)

    def cancel(self, key: object) -> None:
        self.timers.pop(key, None)

    def turn(self) -> None:
        for fd, events in self.epoll.poll(self._patience(), 64):
            handler = self.handlers.get(fd)
            if handler is not None:
                guarded(handler, events)
        if self.timers:
            self._ring()
        self._finish()

    def _patience(self) -> float:
        if not self.timers:
            return -1
        soonest = min([when for when, _ in self.timers.values()])
        return min(max(0.0, soonest - time.monotonic()), LONGEST_TURN_S)

    def _ring(self) -> None:
        now = time.monotonic()
        for key, (when, call) in list(self.timers.items()):
            if when <= now and self.timers.pop(key, None) is not None:
                guarded(call)

    def _finish(self) -> None:
        while self.after_turn:
            guarded(self.after_turn.pop())
        while self.closing:
            posix.close(self.closing.pop())


def guarded(call: Callable[..., None], *arguments: object) -> None:
    """Pid 1 outlives every mistake in one of its handlers: the sandbox would go with it."""
    try:
        call(*arguments)
    except Exception as error:  # noqa: BLE001 - see above
        posix.write(2, b"heyvm agent: %b\n" % frames.raw(repr(error)))


class Connection:
    """One conversation with the host: the frames that come and the bytes that wait to go."""

    def __init__(self, agent: Agent, fd: int) -> None:
        self.agent, self.fd, self.loop = agent, fd, agent.loop
        self.splitter = frames.Splitter(frames.MAX_REQUEST_BYTES)
        self.out = bytearray()
        self.dirty = self.finishing = self.closed = self.deaf = False
        self.on_frame: Callable[[Connection, int, bytes], None] = agent.request
        self.on_gone: Callable[[], None] | None = None
        self.on_room: Callable[[], None] | None = None
        self._watch()

    def _watch(self) -> None:
        events = select.EPOLLRDHUP if self.deaf else select.EPOLLIN | select.EPOLLRDHUP
        if self.out:
            events |= select.EPOLLOUT
        self.loop.watch(self.fd, events, self.ready)

    def ready(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self.flush()
        if events & READ_BITS and not self.closed:
            self._read(events)

    def _read(self, events: int) -> None:
        if self.deaf:
            if events & GONE_BITS:
                self.gone()
            return
        try:
            received = posix.read(self.fd, frames.MAX_PAYLOAD_BYTES)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self.gone()
        elif not self.finishing:
            self.splitter.feed(received)
            self._take_frames()

    def _take_frames(self) -> None:
        try:
            while not (self.closed or self.deaf or self.finishing):
                found = self.splitter.next()
                if found is None:
                    return
                self.on_frame(self, *found)
        except frames.FrameError:
            self.gone()

    def hear(self, willing: bool) -> None:
        """Take further frames, or leave them in the socket until asked again."""
        if self.closed or self.deaf is not willing:
            return
        self.deaf = not willing
        self._watch()
        if willing:
            self._take_frames()

    def send(self, data: bytes) -> None:
        """Queue whole frames; they leave at the end of the turn, together."""
        if self.closed:
            return
        self.out += data
        if not self.dirty:
            self.dirty = True
            self.loop.after_turn.append(self.flush)

    def flush(self) -> None:
        self.dirty = False
        if self.closed:
            return
        waiting = bool(self.out)
        try:
            while self.out:
                del self.out[: posix.write(self.fd, self.out)]
        except BlockingIOError:
            self._watch()
        except OSError:
            self.gone()
        else:
            self._flushed(waiting)

    def _flushed(self, waiting: bool) -> None:
        if self.finishing:
            self.close()
            return
        if waiting:
            self._watch()
        if self.on_room is not None:
            self.on_room()

    @property
    def full(self) -> bool:
        return len(self.out) >= MAX_PENDING_BYTES

    def finish(self, fields: dict[str, frames.Writable]) -> None:
        """Send the result, then close."""
        self.on_gone = self.on_room = None
        self.finishing = True
        self.send(frames.header(fields))

    def fail(self, code: str, message: str) -> None:
        self.finish({"error": code, "message": message})

    def gone(self) -> None:
        """The host went away, or sent nonsense."""
        on_gone = self.on_gone
        self.close()
        if on_gone is not None:
            on_gone()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.on_gone = self.on_room = None
            self.agent.connections.discard(self)
            self.loop.close(self.fd)

    def hand_over(self) -> None:
        """Drop this copy of the connection; a forked child owns it now."""
        self.close()


class Log:
    """`LOG_DIR/log`, and `log.1` before it. Lines that cannot be written are counted instead."""

    def __init__(self, directory: bytes) -> None:
        self._path = directory + b"/log"
        self._fd = -1
        self._torn = False
        self._lost = 0

    def lines(self, source: bytes, block: bytes) -> None:
        """Append whole lines, each with its newline and none longer than the format allows."""
        stamp = b"%.3f %b " % (time.time(), source)
        self._append(stamp + block[:-1].replace(b"\n", b"\n" + stamp) + b"\n", block.count(b"\n"))

    def note(self, message: bytes) -> None:
        self.lines(b"e", message + b"\n")

    def _append(self, block: bytes, count: int) -> None:
        if self._lost:
            words = b"%.3f e heyvm: %d log lines could not be written\n" % (time.time(), self._lost)
            block = words + block
        try:
            self._write(b"\n" + block if self._torn else block)
            self._lost = 0
        except OSError:
            self._lost += count

    def _write(self, block: bytes) -> None:
        fd = self._file()
        written = posix.write(fd, block)
        self._torn = written < len(block)
        if self._torn:
            raise OSError(errno.ENOSPC, "written in part")

    def _file(self) -> int:
        """The file to append to: opened anew when it is full, or when somebody removed it."""
        if self._fd >= 0:
            state = posix.fstat(self._fd)
            if state.st_nlink and state.st_size < LOG_BYTES:
                return self._fd
            posix.close(self._fd)
            self._fd, self._torn = -1, False
        self._fd = self._open()
        return self._fd

    def _open(self) -> int:
        try:
            state = posix.lstat(self._path)
        except FileNotFoundError:
            pass
        else:
            if state.st_mode & 0o170000 != 0o100000:
                posix.unlink(self._path)
            elif state.st_size >= LOG_BYTES:
                posix.rename(self._path, self._path + b".1")
        flags = posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND | posix.O_CLOEXEC
        return posix.open(self._path, flags | posix.O_NOFOLLOW | posix.O_NONBLOCK, 0o600)


class Stream:
    """One output pipe of a command: its first bytes to the host, its lines to the log."""

    def __init__(self, command: Command, fd: int, kind: int, source: bytes) -> None:
        self.command, self.fd, self.kind, self.source = command, fd, kind, source
        self.loop = command.agent.loop
        self.open = self.undrained = True
        self.left = command.max_output
        self.drain_left = DRAIN_BYTES
        self.partial = b""
        self.listen()

    def listen(self) -> None:
        if self.open:
            self.loop.watch(self.fd, select.EPOLLIN, self.ready)

    def pause(self) -> None:
        if self.open:
            self.loop.forget(self.fd)

    def ready(self, _events: int) -> None:
        self.read()
        self.command.throttle()

    def read(self) -> None:
        """Take what one read gives. Afterwards `undrained` says whether more may be there."""
        try:
            chunk = posix.read(self.fd, frames.CHUNK_BYTES)
        except BlockingIOError:
            self.undrained = False
            return
        if not chunk:
            self.close()
            return
        self.undrained = self.command.status is None or self.drain_left > len(chunk)
        if self.command.status is not None:
            self.drain_left -= len(chunk)
        self._deliver(chunk)

    def _deliver(self, chunk: bytes) -> None:
        command = self.command
        if command.connection is not None:
            if len(chunk) > self.left:
                command.truncated = True
            kept = chunk[: self.left]
            self.left -= len(kept)
            if kept:
                command.connection.send(frames.frame(self.kind, kept))
        if command.log:
            self._log(chunk)

    def _log(self, chunk: bytes) -> None:
        data = self.partial + chunk
        cut = data.rfind(b"\n") + 1
        if cut:
            self._log_lines(data[:cut])
        self.partial = data[cut:]
        while len(self.partial) >= LINE_BYTES:
            self.command.agent.log.lines(self.source, self.partial[:LINE_BYTES] + b"\n")
            self.partial = self.partial[LINE_BYTES:]

    def _log_lines(self, block: bytes) -> None:
        at, pieces = 0, []
        while len(block) - at > LINE_BYTES:
            end = block.rfind(b"\n", at, at + LINE_BYTES + 1) + 1
            if end:
                pieces.append(block[at:end])
            else:  # a line that is longer than a log line may be
                end = at + LINE_BYTES
                pieces.append(block[at:end] + b"\n")
            at = end
        pieces.append(block[at:])
        self.command.agent.log.lines(self.source, b"".join(pieces))

    def close(self) -> None:
        if self.open:
            self.open = self.undrained = False
            self.loop.close(self.fd)
            if self.partial and self.command.log:
                self.command.agent.log.lines(self.source, self.partial + b"\n")
            self.partial = b""


class Input:
    """A command's stdin: what the host sent and the command has not read yet."""

    def __init__(self, loop: Loop, fd: int, connection: Connection) -> None:
        self.loop, self.fd, self.connection = loop, fd, connection
        self.pending = bytearray()
        self.ended = False
        self.open = True

    def frame(self, kind: int, payload: bytes) -> None:
        if kind == frames.STDIN and not self.ended:
            self.pending += payload if self.open else b""
        elif kind == frames.END and not self.ended:
            self.ended = True
        else:
            raise frames.FrameError("not stdin")
        self.write()

    def write(self, _events: int = 0) -> None:
        if not self.open:
            return
        try:
            while self.pending:
                del self.pending[: posix.write(self.fd, self.pending[: frames.CHUNK_BYTES])]
        except BlockingIOError:
            self.loop.watch(self.fd, select.EPOLLOUT, self.write)
        except OSError:  # EPIPE: it reads no more; what else comes is dropped
            self.close()
        else:
            self.close() if self.ended else self.loop.forget(self.fd)
        self.connection.hear(len(self.pending) < MAX_PENDING_BYTES)

    def close(self) -> None:
        if self.open:
            self.open = False
            self.pending.clear()
            self.loop.close(self.fd)


class Command:
    """One process started for the host, with its family, until its pipes are closed."""

    def __init__(self, agent: Agent, request: Fields, connection: Connection | None) -> None:
        self.agent, self.connection = agent, connection
        self.max_output = number(request, "max_output", 0)
        self.timeout_ms = number(request, "timeout_ms", 0)
        self.log = bool(octets(request, "log", b""))
        self.status: int | None = None
        self.marker = 0
        self.answered = self.truncated = self.timed_out = False
        self.ending = self.throttled = False
        self.refusal: Refused | None = None
        self.stdin: Input | None = None
        self.streams: tuple[Stream, ...] = ()
        self.timer: object = None
        self.on_end: Callable[[int], None] | None = None
        self.failure = b""
        self.started = time.monotonic()

    def start(self, plan: Plan, feed: bool) -> None:
        """Fork, exec and listen. Raises `Refused` and `OSError`, with nothing left behind."""
        fds: list[int] = []
        try:
            out, err, into = (pair(fds), pair(fds), pair(fds) if feed else (self.agent.null, -1))
            self.agent.spawn(self, plan, (into[0], out[1], err[1]))
        except BaseException:
            close_all(fds)
            raise
        ours = (out[0], err[0], into[1])
        close_all([fd for fd in fds if fd not in ours])
        for fd in ours:
            if fd >= 0:
                posix.set_blocking(fd, False)
        self._listen(ours)

    def _listen(self, ours: tuple[int, int, int]) -> None:
        loop = self.agent.loop
        self.streams = (
            Stream(self, ours[0], frames.STDOUT, b"o"),
            Stream(self, ours[1], frames.STDERR, b"e"),
        )
        if self.connection is not None and ours[2] >= 0:
            self.stdin = Input(loop, ours[2], self.connection)
        if self.timeout_ms:
            self.timer = loop.at(self.started + self.timeout_ms / 1000, self.expire)

    def throttle(self) -> None:
        """Leave the output in the pipes while the host is behind: the command then waits."""
        if self.connection is not None and self.connection.full and not self.throttled:
            self.throttled = True
            for stream in self.streams:
                stream.pause()

    def resume(self) -> None:
        if self.throttled:
            self.throttled = False
            for stream in self.streams:
                stream.listen()
            self.settle()

    def expire(self) -> None:
        self.timer = None
        self.timed_out = True
        self.end_family()

    def end_family(self, grace: float = 0.0) -> None:
        if not self.ending:
            self.ending = True
            Steps(self.agent, end_family(self.marker, grace), self.ended_family)

    def ended_family(self) -> None:
        self.ending = False
        self.agent.reap()
        if self.status is None:
            self.exited(_signal.SIGKILL)  # not dead yet: stuck in the kernel, where none can wait
        self._drain_anew()
        self.settle()

    def exited(self, status: int) -> None:
        """The process itself has ended (`status` as waitpid gives it)."""
        if self.status is not None:
            return
        self.status = status
        self.duration_ms = int((time.monotonic() - self.started) * 1000)
        self.agent.loop.cancel(self.timer)
        if self.on_end is not None:
            self.on_end(status)
        self._drain_anew()
        self.settle()

    def _drain_anew(self) -> None:
        for stream in self.streams:
            stream.undrained = stream.open

    def settle(self) -> None:
        """Answer, once the process has ended and its pipes have given what they held then."""
        if self.status is None or self.ending or self.answered:
            return
        for stream in self.streams:
            while stream.undrained and not (self.connection and self.connection.full):
                stream.read()
        if any(stream.undrained for stream in self.streams):
            self.throttle()
        else:
            self.answer()

    def answer(self) -> None:
        self.answered = True
        if self.stdin is not None:
            self.stdin.close()
        connection, self.connection = self.connection, None
        self.resume()
        if connection is not None and self.refusal is not None:
            connection.fail(self.refusal.code, self.refusal.message)
        elif connection is not None:
            connection.finish(self._result())

    def _result(self) -> dict[str, frames.Writable]:
        return {
            "ok": 1,
            "exit_code": TIMED_OUT if self.timed_out else exit_code(self.status or 0),
            "duration_ms": self.duration_ms,
            "timed_out": int(self.timed_out),
            "truncated": int(self.truncated),
        }

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        self.connection = None
        if self.stdin is not None:
            self.stdin.close()
        self.resume()
        self.end_family()

    def explain(self, plan: Plan) -> int:
        """What a failed start comes to, as a status of waitpid's: a shell would say the same."""
        status, self.refusal, line = explain_failure(self.failure, plan.argv[0])
        if self.connection is not None and self.refusal is None:
            self.connection.send(frames.frame(frames.STDERR, line[: frames.CHUNK_BYTES]))
        if self.log:
            self.agent.log.lines(b"e", line.replace(b"\n", b" ")[:LINE_BYTES] + b"\n")
        return status


def explain_failure(failure: bytes, program: bytes) -> tuple[int, Refused | None, bytes]:
    """What a child that came to no exec has reported: the status of waitpid's that it stands for,
    the refusal, and what a shell would print."""
    number_in_hex, _, where = failure.removeprefix(b"OSError:").partition(b":")
    number = int(number_in_hex, 16)
    refusal: Refused | None = None
    if where:
        refusal = refused_before_exec(number)
    elif number == errno.E2BIG:
        refusal = Refused("too-long", "arguments and environment are too long")
    why = "not found" if number in MISSING else posix.strerror(number)
    status = (NOT_FOUND if number in MISSING else NOT_EXECUTABLE) << 8
    return status, refusal, b"heyvm: %b: %b\n" % (program, frames.raw(why))


class Plan:
    """What is to be executed: everything that a child needs and that can be wrong beforehand."""

    def __init__(self, agent: Agent, request: Fields) -> None:
        self.argv = strings(request, "argv")
        self.environment = environment(request)
        self.cwd = octets(request, "cwd", b"/") or b"/"
        user = octets(request, "user", b"")
        self.account = Account(agent, user)
        if agent.spare < 0 and self.account.ids not in ((0, 0), None):
            raise Refused("bad-user", "this sandbox has a single user: root")
        if agent.spare >= 0 and self.account.ids and self.account.ids[0] == agent.spare:
            raise Refused("bad-user", "that id is the agent's own")
        if not self.cwd.startswith(b"/") or magic(self.cwd):
            raise Refused("bad-cwd", "not a directory of the sandbox")
        self._complete()

    def _complete(self) -> None:
        found = self.environment
        found.setdefault(b"HOME", self.account.home)
        found.setdefault(b"USER", self.account.name)
        found.setdefault(b"LOGNAME", self.account.name)

    def candidates(self) -> list[bytes]:
        """The files to try, as execvp does with the command's own PATH."""
        name = self.argv[0]
        if not name or b"/" in name:
            return [name]
        path = self.environment.get(b"PATH", DEFAULT_PATH)
        return [(directory or b".") + b"/" + name for directory in path.split(b":")]


class Table:
    """/etc/passwd or /etc/group: its well-formed lines, read anew when the file is another."""

    def __init__(self, path: bytes, numbers: tuple[int, ...], columns: int) -> None:
        self.path, self.numbers, self.columns = path, numbers, columns
        self._seen: tuple[int, ...] = ()
        self._rows: list[list[bytes]] = []

    def rows(self) -> list[list[bytes]]:
        try:
            state = posix.stat(self.path)
            mark = (state.st_ino, state.st_dev, state.st_mtime_ns, state.st_size)
            if mark != self._seen:
                self._seen, self._rows = mark, self._read()
        except OSError:
            return []
        return self._rows

    def _read(self) -> list[list[bytes]]:
        lines = read_file(self.path, 1 << 20).split(b"\n")
        rows = [line.split(b":") for line in lines if line.count(b":") == self.columns - 1]
        return [row for row in rows if all(numeric(row[at]) is not None for at in self.numbers)]

    def find(self, name: bytes) -> list[bytes] | None:
        """The line of a name, or else of a number."""
        rows = self.rows()
        for column in (0, 2):
            for row in rows:
                if row[column] == name:
                    return row
        return None


class Account:
    """Who a command runs as. `ids` is None for what the agent is itself: root with no groups."""

    def __init__(self, agent: Agent, user: bytes) -> None:
        self.name, self.home = b"root", b"/root"
        self.groups: list[int] = []
        self.ids: tuple[int, int] | None = None
        name, colon, group = user.partition(b":")
        entry = agent.users.find(name or b"0")
        uid = int(entry[2]) if entry else numeric(name or b"0")
        if uid is None:
            raise Refused("bad-user", "no such user in the sandbox's /etc/passwd")
        gid = int(entry[3]) if entry else 0
        if entry:
            self.name, self.home = entry[0], entry[5] or b"/"
        elif uid:
            self.name, self.home = name, b"/"
        if colon:
            gid = group_id(agent, group)
        if user and (uid, gid) != (0, 0):
            self.ids = (uid, gid)
            self.groups = [gid] if colon else sorted({gid, *groups_of(agent, self.name)})


def group_id(agent: Agent, group: bytes) -> int:
    entry = agent.groups.find(group)
    gid = int(entry[2]) if entry else numeric(group)
    if gid is None:
        raise Refused("bad-user", "no such group in the sandbox's /etc/group")
    return gid


def groups_of(agent: Agent, name: bytes) -> list[int]:
    rows = [row for row in agent.groups.rows() if name in row[3].split(b",")]
    return [int(row[2]) for row in rows[:MAX_GROUPS]]


class Agent:
    """The loop's owner: connections, processes and the log."""

    def __init__(self, listen_fd: int, log_directory: bytes, spare: int) -> None:
        self.loop = Loop()
        self.log = Log(log_directory)
        self.spare = spare
        self.connections: set[Connection] = set()
        self.children: dict[int, Callable[[int], None]] = {}
        self.workers = 0
        self.commands: dict[int, Child] = {}
        self.greeted = self.ready = self.stopping = False
        self.environment: Fields = {}
        self.start_command = StartCommand(self)
        self.ports: Ports | None = None
        self.terminals: Terminals | None = None
        self.listener = _socket.socket(fileno=listen_fd)
        self.listener.settimeout(0)
        self.listener_fd = listen_fd
        self.null = -1
        self.users = Table(b"/etc/passwd", (2, 3), 7)
        self.groups = Table(b"/etc/group", (2,), 4)

    def run(self) -> None:
        """For ever, or until the host shows no interest."""
        self.wake, wake = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
        _signal.signal(_signal.SIGCHLD, ignore_signal)
        _signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self.loop.watch(self.wake, select.EPOLLIN, self.woken)
        self.loop.watch(self.listener_fd, select.EPOLLIN, self.accept)
        self.deadline = self.loop.after(GO_TIMEOUT_S, give_up)
        while True:
            self.loop.turn()

    def woken(self, _events: int) -> None:
        try:
            posix.read(self.wake, 4096)
        except BlockingIOError:
            pass
        self.reap()

    def reap(self) -> None:
        """Collect the dead, our own and the orphans, so many at a time that nobody starves."""
        for _ in range(REAPS_PER_TURN):
            try:
                pid, status = posix.waitpid(-1, posix.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            ended = self.children.pop(pid, None)
            if ended is not None:
                ended(status)
        self.loop.after(0, self.reap)

    def accept(self, _events: int) -> None:
        try:
            fd, _ = self.listener._accept()  # type: ignore[attr-defined]
        except BlockingIOError:
            return
        except OSError:  # no descriptor left: level-triggered, it would be told without a pause
            self.loop.forget(self.listener_fd)
            self.loop.after(FULL_PAUSE_S, self.listen_again)
            return
        if len(self.connections) >= MAX_CONNECTIONS or (self.greeted and not self.ready):
            posix.close(fd)
            return
        posix.set_blocking(fd, False)
        connection = Connection(self, fd)
        self.connections.add(connection)
        if not self.greeted:
            self.greet(connection)
        connection.ready(select.EPOLLIN)

    def listen_again(self) -> None:
        self.loop.watch(self.listener_fd, select.EPOLLIN, self.accept)

    def greet(self, connection: Connection) -> None:
        self.greeted = True
        connection.on_frame, connection.on_gone = self.go, give_up
        self.null = replace_stdio()
        connection.send(frames.header({"hello": 1}))
        # While the host makes its record durable: the first command would wait for these.
        self.loop.after_turn.insert(0, self.prepare)

    def prepare(self) -> None:
        self.limits = Limits()

    def go(self, connection: Connection, kind: int, payload: bytes) -> None:
        request = request_of(kind, payload)
        if octets(request, "op", b"") != b"go":
            raise frames.FrameError("not go")
        self.loop.cancel(self.deadline)
        self.ready = True
        self.environment = {"env": request.get("env", {})}
        connection.on_frame = no_more
        connection.on_gone = give_up if number(request, "visit", 0) else None
        directory = octets(request, "working_directory", b"")
        try:
            if magic(directory):
                raise NotADirectoryError(20, "it goes through a process's entry in /proc")
            make_directories(directory)
        except OSError as error:
            connection.send(frames.header(problem(error)))
        else:
            connection.send(frames.header({"ok": 1}))

    def request(self, connection: Connection, kind: int, payload: bytes) -> None:
        """The first frame of a connection says what it is for."""
        request = request_of(kind, payload)
        operation = OPERATIONS.get(octets(request, "op", b""), file_operation)
        connection.on_frame = no_more
        try:
            operation(self, connection, request)
        except Refused as refused:
            connection.fail(refused.code, refused.message)
        except frames.FrameError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a NUL byte where none can be
            connection.finish(problem(error))

    def spawn(self, command: Command, plan: Plan, stdio: tuple[int, int, int]) -> None:
        """Fork and exec. What goes wrong between the two is in `command.failure` by the time that
        the child has ended.

        For root it is vfork + exec in C, a third faster than fork from Python. That needs an agent
        whose real and effective ids are root's already (see `main`); it waits for the exec.
        """
        report, told = posix.pipe2(posix.O_CLOEXEC | posix.O_NONBLOCK)
        account = plan.account
        uid, gid = account.ids or (None, None)
        variables = [key + b"=" + value for key, value in plan.environment.items()]
        try:
            command.marker = self.limits.lower()
            pid = _posixsubprocess.fork_exec(
                plan.argv, plan.candidates(), False, (),
                plan.cwd, variables,  # type: ignore[arg-type]
                stdio[0], -1, -1, stdio[1], -1, stdio[2], report, told,
                True, True, -1, gid, account.groups if account.ids else None, uid, -1,
                None,  # type: ignore[arg-type]
                True,
            )  # fmt: skip
        except BaseException:
            posix.close(report)
            raise
        finally:
            posix.close(told)
            self.limits.restore()
        self.commands[command.marker] = command
        birth = Birth(self, command, plan, (pid, report))
        self.children[pid] = birth.ended
        birth.told()


class Birth:
    """A child between its fork and its exec: the pipe through which a failure is told."""

    def __init__(self, agent: Agent, command: Child, plan: Plan, child: tuple[int, int]) -> None:
        self.agent, self.command, self.plan = agent, command, plan
        self.pid, self.report = child
        self.over = False

    def told(self, _events: int = 0) -> None:
        """It has failed, or is another program now, or (for a plain fork) has come to neither.

        A failure is written in several parts, so it is complete at the end of the file only.
        """
        try:
            while part := posix.read(self.report, 512):
                self.command.failure += part
        except BlockingIOError:
            self.agent.loop.watch(self.report, select.EPOLLIN, self.told)
            return
        self._finish()

    def _finish(self) -> None:
        self.over = True
        self.agent.loop.close(self.report)
        raise_oom_score(self.pid)

    def ended(self, status: int) -> None:
        if not self.over:
            self.told()
        if not self.over:
            self._finish()
        command = self.command
        del self.agent.commands[command.marker]
        command.exited(command.explain(self.plan) if command.failure else status)


class StartCommand:
    """The sandbox's one start command. A new one starts when the old one's family has ended."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.current: Command | None = None
        self.waiting: list[tuple[Connection, Fields]] = []
        self.replacing = False

    def ask(self, connection: Connection, request: Fields) -> None:
        self.waiting.append((connection, request))
        if self.replacing:
            return
        if self.current is None:
            self._begin()
            return
        self.replacing = True
        self.current.on_end = None
        Steps(self.agent, end_family(self.current.marker, REPLACE_GRACE_S), self._ended)

    def _ended(self) -> None:
        self.replacing, self.current = False, None
        self._begin()

    def _begin(self) -> None:
        connection, request = self.waiting.pop(0)
        try:
            self._start(request)
        except Refused as refused:
            connection.fail(refused.code, refused.message)
        except (OSError, ValueError) as error:
            connection.finish(problem(error))
        else:
            connection.finish({"ok": 1})
        if self.waiting:
            self.ask(*self.waiting.pop(0))

    def _start(self, request: Fields) -> None:
        text = octets(request, "command", b"")
        if text:
            request = {**request, "argv": [b"/bin/sh", b"-c", text]}
        elif not request.get("argv"):
            return
        request = {**request, "log": b"start"}
        command = Command(self.agent, request, None)
        command.on_end = self._tell
        command.start(Plan(self.agent, request), feed=False)
        self.current = command

    def _tell(self, status: int) -> None:
        code = posix.waitstatus_to_exitcode(status)
        words = b"exited with code %d" % code if code >= 0 else b"was killed by signal %d" % -code
        self.agent.log.note(b"start command " + words)


class Steps:
    """Runs a generator in the loop: what it yields is how long it wants to wait, in seconds."""

    def __init__(self, agent: Agent, steps: Iterator[float], done: Callable[[], None]) -> None:
        self.loop, self.steps, self.done = agent.loop, steps, done
        self.step()

    def step(self) -> None:
        try:
            delay = next(self.steps)
        except StopIteration:
            self.done()
        except OSError:  # /proc is gone: nothing more can be found, and somebody waits for `done`
            self.done()
        else:
            self.loop.after(delay, self.step)


class Limits:
    """The agent's own resource limits, set just before a fork for the child to inherit.

    `lower` gives the next child a marker of its own; `restore` takes the agent itself, and what
    it forks otherwise, out of every family.
    """

    def __init__(self) -> None:
        import resource

        self._set = resource.setrlimit
        hard = resource.getrlimit(RLIMIT_LOCKS)[1]
        ceiling = 1 << 62 if hard == resource.RLIM_INFINITY else hard
        # Agents that share a process table (nested ones, tests) must not share markers.
        self._next = ceiling - int.from_bytes(posix.getrandom(7), "big") % (ceiling // 4 + 1)
        self._files, self._files_id = resource.getrlimit(resource.RLIMIT_NOFILE), 7
        hard_files = self._files[1] if self._files[1] >= 0 else MAX_FILES
        self._many = (max(self._files[0], min(hard_files, MAX_FILES)), self._files[1])
        self.restore()

    def lower(self) -> int:
        self._mark()
        self._set(self._files_id, self._files)
        return self._next

    def restore(self) -> None:
        self._mark()
        self._set(self._files_id, self._many)

    def _mark(self) -> None:
        self._next = max(0, self._next - 1)
        self._set(RLIMIT_LOCKS, (self._next, self._next))


def end_family(marker: int, grace: float) -> Iterator[float]:
    """End every process that bears the marker: first politely, where there is any grace.

    All are stopped before any is killed: a fork bomb whose members die one by one fills the
    places that they leave. Bounded in time, for those that the kernel does not let die.
    """
    limit = time.monotonic() + grace
    if grace:
        yield from signal_family(marker, _signal.SIGTERM, set())
        yield from signal_family(marker, _signal.SIGCONT, set())
    while time.monotonic() < limit:
        if not (yield from signal_family(marker, 0, set())):
            return
        yield 0.01
    stopped: set[int] = set()
    limit = time.monotonic() + CALM_S
    for _ in range(CALM_PASSES):
        if not (yield from signal_family(marker, _signal.SIGSTOP, stopped, limit)):
            yield from kill_family(marker)
            return
    yield from kill_bomb(marker)


def kill_family(marker: int) -> Iterator[float]:
    """Kill until two looks at everybody have found none of it."""
    limit = time.monotonic() + KILL_LIMIT_S
    clean = 0
    while clean < 2 and time.monotonic() < limit:
        found = yield from signal_family(marker, _signal.SIGKILL, set())
        clean = 0 if found else clean + 1
        if found:
            yield 0.001


def kill_bomb(marker: int) -> Iterator[float]:
    """It multiplies faster than it is stopped one by one, and leaves the agent little time to run:
    halt the whole sandbox meanwhile. A signal to all is a single call that no fork escapes.

    What somebody had stopped before goes on afterwards: who that was is past finding out.
    """
    if posix.getpid() == 1:
        signal_the_rest(_signal.SIGSTOP)
    try:
        yield from kill_family(marker)
    finally:
        if posix.getpid() == 1:
            signal_the_rest(_signal.SIGCONT)


def signal_the_rest(number: int) -> None:
    """For pid 1: everybody in the sandbox but itself."""
    try:
        posix.kill(-1, number)
    except ProcessLookupError:
        pass


def signal_family(
    marker: int, number: int, seen: set[int], limit: float = FOREVER
) -> Generator[float, None, int]:
    """How many live members were met that are not in `seen`, which they then are. Beyond the
    limit it is given up, as if there were more."""
    fresh = 0
    own = posix.getpid()
    for count, name in enumerate(posix.listdir("/proc")):
        if count % PROCESSES_PER_TURN == PROCESSES_PER_TURN - 1:
            yield 0
        if time.monotonic() > limit:
            return fresh + 1
        if name.isdigit() and int(name) != own and signal_member(int(name), marker, number):
            fresh += int(name) not in seen
            seen.add(int(name))
    return fresh


def signal_member(pid: int, marker: int, number: int) -> bool:
    """Signal the process if it is alive and bears the marker (0: only look)."""
    if not bears(pid, marker):
        return False
    try:
        handle = posix.pidfd_open(pid)
    except OSError:
        return False
    try:  # the number may have become another process's since: the handle cannot
        if not bears(pid, marker):
            return False
        if number:
            _signal.pidfd_send_signal(handle, number)
        return True
    except OSError:
        return False
    finally:
        posix.close(handle)


def bears(pid: int, marker: int) -> bool:
    """The process is alive, and its marker is this."""
    try:
        limits = read_file(b"/proc/%d/limits" % pid, 4096)
        line = limits[limits.find(b"Max file locks") :].split(b"\n", 1)[0].split()
        if b"%d" % marker not in line:
            return False
        state = read_file(b"/proc/%d/stat" % pid, 4096).rpartition(b")")[2].split(None, 1)[0]
    except (OSError, IndexError):
        return False
    return state not in (b"Z", b"X")


def execute(agent: Agent, connection: Connection, request: Fields) -> None:
    refuse_while_stopping(agent)
    plan = Plan(agent, {**agent.environment, **request})
    command = Command(agent, request, connection)
    command.start(plan, feed=number(request, "stdin", 0) == 1)
    connection.on_gone, connection.on_room = command.abandon, command.resume
    stdin = command.stdin
    if stdin is not None:
        connection.on_frame = lambda _, kind, payload: stdin.frame(kind, payload)


def start(agent: Agent, connection: Connection, request: Fields) -> None:
    refuse_while_stopping(agent)
    agent.start_command.ask(connection, {**agent.environment, **request})


def refuse_while_stopping(agent: Agent) -> None:
    if agent.stopping:
        raise Refused("failed", "the sandbox is stopping")


def stop(agent: Agent, connection: Connection, request: Fields) -> None:
    """SIGTERM to everybody, then wait for them, for so long at most."""
    agent.stopping = True
    limit = time.monotonic() + number(request, "grace_ms", 0) / 1000
    if agent.terminals is not None:
        agent.terminals.hang_up()

    def stopped() -> None:
        agent.stopping = False
        connection.finish({"ok": 1})

    Steps(agent, end_everybody(agent, limit), stopped)


def end_everybody(agent: Agent, limit: float) -> Iterator[float]:
    if posix.getpid() == 1:
        signal_the_rest(_signal.SIGTERM)
    else:  # not in a sandbox (a test): -1 would be everybody on the machine
        for marker in list(agent.commands):
            yield from signal_family(marker, _signal.SIGTERM, set())
    while has_children() and time.monotonic() < limit:
        yield 0.005


def has_children() -> bool:
    """For pid 1 that is: anybody else is left."""
    try:
        posix.waitid(posix.P_ALL, 0, posix.WEXITED | posix.WNOHANG | posix.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def ping(agent: Agent, connection: Connection, request: Fields) -> None:
    connection.finish({"ok": 1})


def note(agent: Agent, connection: Connection, request: Fields) -> None:
    """A line of the host's in the log."""
    agent.log.note(octets(request, "message", b"").replace(b"\n", b" ")[:LINE_BYTES])
    connection.finish({"ok": 1})


def file_operation(agent: Agent, connection: Connection, request: Fields) -> None:
    """Files are the business of a forked child, which may block."""
    from heyvm import agent_files

    work = agent_files.OPERATIONS.get(octets(request, "op", b""))
    if work is None:
        raise Refused("failed", "unknown operation")
    if agent.workers >= MAX_WORKERS:
        raise Refused("failed", "too many file operations at once")
    fd, splitter = connection.fd, connection.splitter
    fork_worker(agent, connection, lambda: agent_files.serve(fd, splitter, work, request))


def call_operation(agent: Agent, connection: Connection, request: Fields) -> None:
    """As long as the host likes: half of the workers is left to what is over soon."""
    from heyvm import agent_calls

    plan = Plan(agent, {**agent.environment, **request, "argv": [b"-"]})
    if agent.workers >= MAX_WORKERS // 2:
        raise Refused("failed", "too many SFTP sessions at once")
    fd, splitter = connection.fd, connection.splitter
    fork_worker(agent, connection, lambda: agent_calls.serve(fd, splitter, plan))


def fork_worker(agent: Agent, connection: Connection, work: Callable[[], None]) -> None:
    """`work` owns the connection, and never returns."""
    pid = posix.fork()
    if pid == 0:
        become_worker(connection.fd)
        work()
    agent.workers += 1

    def ended(_status: int) -> None:
        agent.workers -= 1

    agent.children[pid] = ended
    connection.close()


def port_operation(agent: Agent, connection: Connection, request: Fields) -> None:
    from heyvm import agent_ports

    agent_ports.operate(agent, connection, request)


def terminal_operation(agent: Agent, connection: Connection, request: Fields) -> None:
    from heyvm import agent_terminals

    agent_terminals.operate(agent, connection, request)


def become_worker(fd: int) -> None:
    """Keep nothing of the agent's but this descriptor: a command's stdin would never end."""
    _signal.set_wakeup_fd(-1)
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    posix.closerange(3, fd)
    posix.closerange(fd + 1, MAX_FILES)


OPERATIONS: dict[bytes, Callable[[Agent, Connection, Fields], None]] = {
    b"exec": execute,
    b"start": start,
    b"stop": stop,
    b"ping": ping,
    b"note": note,
    b"connect": port_operation,
    b"listen": port_operation,
    b"unlisten": port_operation,
    b"terminal": terminal_operation,
    b"hangup": terminal_operation,
    b"calls": call_operation,
}


def no_more(_connection: Connection, _kind: int, _payload: bytes) -> None:
    raise frames.FrameError("one request for each connection")


def give_up() -> None:
    """The host is gone and never said go, or this was a visit: nothing may be left behind."""
    posix._exit(0)


def ignore_signal(_number: int, _frame: object) -> None:
    """The wake-up descriptor tells the loop; a handler is what makes it be written to."""


def request_of(kind: int, payload: bytes) -> Fields:
    if kind != frames.HEADER:
        raise frames.FrameError("a request is a header")
    return frames.decode_header(payload)


def octets(fields: Fields, key: str, default: bytes) -> bytes:
    value = fields.get(key, default)
    if not isinstance(value, bytes):
        raise frames.FrameError(f"{key} is not a string")
    return value


def number(fields: Fields, key: str, default: int) -> int:
    value = fields.get(key, default)
    if not isinstance(value, int):
        raise frames.FrameError(f"{key} is not a number")
    return value


def strings(fields: Fields, key: str) -> list[bytes]:
    value = fields.get(key)
    if not isinstance(value, list) or not value:
        raise frames.FrameError(f"{key} is not a list")
    found = [item for item in value if isinstance(item, bytes)]
    if len(found) < len(value):
        raise frames.FrameError(f"{key} does not hold strings")
    return found


def environment(fields: Fields) -> dict[bytes, bytes]:
    value = fields.get("env", {})
    if not isinstance(value, dict):
        raise frames.FrameError("env is not a dict")
    return {frames.raw(key): octets(value, key, b"") for key in value}


def problem(error: OSError | ValueError) -> dict[str, frames.Writable]:
    code = CODES.get(error.errno or 0, "failed") if isinstance(error, OSError) else "failed"
    return {"error": code, "message": str(error)[:200]}


CODES = {
    errno.ENOENT: "not-found",
    errno.EISDIR: "is-directory",
    errno.ENOTDIR: "not-directory",
    errno.EEXIST: "not-directory",
    errno.ENOTEMPTY: "not-empty",
    errno.ELOOP: "outside",
    errno.ENAMETOOLONG: "bad-path",
    errno.EROFS: "read-only",
    errno.ENOSPC: "no-space",
    errno.EDQUOT: "no-space",
    errno.EACCES: "denied",
    errno.EPERM: "denied",
    errno.EBUSY: "denied",
    errno.E2BIG: "too-long",
}


def refused_before_exec(number: int) -> Refused:
    if number in CWD_ERRORS:
        return Refused("bad-cwd", posix.strerror(number))
    if number in (errno.EPERM, errno.EINVAL):
        return Refused("bad-user", "the sandbox has no such id")
    return Refused("failed", posix.strerror(number))


def exit_code(status: int) -> int:
    code = posix.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def magic(path: bytes) -> bool:
    """The path goes through a process's entry in /proc: the agent's own, before the exec."""
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if len(parts) < 2 or parts[0] != b"proc":
        return False
    return parts[1] in (b"self", b"thread-self") or parts[1].isdigit()


def pair(fds: list[int]) -> tuple[int, int]:
    """A pipe, remembered in `fds` as well."""
    ends = posix.pipe2(posix.O_CLOEXEC)
    fds.extend(ends)
    return ends


def close_all(fds: list[int]) -> None:
    for fd in fds:
        posix.close(fd)


def read_file(path: bytes, size: int) -> bytes:
    """The first bytes of a file that anybody may have put there: never waits for a FIFO."""
    fd = posix.open(path, posix.O_RDONLY | posix.O_NONBLOCK | posix.O_CLOEXEC | posix.O_NOCTTY)
    try:
        return posix.read(fd, size)
    finally:
        posix.close(fd)


def numeric(name: bytes) -> int | None:
    """A user or group id, or None. -1 and what is beyond 32 bits are not ids."""
    if not name.isdigit() or len(name) > 10 or int(name) >= 0xFFFFFFFF:
        return None
    return int(name)


def make_directories(path: bytes) -> None:
    """The directory and its parents, where missing."""
    at = b""
    for part in path.split(b"/"):
        at += part
        try:
            if part:
                posix.mkdir(at, 0o755)
        except FileExistsError:
            pass
        at += b"/"
    if path and posix.stat(path).st_mode & 0o170000 != 0o040000:
        raise NotADirectoryError(errno.ENOTDIR, "not a directory")


def raise_oom_score(pid: int) -> None:
    """By the parent: before its exec the child is as closed to itself as the agent is."""
    try:
        fd = posix.open(b"/proc/%d/oom_score_adj" % pid, posix.O_WRONLY | posix.O_CLOEXEC)
    except OSError:
        return
    try:
        posix.write(fd, OOM_SCORE)
    except OSError:
        pass
    posix.close(fd)


def replace_stdio() -> int:
    """Let go of the pipe that the host listens to for failure. What it returns is /dev/null."""
    null = posix.open("/dev/null", posix.O_RDWR | posix.O_CLOEXEC)
    for fd in range(3):
        posix.dup2(null, fd)
    return null


def default_signals() -> None:
    """As a fresh process has them. SIGPIPE and SIGXFSZ stay ignored here and not in children."""
    kept = (_signal.SIGKILL, _signal.SIGSTOP, _signal.SIGPIPE, _signal.SIGXFSZ)
    for number in range(1, 32):
        if number not in kept:
            _signal.signal(number, _signal.SIG_DFL)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())


def main(argv: list[str] | None = None) -> None:
    """`LISTEN_FD LOG_DIR SPARE_UID`, for ever."""
    # Python's own handler of SIGINT would make `kill -INT 1` fatal; with none it is ignored.
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    listen_fd, log_directory, spare = (argv or sys.argv[1:])[:3]
    if int(spare) >= 0:
        # prlimit(2) on the agent needs the caller's uid to be all three of these. The saved one is
        # replaced by every exec, so that children need not change theirs.
        posix.setresuid(0, 0, int(spare))
    default_signals()
    posix.umask(0o022)
    posix.closerange(3, int(listen_fd))
    posix.closerange(int(listen_fd) + 1, 1024)
    posix.set_inheritable(int(listen_fd), False)
    Agent(int(listen_fd), frames.raw(log_directory), int(spare)).run()
