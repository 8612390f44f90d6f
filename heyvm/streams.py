"""What an agent streams to its host and back: terminals, and commands while they run.

The host's side, as `guest.py` is for what is asked and answered; trusts no byte either. One thread
(or greenlet) may receive from a stream while any number of others send.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heyvm.errors import Conflict


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


class Terminal:
    """A terminal of a sandbox, and the connection that is attached to it."""

    session: str
    last_seq: int  # the last piece that there was when this was attached
    lost: int  # pieces up to this one were not acknowledged, and are not kept any more

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
        raise NotImplementedError

    @classmethod
    def attach(cls, sock: socket.socket, session: str) -> Terminal:
        """One that is there; what is not acknowledged comes again. `NotFound` where it is gone."""
        raise NotImplementedError

    def fileno(self) -> int:
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        """What is typed. Waits while the program reads nothing. Raises `BackendFailed`."""
        raise NotImplementedError

    def resize(self, cols: int, rows: int) -> None:
        """Never waits: of sizes that cannot be sent at once the last one is."""
        raise NotImplementedError

    def ack(self, seq: int) -> None:
        """Pieces up to this one have arrived. Never waits."""
        raise NotImplementedError

    def receive(self, timeout: float | None = None) -> Output | Ended | None:
        """The next piece, None after so many seconds without one. `Taken`, `BackendFailed`."""
        raise NotImplementedError

    def close(self) -> None:
        """Detach; from any thread, and a `receive` under way then raises `BackendFailed`."""
        raise NotImplementedError


class Command:
    """A command that runs without a terminal; closing it ends the command and its family."""

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
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        """For its stdin. Waits while it reads nothing."""
        raise NotImplementedError

    def end_input(self) -> None:
        raise NotImplementedError

    def receive(self, timeout: float | None = None) -> Output | Ended | None:
        """As a terminal's."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def end_terminal(sock: socket.socket, session: str) -> None:
    """Hang up; a terminal that is not there has been."""
    raise NotImplementedError
