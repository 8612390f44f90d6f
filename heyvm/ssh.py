"""The SSH server of a sandbox, on one connection: shells, commands, ports and files inside.

Runs in a process with plain threads (tunnels.py): each channel has two, and the connection one.
What paramiko needs to be safe against its clients is in sshwire.py.
"""

from __future__ import annotations

import base64
import io
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass

import paramiko
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from paramiko.common import (
    AUTH_FAILED,
    AUTH_SUCCESSFUL,
    OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
    OPEN_FAILED_CONNECT_FAILED,
    OPEN_FAILED_RESOURCE_SHORTAGE,
)
from paramiko.ssh_exception import SSHException

from heyvm import sftp, sshwire
from heyvm.errors import HeyvmError, Invalid
from heyvm.shells import Inside
from heyvm.sshkeys import parse_public_key
from heyvm.sshwire import Channel, Line, Opening
from heyvm.streams import Command, Ended, Terminal

logger = logging.getLogger("heyvm")

SIGNALLED = 128
FAILED = 255  # what ssh itself exits with when it is not the command that failed
GRACE_S = 0.5  # for what is under way when its connection has ended
CHUNK_BYTES = 128 << 10
MAX_ENV = 64
MAX_ENV_BYTES = 128 << 10
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
DEFAULT_SIZE = (80, 24)
MAX_SIZE = 1000  # columns and rows
# What a client asks for without a terminal and without a command: what sshd starts then.
LOGIN_SHELL = "if command -v bash >/dev/null 2>&1; then exec bash -l; else exec sh -l; fi"
# What means the sandbox, beside its name, when a client asks for a port there.
HERE = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0", "::", "ip6-localhost", ""})


def serve(
    sock: socket.socket,
    inside: Callable[[], Inside],
    *,
    host_key: bytes,
    authorized: Sequence[str] = (),
    stop: threading.Event | None = None,
) -> None:
    """Be the SSH server on `sock` until that connection is over, or `stop` is set, or the caller
    closes `sock`; the latter two take less than a second. Every thread, connection and command of
    it has ended when this returns, but for what a silent agent keeps waiting for an answer: that
    ends when its time is over, and opens nothing.

    `inside` is asked anew for each thing that is opened; its errors are told to the client. With
    `authorized`, lines as `parse_public_key` takes them (`Invalid`), whoever comes needs one of
    these keys; without, nobody needs anything. The name that a client logs in with means nothing.
    """
    sshwire.silence()
    desk = Desk(inside, [parse_public_key(line) for line in authorized])
    line = Line(sock, stop or threading.Event(), desk.keys, desk.welcome)
    line.add_server_key(private_key(host_key))
    try:
        line.start_server(event=threading.Event(), server=desk)
        line.join()
    finally:
        line.close()
        desk.finish(line)


def public_line(seed: bytes) -> str:
    """`ssh-ed25519 AAAA...` for the seed of a key: what a client may expect to meet."""
    key = private_key(seed)
    return f"{key.get_name()} {base64.b64encode(key.asbytes()).decode()}"


def private_key(seed: bytes) -> paramiko.Ed25519Key:
    secret = Ed25519PrivateKey.from_private_bytes(seed)
    text = secret.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    return paramiko.Ed25519Key(file_obj=io.StringIO(text))


class Desk(paramiko.ServerInterface):
    """Who may come in on a connection, and what is under way on it.

    paramiko asks in the connection's own thread, so nothing here waits: what takes time is a job,
    in a thread of its own.
    """

    def __init__(self, inside: Callable[[], Inside], keys: Sequence[bytes]) -> None:
        self.inside = inside
        self.keys = frozenset(keys)
        self._jobs = set[threading.Thread]()
        self._lock = threading.Lock()

    # -- logins ----------------------------------------------------------------------------------

    def get_allowed_auths(self, username: str) -> str:
        return "publickey" if self.keys else "none"

    def check_auth_none(self, username: str) -> int:
        return AUTH_FAILED if self.keys else AUTH_SUCCESSFUL

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return AUTH_SUCCESSFUL if key.asbytes() in self.keys else AUTH_FAILED

    # -- jobs ------------------------------------------------------------------------------------

    def begin(self, job: Callable[[], None]) -> None:
        thread = Job(lambda: self._do(job))
        with self._lock:
            thread.start()
            self._jobs.add(thread)

    def _do(self, job: Callable[[], None]) -> None:
        try:
            guarded(job)
        finally:
            with self._lock:
                self._jobs.discard(threading.current_thread())

    def finish(self, line: Line) -> None:
        """Close what is open on a connection that has ended, and wait for its jobs to notice."""
        line.close_all()
        with self._lock:
            jobs = list(self._jobs)
        deadline = time.monotonic() + GRACE_S
        for job in jobs:
            job.join(max(0.0, deadline - time.monotonic()))

    # -- channels --------------------------------------------------------------------------------

    def welcome(self, opening: Opening) -> None:
        """A channel that a client asks for."""
        if len(self._jobs) >= sshwire.MAX_CHANNELS:
            opening.refuse(OPEN_FAILED_RESOURCE_SHORTAGE, "too much is under way here")
        elif opening.kind == "session":
            opening.channel.subject = Session(self, opening.accept())
        elif opening.kind == "direct-tcpip":
            self.begin(Forwarding(self, opening).run)
        else:
            text = f"{opening.kind[:64]!r} is not offered here"
            opening.refuse(OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED, text)

    def check_channel_env_request(
        self, channel: paramiko.Channel, name: bytes, value: bytes
    ) -> bool:
        return session_of(channel).set_env(name, value)

    def check_channel_pty_request(
        self,
        channel: paramiko.Channel,
        term: bytes,
        width: int,
        height: int,
        pixelwidth: int,
        pixelheight: int,
        modes: bytes,
    ) -> bool:
        return session_of(channel).set_terminal(term, width, height)

    def check_channel_window_change_request(
        self,
        channel: paramiko.Channel,
        width: int,
        height: int,
        pixelwidth: int,
        pixelheight: int,
    ) -> bool:
        return session_of(channel).resize(width, height)

    def check_channel_shell_request(self, channel: paramiko.Channel) -> bool:
        return session_of(channel).start(None)

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        return session_of(channel).start(command)

    def check_channel_subsystem_request(self, channel: paramiko.Channel, name: str) -> bool:
        return name == "sftp" and session_of(channel).start_files()


