"""HTTP/1.x on one connection of a private endpoint's local port, for a WSGI application.

What is read strictly here cannot be read in two ways behind: one framing, lines that end with
CR LF, no header twice that must stand once. Blocks; for greenlets where gevent has patched the
standard library, or for threads.
"""

from __future__ import annotations

import logging
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes

from heyvm.errors import BadRequest, HeyvmError
from heyvm.problems import raw_page
from heyvm.upstream import TOKEN, VALUE, Chunks

log = logging.getLogger("heyvm.localhttp")

RECEIVE_BYTES = 64 * 1024
HEAD_S = 20.0  # a whole head, from its first byte; and between two requests
BODY_S = 60.0  # between two pieces of a request's body
WRITE_S = 24 * 60 * 60.0
# gunicorn's, as serving.py has them.
MAX_LINE_BYTES = 8190
MAX_HEADERS = 64
MAX_HEAD_BYTES = 128 * 1024
DRAINED_BYTES = 64 * 1024
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

REQUEST_LINE = re.compile(rb"([A-Z][A-Z-]{1,23}) ([!-~]+) (HTTP/1\.[01])")
NUMBER = re.compile(r"[0-9]{1,18}")
ONCE = frozenset({"HOST", "CONTENT-LENGTH", "CONTENT-TYPE", "TRANSFER-ENCODING"})
HOST_NEEDED = "the Host header is missing"

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def serve(sock: socket.socket, address: Any, app: App) -> None:
    """Answer the requests of a connection one after the other, and close it."""
    source = Source(sock)
    with suppress(OSError):  # a unix socket has no such option
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        while answer_one(source, address, app):
            pass
    except OSError:
        pass  # the client is gone, or is to see a reset
    finally:
        sock.close()


class Source:
    """What a client sends, and what of it has been read but not taken."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._held = bytearray()

    def head(self) -> bytes | None:
        """A request's head without its last line; None where no request comes."""
        searched, due = 0, time.monotonic() + HEAD_S
        while (end := self._held.find(b"\r\n\r\n", searched)) < 0:
            searched = max(0, len(self._held) - 3)
            if len(self._held) > MAX_HEAD_BYTES:
                raise BadRequest("the request's head is too large")
            if not self._receive_by(due):
                return None
        text = bytes(self._held[:end])
        del self._held[: end + 4]
        return text

    def _receive_by(self, due: float) -> bool:
        self.sock.settimeout(max(0.001, due - time.monotonic()))
        try:
            received = self.sock.recv(RECEIVE_BYTES)
        except OSError:
            return False
        self._held += received
        return bool(received)

    def some(self, most: int) -> bytes:
        """What is there, or comes next; empty at the end of file."""
        if not self._held:
            self.sock.settimeout(BODY_S)
            return self.sock.recv(min(most, RECEIVE_BYTES))
        piece = bytes(self._held[:most])
        del self._held[:most]
        return piece

    def unread(self, rest: bytes) -> None:
        """It was somebody else's."""
        self._held[:0] = rest

    def take_buffered(self) -> bytes:
        """What has come already, for somebody who reads the socket from here on."""
        return self.some(len(self._held)) if self._held else b""


@dataclass
class Body:
    """`wsgi.input`: `read` gives what has come, without waiting for as much as was asked for."""

    source: Source
    left: int = 0
    chunks: Chunks | None = None
    is_awaited: bool = False  # with 100-continue
    failed: bool = field(default=False)

    @property
    def is_over(self) -> bool:
        return not self.left if self.chunks is None else self.chunks.is_over

    def read(self, most: int = RECEIVE_BYTES) -> bytes:
        if self.is_awaited and not self.is_over:
            self.is_awaited = False
            self.source.sock.sendall(CONTINUE)
        try:
            return self._of_length(most) if self.chunks is None else self._of_chunks(self.chunks)
        except (OSError, ValueError):
            self.failed = True
            raise

    def _of_length(self, most: int) -> bytes:
        if not self.left:
            return b""
        piece = self.source.some(min(most, self.left))
        if not piece:
            raise ConnectionResetError("the body ended too early")
        self.left -= len(piece)
        return piece

    def _of_chunks(self, chunks: Chunks) -> bytes:
        content = b""
        while not (content or chunks.is_over):
            coded = self.source.some(RECEIVE_BYTES)
            if not coded:
                raise ConnectionResetError("the body ended too early")
            content = chunks.feed(coded)
            self.source.unread(chunks.surplus())
        return content

    def drain(self) -> bool:
        """Read to the end what nobody wanted; False where that cannot be done, or is too much."""
        if self.failed:
            return False
        seen = 0
        self.is_awaited = False
        while not self.is_over and seen <= DRAINED_BYTES:
            try:
                seen += len(self.read())
            except (OSError, ValueError):
                return False
        return self.is_over


def answer_one(source: Source, address: Any, app: App) -> bool:
    """Whether there may be another request after this one."""
    try:
        text = source.head()
        if text is None:
            return False
        environ = environ_of(text, source, address)
    except HeyvmError as error:
        source.sock.settimeout(HEAD_S)
        source.sock.sendall(raw_page(error))
        return False
    reply = Reply(source.sock, environ)
    try:
        run(app, environ, reply)
    except StopIteration:
        return False
    except Exception as error:
        # Whatever an application raises must not end the keeper's listener.
        if isinstance(error, OSError):
            raise
        log.error("%s", type(error).__name__, exc_info=error)
        return False
    return reply.stays and bool(environ["wsgi.input"].drain())


