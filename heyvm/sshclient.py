"""SSH's client on one connection: paramiko, as far as a shell or a command needs it."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import paramiko
from paramiko.message import Message
from paramiko.pkey import UnknownKeyType
from paramiko.ssh_exception import SSHException

from heyvm.errors import Unauthorized, Unavailable

BEAT_S = 3.0  # from an answer of the server to the next question whether it lives
DEAD_S = 9.0  # after so long without a byte of it, it does not
STOPPED_S = 4.0  # between two looks: this program was halted, and what came waits to be read
ANSWER_S = 12.0
NO_SSH = "no SSH server answers (the ticket of a TCP tunnel is for `-p`, without --shell)"
LONGEST_REASON = 200
USER = "heyvm"  # the name that a client logs in with means nothing to the server
KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")
# The fastest that both ends have; the tunnel around it is encrypted once more.
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes256-ctr")


class Watched:
    """A connection, and when a byte last came."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._heard = self._looked = time.monotonic()
        self.send, self.close, self.settimeout = sock.send, sock.close, sock.settimeout

    @property
    def _closed(self) -> bool:
        """paramiko asks for it at the end of the program, and prints a traceback where it is not
        there."""
        return self._sock.fileno() < 0

    def recv(self, size: int) -> bytes:
        data = self._sock.recv(size)
        self._heard = time.monotonic()
        return data

    def is_dead(self) -> bool:
        """Whether its other end has said nothing for too long. To be asked every second."""
        now = time.monotonic()
        if now - self._looked > STOPPED_S:
            self._heard = now
        self._looked = now
        return now - self._heard > DEAD_S


class Transport(paramiko.Transport):
    """Keeps what the server says when it ends a connection."""

    _preferred_ciphers = CIPHERS
    goodbye = ""

    def _parse_disconnect(self, m: Message) -> None:
        m.get_int()
        self.goodbye = printable(m.get_text())


class Shell:
    """A shell, or a command, that has answered."""

    def __init__(self, line: Watched, transport: Transport, channel: paramiko.Channel) -> None:
        self._line, self._transport, self._channel = line, transport, channel
        self.is_dead = line.is_dead
        self.send, self.end_input = channel.sendall, channel.shutdown_write
        self.stdout, self.stderr = channel.recv, channel.recv_stderr

    def resize(self, cols: int, rows: int) -> None:
        with suppress(EOFError, OSError, SSHException):  # its end is told by `exit_code`
            self._channel.resize_pty(cols, rows)

    def beat(self) -> None:
        """Make a server that lives say something now and then, for as long as there is one."""
        with suppress(EOFError, OSError, SSHException):
            while self._transport.is_active():
                self._transport.global_request("keepalive@openssh.com", wait=True)
                time.sleep(BEAT_S)

    def exit_code(self) -> int | None:
        """Once it has ended and its output is read; None where nobody has said it."""
        code = self._channel.recv_exit_status()
        return None if code < 0 else code & 0xFF

    def why(self) -> str:
        """What the server said when it ended the connection."""
        return self._transport.goodbye


def open_shell(
    sock: socket.socket,
    *,
    command: str | None,
    terminal: tuple[str, int, int] | None,
    identity: str | None,
) -> Shell:
    """Log in on a connection and start a shell, or `command`; in a terminal of this type and size.
    Raises `Unavailable` where no SSH server answers as one should, `Unauthorized`."""
    logging.getLogger("paramiko").addHandler(logging.NullHandler())
    logging.getLogger("paramiko").propagate = False
    line = Watched(sock)
    try:
        transport = _connected(line)
        _log_in(transport, identity)
        channel = transport.open_session(timeout=ANSWER_S)
        if terminal is not None:
            channel.get_pty(*terminal)
        if command is None:
            channel.invoke_shell()
        else:
            channel.exec_command(command)
    except (EOFError, OSError, SSHException) as error:
        said = getattr(error, "text", "") or str(error) or NO_SSH
        raise Unavailable(f"no shell: {printable(said)}") from None
    return Shell(line, transport, channel)


def _connected(line: Watched) -> Transport:
    transport = Transport(line)  # type: ignore[arg-type]  # "socket-like", says paramiko
    transport.banner_timeout = ANSWER_S
    negotiated = threading.Event()
    transport.start_client(event=negotiated)
    negotiated.wait(ANSWER_S)
    if not transport.is_active() or not negotiated.is_set():
        error = str(transport.get_exception() or "")
        is_other = not error or "banner" in error  # paramiko, of a first line that is not SSH's
        raise SSHException(transport.goodbye or (NO_SSH if is_other else error))
    # Any host key will do: the ticket names the key of the endpoint that it leads to, and QUIC has
    # proved that this is who answers. Nobody else can be inside the tunnel.
    return transport


def _log_in(transport: Transport, identity: str | None) -> None:
    for attempt in _logins(transport, identity):
        with suppress(paramiko.AuthenticationException):
            attempt()
            return
    if identity is not None:
        raise Unauthorized(f"the shell session does not know the key {identity!r}")
    raise Unauthorized("the shell session asks for one of its own SSH keys: name it with -i FILE")


def _logins(transport: Transport, identity: str | None) -> Iterator[Callable[[], Any]]:
    """By nothing, which is what a ticket alone needs; else by the user's keys."""
    yield lambda: transport.auth_none(USER)
    for key in _keys(identity):
        yield lambda key=key: transport.auth_publickey(USER, key)  # type: ignore[misc]


def _keys(identity: str | None) -> Iterator[paramiko.PKey]:
    if identity is not None:
        yield _read_key(Path(identity))
        return
    with suppress(OSError, SSHException):
        yield from paramiko.Agent().get_keys()
    for name in KEYS:
        path = Path.home() / ".ssh" / name
        if path.exists():
            with suppress(Unauthorized):
                yield _read_key(path)


def _read_key(path: Path) -> paramiko.PKey:
    try:
        return paramiko.PKey.from_path(os.fspath(path))
    except (OSError, ValueError, TypeError, SSHException, UnknownKeyType) as error:
        if isinstance(error, OSError):
            raise Unauthorized(f"{path}: {error.strerror}") from None
        if path.suffix == ".pub":
            raise Unauthorized(f"{path} is the public half: name the private one") from None
        why = "it is locked, or no SSH key; add it to ssh-agent, or name another"
        raise Unauthorized(f"{path}: {why}") from None


def printable(text: str) -> str:
    """On one line, harmless to a terminal: it is a server's."""
    return "".join(one if one.isprintable() else "?" for one in text)[:LONGEST_REASON]
