"""One HTTP exchange with a server inside a sandbox, on a connection of its own.

Trusts no byte of the answer: every size has a bound, and every wait but those for a body, which
lasts as long as the client stays, a deadline. Blocks; for threads, or for greenlets where gevent
has patched the standard library. Knows neither endpoints nor WSGI.
"""

from __future__ import annotations

import errno
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from heyvm.problems import BadGateway, GatewayTimeout

RECEIVE_BYTES = 64 * 1024
MAX_HEAD_BYTES = 64 * 1024  # interim answers (1xx) included
MAX_HEAD_LINES = 100
MAX_INTERIM = 32
MAX_LINE_BYTES = 8 * 1024  # of chunked coding: a size with its extensions, a trailer
MAX_TRAILERS = 100
# Without a byte, while an answer's head is due; as deploy/nginx has it. Some requests think long.
SILENT_S = 3600.0
# A server that takes no byte of a body for so long gets none of the rest. While it stands still
# so does the client, whose end could not be seen behind what it has sent.
SEND_S = 600.0
# Most answers are there at once: watching the client too would cost them more than the rest.
UNWATCHED_S = 0.05
LOOK_S = 5.0
HALF_OPEN_S = 300.0  # without a byte, after one side of an upgraded connection has ended
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
# linux/tcp_states.h: TCP_CLOSE, TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_CLOSING.
HUNG_UP = frozenset({7, 8, 9, 11})

STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: ([\t -~\x80-\xff]*))?")
TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
VALUE = re.compile(rb"[\t -~\x80-\xff]*")
BLANK_LINE = re.compile(rb"\n\r?\n")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t -~\x80-\xff]*)?")
LENGTH = re.compile(r"[0-9]{1,18}")

Headers = list[tuple[str, str]]


class Cut(ConnectionResetError):
    """Half of an answer went out, or nobody waits for it: the client's connection has to end.

    Servers take it, by its number, for the client's own doing, and say nothing.
    """

    def __init__(self, why: str) -> None:
        super().__init__(errno.ECONNRESET, why)


@dataclass(frozen=True)
class Head:
    """The first part of an answer, as the server inside wrote it."""

    status: int
    reason: str
    headers: Headers

    def values(self, name: str) -> list[str]:
        """All values of a header; `name` in lower case."""
        return [value for key, value in self.headers if key.lower() == name]