def run(app: App, environ: dict[str, Any], reply: Reply) -> None:
    pieces = app(environ, reply.start)
    try:
        for piece in pieces:
            reply.write(piece)
        reply.end()
    finally:
        if hasattr(pieces, "close"):
            pieces.close()


def environ_of(text: bytes, source: Source, address: Any) -> dict[str, Any]:
    """A request's head as WSGI has it (PEP 3333), with `RAW_URI` and `heyvm.socket`."""
    first, *lines = text.removeprefix(b"\r\n").split(b"\r\n")
    found = REQUEST_LINE.fullmatch(first)
    if found is None or len(first) > MAX_LINE_BYTES:
        raise BadRequest("the request line cannot be read")
    headers = headers_of(lines)
    method, target, version = (part.decode("ascii") for part in found.groups())
    if version == "HTTP/1.1" and "HOST" not in headers:
        raise BadRequest(HOST_NEEDED)
    path, _, query = target.partition("?")
    peer = address if isinstance(address, tuple) and address else ("127.0.0.1", 0)
    return {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": query,
        "RAW_URI": target,
        "SERVER_PROTOCOL": version,
        "SERVER_NAME": "localhost",
        "SERVER_PORT": str(port_of(source.sock)),
        "REMOTE_ADDR": peer[0],
        "REMOTE_PORT": str(peer[1]),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "wsgi.input": body_for(headers, version, source),
        "heyvm.socket": source.sock,
        "heyvm.unreader": source,
        **{key_of(name): value for name, value in headers.items()},
    }


def headers_of(lines: list[bytes]) -> dict[str, str]:
    if len(lines) > MAX_HEADERS:
        raise BadRequest(f"there are more than {MAX_HEADERS} headers")
    found: dict[str, str] = {}
    for line in lines:
        name, value = header_of(line)
        if name in found and name in ONCE:
            raise BadRequest(f"the header {name} stands twice")
        found[name] = f"{found[name]},{value}" if name in found else value
    return found


def header_of(line: bytes) -> tuple[str, str]:
    name, colon, value = line.partition(b":")
    value = value.strip(b" \t")
    # With an underscore it could pass for one with a hyphen.
    good = colon and TOKEN.fullmatch(name) and VALUE.fullmatch(value) and b"_" not in name
    if not good or len(line) > MAX_LINE_BYTES:
        raise BadRequest("a header of the request cannot be read")
    return name.decode("ascii").upper(), value.decode("latin-1")


def key_of(name: str) -> str:
    key = name.replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"


def body_for(headers: dict[str, str], version: str, source: Source) -> Body:
    coding, length = headers.get("TRANSFER-ENCODING"), headers.get("CONTENT-LENGTH")
    waits = headers.get("EXPECT", "").lower() == "100-continue" and version == "HTTP/1.1"
    if coding is not None:
        if coding.lower() != "chunked" or length is not None or version != "HTTP/1.1":
            raise BadRequest("where the request's body ends can be told in two ways, or in none")
        return Body(source, chunks=Chunks(strict=True), is_awaited=waits)
    if length is not None and not NUMBER.fullmatch(length):
        raise BadRequest("the Content-Length is no number")
    return Body(source, left=int(length or 0), is_awaited=waits)


def port_of(sock: socket.socket) -> int:
    with suppress(OSError):
        name = sock.getsockname()
        return int(name[1]) if isinstance(name, tuple) else 0
    return 0


class Reply:
    """One answer, framed: by its length, in chunks, or by the end of the connection."""

    def __init__(self, sock: socket.socket, environ: dict[str, Any]) -> None:
        self._sock = sock
        self._is_new = environ["SERVER_PROTOCOL"] == "HTTP/1.1"
        self._has_body = environ["REQUEST_METHOD"] != "HEAD"
        asked = environ.get("HTTP_CONNECTION", "").lower()
        self.stays = self._is_new and "close" not in asked
        self._head: bytes | None = None
        self._is_chunked = False

    def start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
        """WSGI's start_response."""
        self._has_body = self._has_body and status[:3] not in ("204", "304")
        has_length = any(name.lower() == "content-length" for name, _ in headers)
        self._is_chunked = self._has_body and not has_length and self._is_new
        if self._has_body and not has_length and not self._is_new:
            self.stays = False
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers)]
        if self._is_chunked:
            lines.append("Transfer-Encoding: chunked")
        if not self.stays:
            lines.append("Connection: close")
        self._head = "\r\n".join([*lines, "", ""]).encode("latin-1")

    def write(self, piece: bytes) -> None:
        """The next piece of the body."""
        piece = piece if self._has_body else b""
        if piece and self._is_chunked:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        self._send(piece)

    def end(self) -> None:
        """All of it has been written."""
        self._send(b"0\r\n\r\n" if self._is_chunked else b"")

    def _send(self, piece: bytes) -> None:
        head, self._head = self._head or b"", None
        self._sock.settimeout(WRITE_S)
        self._sock.sendall(head + piece)
