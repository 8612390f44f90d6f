"""What an agent streams to its host and back: terminals, and commands while they run.

The host's side, as `guest.py` is for what is asked and answered; trusts no byte either. One thread
(or greenlet) may receive from a stream while any number of others send.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from heyvm import frames, guest
from heyvm.errors import BackendFailed, Conflict, NotFound
from heyvm.guest import ANSWER_TIMEOUT_S, FRAME_TIMEOUT_S, Subject, failed, nonsense

if TYPE_CHECKING:
    from heyvm.guest import Fields

MAX_PIECE_BYTES = 32 * 1024
MAX_SEQ = 1 << 62
NO_LIMIT = 1 << 62  # of a command's output
# How long what `resize` and `ack` could not send may lie after there is room again.
LOOK_AGAIN_S = 2.0
SEQ_BYTES = 8


class Taken(Conflict):
    """Another client has attached to this terminal."""


@dataclass(frozen=True)
class Output:
    """Some bytes. `seq` counts a terminal's pieces, from 1; 0 for a command's."""

    data: bytes
    seq: int = 0
    is_error: bool = False  # of stderr; a terminal has one stream only


@dataclass(frozen=True)
class Ended:
    """The program has ended; there is nothing after this."""

    exit_code: int


class Wire:
    """Frames both ways on one connection, which is never waited for but with poll(2): a timeout
    would be one for everybody who uses it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(0)
        self.sock = sock
        self.closed = False
        self._users = 0
        self._count = threading.Lock()  # held for a moment only
        self._turn = threading.Lock()  # to send; held for as long as the agent does not read
        self._rest = memoryview(b"")  # of a frame that has gone in part
        self._latest: dict[str, frames.Writable] = {}  # what waits for its turn
        self._deaf = False
        self._splitter = frames.Splitter()
        self._waited = 0.0  # for the rest of a frame
        self._frames = self._bytes = 0

    # -- to the agent ----------------------------------------------------------------------------

    def send(self, data: bytes, timeout: float | None = None) -> None:
        """One frame, behind what there is. What an agent that has hung up does not take is dropped:
        it has said why, and `receive` tells. Raises `BackendFailed` when it is closed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._used():
            with self._turn:
                self._finish(deadline)
                self._rest = memoryview(self._notes() + data)
                self._finish(deadline)
            self.flush()

    def note(self, fields: dict[str, frames.Writable]) -> None:
        """Fields of a header, soon: never waits. Of several of a kind the latest is sent."""
        with self._count:
            self._latest |= fields
        with suppress(BackendFailed), self._used():
            self.flush()

    def flush(self) -> None:
        """What can be sent now, without waiting for anybody."""
        # Whoever holds the turn looks once more after letting go of it: nothing is left lying.
        while self.unsent and self._turn.acquire(blocking=False):
            try:
                if not self._push():
                    return
                self._rest = memoryview(self._notes())
                if not self._push():
                    return
            finally:
                self._turn.release()

    @property
    def unsent(self) -> bool:
        return bool(self._rest or self._latest)

    def _notes(self) -> bytes:
        with self._count:
            latest, self._latest = self._latest, {}
        return frames.header(latest) if latest else b""

    def _finish(self, deadline: float | None) -> None:
        while not self._push():
            self._poll(select.POLLOUT, left(deadline))
            if deadline is not None and time.monotonic() > deadline:
                raise failed("deaf", "the sandbox's agent does not read")
        self._demand_open()

    def _push(self) -> bool:
        """Whether all of the frame that is under way has gone."""
        try:
            while self._rest and not self._deaf:
                self._rest = self._rest[self.sock.send(self._rest) :]
        except BlockingIOError:
            return False
        except OSError:
            self._deaf = True
        if self._deaf:
            self._rest = memoryview(b"")
        return True

    # -- from the agent --------------------------------------------------------------------------

    def next(self, timeout: float | None) -> tuple[int, bytes] | None:
        """The next frame; None when none has begun to come for so long. One that has begun must
        end within `FRAME_TIMEOUT_S`, however it trickles."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._used():
            while True:
                if self.unsent:
                    self.flush()
                if (found := self._ready()) is not None:
                    return found
                if not self._take() and not self._wait(deadline):
                    return None

    def _ready(self) -> tuple[int, bytes] | None:
        try:
            found = self._splitter.next()
        except frames.FrameError as error:
            raise nonsense(str(error)) from None
        if found is not None:
            self._waited = 0.0
            self._give_way(len(found[1]))
        return found

    def _give_way(self, size: int) -> None:
        """A flood must not keep the worker's other requests waiting."""
        self._frames += 1
        self._bytes += size
        if self._frames >= guest.FRAMES_PER_TURN or self._bytes >= guest.BYTES_PER_TURN:
            self._frames = self._bytes = 0
            time.sleep(0)

    def _take(self) -> bool:
        """What is there already."""
        self._demand_open()
        try:
            received = self.sock.recv(guest.RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            why = f"the connection to the sandbox's agent broke: {error}"
            raise failed("broken", why) from None
        self._demand_open()
        if not received:
            raise failed("closed", "the sandbox's agent closed the connection without an answer")
        self._splitter.feed(received)
        return True

    def _wait(self, deadline: float | None) -> bool:
        """For more; False when it is time to give up."""
        begun = time.monotonic()
        if deadline is not None and begun >= deadline:
            return False
        patience = left(deadline)
        if self._splitter.begun:
            if self._waited >= FRAME_TIMEOUT_S:
                raise nonsense("it began a frame and did not end it")
            patience = min(patience or FRAME_TIMEOUT_S, FRAME_TIMEOUT_S - self._waited)
        events = select.POLLIN
        if self._rest:
            events |= select.POLLOUT
        self._poll(events, patience)
        if self._splitter.begun:
            self._waited += time.monotonic() - begun
        return True

    def _poll(self, events: int, patience: float | None) -> None:
        """Looks up now and then, for what has come to be unsent meanwhile."""
        poll = select.poll()
        poll.register(self.sock, events)
        poll.poll(1000 * min(LOOK_AGAIN_S, LOOK_AGAIN_S if patience is None else patience))

    # -- its end ---------------------------------------------------------------------------------

    def _demand_open(self) -> None:
        if self.closed:
            raise gone()

    @contextmanager
    def _used(self) -> Iterator[None]:
        """While somebody uses it, its descriptor must not become another's."""
        with self._count:
            if self.closed:
                raise gone()
            self._users += 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._count:
            self._users -= 1
            if self.closed and not self._users:
                self.sock.close()

    def close(self) -> None:
        """From any thread; whoever waits is told. Twice is fine."""
        with self._count:
            if self.closed:
                return
            self.closed = True
            if self._users:
                with suppress(OSError):
                    self.sock.shutdown(socket.SHUT_RDWR)
            else:
                self.sock.close()


def left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def gone() -> BackendFailed:
    return BackendFailed("the connection to the sandbox was closed on this side")


class Stream:
    """What a terminal and a command have in common."""

    def __init__(self, sock: socket.socket) -> None:
        self._wire = Wire(sock)
        self._end: Ended | None = None

    def receive(self, timeout: float | None = None) -> Output | Ended | None:
        """The next piece, None after so many seconds without one. `Taken`, `BackendFailed`."""
        if self._end is not None:
            return self._end
        found = self._wire.next(timeout)
        if found is None:
            return None
        kind, payload = found
        if kind != frames.HEADER:
            return self._output(kind, payload)
        self._end = self._ended(guest.fields_of(payload))
        return self._end

    def _output(self, kind: int, payload: bytes) -> Output:
        raise NotImplementedError

    def _ended(self, fields: Fields) -> Ended:
        raise NotImplementedError

    def fileno(self) -> int:
        return self._wire.sock.fileno()

    def close(self) -> None:
        """Detach; from any thread, and a `receive` under way then raises `BackendFailed`."""
        self._wire.close()


class Terminal(Stream):
    """A terminal of a sandbox, and the connection that is attached to it.

    `fileno` is for a look at whether something has come; then `receive(0)` until it gives None.
    """

    session: str
    last_seq: int  # the last piece that there was when this was attached
    lost: int  # pieces up to this one were not acknowledged, and are not kept any more

    def __init__(self, sock: socket.socket, session: str) -> None:
        super().__init__(sock)
        self.session = session
        self.last_seq = self.lost = 0
        self._next: int | None = None  # the number of the piece that is due
        self._acked = 0

    @classmethod
    def open(
        cls,
        sock: socket.socket,
        *,
        session: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str,
        user: str,
        size: tuple[int, int],
        keep: float,
    ) -> Terminal:
        """A new one: a login shell where `argv` is empty. `size`: columns, rows. With `keep` (in
        seconds) it outlives its connection by so much, and keeps what is not acknowledged."""
        fields: dict[str, frames.Writable] = {
            "new": 1,
            "argv": tuple(argv),
            "env": dict(env),
            "cwd": cwd,
            "user": user,
            "cols": size[0],
            "rows": size[1],
            "keep_ms": round(keep * 1000),
        }
        return cls(sock, session)._begin(fields, Subject("the terminal", "command", cwd, user))

    @classmethod
    def attach(cls, sock: socket.socket, session: str) -> Terminal:
        """One that is there; what is not acknowledged comes again. `NotFound` where it is gone."""
        return cls(sock, session)._begin({"new": 0}, Subject("the terminal"))

    def _begin(self, fields: dict[str, frames.Writable], subject: Subject) -> Terminal:
        asked = {"op": "terminal", "session": self.session, **fields}
        self._wire.send(frames.header(asked), ANSWER_TIMEOUT_S)
        found = self._wire.next(ANSWER_TIMEOUT_S)
        if found is None:
            raise failed("silent", "the sandbox's agent gave no answer in time")
        if found[0] != frames.HEADER:
            raise nonsense("a terminal that speaks before it is ready")
        answer = guest.fields_of(found[1])
        demand_here(answer, subject)
        if answer.get("ready") != 1:
            raise nonsense("a terminal that is neither ready nor refused")
        self.last_seq = guest.number(answer, "seq", 0, MAX_SEQ)
        self.lost = guest.number(answer, "lost", 0, self.last_seq)
        return self

    def send(self, data: bytes) -> None:
        """What is typed. Waits while the program reads nothing; dropped when it has ended, which
        `receive` tells. Raises `BackendFailed` when this is closed."""
        for chunk in chunks_of(data):
            self._wire.send(frames.frame(frames.STDIN, chunk))

    def resize(self, cols: int, rows: int) -> None:
        """Never waits: of sizes that cannot be sent at once the last one is. What cannot be a size
        (beyond 1 to 65535) changes nothing."""
        if 1 <= cols <= 65535 and 1 <= rows <= 65535:
            self._wire.note({"resize": (cols, rows)})

    def ack(self, seq: int) -> None:
        """Pieces up to this one have arrived. Never waits."""
        if seq > self._acked:
            self._acked = seq
            self._wire.note({"ack": min(seq, MAX_SEQ)})

    def _output(self, kind: int, payload: bytes) -> Output:
        if kind != frames.STDOUT:
            raise nonsense("a frame that is no output")
        return self._piece(payload)

    def _ended(self, fields: Fields) -> Ended:
        return ended(demand_here(fields, Subject("the terminal")))

    def _piece(self, payload: bytes) -> Output:
        seq, data = int.from_bytes(payload[:SEQ_BYTES], "big"), payload[SEQ_BYTES:]
        if not 1 <= len(data) <= MAX_PIECE_BYTES:
            raise nonsense("a piece of a size that there is not")
        first = self.lost < seq <= self.last_seq + 1
        if not (first if self._next is None else seq == self._next):
            raise nonsense("a piece that is not due")
        self._next = seq + 1
        return Output(data, seq)


class Command(Stream):
    """A command that runs without a terminal; closing it ends the command and its family."""

    def __init__(self, sock: socket.socket, subject: Subject) -> None:
        super().__init__(sock)
        self._subject = subject
        self._said_all = False

    @classmethod
    def start(
        cls,
        sock: socket.socket,
        *,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str,
        user: str,
    ) -> Command:
        """Its refusals (`Invalid`: bad cwd, user) come from the first `receive`."""
        fields: dict[str, frames.Writable] = {
            "op": "exec",
            "argv": tuple(argv),
            "env": dict(env),
            "cwd": cwd,
            "user": user,
            "timeout_ms": 0,
            "max_output": NO_LIMIT,
            "log": "",
            "stdin": 1,
        }
        made = cls(sock, Subject(argv[0], "command", cwd, user))
        made._wire.send(frames.header(fields), FRAME_TIMEOUT_S)
        return made

    def send(self, data: bytes) -> None:
        """For its stdin. Waits while it reads nothing; dropped when it reads no more, or after
        `end_input`. Raises `BackendFailed` when this is closed."""
        for chunk in chunks_of(data):
            if not self._said_all:
                self._wire.send(frames.frame(frames.STDIN, chunk))

    def end_input(self) -> None:
        """Waits as `send` does. Twice is fine."""
        if not self._said_all:
            self._said_all = True
            self._wire.send(frames.frame(frames.END))

    def _output(self, kind: int, payload: bytes) -> Output:
        if kind not in (frames.STDOUT, frames.STDERR) or not payload:
            raise nonsense("a frame that is no output")
        return Output(payload, is_error=kind == frames.STDERR)

    def _ended(self, fields: Fields) -> Ended:
        return ended(guest.demand_ok(fields, self._subject))


def end_terminal(sock: socket.socket, session: str) -> None:
    """Hang up; a terminal that is not there has been."""
    talk = guest.Conversation(sock)
    talk.ask({"op": "hangup", "session": session})
    talk.answer(Subject("the terminal"))


def demand_here(fields: Fields, subject: Subject) -> Fields:
    """What an agent says of a terminal, unless that is a refusal."""
    if fields.get("error") == b"taken":
        raise Taken("another client has attached to this terminal")
    if fields.get("error") == b"gone":
        raise NotFound("there is no such terminal, or there is no longer")
    return guest.demand_ok(fields, subject) if "error" in fields else fields


def ended(fields: Fields) -> Ended:
    if fields.get("ok") != 1:
        raise nonsense("an end that is neither good nor bad")
    return Ended(guest.number(fields, "exit_code", 0, 255))


def chunks_of(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), frames.CHUNK_BYTES):
        yield data[at : at + frames.CHUNK_BYTES]