class Chunks:
    """Takes chunked coding apart (RFC 9112 section 7.1), in whatever pieces it comes.

    `strict`: a line ends with CR LF. Otherwise LF alone will do, as nginx has it.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.is_over = False
        self._rest = b""  # what has come and was not taken apart
        self._strict = strict
        self._left = 0
        self._read = self._size
        self._trailers = 0

    def feed(self, more: bytes) -> bytes:
        """The content in what has come by now. `ValueError` where it is no chunked coding."""
        coded, at, found = self._rest + more, 0, bytearray()
        while not self.is_over:
            if self._left:
                part = coded[at : at + self._left]
                found += part
                at += len(part)
                self._left -= len(part)
                if self._left:
                    break
            end = coded.find(b"\n", at)
            if end < 0:
                break
            self._read(self._line(coded[at:end]))
            at = end + 1
        self._rest = coded[at:]
        if not self.is_over and len(self._rest) > MAX_LINE_BYTES:
            raise ValueError("a line without an end")
        return bytes(found)

    def surplus(self) -> bytes:
        """What came behind the end, once: it belongs to somebody else."""
        if not self.is_over:
            return b""
        found, self._rest = self._rest, b""
        return found

    def _line(self, line: bytes) -> bytes:
        if line.endswith(b"\r"):
            return line[:-1]
        if self._strict:
            raise ValueError("a line that ends with LF alone")
        return line

    def _size(self, line: bytes) -> None:
        found = CHUNK_SIZE.fullmatch(line)
        if found is None:
            raise ValueError("no chunk's size")
        self._left = int(found[1], 16)
        self._read = self._end if self._left else self._trailer

    def _end(self, line: bytes) -> None:
        if line:
            raise ValueError("more than the chunk's size")
        self._read = self._size

    def _trailer(self, line: bytes) -> None:
        self._trailers += 1
        if self._trailers > MAX_TRAILERS:
            raise ValueError("trailers without an end")
        self.is_over = not line


def parse_head(text: bytes) -> Head:
    """The head of an answer. `BadGateway` for what is none."""
    first, *lines = [line.removesuffix(b"\r") for line in text.split(b"\n")]
    found = STATUS_LINE.fullmatch(first)
    if found is None:
        raise BadGateway("the server inside does not speak HTTP/1.x")
    if len(lines) > MAX_HEAD_LINES:
        raise BadGateway(f"the server inside sent more than {MAX_HEAD_LINES} headers")
    headers = [_header(line) for line in lines]
    return Head(int(found[1]), (found[2] or b"").decode("latin-1"), headers)


def _header(line: bytes) -> tuple[str, str]:
    name, colon, value = line.partition(b":")
    value = value.strip(b" \t")
    if not (colon and TOKEN.fullmatch(name) and VALUE.fullmatch(value)):
        raise BadGateway("the server inside sent a header that is none")
    return name.decode("ascii"), value.decode("latin-1")


class Exchange:
    """Sends one request and reads its answer.

    `sock` is taken over; `client` is only watched: `Cut` is raised when it hangs up.
    """

    def __init__(self, sock: socket.socket, client: socket.socket | None) -> None:
        self._sock, self._client = sock, client
        self._buffer = bytearray()
        self._pump: Pump | None = None
        self._moved_at = time.monotonic()
        sock.settimeout(UNWATCHED_S)
        # An object of its own, for the sake of its own timeout.
        self._sender = sock.dup()
        self._sender.settimeout(SEND_S)

    def send(self, head: bytes, body: Iterable[bytes] | None = None, *, chunked: bool) -> None:
        """Send the head, and go on sending the body while the answer is read."""
        with suppress(OSError):  # whoever hangs up at once may have said why
            self._sender.sendall(head)
        if body is not None:
            self._pump = Pump(self, body, chunked=chunked)
            self._pump.start()

    def head(self) -> Head:
        """The answer's head, interim ones skipped; 101 is none of those."""
        due = MAX_HEAD_BYTES
        for _ in range(MAX_INTERIM):
            text = self._until_blank_line(due)
            due -= len(text)
            found = parse_head(text)
            if found.status >= 200 or found.status == 101:
                return found
        raise BadGateway("the server inside sends interim answers (1xx) without an end")

    def body(self, head: Head, method: str) -> Iterator[bytes]:
        """What follows this head, decoded. `BadGateway` at once where its end cannot be told, and
        `Cut` later when it breaks off."""
        lengths, codings = head.values("content-length"), head.values("transfer-encoding")
        if len(lengths) + len(codings) > 1:
            raise BadGateway("the server inside sent a body of more than one length")
        if lengths and not LENGTH.fullmatch(lengths[0]):
            raise BadGateway("the server inside sent a Content-Length that is none")
        if codings and codings[0].lower() != "chunked":
            raise BadGateway("the server inside sent a Transfer-Encoding other than chunked")
        if method == "HEAD" or head.status in (204, 304):
            return iter(())
        if codings:
            return self._chunked()
        return self._exactly(int(lengths[0])) if lengths else self._all()

    @property
    def has_more(self) -> bool:
        """Whether something of the body came with the head."""
        return bool(self._buffer)

    def take(self) -> tuple[socket.socket, bytes]:
        """The connection itself, and what has been read of it beyond the head."""
        self._sender.close()
        return self._sock, bytes(self._buffer)

    def end(self, patience: float = 0.0) -> bool:
        """Close it. False where the client's body was not read to its end in `patience` seconds:
        nothing else can be read of that connection then."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._sender.close()
        return self._pump is None or self._pump.end(patience)

    # -- what comes --------------------------------------------------------------------------------

    def _until_blank_line(self, most: int) -> bytes:
        searched = 0
        while (found := BLANK_LINE.search(self._buffer, searched)) is None:
            searched = max(0, len(self._buffer) - 2)
            if len(self._buffer) > most:
                break
            self._more_of_head()
        if found is None or found.start() > most:
            raise BadGateway(f"the server inside sent more than {MAX_HEAD_BYTES} bytes of headers")
        text = bytes(self._buffer[: found.start()])
        del self._buffer[: found.end()]
        return text.removesuffix(b"\r")

    def _more_of_head(self) -> None:
        try:
            received = self._receive(SILENT_S)
        except TimeoutError:
            raise GatewayTimeout(f"the server inside did not answer for {SILENT_S:g} s") from None
        if not received:
            raise BadGateway("the server inside closed the connection before it answered")
        self._buffer += received

    def _piece(self) -> bytes:
        if self._buffer:
            piece = bytes(self._buffer)
            self._buffer.clear()
            return piece
        time.sleep(0)  # other requests of this worker have their turn
        return self._receive(None)

    def _exactly(self, length: int) -> Iterator[bytes]:
        left = length
        while left:
            piece = self._piece()[:left]
            if not piece:
                raise Cut("the server inside broke off")
            left -= len(piece)
            yield piece

    def _all(self) -> Iterator[bytes]:
        while piece := self._piece():
            yield piece

    def _chunked(self) -> Iterator[bytes]:
        chunks = Chunks()
        while not chunks.is_over:
            piece = self._piece()
            if not piece:
                raise Cut("the server inside broke off")
            try:
                content = chunks.feed(piece)
            except ValueError as error:
                raise Cut(f"the server inside sent {error}") from None
            if content:
                yield content

    # -- waiting -----------------------------------------------------------------------------------

    def moved(self) -> None:
        """The request's body is getting on: the answer need not come yet."""
        self._moved_at = time.monotonic()

    def abandon(self) -> None:
        """The client broke off: whoever reads here gets an end of file."""
        self._client_broke = True
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    _client_broke = False

    def _receive(self, patience: float | None) -> bytes:
        self.moved()
        while True:
            try:
                received = self._sock.recv(RECEIVE_BYTES)
            except TimeoutError:
                self._wait(patience)
                continue
            except OSError:
                if self._client_broke:
                    raise Cut("the client went away") from None
                if patience is None:
                    raise Cut("the server inside broke off") from None
                received = b""
            if not received and self._client_broke:
                raise Cut("the client went away")
            return received

    def _wait(self, patience: float | None) -> None:
        """Until something came. `TimeoutError` when nothing moved for `patience` seconds."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        # The body's own reader watches the client while it reads.
        watched = self._client if self._pump is None or self._pump.is_over else None
        if watched is not None:
            poll.register(watched, select.POLLIN)
        look_s = LOOK_S if patience is None else max(0.0, min(LOOK_S, self._left(patience)))
        found = {fd for fd, _ in poll.poll(look_s * 1000)}
        if watched is not None and watched.fileno() in found:
            self._look_at(watched)
        elif not found and self._client is not None and hung_up(self._client):
            raise Cut("the client went away")
        late = patience is not None and self._left(patience) <= 0
        if late and self._sock.fileno() not in found:
            raise TimeoutError

    def _left(self, patience: float) -> float:
        return self._moved_at + patience - time.monotonic()

    def _look_at(self, client: socket.socket) -> None:
        if is_at_end(client):
            raise Cut("the client went away")
        # Its next request, ahead of time, which would tell of itself for ever.
        time.sleep(UNWATCHED_S)


class Pump:
    """Passes a request's body on while the answer is read."""

    def __init__(self, exchange: Exchange, body: Iterable[bytes], *, chunked: bool) -> None:
        self._exchange, self._body, self._chunked = exchange, body, chunked
        self._inside_reads = True
        self._is_whole = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def end(self, patience: float) -> bool:
        """Whether the client's body was read to its end, within so many seconds."""
        self._inside_reads = False
        self._thread.join(patience)
        return self.is_over and self._is_whole

    def _run(self) -> None:
        try:
            for piece in self._body:
                self._pass_on(piece)
                time.sleep(0)
            self._is_whole = True
            self._pass_on(b"")
        # Servers' classes for broken chunks and connections share no base but this one.
        except Exception:  # noqa: BLE001
            self._exchange.abandon()

    def _pass_on(self, piece: bytes) -> None:
        """A server that no longer reads may still answer: the rest is taken and dropped."""
        if self._chunked:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        if not (piece and self._inside_reads):
            return
        try:
            self._exchange._sender.sendall(piece)
        except OSError:
            self._inside_reads = False
        self._exchange.moved()