def session_of(channel: paramiko.Channel) -> Session:
    """Of a channel that was opened as a session."""
    subject = channel.subject if isinstance(channel, Channel) else None
    if not isinstance(subject, Session):
        raise SSHException("a request that is no business of this channel")
    return subject


class Job(threading.Thread):
    """A thread of a channel."""

    def __init__(self, target: Callable[[], None]) -> None:
        super().__init__(target=target, daemon=True)


def guarded(job: Callable[[], None]) -> None:
    """Do it; what a connection's end makes of it is no news."""
    try:
        job()
    except (EOFError, OSError, SSHException):
        pass
    except Exception as error:  # noqa: BLE001  # a fault of ours must not print a client's bytes
        logger.warning("an SSH channel failed: %s", type(error).__name__)


def beside(job: Callable[[], None]) -> threading.Thread:
    """A thread for the other direction."""
    thread = Job(lambda: guarded(job))
    thread.start()
    return thread


@dataclass
class Screen:
    """The terminal that a client has asked for."""

    term: str
    cols: int
    rows: int


class Session:
    """One `session` channel: what is asked of it, then the one program that it has."""

    def __init__(self, desk: Desk, channel: Channel) -> None:
        self.desk, self.channel = desk, channel
        self._env: dict[str, str] = {}
        self._screen: Screen | None = None
        self._started = False
        self._terminal: Terminal | None = None
        self._lock = threading.Lock()  # of the screen's size and the terminal, against each other

    # -- asked in the connection's thread --------------------------------------------------------

    def set_env(self, name: bytes, value: bytes) -> bool:
        try:
            new = {name.decode("ascii"): value.decode()}
        except UnicodeDecodeError:
            return False
        both = self._env | new
        size = sum(len(one) + len(other) for one, other in both.items())
        if self._started or len(both) > MAX_ENV or size > MAX_ENV_BYTES or b"\0" in value:
            return False
        if not all(map(ENV_NAME.fullmatch, new)):
            return False
        self._env = both
        return True

    def set_terminal(self, term: bytes, cols: int, rows: int) -> bool:
        if self._started or self._screen is not None:
            return False
        word = term.decode("ascii", "replace")
        good = bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", word))
        self._screen = Screen(word if good else "dumb", *fitting(cols, rows))
        return True

    def resize(self, cols: int, rows: int) -> bool:
        with self._lock:
            if self._screen is None:
                return False
            self._screen.cols, self._screen.rows = fitting(cols, rows)
            if self._terminal is not None:
                with suppress(HeyvmError, OSError):
                    self._terminal.resize(self._screen.cols, self._screen.rows)
        return True

    def start(self, command: bytes | None) -> bool:
        if self._screen is None:
            return self._start(lambda: self._run_command(command))
        return self._start(lambda: self._run_terminal(command))

    def start_files(self) -> bool:
        return self._start(self._serve_files)

    def _start(self, job: Callable[[], None]) -> bool:
        if self._started:
            return False
        self._started = True
        self.channel.after_reply = lambda: self.desk.begin(lambda: self._do(job))
        return True

    # -- done in threads of its own --------------------------------------------------------------

    def _do(self, job: Callable[[], None]) -> None:
        """Errors go to the client, and the channel is closed whatever happens."""
        try:
            job()
        except HeyvmError as error:
            self._fail(error.detail)
        finally:
            with suppress(EOFError):
                self.channel.close()

    def _fail(self, detail: str) -> None:
        self._tell(detail)
        self.channel.send_exit_status(FAILED)

    def _tell(self, detail: str) -> None:
        text = "".join(letter if letter.isprintable() else "?" for letter in detail)
        end = "\n" if self._screen is None else "\r\n"
        self.channel.write(f"heyvm: {text}{end}".encode(), is_error=True)

    def _run_command(self, command: bytes | None) -> None:
        line = LOGIN_SHELL if command is None else decoded(command)
        with closing(self.desk.inside().command(line, self._env)) as running:
            self.channel.when_closed(running.close)
            self._converse(running, running.end_input)

    def _run_terminal(self, command: bytes | None) -> None:
        assert self._screen is not None
        asked = (self._screen.cols, self._screen.rows)
        env = {**self._env, "TERM": self._screen.term}
        line = None if command is None else decoded(command)
        terminal = self.desk.inside().terminal(*asked, command=line, env=env)
        try:
            self.channel.when_closed(terminal.close)
            self._show(terminal, asked)
            # The end of what is typed says nothing to a terminal, as in sshd.
            self._converse(terminal, lambda: None)
        finally:
            with self._lock:
                self._terminal = None
            terminal.close()

    def _show(self, terminal: Terminal, asked: tuple[int, int]) -> None:
        """From now on sizes go to it; one that came meanwhile, at once."""
        with self._lock:
            self._terminal = terminal
            assert self._screen is not None
            if (self._screen.cols, self._screen.rows) != asked:
                terminal.resize(self._screen.cols, self._screen.rows)

    def _converse(self, stream: Terminal | Command, end_input: Callable[[], None]) -> None:
        """Bytes both ways until the program has ended, and how it did."""
        channel = self.channel

        def feed() -> None:
            with suppress(HeyvmError):  # it has ended, or its other thread says why not
                while piece := channel.recv(CHUNK_BYTES):
                    stream.send(piece)
                if not channel.closed:
                    end_input()

        feeder = beside(feed)
        try:
            self._pass_on(stream)
        finally:
            channel.close()
            feeder.join()

    def _pass_on(self, stream: Terminal | Command) -> None:
        try:
            while not isinstance(piece := stream.receive(), Ended):
                if piece is not None:
                    self.channel.write(piece.data, is_error=piece.is_error)
            if piece.exit_code > SIGNALLED:
                self._tell_stop()
            self.channel.send_exit_status(piece.exit_code & 0xFF)
        except HeyvmError as error:
            if not self.channel.closed:
                self._fail(self._why(error))

    def _tell_stop(self) -> None:
        """Who has ended what a signal has ended, where it went with its sandbox."""
        if told := self._refusal():
            self._tell(told)

    def _why(self, error: HeyvmError) -> str:
        """What has become of the sandbox says more than what has become of a connection."""
        return self._refusal() or error.detail

    def _refusal(self) -> str:
        try:
            self.desk.inside()
        except HeyvmError as now:
            return now.detail
        return ""

    def _serve_files(self) -> None:
        with closing(self.desk.inside().calls()) as calls:
            self.channel.when_closed(calls.hang_up)
            sftp.serve(self.channel, calls)
            self.channel.send_exit_status(0)  # scp wants one


