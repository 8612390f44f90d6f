"""The host's side of a conversation with one agent. Trusts no byte of it.

Every wait has a deadline, every size a bound, every value its type checked; what is off is a
`BackendFailed`, and the agent's own refusals become the errors of the domain. A connection carries
one operation and is the caller's to close.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from heyvm import frames, metrics
from heyvm.errors import (
    BackendFailed,
    BadRequest,
    Conflict,
    HeyvmError,
    Invalid,
    NotFound,
    PortClosed,
    StorageFull,
)
from heyvm.models import ExecResult, FileInfo, Sandbox

if TYPE_CHECKING:
    Fields: TypeAlias = dict[str, frames.Value]

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
RECEIVE_BYTES = 256 * 1024
# An agent answers at once; a busy machine may hold it up. What has begun must come to its end.
ANSWER_TIMEOUT_S = 30.0
FRAME_TIMEOUT_S = 30.0
START_COMMAND_TIMEOUT_S = 30.0  # the one that it replaces is given 2 s, and killing is bounded too
TRANSFER_TIMEOUT_S = 60.0  # between two frames of a file: a slow disk, a search through a tree
KILL_ALLOWANCE_S = 15.0
# A short command is over before its client could go away: watching both costs a tenth of it.
UNWATCHED_S = 0.05
WAIT_S = 5.0
# A flood of tiny frames must not keep the worker's other requests waiting.
FRAMES_PER_TURN = 500
BYTES_PER_TURN = 1024 * 1024
CONNECT_TIMEOUT_S = 10.0  # the server inside may have a queue
LISTEN_TIMEOUT_S = 5.0
UNLISTEN_TIMEOUT_S = 3.0
MAX_RESULT_BYTES = 4096
CHANGE_TIMEOUT_S = 600.0  # a tree is removed or moved into place before the answer
MAX_ENTRIES = 100_000
MAX_LISTING_BYTES = 32 * 1024 * 1024
MAX_SIZE = 1 << 63
FILE_TYPES = frozenset({"file", "directory", "symlink", "fifo", "socket", "device"})


logger = logging.getLogger(__name__)


class ClientGone(Conflict):
    """The HTTP client that asked for the command closed its connection: nobody reads this."""


@dataclass(frozen=True)
class FileHead:
    """What an agent says of a file before it sends it."""

    type: str
    size: int
    mode: int
    mtime_ns: int
    ino: int

    @property
    def modified_at(self) -> float:
        seconds, rest = divmod(self.mtime_ns, 1_000_000_000)
        return seconds + rest / 1e9


def base_environment(sandbox: Sandbox) -> dict[str, str]:
    """What every command of a sandbox finds set. The agent adds HOME, USER and LOGNAME."""
    return {"PATH": PATH, "LANG": "C.UTF-8", **sandbox.image_config.env, **sandbox.env_vars}


class Conversation:
    """Frames to and from one agent, with deadlines."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._splitter = frames.Splitter()
        self._begun_at: float | None = None
        self._frames = self._bytes = 0

    def send(self, data: bytes, timeout: float = FRAME_TIMEOUT_S) -> None:
        """Raises `OSError` where the agent no longer listens: it may have said why."""
        self.sock.settimeout(timeout)
        try:
            self.sock.sendall(data)
        except TimeoutError:
            raise failed("deaf", "the sandbox's agent does not read") from None

    def ask(self, fields: dict[str, frames.Writable]) -> None:
        logger.debug("agent call %s", fields["op"])
        try:
            self.send(frames.header(fields))
        except OSError:
            pass  # what it said before it hung up is read next

    def ready(self) -> tuple[int, bytes] | None:
        """A frame that is here already."""
        try:
            found = self._splitter.next()
        except frames.FrameError as error:
            raise nonsense(str(error)) from None
        if found is None:
            self._begun_at = self._begun_at or time.monotonic() if self._splitter.begun else None
            return None
        self._begun_at = None
        self._give_way(len(found[1]))
        return found

    def _give_way(self, size: int) -> None:
        self._frames += 1
        self._bytes += size
        if self._frames >= FRAMES_PER_TURN or self._bytes >= BYTES_PER_TURN:
            self._frames = self._bytes = 0
            time.sleep(0)

    def receive(self, patience: float) -> bool:
        """Take what comes; False when nothing does for so long. What has begun is waited for
        no longer than `FRAME_TIMEOUT_S`, however it trickles."""
        self.sock.settimeout(max(0.001, min(patience, self._left())))
        try:
            received = self.sock.recv(RECEIVE_BYTES)
        except TimeoutError:
            if self._left() <= 0:
                raise nonsense("it began a frame and did not end it") from None
            return False
        except OSError as error:
            why = f"the connection to the sandbox's agent broke: {error}"
            raise failed("broken", why) from None
        if not received:
            raise failed("closed", "the sandbox's agent closed the connection without an answer")
        self._splitter.feed(received)
        return True

    def _left(self) -> float:
        if self._begun_at is None:
            return FRAME_TIMEOUT_S
        left = self._begun_at + FRAME_TIMEOUT_S - time.monotonic()
        if left <= 0:
            raise nonsense("it began a frame and did not end it")
        return left

    def next(self, timeout: float) -> tuple[int, bytes]:
        """The next frame, within so long."""
        deadline = time.monotonic() + timeout
        while (found := self.ready()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                why = f"the sandbox's agent gave no answer for {timeout:.0f} s"
                raise failed("silent", why)
            self.receive(left)
        return found

    def header(self, timeout: float = ANSWER_TIMEOUT_S) -> Fields:
        kind, payload = self.next(timeout)
        if kind != frames.HEADER:
            raise nonsense("a frame that is no header")
        return fields_of(payload)

    def answer(self, subject: Subject, timeout: float = ANSWER_TIMEOUT_S) -> Fields:
        """The result of what was asked. Raises what the agent refused it with."""
        return demand_ok(self.header(timeout), subject)


@dataclass(frozen=True)
class Subject:
    """What a request was about, in the words of whoever sent it."""

    what: str
    field: str = "command"
    cwd: str = ""
    user: str = ""


def nonsense(why: str) -> BackendFailed:
    return failed("nonsense", f"the sandbox's agent talks nonsense: {why}")


def failed(kind: str, detail: str) -> BackendFailed:
    """A conversation that has failed is counted, by its kind."""
    metrics.here().agent_failed(kind)
    return BackendFailed(detail)


def fields_of(payload: bytes) -> Fields:
    try:
        return frames.decode_header(payload)
    except frames.FrameError as error:
        raise nonsense(str(error)) from None


def number(fields: Fields, key: str, least: int = 0, most: int = MAX_SIZE) -> int:
    value = fields.get(key)
    if not isinstance(value, int) or not least <= value <= most:
        raise nonsense(f"{key} is not a number that it could be")
    return value


def words(fields: Fields, key: str, most: int = 4096) -> str:
    value = fields.get(key)
    if not isinstance(value, bytes) or len(value) > most:
        raise nonsense(f"{key} is not a text that it could be")
    return frames.text(value)


def demand_ok(fields: Fields, subject: Subject) -> Fields:
    if "error" in fields:
        raise refusal(words(fields, "error", 64), harmless(words(fields, "message")), subject)
    if fields.get("ok") != 1:
        raise nonsense("a result that is neither good nor bad")
    return fields


def harmless(message: str) -> str:
    """Text from inside, fit for a log and a terminal."""
    return "".join(char if char.isprintable() else "?" for char in message[:200])


def refusal(code: str, message: str, subject: Subject) -> HeyvmError:
    """The domain's error for one of the agent's codes (docs/architecture.md lists them)."""
    what = subject.what
    if code in COMMAND_CODES:
        text = COMMAND_CODES[code].format(cwd=subject.cwd, user=subject.user)
        field = {"bad-cwd": "cwd", "bad-user": "user"}.get(code, subject.field)
        return Invalid(f"{text} ({message})", errors={field: [text]})
    if code in FILE_CODES:
        error, text = FILE_CODES[code]
        return error(text.format(what=what, message=message))
    if code == "refused":
        return PortClosed(f"nobody listens on {what} in the sandbox")
    if code == "failed":
        return failed("failed", f"{what}: {message}")
    return nonsense("an error of a kind that there is not")


COMMAND_CODES = {
    "bad-cwd": "cwd {cwd!r} is not a directory that can be entered in the sandbox",
    "bad-user": "user {user!r} is not one that the sandbox has",
    "too-long": "arguments too long",
}
FILE_CODES: dict[str, tuple[type[HeyvmError], str]] = {
    "not-found": (NotFound, "there is no {what}"),
    "is-directory": (
        Conflict,
        "{what} is a directory (as a tar: ?format=tar), or has one in its way",
    ),
    "not-directory": (Conflict, "{what} is not a directory, or lies below something that is none"),
    "not-empty": (Conflict, "{what} has something in it: add ?recursive=true to delete it too"),
    "not-regular": (BadRequest, "{what} cannot be read as a file: {message}"),
    "outside": (BadRequest, "{what} leads out of the mount: {message}"),
    "bad-path": (BadRequest, "{what} is not a path that can be used: {message}"),
    "bad-archive": (BadRequest, "the archive for {what} was refused: {message}"),
    "read-only": (Conflict, "{what} lies on a read-only file system"),
    "no-space": (StorageFull, "no space is left for {what}"),
    "denied": (Conflict, "the sandbox may not do that to {what}: {message}"),
}


# -- a sandbox's life ------------------------------------------------------------------------------


def greet(sock: socket.socket, timeout: float) -> None:
    """Wait for the hello of an agent that has just been started."""
    if Conversation(sock).header(timeout).get("hello") != 1:
        raise nonsense("it did not say hello")


def go(
    sock: socket.socket, env: Mapping[str, str], working_directory: str, *, visit: bool = False
) -> None:
    """Let a greeted agent work. The directory is made where missing. With `visit` the box ends
    with this connection."""
    fields: dict[str, frames.Writable] = {"op": "go", "env": dict(env), "visit": int(visit)}
    talk = Conversation(sock)
    talk.ask({**fields, "working_directory": working_directory})
    try:
        talk.answer(Subject(f"working directory {working_directory!r}", "working_directory"))
    except (NotFound, Conflict, BadRequest) as error:
        complaint = f"it cannot be had in the sandbox: {error.detail}"
        raise Invalid(complaint, errors={"working_directory": [complaint]}) from None


def start_command(
    sock: socket.socket,
    command: str,
    cwd: str,
    env: Mapping[str, str],
    *,
    argv: Sequence[str] = (),
    user: str = "",
) -> None:
    """Replace the start command: a line for the shell, or `argv`; neither only ends what runs.
    Returns once it has started."""
    talk = Conversation(sock)
    fields: dict[str, frames.Writable] = {"op": "start", "command": command, "cwd": cwd}
    talk.ask({**fields, "env": dict(env), "argv": tuple(argv), "user": user})
    talk.answer(Subject("the start command", "start_command"), START_COMMAND_TIMEOUT_S)


def stop(sock: socket.socket, grace: float) -> None:
    """SIGTERM to every process; returns when none is left, or after `grace` seconds."""
    talk = Conversation(sock)
    talk.ask({"op": "stop", "grace_ms": int(grace * 1000)})
    talk.answer(Subject("stop"), grace + ANSWER_TIMEOUT_S)


def ping(sock: socket.socket, timeout: float = 5.0) -> None:
    """Raises `BackendFailed` where the agent does not answer."""
    talk = Conversation(sock)
    talk.ask({"op": "ping"})
    talk.answer(Subject("ping"), timeout)


def note(sock: socket.socket, message: str, timeout: float = 5.0) -> None:
    """Write a line into the sandbox's log, as from stderr; its level is the word in it."""
    talk = Conversation(sock)
    talk.ask({"op": "note", "message": message})
    talk.answer(Subject("note"), timeout)


# -- ports -----------------------------------------------------------------------------------------


def connect_port(
    sock: socket.socket, port: int, name: str, timeout: float = CONNECT_TIMEOUT_S
) -> None:
    """Make this connection the one to a port inside: from here on `sock` (blocking, without a
    timeout) is that stream, byte for byte. Raises `PortClosed` where nobody listens."""
    talk = Conversation(sock)
    talk.ask({"op": "connect", "port": port, "name": name})
    demand_ok(lone_header(sock, time.monotonic() + timeout), Subject(f"port {port}"))
    sock.settimeout(None)


def lone_header(sock: socket.socket, deadline: float) -> Fields:
    """One header, and no byte of what follows it."""
    prefix = exactly(sock, frames.PREFIX_BYTES, deadline)
    size = int.from_bytes(prefix[:4], "big")
    if prefix[4] != frames.HEADER or size > MAX_RESULT_BYTES:
        raise nonsense("a frame that is no result")
    return fields_of(exactly(sock, size, deadline))


def exactly(sock: socket.socket, size: int, deadline: float) -> bytes:
    found = b""
    while len(found) < size:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            part = sock.recv(size - len(found))
        except TimeoutError:
            raise failed("silent", "the sandbox's agent gave no answer in time") from None
        except OSError as error:
            why = f"the connection to the sandbox's agent broke: {error}"
            raise failed("broken", why) from None
        if not part:
            raise failed("closed", "the sandbox's agent closed the connection without an answer")
        found += part
        if time.monotonic() > deadline:
            raise failed("silent", "the sandbox's agent gave no answer in time")
    return found


def listen(
    sock: socket.socket, port: int, name: str, descriptor: int, timeout: float = LISTEN_TIMEOUT_S
) -> None:
    """Have every connection to this listening unix socket led to a port inside, until `unlisten` of
    this name. One that the agent has of this name already is replaced."""
    subject = Subject(f"port {port}")
    talk = Conversation(sock)
    talk.ask({"op": "listen", "port": port, "name": name})
    if demand_head(talk.header(timeout), subject).get("ready") != 1:
        raise nonsense("it is not ready for a listener")
    try:
        socket.send_fds(sock, [b"L"], [descriptor])
    except OSError as error:
        raise BackendFailed(f"the sandbox's agent does not take a listener: {error}") from None
    talk.answer(subject, timeout)


def unlisten(
    sock: socket.socket, name: str, *, keep: bool = False, timeout: float = UNLISTEN_TIMEOUT_S
) -> None:
    """Cut every connection of this name, however it came; without `keep` listen no more for it."""
    talk = Conversation(sock)
    talk.ask({"op": "unlisten", "name": name, "keep": int(keep)})
    talk.answer(Subject(f"endpoint {name}"), timeout)


# -- execute ---------------------------------------------------------------------------------------


def execute(
    sock: socket.socket,
    *,
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: str = "/",
    user: str = "",
    stdin: bytes | None = None,
    timeout_seconds: float | None = None,
    max_output_bytes: int = 10 * 1024 * 1024,
    log: str = "execute",
    client: socket.socket | None = None,
    on_wait: Callable[[], None] | None = None,
) -> ExecResult:
    """Run one command to its end.

    `client`: raises `ClientGone` when that socket is closed by its other side; closing `sock` then
    ends the command. `on_wait` is called every few seconds of silence, and may raise to give up.
    """
    fields: dict[str, frames.Writable] = {
        "op": "exec",
        "argv": tuple(argv),
        "env": dict(env),
        "cwd": cwd,
        "user": user,
        "timeout_ms": milliseconds(timeout_seconds),
        "max_output": max_output_bytes,
        "log": log,
        "stdin": int(stdin is not None),
    }
    running = Execution(Conversation(sock), max_output_bytes)
    running.waits(client, on_wait, timeout_seconds)
    running.talk.ask(fields)
    if stdin is not None:
        running.feed(stdin)
    return running.finish(Subject(argv[0], "command", cwd, user))


def milliseconds(seconds: float | None) -> int:
    """0 is no limit to the agent; whatever else is asked is at least a moment."""
    return 0 if seconds is None else max(1, round(seconds * 1000))


class Execution:
    """A command that runs: what it printed so far, and how it is waited for."""

    def __init__(self, talk: Conversation, max_output: int) -> None:
        self.talk = talk
        self.max_output = max_output
        self.output, self.stdout, self.stderr = bytearray(), bytearray(), bytearray()
        self.result: Fields | None = None
        self.client: socket.socket | None = None
        self.on_wait: Callable[[], None] | None = None
        self.deadline: float | None = None
        self.young = True

    def waits(
        self,
        client: socket.socket | None,
        on_wait: Callable[[], None] | None,
        timeout_seconds: float | None,
    ) -> None:
        self.client, self.on_wait = client, on_wait
        if timeout_seconds is not None:
            self.deadline = time.monotonic() + timeout_seconds + KILL_ALLOWANCE_S

    def feed(self, stdin: bytes) -> None:
        """Send it as fast as it is read, taking output meanwhile. A command that ends before, or
        reads no further, is no failure."""
        whole = memoryview(stdin)
        for at in range(0, len(whole), frames.CHUNK_BYTES):
            self._send(frames.frame(frames.STDIN, bytes(whole[at : at + frames.CHUNK_BYTES])))
        self._send(frames.frame(frames.END))

    def _send(self, frame: bytes) -> None:
        rest = memoryview(frame)
        while rest and self.result is None:
            self.talk.sock.settimeout(0)
            try:
                rest = rest[self.talk.sock.send(rest) :]
            except BlockingIOError:
                self._wait(select.POLLIN | select.POLLOUT)
            except OSError:  # the agent has hung up: its answer is there to be read
                return

    def finish(self, subject: Subject) -> ExecResult:
        """Wait for the end."""
        while self.result is None:
            self._wait(select.POLLIN)
        found = demand_ok(self.result, subject)
        return ExecResult(
            output=bytes(self.output),
            stdout=bytes(self.stdout),
            stderr=bytes(self.stderr),
            exit_code=number(found, "exit_code", 0, 255),
            duration_ms=number(found, "duration_ms"),
            timed_out=number(found, "timed_out", 0, 1) == 1,
            truncated=number(found, "truncated", 0, 1) == 1,
        )

    def _wait(self, events: int) -> None:
        """Until the agent has said something more, which is taken in, or listens again."""
        if events == select.POLLIN and (self.young or self.client is None):
            heard = self.talk.receive(UNWATCHED_S if self.young else WAIT_S)
        else:
            heard = self._watch_both(events)
        self._endure(silent=not heard and not self.young)
        self.young = False
        while self.result is None and (found := self.talk.ready()) is not None:
            self._take(*found)

    def _watch_both(self, events: int) -> bool:
        poll = select.poll()
        poll.register(self.talk.sock, events)
        if self.client is not None:
            poll.register(self.client, select.POLLIN)
        found = dict(poll.poll(WAIT_S * 1000))
        if self.client is not None and self.client.fileno() in found:
            self._look_at(self.client)
        happened = found.get(self.talk.sock.fileno(), 0)
        if happened & ~select.POLLOUT:
            return self.talk.receive(0)
        return bool(found)

    def _look_at(self, client: socket.socket) -> None:
        if client_gone(client):
            raise ClientGone("the client went away, and its command with it")
        # It sent something: the next request, ahead of time. It would tell of itself for ever.
        self.client = None

    def _endure(self, *, silent: bool) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise BackendFailed("the sandbox's agent did not end the command at its time limit")
        if silent and self.on_wait is not None:
            self.on_wait()

    def _take(self, kind: int, payload: bytes) -> None:
        if kind == frames.HEADER:
            self.result = fields_of(payload)
            return
        if kind not in (frames.STDOUT, frames.STDERR) or not payload:
            raise nonsense("a frame that is no output")
        stream = self.stdout if kind == frames.STDOUT else self.stderr
        if len(stream) + len(payload) > self.max_output:
            raise nonsense("more output than was asked for")
        stream += payload
        self.output += payload


def client_gone(client: socket.socket) -> bool:
    try:
        return not client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except (BlockingIOError, TimeoutError):
        return False
    except OSError:
        return True


# -- files -----------------------------------------------------------------------------------------


def list_files(sock: socket.socket, mount: str, path: str, *, recursive: bool) -> list[FileInfo]:
    """The entries of a directory, or of all below it too, sorted by path."""
    talk = Conversation(sock)
    subject = Subject(place(mount, path))
    talk.ask({"op": "list", "mount": mount, "path": path, "recursive": int(recursive)})
    found, size = list[FileInfo](), 0
    while True:
        kind, payload = talk.next(TRANSFER_TIMEOUT_S)
        if kind == frames.HEADER:
            demand_ok(fields_of(payload), subject)
            return sorted(found, key=lambda info: info.path)
        if kind != frames.DATA:
            raise nonsense("a frame that is no listing")
        size += len(payload)
        found += entries_of(payload)
        if len(found) > MAX_ENTRIES or size > MAX_LISTING_BYTES:
            raise Conflict(
                f"{subject.what} holds more than {MAX_ENTRIES} entries: list a directory below it"
            )


def entries_of(payload: bytes) -> list[FileInfo]:
    try:
        batch = frames.decode(payload)
    except frames.FrameError as error:
        raise nonsense(str(error)) from None
    if not isinstance(batch, list) or not batch:
        raise nonsense("a listing that is no list")
    return [entry_of(item) for item in batch]


def entry_of(item: frames.Value) -> FileInfo:
    if not isinstance(item, dict):
        raise nonsense("an entry that is no dict")
    head = head_of(item)
    name, path = words(item, "name"), words(item, "path")
    return FileInfo(name, path, head.type, head.size, head.mode, head.modified_at)


def head_of(fields: Fields) -> FileHead:
    kind = words(fields, "type", 16)
    if kind not in FILE_TYPES:
        raise nonsense("a file of a kind that there is not")
    return FileHead(
        type=kind,
        size=number(fields, "size"),
        mode=number(fields, "mode", 0, 0o7777),
        mtime_ns=number(fields, "mtime_ns", -MAX_SIZE),
        ino=number(fields, "ino", 0, 1 << 64),
    )


def place(mount: str, path: str) -> str:
    """How an error names it."""
    return repr(f"{mount.rstrip('/')}/{path}" if path else mount)


def read(
    sock: socket.socket, mount: str, path: str, *, offset: int = 0, length: int | None = None
) -> tuple[FileHead, Iterator[bytes]]:
    """A file's head, and its bytes from `offset` on. The iterator raises when they fall short."""
    talk = Conversation(sock)
    subject = Subject(place(mount, path))
    wanted = -1 if length is None else length
    talk.ask({"op": "read", "mount": mount, "path": path, "offset": offset, "length": wanted})
    head = head_of(demand_head(talk.header(TRANSFER_TIMEOUT_S), subject))
    due = max(0, head.size - offset)
    return head, body(talk, subject, due if length is None else min(due, length))


def read_tar(sock: socket.socket, mount: str, path: str) -> tuple[FileHead, Iterator[bytes]]:
    """A directory's head, and all that is in it as a tar archive."""
    talk = Conversation(sock)
    subject = Subject(place(mount, path))
    talk.ask({"op": "read", "mount": mount, "path": path, "tar": 1})
    return head_of(demand_head(talk.header(TRANSFER_TIMEOUT_S), subject)), body(talk, subject, None)


def demand_head(fields: Fields, subject: Subject) -> Fields:
    return demand_ok(fields, subject) if "error" in fields else fields


def body(talk: Conversation, subject: Subject, due: int | None) -> Iterator[bytes]:
    """The bytes of a file, as many as are due (None: as many as come)."""
    came = 0
    while True:
        kind, payload = talk.next(TRANSFER_TIMEOUT_S)
        if kind == frames.HEADER:
            demand_ok(fields_of(payload), subject)
            raise nonsense("a good result before the end")
        if kind == frames.END:
            break
        came += len(payload)
        if kind != frames.DATA or not payload or (due is not None and came > due):
            raise nonsense("bytes of a file that are not due")
        yield payload
    if due is not None and came < due:
        raise nonsense("fewer bytes than it promised")
    talk.answer(subject)


def write(
    sock: socket.socket, mount: str, path: str, chunks: Iterator[bytes], *, tar: bool = False
) -> int:
    """Write a file, or unpack a tar into a directory. It is there, whole, when this returns.

    What `chunks` raises goes through, and nothing is written. The size of what was written.
    """
    talk = Conversation(sock)
    subject = Subject(place(mount, path))
    talk.ask({"op": "write", "mount": mount, "path": path, "tar": int(tar)})
    for chunk in chunks:
        if not sent(talk, chunk):
            break
    else:
        ended(talk)
    return number(talk.answer(subject, CHANGE_TIMEOUT_S), "size")


def sent(talk: Conversation, chunk: bytes) -> bool:
    """False: the agent has hung up, and has said why."""
    view = memoryview(chunk)
    try:
        for at in range(0, len(view), frames.MAX_PAYLOAD_BYTES):
            part = bytes(view[at : at + frames.MAX_PAYLOAD_BYTES])
            talk.send(frames.frame(frames.DATA, part), TRANSFER_TIMEOUT_S)
    except OSError:
        return False
    return True


def ended(talk: Conversation) -> None:
    try:
        talk.send(frames.frame(frames.END))
    except OSError:
        pass  # it has said why


def delete(sock: socket.socket, mount: str, path: str, *, recursive: bool) -> None:
    """Remove a file or an empty directory; with `recursive` whatever is in it too."""
    talk = Conversation(sock)
    talk.ask({"op": "delete", "mount": mount, "path": path, "recursive": int(recursive)})
    talk.answer(Subject(place(mount, path)), CHANGE_TIMEOUT_S)


def mkdir(sock: socket.socket, path: str) -> None:
    """Make a directory (an absolute path) with its parents, where missing."""
    talk = Conversation(sock)
    talk.ask({"op": "mkdir", "path": path})
    talk.answer(Subject(repr(path)), ANSWER_TIMEOUT_S)