def is_at_end(sock: socket.socket) -> bool:
    """Whether the other side has closed it, and nothing is left to be read."""
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except (BlockingIOError, TimeoutError):
        return False
    except OSError:
        return True


def hung_up(sock: socket.socket) -> bool:
    """Whether the other side has closed it, whatever is still to be read. TCP alone tells."""
    try:
        state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    except OSError:
        return False
    return state in HUNG_UP


def reset_on_close(sock: socket.socket) -> None:
    """What is cut short must not pass for whole, as it could where the end is the only mark."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)


@dataclass
class Way:
    """One direction of a relay."""

    source: socket.socket
    sink: socket.socket
    pending: bytes = b""
    is_over: bool = field(default=False)

    def step(self, ready: set[int]) -> None:
        """Read or write as far as it goes at once."""
        if not self.pending and not self.is_over and self.source.fileno() in ready:
            self._read()
        if self.pending:
            with suppress(BlockingIOError):
                self.pending = self.pending[self.sink.send(self.pending) :]

    def _read(self) -> None:
        with suppress(BlockingIOError):
            self.pending = self.source.recv(RECEIVE_BYTES)
            if not self.pending:
                self.is_over = True
                with suppress(OSError):
                    self.sink.shutdown(socket.SHUT_WR)


def relay(client: socket.socket, inside: socket.socket, up: bytes, down: bytes) -> None:
    """Pass bytes both ways until both have ended; `up` and `down` were read before. Half-closes
    are passed on. Closes nothing."""
    ways = (Way(client, inside, up), Way(inside, client, down))
    client.settimeout(0)
    inside.settimeout(0)
    ready: set[int] = set()
    try:
        while True:
            for way in ways:
                way.step(ready)
            if all(way.is_over and not way.pending for way in ways):
                return
            ready = _wait_for(ways)
            if not ready:
                return
    except OSError:
        reset_on_close(client)


def _wait_for(ways: tuple[Way, Way]) -> set[int]:
    """The descriptors at which something can be done; none when it took too long."""
    poll = select.poll()
    events: dict[int, int] = {}
    for way in ways:
        if way.pending:
            events[way.sink.fileno()] = events.get(way.sink.fileno(), 0) | select.POLLOUT
        elif not way.is_over:
            events[way.source.fileno()] = events.get(way.source.fileno(), 0) | select.POLLIN
    for number, wanted in events.items():
        poll.register(number, wanted)
    half_open = any(way.is_over for way in ways)
    time.sleep(0)
    return {fd for fd, _ in poll.poll(HALF_OPEN_S * 1000 if half_open else None)}


def keep_alive(sock: socket.socket) -> None:
    """Have the kernel find out about a client that is silent because it is gone, and pass on at
    once what is small (tcp(7))."""
    with suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