def fitting(cols: int, rows: int) -> tuple[int, int]:
    """A terminal's size; 0 means that the client does not know."""
    return min(cols or DEFAULT_SIZE[0], MAX_SIZE), min(rows or DEFAULT_SIZE[1], MAX_SIZE)


def decoded(command: bytes) -> str:
    try:
        return command.decode()
    except UnicodeDecodeError:
        raise Invalid("the command is not UTF-8") from None


class Forwarding:
    """One `direct-tcpip` channel: a connection to a port inside."""

    def __init__(self, desk: Desk, opening: Opening) -> None:
        self.desk, self.opening = desk, opening

    def run(self) -> None:
        try:
            sock = self._connect()
        except HeyvmError as error:
            self.opening.refuse(OPEN_FAILED_CONNECT_FAILED, error.detail)
            return
        with sock:
            channel = self.opening.accept()
            channel.when_closed(lambda: shut(sock, socket.SHUT_RDWR))
            try:
                self._relay(channel, sock)
            finally:
                with suppress(EOFError):
                    channel.close()

    def _connect(self) -> socket.socket:
        host, port = self.opening.host.lower().rstrip("."), self.opening.port
        inside = self.desk.inside()
        if host not in HERE | {inside.sandbox.slug, inside.sandbox.id}:
            raise Invalid(
                "only ports of the sandbox can be reached through it:"
                f" forward to localhost, not to {host[:253]!r}"
            )
        if not 0 < port < 1 << 16:
            raise Invalid(f"{port} is no port")
        sock = inside.port(port)
        sock.settimeout(None)
        return sock

    def _relay(self, channel: Channel, sock: socket.socket) -> None:
        """Both ways, each until its own end."""

        def feed() -> None:
            try:
                while piece := channel.recv(CHUNK_BYTES):
                    sock.sendall(piece)
            except OSError:
                channel.close()  # nobody reads it any more
            shut(sock, socket.SHUT_WR)

        feeder = beside(feed)
        try:
            while piece := sock.recv(CHUNK_BYTES):
                channel.write(piece)
            channel.end_output()
        except BaseException:
            channel.close()
            raise
        finally:
            feeder.join()


def shut(sock: socket.socket, how: int) -> None:
    with suppress(OSError):
        sock.shutdown(how)
