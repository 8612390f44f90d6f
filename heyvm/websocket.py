"""The server's end of a WebSocket (RFC 6455), on the connection of a request that was read.

The only module that imports wsproto. Offers no extension, so nothing is ever inflated. Trusts no
byte: messages have a bound, and so has every wait. Blocks; for threads, or for greenlets where
gevent has patched the standard library. Knows neither routes nor sandboxes.
"""

from __future__ import annotations

import base64
import binascii
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from wsproto.connection import Connection, ConnectionType
from wsproto.events import (
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    TextMessage,
)
from wsproto.events import Pong as PongEvent
from wsproto.utilities import generate_accept_token

from heyvm.errors import BadRequest, UpgradeRequired
from heyvm.upstream import hung_up, keep_alive, reset_on_close

VERSION = "13"
KEY_BYTES = 16
RECEIVE_BYTES = 64 * 1024
EVENTS_PER_TURN = 64  # of the smallest, ten thousand come at once
MAX_TEXT_BYTES = 64 * 1024
MAX_BINARY_BYTES = 4 * 1024 * 1024
STALLED_S = 60.0  # a client that takes not a byte for so long is gone
# What need not be said is not waited for behind what is being sent.
AT_ONCE = 0.0
NORMAL, GOING_AWAY, UNREADABLE, TOO_BIG = 1000, 1001, 1003, 1009
REFUSED, FAILED, RESTARTING = 1008, 1011, 1012
LOST = 1006  # never sent: the connection ended without a word


class Closed(Exception):
    """There is nothing more to be received, or nobody to send to. `code` as RFC 6455 has it."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the WebSocket was closed ({code})")
        self.code = code


@dataclass(frozen=True)
class Received:
    """A whole message; a text's bytes are UTF-8."""

    content: bytes
    is_text: bool


def switching(
    key: str | None, version: str | None, headers: Iterable[tuple[str, str]] = ()
) -> bytes:
    """The head of a 101. `UpgradeRequired` for another version, `BadRequest` for a bad key."""
    if version is None or version.strip() != VERSION:
        raise UpgradeRequired(f"Sec-WebSocket-Version must be {VERSION}")
    if not _is_key(key or ""):
        raise BadRequest("Sec-WebSocket-Key must be 16 bytes in base64")
    lines = [
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Accept", generate_accept_token((key or "").encode()).decode()),
        *headers,
    ]
    text = "".join(f"{name}: {value}\r\n" for name, value in lines)
    return f"HTTP/1.1 101 Switching Protocols\r\n{text}\r\n".encode("latin-1")


def _is_key(key: str) -> bool:
    try:
        return len(base64.b64decode(key, validate=True)) == KEY_BYTES
    except (ValueError, binascii.Error):
        return False


