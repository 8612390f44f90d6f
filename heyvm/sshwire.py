"""SSH as paramiko speaks it, with what it lacks against clients that mean harm.

paramiko trusts its peer to keep to windows and sizes, polls, and waits for new keys in the thread
that must bring them. What is overridden here is named in paramiko 5 with a leading underscore;
tests/test_ssh.py tells if another version takes it away. Knows no sandbox.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import paramiko
from paramiko.auth_handler import AuthHandler
from paramiko.common import (
    AUTH_SUCCESSFUL,
    DISCONNECT_NO_MORE_AUTH_METHODS_AVAILABLE,
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_EXTENDED_DATA,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_REQUEST,
    MSG_CHANNEL_SUCCESS,
    MSG_CHANNEL_WINDOW_ADJUST,
    OPEN_FAILED_RESOURCE_SHORTAGE,
    cMSG_CHANNEL_EOF,
    cMSG_CHANNEL_OPEN_FAILURE,
    cMSG_CHANNEL_OPEN_SUCCESS,
    cMSG_CHANNEL_REQUEST,
    cMSG_CHANNEL_WINDOW_ADJUST,
    cMSG_DISCONNECT,
    cMSG_REQUEST_FAILURE,
)
from paramiko.message import Message
from paramiko.packet import Packetizer
from paramiko.ssh_exception import SSHException
from paramiko.transport import Transport

WAKE_S = 0.25  # how often a waiting connection looks whether it is to end
LOGIN_S = 30.0  # from the first byte to a client that is let in
KEYS_S = 30.0  # for an exchange of keys later on
MAX_ATTEMPTS = 6  # sshd's MaxAuthTries
MAX_CHANNELS = 64
WINDOW_BYTES = 1 << 20  # what a channel holds of what its program has not read
PACKET_BYTES = 64 << 10  # of data, that clients may send at once
MAX_PACKET_BYTES = 256 << 10  # OpenSSH's own bound (packet.c, PACKET_MAX_SIZE)
MAX_LINE_BYTES = 255  # RFC 4253, 4.2
MAX_HELD = 1024  # replies that wait for new keys
READ_BYTES = 256 << 10
DISCONNECT_BY_APPLICATION = 11  # RFC 4253, 11.1


def silence() -> None:
    """paramiko logs tracebacks of what clients send; nobody is to see these."""
    logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)


class Over(EOFError):
    """The connection is to end: `stop` was set, or a deadline has passed."""


class Wire:
    """A socket as paramiko wants it, which ends when it is told or late, and reads ahead.

    `close` only shuts it down, so that no thread can meet another file under its number.
    """

    def __init__(self, sock: socket.socket, stop: threading.Event) -> None:
        self.deadline: float | None = time.monotonic() + LOGIN_S
        self._sock, self._stop, self._ahead = sock, stop, memoryview(b"")
        sock.settimeout(WAKE_S)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def settimeout(self, timeout: float | None) -> None:
        """Its own are right."""

    def is_over(self) -> bool:
        late = self.deadline is not None and time.monotonic() > self.deadline
        return late or self._stop.is_set()

    def recv(self, size: int) -> bytes:
        if not self._ahead:
            if self.is_over():
                raise Over
            self._ahead = memoryview(self._do(self._sock.recv, READ_BYTES))
        piece, self._ahead = self._ahead[:size], self._ahead[size:]
        return bytes(piece)

    def send(self, piece: bytes) -> int:
        try:
            return int(self._do(self._sock.send, piece))
        except TimeoutError:
            if self.is_over():
                raise Over from None
            raise

    def close(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def getpeername(self) -> Any:
        return ""

    @staticmethod
    def _do(call: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return call(argument)
        except TimeoutError:
            raise
        except OSError as error:
            raise EOFError from error


class Packets(Packetizer):
    """paramiko's packets, each with a bound. The handshake's deadline is the wire's."""

    def __init__(self, wire: Any) -> None:
        super().__init__(wire)
        self.say_goodbye: Callable[[], None] = lambda: None

    def start_handshake(self, timeout: float) -> None:
        """No thread for it."""

    def handshake_timed_out(self) -> bool:
        return False

    def complete_handshake(self) -> None:
        """See `Wire.deadline`."""

    def read_all(self, n: int, check_rekey: bool = False) -> bytes:
        if n > MAX_PACKET_BYTES:
            raise SSHException("a packet that is too long")
        return super().read_all(n, check_rekey)

    def readline(self, timeout: float) -> str:
        """The client's version, which is the first thing that a client says."""
        line = bytearray()
        while not line.endswith(b"\n"):
            if len(line) >= MAX_LINE_BYTES:
                raise SSHException("no line of a version")
            line += self.read_all(1)
        if not line.startswith(b"SSH-"):
            raise SSHException("no version of SSH")
        return line.decode("ascii").rstrip("\r\n")

    def read_message(self) -> tuple[int, Message]:
        try:
            return super().read_message()
        except Over:
            self.say_goodbye()
            raise


