"""A client of WebSockets, and one of `shell-stream`: no more than tests and bench need.

with Shell.open(server, ref) as shell:
    shell.type("echo hello\\n")
    shell.read_until(b"hello")
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import socket
import struct
import time
from typing import Any

from wsproto.connection import Connection, ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, Pong, TextMessage

Record = dict[str, Any]

WAIT_S = 20.0
OUTPUT = struct.Struct(">BQ")


class Refused(Exception):
    """No 101: an answer like another."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        super().__init__(f"{status}: {body!r}")
        self.status, self.headers, self.body = status, headers, body

    @property
    def problem(self) -> Record:
        return dict(json.loads(self.body))


def handshake(path: str, host: str, *headers: str) -> bytes:
    """The request; of headers that are given the default is left out."""
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        f"Host: {host}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
    ]
    said = {line.partition(":")[0].lower() for line in headers}
    kept = [line for line in lines if line.partition(":")[0].lower() not in said]
    given = [line for line in headers if not line.endswith(":")]
    return "\r\n".join([f"GET {path} HTTP/1.1", *kept, *given, "", ""]).encode("latin-1")


def frame(opcode: int, payload: bytes = b"", *, first: int = 0x80, mask: bool = True) -> bytes:
    """A frame as a client sends it, or should not."""
    size = len(payload)
    if size < 126:
        head = bytes([first | opcode, (0x80 if mask else 0) | size])
    elif size < 65536:
        head = bytes([first | opcode, (0x80 if mask else 0) | 126]) + struct.pack(">H", size)
    else:
        head = bytes([first | opcode, (0x80 if mask else 0) | 127]) + struct.pack(">Q", size)
    return head + (b"\0\0\0\0" if mask else b"") + payload


class Client:
    """A WebSocket on a connection. Answers pings."""

    def __init__(self, sock: socket.socket, request: bytes, early: bytes = b"") -> None:
        self.sock = sock
        self.pongs = 0
        self.closed: int | None = None
        self._protocol = Connection(ConnectionType.CLIENT)
        self._parts = bytearray()
        self._messages: list[str | bytes] = []
        sock.settimeout(WAIT_S)
        sock.sendall(request + early)
        self.headers, rest = self._head()
        self._take(rest)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def _head(self) -> tuple[dict[str, str], bytes]:
        text = b""
        while b"\r\n\r\n" not in text:
            some = self.sock.recv(65536)
            if not some:
                raise ConnectionResetError(f"no answer to the handshake: {text!r}")
            text += some
        head, _, rest = text.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        pairs = [line.partition(":") for line in lines]
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        if status.split()[1] != "101":
            while len(rest) < int(headers["content-length"]):
                rest += self.sock.recv(65536)
            self.sock.close()
            raise Refused(int(status.split()[1]), headers, rest)
        return headers, rest

    # -- sending -----------------------------------------------------------------------------------

    def raw(self, some: bytes) -> None:
        self.sock.sendall(some)

    def send(self, event: Event) -> None:
        self.raw(self._protocol.send(event))

    def say(self, **words: Any) -> None:
        self.send(TextMessage(json.dumps(words)))

    def close(self, code: int = 1000) -> None:
        self.send(CloseConnection(code))

    # -- receiving ---------------------------------------------------------------------------------

    def receive(self, timeout: float = WAIT_S) -> str | bytes | None:
        """The next message; None when the connection has ended (`closed` has the code, or 1006)."""
        due = time.monotonic() + timeout
        while not self._messages:
            if self.closed is not None:
                return None
            left = due - time.monotonic()
            if left <= 0:
                raise TimeoutError("no message came")
            self._read(left)
        return self._messages.pop(0)

    def _read(self, timeout: float) -> None:
        self.sock.settimeout(timeout)
        try:
            some = self.sock.recv(256 * 1024)
        except TimeoutError:
            return
        except OSError:
            some = b""
        if some:
            self._take(some)
        else:
            self.closed = 1006

    def _take(self, some: bytes) -> None:
        if self._protocol.state is ConnectionState.CLOSED:
            return
        self._protocol.receive_data(some)
        for event in self._protocol.events():
            self._see(event)

    def _see(self, event: Event) -> None:
        if isinstance(event, TextMessage | BytesMessage):
            data = event.data
            self._parts += data.encode() if isinstance(data, str) else data
            if event.message_finished:
                whole = bytes(self._parts)
                self._messages.append(whole.decode() if isinstance(event, TextMessage) else whole)
                self._parts.clear()
        elif isinstance(event, Ping):
            with contextlib.suppress(OSError):
                self.send(event.response())
        elif isinstance(event, Pong):
            self.pongs += 1
        elif isinstance(event, CloseConnection):
            self.closed = event.code
            if self._protocol.state is ConnectionState.REMOTE_CLOSING:
                with contextlib.suppress(OSError):
                    self.send(event.response())

    def end(self, timeout: float = WAIT_S) -> list[str | bytes]:
        """What comes until the connection has ended."""
        found = []
        while (message := self.receive(timeout)) is not None:
            found.append(message)
        return found

    def has_something(self) -> bool:
        """Whether there is more to be received at once."""
        return bool(self._messages or select.select([self.sock], [], [], 0)[0])