class WebSocket:
    """One may receive while any number of others send. `head` is what goes out first; `early` was
    read behind the request. A context manager; `sock` stays the caller's."""

    def __init__(self, sock: socket.socket, head: bytes, early: bytes = b"") -> None:
        self._sock = sock
        # An object of its own: who receives and who sends wait for so long each.
        self._sender = sock.dup()
        self._sender.settimeout(0)
        self._protocol = Connection(ConnectionType.SERVER)
        self._messages: deque[Received] = deque()
        self._parts = bytearray()
        self._sending = threading.Lock()
        self._pong: bytes | None = None
        self._has_said_end = False
        self._end: Closed | None = None
        self.heard_at = time.monotonic()  # when something came, or went after it had to wait
        self._pinged_at = 0.0
        keep_alive(sock)
        with suppress(OSError):
            user_timeout = int(STALLED_S * 1000)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, user_timeout)
        self._head, self._early = head, early

    def __enter__(self) -> WebSocket:
        try:
            self._put(self._head, STALLED_S)
            self._take(self._early)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()
        self._sender.close()

    # -- receiving ---------------------------------------------------------------------------------

    def receive(self, timeout: float) -> Received | None:
        """The next message; None after so many seconds without one. Raises `Closed`."""
        due = time.monotonic() + timeout
        time.sleep(0)  # other requests of this worker have their turn, whatever comes how fast
        while not self._messages:
            if self._end is not None:
                raise self._end
            left = due - time.monotonic()
            if left <= 0:
                return None
            self._read(left)
        return self._messages.popleft()

    def _read(self, timeout: float) -> None:
        self._sock.settimeout(timeout)
        try:
            some = self._sock.recv(RECEIVE_BYTES)
        except TimeoutError:
            return
        except OSError:
            some = b""
        if not some:
            self._end = Closed(LOST)
            return
        self.heard_at = time.monotonic()
        self._take(some)

    def _take(self, some: bytes) -> None:
        self._protocol.receive_data(some)
        for number, event in enumerate(self._protocol.events(), 1):
            self._see(event)
            if number % EVENTS_PER_TURN == 0:
                time.sleep(0)
            if self._end is not None:
                self._parts.clear()
                return
        # Of many pings the last one is answered (RFC 6455, 5.5.3).
        if self._pong is not None:
            self._answer_ping()

    def _see(self, event: Event) -> None:
        if isinstance(event, TextMessage):
            self._gather(event.data.encode(), event, MAX_TEXT_BYTES)
        elif isinstance(event, BytesMessage):
            self._gather(event.data, event, MAX_BINARY_BYTES)
        elif isinstance(event, Ping):
            self._pong = bytes(event.payload)
        elif isinstance(event, CloseConnection):
            # What cannot be read is one too, to wsproto, with the code that it deserves.
            self._end = Closed(event.code)
            self.close(event.code)

    def _gather(
        self, content: bytes | bytearray, event: TextMessage | BytesMessage, most: int
    ) -> None:
        self._parts += content
        if len(self._parts) > most:
            self._end = Closed(TOO_BIG)
            self.close(TOO_BIG, f"a message of more than {most} bytes")
        elif event.message_finished:
            message = Received(bytes(self._parts), isinstance(event, TextMessage))
            self._parts.clear()
            self._messages.append(message)

    def _answer_ping(self) -> None:
        # Where somebody is sending, he answers next.
        if self._sending.acquire(blocking=False):
            try:
                with suppress(Closed):  # whoever receives next is told
                    self._pong_now()
            finally:
                self._sending.release()

    def _pong_now(self) -> None:
        payload, self._pong = self._pong, None
        if payload is not None and not self._has_said_end:
            self._put(self._protocol.send(PongEvent(payload)), AT_ONCE)

    # -- sending -----------------------------------------------------------------------------------

    def send_text(self, text: str, patience: float = STALLED_S) -> None:
        """Raises `Closed` where it cannot be sent: after `patience` seconds the connection is cut,
        for half a message may have gone."""
        self._send(TextMessage(text), patience)

    def send_bytes(self, content: bytes, patience: float = STALLED_S) -> None:
        """As `send_text`."""
        self._send(BytesMessage(content), patience)

    def ping(self, pause: float) -> None:
        """Ask for a sign of life, not more often than that. Never waits: where the client takes
        nothing, it is not asked."""
        if time.monotonic() - self._pinged_at < pause:
            return
        self._pinged_at = time.monotonic()
        if self._sending.acquire(blocking=False):
            try:
                if not self._has_said_end:
                    with suppress(Closed):
                        self._put(self._protocol.send(Ping()), AT_ONCE)
            finally:
                self._sending.release()

    def close(self, code: int, reason: str = "", patience: float = 1.0) -> None:
        """Say that this is the end; the client's own close is still to be received. Nothing is
        sent after it, and the second time it does nothing."""
        with suppress(Closed):
            # A code that nobody may send (1005, 1006) answers with none.
            self._send(CloseConnection(code, reason[:100] or None), patience)

    def is_gone(self) -> bool:
        """Whether the client has hung up, for when nothing is received: behind what it has sent."""
        return hung_up(self._sock)

    def drop(self) -> None:
        """`cut`, unless an end was said."""
        if not self._has_said_end:
            self.cut()

    def cut(self) -> None:
        """End the connection without a word. Whoever sends or receives gets `Closed`."""
        self._has_said_end = True
        reset_on_close(self._sock)
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _send(self, event: Event, patience: float) -> None:
        due = time.monotonic() + patience
        if not self._sending.acquire(timeout=patience):
            self.cut()
            raise Closed(LOST)
        try:
            if self._has_said_end:
                raise Closed(LOST)
            self._has_said_end = isinstance(event, CloseConnection)
            self._put(self._protocol.send(event), max(due - time.monotonic(), 0.01))
            self._pong_now()
        finally:
            self._sending.release()

    def _put(self, some: bytes, patience: float) -> None:
        """All of it. With `AT_ONCE` perhaps nothing, if not even its beginning can go."""
        left, due = memoryview(some), time.monotonic() + patience
        while left:
            try:
                left = left[self._sender.send(left) :]
                continue
            except BlockingIOError:
                if patience == AT_ONCE and len(left) == len(some):
                    return
            except OSError:
                self.cut()
                raise Closed(LOST) from None
            self._wait(max(due - time.monotonic(), 0.0))

    def _wait(self, patience: float) -> None:
        """Until the client has taken something: that is a sign of life too."""
        poll = select.poll()
        poll.register(self._sender, select.POLLOUT)
        if not poll.poll(patience * 1000):
            self.cut()
            raise Closed(LOST)
        self.heard_at = time.monotonic()