class Channel(paramiko.Channel):
    """paramiko's, with a window that counts, and no word after it was closed.

    OpenSSH ends the whole connection over a message for a channel that is closed.
    """

    def __init__(self, chanid: int) -> None:
        super().__init__(chanid)
        self.subject: Any = None  # of whoever serves it
        self.after_reply: Callable[[], None] | None = None
        self._room = WINDOW_BYTES
        self._on_close: Callable[[], None] | None = None

    def when_closed(self, call: Callable[[], None]) -> None:
        """Call it once, as soon as either side has closed this, or now. It must not wait."""
        with self.lock:
            if not self.closed:
                self._on_close = call
                return
        call()

    def _set_closed(self) -> None:
        super()._set_closed()
        call, self._on_close = self._on_close, None
        if call is not None:
            call()

    # -- in ------------------------------------------------------------------------------------

    def take(self, message: Message) -> None:
        """Data from the client."""
        piece = message.get_binary()
        self._spend(len(piece))
        if not self.closed:
            self.in_buffer.feed(piece)

    def take_extended(self, message: Message) -> None:
        """Clients have no stderr; it counts, and that is all."""
        message.get_int()
        self._spend(len(message.get_binary()))

    def _spend(self, size: int) -> None:
        with self.lock:
            self._room -= size
        if self._room < 0:
            raise SSHException("more data than the window has room for")

    def recv(self, nbytes: int) -> bytes:
        piece = bytes(self.in_buffer.read(nbytes))
        room = self._check_add_window(len(piece))
        if room:
            with self.lock:
                self._room += room
            message = self._message(cMSG_CHANNEL_WINDOW_ADJUST)
            message.add_int(room)
            self._say(message)
        return piece

    def answer(self, message: Message) -> None:
        """A request; what it starts begins after the reply."""
        self._handle_request(message)
        after, self.after_reply = self.after_reply, None
        if after is not None:
            after()

    # -- out -----------------------------------------------------------------------------------

    def write(self, piece: bytes, *, is_error: bool = False) -> None:
        """All of it; waits for the client's window. `OSError` when the channel is closed."""
        send = self.send_stderr if is_error else self.send
        view = memoryview(piece)
        while view:
            sent = send(view)  # type: ignore[arg-type]  # Message takes what BytesIO takes
            if not sent:
                raise OSError("the channel is closed")
            view = view[sent:]

    def end_output(self) -> None:
        """No more data from here; the other way goes on."""
        with self.lock:
            if self.eof_sent or self.closed:
                return
            self.eof_sent = True
        self._say(self._message(cMSG_CHANNEL_EOF))

    def send_exit_status(self, status: int) -> None:
        message = self._message(cMSG_CHANNEL_REQUEST)
        message.add_string("exit-status")
        message.add_boolean(False)
        message.add_int(status)
        self._say(message)

    def _send(self, s: Any, m: Message) -> int:
        with self.lock:
            if self.closed:
                raise OSError("the channel is closed")
            size = int(self._wait_for_send_window(len(s)))
        if size:
            m.add_string(s[:size])
            self._say(m)
        return size

    def _message(self, kind: bytes) -> Message:
        message = Message()
        message.add_byte(kind)
        message.add_int(self.remote_chanid)
        return message

    def _say(self, message: Message) -> None:
        self.transport.say(message, self)


