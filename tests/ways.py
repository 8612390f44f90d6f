"""The ways from outside to a server in a sandbox, and what tests send along them.

A `Way` opens connections to one endpoint: through nginx, to gunicorn by Host, or to a local port.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.server import Session

PORT = 8000


@dataclass(frozen=True)
class Way:
    """`connect` opens a connection; `host` is what the requests on it name."""

    name: str
    host: str
    connect: Callable[[], socket.socket]

    def request(
        self, path: str, method: str = "GET", body: Any = None, **options: Any
    ) -> http.client.HTTPResponse:
        """The answer to one request on a connection of its own, which the answer closes."""
        return Connection(self).ask(path, method, body, **options)

    def send(self, data: bytes) -> socket.socket:
        """A connection on which these bytes were sent. `HOST` is replaced."""
        sock = self.connect()
        sock.sendall(data.replace(b"HOST", self.host.encode()))
        return sock

    def websocket(self, headers: Mapping[str, str] | None = None) -> WebSocket:
        return WebSocket(self, headers or {})


class Connection(http.client.HTTPConnection):
    """One connection of a way, for one request after the other."""

    def __init__(self, way: Way) -> None:
        super().__init__(way.host)
        self.way = way

    def connect(self) -> None:
        self.sock = self.way.connect()

    def ask(
        self, path: str, method: str = "GET", body: Any = None, **options: Any
    ) -> http.client.HTTPResponse:
        self.request(method, path, body, **options)
        return self.getresponse()


class WebSocket:
    """Enough of RFC 6455 to say something short and to hear it."""

    def __init__(self, way: Way, headers: Mapping[str, str]) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        lines = ["GET /ws HTTP/1.1", "Host: HOST", "Upgrade: websocket", "Connection: Upgrade"]
        lines += [f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.sock = way.send("\r\n".join([*lines, "", ""]).encode())
        self.reader = self.sock.makefile("rb")
        self.status = int(self.reader.readline().split()[1])
        while self.reader.readline() not in (b"\r\n", b""):
            pass

    def say(self, text: bytes, opcode: int = 1) -> None:
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(text))
        self.sock.sendall(bytes([0x80 | opcode, 0x80 | len(text)]) + mask + masked)

    def hear(self) -> bytes:
        """The next frame's text; empty at the end of the connection."""
        try:
            head = self.reader.read(2)
            return self.reader.read(head[1]) if head else b""
        except ConnectionError:
            return b""

    def ask(self, text: bytes) -> bytes:
        self.say(text)
        return self.hear()

    def close(self) -> None:
        self.reader.close()
        self.sock.close()


def expose(http: Session, ref: str, port: int = PORT, *, public: bool = True) -> dict[str, Any]:
    """A new proxy endpoint's record."""
    answer = http.post(f"/sandboxes/{ref}/proxy", json={"port": port, "is_public": public})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def everything(sock: socket.socket, most: int = 1 << 20) -> bytes:
    """What comes until the other side ends it, or breaks it off, or there is too much."""
    received = b""
    with sock, contextlib.suppress(ConnectionError, TimeoutError):
        while len(received) < most and (piece := sock.recv(65536)):
            received += piece
    return received


def lines_of(sock: socket.socket) -> Iterator[bytes]:
    """The lines of an answer as they come."""
    with sock, sock.makefile("rb") as reader:
        yield from reader