def connect(port: int, path: str, *headers: str, early: bytes = b"") -> Client:
    """A WebSocket to a server on loopback."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=WAIT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        return Client(sock, handshake(path, f"localhost:{port}", *headers), early)
    except BaseException:
        sock.close()
        raise


class Shell:
    """A client of `shell-stream`: keeps what the shell prints, by number, each piece once."""

    def __init__(self, client: Client, *, acks: bool = True, **init: Any) -> None:
        self.client, self.acks = client, acks
        self.output = bytearray()
        self.last = 0  # the last piece that was seen
        self.twice = 0  # pieces that came again
        self.told: list[Record] = []  # what else was said
        client.say(type="init", **init)
        self.ready = self.hear()

    @classmethod
    def open(cls, port: int, ref: str, *headers: str, query: str = "", **init: Any) -> Shell:
        client = connect(port, f"/sandboxes/{ref}/shell-stream{query}", *headers)
        try:
            return cls(client, **init)
        except BaseException:
            client.sock.close()
            raise

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        """Hang up, and see that it ends."""
        if self.client.closed is None:
            with contextlib.suppress(OSError):
                self.client.say(type="close")
                self.finish()
        self.client.sock.close()

    @property
    def id(self) -> str:
        return str(self.ready["sessionId"])

    def type(self, text: str | bytes) -> None:
        raw = text.encode() if isinstance(text, str) else text
        self.client.send(BytesMessage(b"\x01" + raw))

    def hear(self, timeout: float = WAIT_S) -> Record:
        """The next text; output that comes before it is kept."""
        while True:
            message = self.client.receive(timeout)
            if message is None:
                raise ConnectionResetError(f"closed ({self.client.closed}): {self.told}")
            if isinstance(message, str):
                self.told.append(json.loads(message))
                return self.told[-1]
            self.keep(message)

    def keep(self, message: bytes) -> None:
        kind, seq = OUTPUT.unpack_from(message)
        assert kind == 2, message[:20]
        if seq <= self.last:
            self.twice += 1
            return
        self.last = seq
        self.output += memoryview(message)[OUTPUT.size :]
        if self.acks and self.client.closed is None:
            self.client.say(type="ack", seq=seq)

    def read_until(self, mark: bytes, timeout: float = WAIT_S) -> bytes:
        """All output until `mark` is in it."""
        due = time.monotonic() + timeout
        while mark not in self.output:
            message = self.client.receive(max(due - time.monotonic(), 0.001))
            if message is None:
                raise ConnectionResetError(f"closed: {self.told}, {bytes(self.output[-500:])!r}")
            if isinstance(message, str):
                self.told.append(json.loads(message))
            else:
                self.keep(message)
        return bytes(self.output)

    def finish(self, timeout: float = WAIT_S) -> list[Record]:
        """Read to the end; every text that ever came."""
        with contextlib.suppress(ConnectionResetError):
            while True:
                self.hear(timeout)
        return self.told