@dataclass(frozen=True)
class Opening:
    """A channel that the client asks for. Answer once, from any thread."""

    kind: str
    host: str  # of direct-tcpip, as its port
    port: int
    channel: Channel
    transport: Line
    remote: tuple[int, int, int]

    def accept(self) -> Channel:
        self.transport.admit(self)
        return self.channel

    def refuse(self, reason: int, text: str) -> None:
        self.transport.turn_away(self, reason, text)


class Stranger:
    """A key that nobody has allowed; it is not even parsed."""

    def __init__(self, blob: bytes) -> None:
        self._blob = blob

    def asbytes(self) -> bytes:
        return self._blob


class Logins(AuthHandler):
    """paramiko's, which ends the connection over a key of a kind that it does not know (a FIDO
    key, say), where the client's next key may be the right one."""

    def __init__(self, transport: Line, keys: Collection[bytes]) -> None:
        super().__init__(transport)
        self._keys, self._refused = keys, 0

    def _generate_key_from_request(self, algorithm: str, keyblob: bytes) -> Any:
        if keyblob not in self._keys:
            return Stranger(keyblob)
        return super()._generate_key_from_request(algorithm, keyblob)

    def _send_auth_result(self, username: str, method: str, result: int) -> None:
        if result != AUTH_SUCCESSFUL and method != "none":
            self._refused += 1
        if self._refused >= MAX_ATTEMPTS:
            reason = DISCONNECT_NO_MORE_AUTH_METHODS_AVAILABLE
            self.transport.disconnect(reason, "too many attempts to log in")
            raise SSHException("too many attempts")
        super()._send_auth_result(username, method, result)

    def _parse_userauth_info_response(self, m: Message) -> None:
        # paramiko counts to any number that it is told.
        raise SSHException("an answer to no question")


