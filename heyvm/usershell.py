"""A shell of a sandbox in the user's own terminal, or at the ends of pipes.

Given a way to get a connection; knows neither tickets nor the API. Threads do all that may wait,
and tell the main one, which does nothing but hear of it: a signal finds it ready at any time.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Any

from heyvm.errors import HeyvmError
from heyvm.usertty import HELP, INTERRUPT, Escape, Escapes, Screen

if TYPE_CHECKING:
    from heyvm.sshclient import Shell

FAILED = 255  # as ssh: it is not the command that has failed
SIGNALLED = 128
ANSWER_S = 14.0  # until a shell must have answered, all told
TICK_S = 1.0
SUSPEND_S = 0.1
PROMPT_S = 1.0  # for a shell that prints none
EARLY_BYTES = 64 * 1024
PIECE_BYTES = 64 * 1024
TERM = "xterm"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class Ended:
    """The last thing that happens; `message` is for the user."""

    code: int
    message: str = ""


@dataclass(frozen=True)
class Opened:
    """The shell has answered; its terminal has this size."""

    shell: Shell
    size: tuple[int, int]


@dataclass(frozen=True)
class Signalled:
    number: int


Event = Ended | Opened | Signalled | Escape


@dataclass(frozen=True)
class Wanted:
    """What to run: None for a shell. Without a `screen` stdin, stdout and stderr are pipes."""

    command: str | None
    screen: Screen | None
    identity: str | None = None


class Session:
    """One shell or command, from the first key that is typed to the exit code.

    `connect` gives the connection, or a `HeyvmError`; `why` what is known of its end.
    """

    def __init__(
        self, wanted: Wanted, connect: Callable[[], socket.socket], why: Callable[[], str]
    ) -> None:
        self.wanted, self.screen = wanted, wanted.screen
        self._connect, self._why = connect, why
        self._events = SimpleQueue[Event]()
        self._open: Opened | None = None
        self._may_send, self._answered = os.pipe()
        self._handed_over = False

    def run(self) -> int:
        """Its exit code; the terminal is as it was when this returns."""
        with self._signals():
            try:
                if self.screen is not None:
                    self.screen.enter()
                ended = self._run()
            finally:
                if self.screen is not None:
                    self.screen.restore()
        if ended.message:
            newline = "\n" if self.screen is not None and self._open is not None else ""
            tell(f"{newline}heyvm: {ended.message}\n")
        return ended.code

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def hear(number: int, _: FrameType | None) -> None:
            self._events.put(Signalled(number))

        heard = (*ENDING, signal.SIGWINCH, signal.SIGCONT)
        before = {number: signal.signal(number, hear) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # -- what happens ----------------------------------------------------------------------------

    def _run(self) -> Ended:
        if self.screen is not None:
            spawn(self._read_keys, self.screen)
        spawn(self._begin)
        answer_by = time.monotonic() + ANSWER_S
        while True:
            ended = None
            with suppress(Empty):
                ended = self._happened(self._events.get(timeout=TICK_S))
            if ended is not None:
                return ended
            if self._open is None and time.monotonic() > answer_by:
                return Ended(FAILED, f"no shell has answered in {ANSWER_S:.0f} seconds")
            if self._open is not None and self._open.shell.is_dead():
                return Ended(FAILED, "the connection is lost: the server does not answer any more")

    def _happened(self, event: Event) -> Ended | None:
        match event:
            case Ended():
                return event
            case Opened():
                self._opened(event)
            case Signalled(number):
                return self._signalled(number)
            case Escape.DISCONNECT:
                return Ended(FAILED, "disconnected")
            case Escape.HELP:
                tell("\r\n" + HELP.replace("\n", "\r\n"))
            case Escape.SUSPEND:
                self._suspend()
        return None

    def _signalled(self, number: int) -> Ended | None:
        if number in ENDING:
            return Ended(SIGNALLED + number)
        if number == signal.SIGCONT:
            self._resume()
        self._resize()
        return None

    def _opened(self, opened: Opened) -> None:
        self._open = opened
        self._resize()
        spawn(opened.shell.beat)
        spawn(self._copy_out, opened.shell)
        if self.screen is None:
            spawn(self._copy_in, opened.shell)
        elif self.wanted.command is None:
            spawn(self._hand_over, PROMPT_S)
        else:
            self._hand_over()

    def _hand_over(self, wait: float = 0.0) -> None:
        """From now on what is typed goes to the shell. One that has printed something has its own
        way with keys: those that come earlier are echoed by its terminal, and by itself again."""
        time.sleep(wait)
        if not self._handed_over:
            self._handed_over = True
            os.write(self._answered, b"!")

    def _resize(self) -> None:
        if self._open is None or self.screen is None:
            return
        size = self.screen.size()
        if size != self._open.size:
            self._open = Opened(self._open.shell, size)
            self._open.shell.resize(*size)

    def _suspend(self) -> None:
        assert self.screen is not None
        self.screen.restore()
        os.kill(0, signal.SIGTSTP)  # the whole job, as ^Z does
        # The signal may take effect a moment later, and has none where no shell controls jobs.
        time.sleep(SUSPEND_S)
        self._resume()

    def _resume(self) -> None:
        # Whoever had the terminal meanwhile need not have left it raw.
        if self.screen is not None:
            self.screen.enter()

    # -- the connection --------------------------------------------------------------------------

    def _begin(self) -> None:
        """Connect, log in, ask for the shell."""
        # paramiko takes a while to load, and so does an answer.
        spawn(importlib.import_module, "heyvm.sshclient")
        try:
            self._events.put(self._dial())
        except HeyvmError as error:
            self._events.put(Ended(FAILED, error.detail))
        except Exception as error:  # noqa: BLE001  # no traceback into a terminal that is raw
            self._events.put(Ended(FAILED, f"no shell: {type(error).__name__}"))

    def _dial(self) -> Opened:
        sock = self._connect()
        from heyvm import sshclient

        size = self.screen.size() if self.screen is not None else (0, 0)
        terminal = (os.environ.get("TERM") or TERM, *size)
        shell = sshclient.open_shell(
            sock,
            command=self.wanted.command,
            terminal=None if self.screen is None else terminal,
            identity=self.wanted.identity,
        )
        return Opened(shell, size)

    # -- bytes -----------------------------------------------------------------------------------

    def _read_keys(self, screen: Screen) -> None:
        """What is typed is kept until the shell has answered, and then sent."""
        early = self._keep(screen)
        if self._open is None:
            return
        escapes = Escapes()
        with suppress(OSError):  # it is closed, which `_copy_out` hears of
            for data in pieces(early, screen):
                for piece in escapes.take(data):
                    if isinstance(piece, Escape):
                        self._events.put(piece)
                    else:
                        self._open.shell.send(piece)
            self._events.put(Ended(FAILED, "the terminal is gone"))

    def _keep(self, screen: Screen) -> bytes:
        early = bytearray()
        while True:
            watched = [self._may_send, screen.fd][: 2 if len(early) < EARLY_BYTES else 1]
            ready = select.select(watched, [], [])[0]
            if self._may_send in ready:
                return bytes(early)
            data = screen.as_typed(read(screen.fd))
            if INTERRUPT in data:
                self._events.put(Ended(SIGNALLED + signal.SIGINT))
            if not data:
                self._events.put(Ended(FAILED, "the terminal is gone"))
                return b""
            early += data

    def _copy_in(self, shell: Shell) -> None:
        with suppress(OSError):  # it is closed: there is nobody to send it to
            while data := read(0):
                shell.send(data)
            shell.end_input()

    def _copy_out(self, shell: Shell) -> None:
        """Until the program has ended; then how."""
        beside = spawn(self._write, shell.stderr, 2)
        self._write(lambda size: self._prompted(shell.stdout(size)), 1)
        beside.join()
        code = shell.exit_code()
        if code is not None:
            self._events.put(Ended(code))
            return
        why = shell.why() or self._why()
        self._events.put(Ended(FAILED, f"the connection is closed: {why or 'it was lost'}"))

    def _prompted(self, data: bytes) -> bytes:
        self._hand_over()
        return data

    def _write(self, receive: Callable[[int], bytes], fd: int) -> None:
        try:
            while data := receive(PIECE_BYTES):
                write(fd, data)
        except BrokenPipeError:
            self._events.put(Ended(SIGNALLED + signal.SIGPIPE))
        except OSError as error:
            self._events.put(Ended(FAILED, f"cannot write: {error.strerror or error}"))


def pieces(first: bytes, screen: Screen) -> Iterator[bytes]:
    if first:
        yield first
    while data := read(screen.fd):
        yield screen.as_typed(data)


def read(fd: int) -> bytes:
    """Some bytes; none at the end, and where the terminal is gone."""
    while True:
        try:
            return os.read(fd, PIECE_BYTES)
        except BlockingIOError:  # whoever shares the descriptor has made it so
            select.select([fd], [], [])
        except OSError:
            return b""


def write(fd: int, data: bytes) -> None:
    """All of it."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])


def tell(text: str) -> None:
    with suppress(OSError):
        write(2, text.encode(sys.stderr.encoding or "utf-8", "replace"))


def spawn(job: Callable[..., Any], *given: Any) -> threading.Thread:
    thread = threading.Thread(target=job, args=given, daemon=True)
    thread.start()
    return thread