class Line(Transport):
    """A server's side of one SSH connection."""

    _CLIENT_ID = "heyvm"
    _preferred_ciphers = (
        "aes128-gcm@openssh.com",
        "aes256-gcm@openssh.com",
        "aes128-ctr",
        "aes256-ctr",
    )
    _preferred_macs = (
        "hmac-sha2-256-etm@openssh.com",
        "hmac-sha2-512-etm@openssh.com",
        "hmac-sha2-256",
        "hmac-sha2-512",
    )
    _preferred_kex = tuple(
        name
        for name in Transport._preferred_kex
        if name.startswith(("mlkem768x25519-", "curve25519-", "ecdh-sha2-"))
    )
    _channel_handler_table = {
        MSG_CHANNEL_SUCCESS: Channel._request_success,
        MSG_CHANNEL_FAILURE: Channel._request_failed,
        MSG_CHANNEL_DATA: Channel.take,
        MSG_CHANNEL_EXTENDED_DATA: Channel.take_extended,
        MSG_CHANNEL_WINDOW_ADJUST: Channel._window_adjust,
        MSG_CHANNEL_REQUEST: Channel.answer,
        MSG_CHANNEL_EOF: Channel._handle_eof,
        MSG_CHANNEL_CLOSE: Channel._handle_close,
    }

    def __init__(
        self,
        sock: socket.socket,
        stop: threading.Event,
        keys: Collection[bytes],
        welcome: Callable[[Opening], None],
    ) -> None:
        """`keys`: blobs of those that may log in. `welcome` is told of each channel that the
        client asks for, in this thread: it must not wait."""
        self.wire = Wire(sock, stop)
        super().__init__(
            self.wire,  # type: ignore[arg-type]  # "socket-like", says paramiko
            default_window_size=WINDOW_BYTES,
            default_max_packet_size=PACKET_BYTES,
            packetizer_class=Packets,
        )
        self.packetizer.say_goodbye = self._say_goodbye
        self._keys, self._welcome = keys, welcome
        self._live: dict[int, Channel] = {}  # until both sides have closed it
        self._held: list[Message] = []

    # -- keys and logins -----------------------------------------------------------------------

    def _send_kex_init(self) -> None:
        if self.authenticated:
            self.wire.deadline = time.monotonic() + KEYS_S
        super()._send_kex_init()

    def _parse_newkeys(self, m: Message) -> None:
        if self.auth_handler is None:
            self.auth_handler = Logins(self, self._keys)
        super()._parse_newkeys(m)
        if self.authenticated:
            self.wire.deadline = None
        held, self._held = self._held, []
        for message in held:
            self._send_user_message(message)

    def _auth_trigger(self) -> None:
        super()._auth_trigger()
        self.wire.deadline = None

    def _parse_ext_info(self, msg: Message) -> None:
        """Nothing in it matters to a server, and paramiko counts to any number in it."""

    def disconnect(self, reason: int, text: str) -> None:
        """Tell the client why; whoever calls this ends the connection."""
        message = Message()
        message.add_byte(cMSG_DISCONNECT)
        message.add_int(reason)
        message.add_string(text)
        message.add_string("en")
        self._send_message(message)

    def _say_goodbye(self) -> None:
        with suppress(EOFError, OSError, SSHException):
            self.disconnect(DISCONNECT_BY_APPLICATION, "the server has ended this connection")

    # -- what is sent --------------------------------------------------------------------------

    def _send_user_message(self, data: Message) -> None:
        """While keys are exchanged this thread must not wait for the end of it, as paramiko's
        does: it is the one that reads what brings the end."""
        if threading.current_thread() is not self or self.clear_to_send.is_set():
            self.say(data)
        elif len(self._held) < MAX_HELD:
            self._held.append(data)
        else:
            raise SSHException("too many requests while keys are exchanged")

    def say(self, message: Message, channel: Channel | None = None) -> None:
        """Send it as soon as keys allow; not if the channel has been closed by then."""
        while self.active:
            self.clear_to_send.wait(WAKE_S)
            with self.clear_to_send_lock:
                if not self.clear_to_send.is_set():
                    continue
                if channel is None or not channel.closed:
                    self._send_message(message)
                return

    def _parse_global_request(self, m: Message) -> None:
        """Nothing is forwarded back, and nothing else is known."""
        m.get_text()
        if m.get_boolean():
            reply = Message()
            reply.add_byte(cMSG_REQUEST_FAILURE)
            self._send_user_message(reply)

    # -- channels ------------------------------------------------------------------------------

    def _parse_channel_open(self, m: Message) -> None:
        kind = m.get_text()
        remote = (m.get_int(), m.get_int(), m.get_int())
        host, port = (m.get_text(), m.get_int()) if kind == "direct-tcpip" else ("", 0)
        channel = Channel(self._lowest_free())
        opening = Opening(kind, host, port, channel, self, remote)
        if len(self._live) >= MAX_CHANNELS:
            text = f"a connection has at most {MAX_CHANNELS} channels"
            opening.refuse(OPEN_FAILED_RESOURCE_SHORTAGE, text)
            return
        self._live[channel.chanid] = channel
        self._welcome(opening)

    def _lowest_free(self) -> int:
        # paramiko remembers every number that it has seen: use few.
        return next(number for number in range(MAX_CHANNELS + 1) if number not in self._live)

    def admit(self, opening: Opening) -> None:
        channel = opening.channel
        with self.lock:
            self._channels.put(channel.chanid, channel)
            self.channels_seen[channel.chanid] = True
            channel._set_transport(self)
            channel._set_window(WINDOW_BYTES, PACKET_BYTES)
            channel._set_remote_channel(*opening.remote)
        message = Message()
        message.add_byte(cMSG_CHANNEL_OPEN_SUCCESS)
        for number in (channel.remote_chanid, channel.chanid, WINDOW_BYTES, PACKET_BYTES):
            message.add_int(number)
        self._send_user_message(message)
        if not self.active:
            channel._unlink()

    def turn_away(self, opening: Opening, reason: int, text: str) -> None:
        if self._live.get(opening.channel.chanid) is opening.channel:
            del self._live[opening.channel.chanid]
        message = Message()
        message.add_byte(cMSG_CHANNEL_OPEN_FAILURE)
        message.add_int(opening.remote[0])
        message.add_int(reason)
        message.add_string(text)
        message.add_string("en")
        self._send_user_message(message)

    def _unlink_channel(self, chanid: int) -> None:
        super()._unlink_channel(chanid)
        self._live.pop(chanid, None)

    def close_all(self) -> None:
        """Close what is open after the end. What is still being opened is closed by `admit`."""
        for channel in list(self._live.values()):
            if channel.active:
                channel._unlink()
