"""Bytes between two connected sockets, both ways, by callbacks of gevent's loop.

A greenlet for each way costs two switches for every chunk, half of what a request takes; these
callbacks read once, write once, and are gone. Knows no endpoint and no HTTP but how it begins.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Callable
from typing import Any

READ, WRITE = 1, 2  # gevent's names for events: those of libev
CHUNK_BYTES = 256 * 1024
# What slow readers have us keep, of all connections; beyond it, each is given little at a time.
KEPT_BYTES = 32 * 1024 * 1024
SMALL_CHUNK_BYTES = 4 * 1024
# What a client still sends to a server that has answered and hung up is taken for so long: an
# unread byte makes the kernel reset the connection, and with it the answer.
LINGER_S = 2.0
AT_ONCE_GONE = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: the other side sees a reset
METHOD = re.compile(rb"[A-Z][A-Z-]{0,23}")
TARGET = re.compile(rb"[!-~]{1,8190}")
VERSION = b"HTTP/1."


class Opening:
    """Whether what a client sends first is a request of HTTP/1.x (RFC 9112 section 3)."""

    def __init__(self) -> None:
        self._begun = b""
        self._is_http: bool | None = None

    @property
    def is_http(self) -> bool:
        """Known to be: the bytes so far go up to the version."""
        return self._is_http is True

    @property
    def is_decided(self) -> bool:
        """Whether more bytes would not change it."""
        return self._is_http is not None

    @property
    def is_head(self) -> bool:
        """Whether the answer has no body (RFC 9110 section 9.3.2)."""
        return self.is_http and self._begun.startswith(b"HEAD ")

    def feed(self, more: bytes | memoryview) -> None:
        """The next bytes."""
        if self._is_http is None:
            self._begun += bytes(more[: MOST_BYTES - len(self._begun)])
            self._is_http = _is_request_line(self._begun)


MOST_BYTES = 24 + 1 + 8190 + 1 + len(VERSION)  # as METHOD and TARGET say


def _is_request_line(begun: bytes) -> bool | None:
    """None where it may become one."""
    method, _, rest = begun.partition(b" ")
    if not METHOD.fullmatch(method):
        return False if begun else None
    target, second_space, version = rest.partition(b" ")
    if not TARGET.fullmatch(target):
        return False if rest else None
    if second_space and len(version) >= len(VERSION):
        return version.startswith(VERSION)
    return None if VERSION.startswith(version) else False


class Pump:
    """What all relays of one loop share: the buffer, and the count of what is kept."""

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self.buffer = memoryview(bytearray(CHUNK_BYTES))
        self.small = self.buffer[:SMALL_CHUNK_BYTES]
        self.kept = 0

    @property
    def room(self) -> memoryview:
        """Where to read to. What is in it is gone at the next read."""
        return self.buffer if self.kept < KEPT_BYTES else self.small


class Relay:
    """Passes on until both ways have ended or one side broke; then calls `ended`, once.

    Each way keeps at most one chunk, and reads no more before that is written. The end of one way
    is passed on as such (half-close). `page` is what a client gets that began as HTTP and to whom
    the other side said nothing at all; it is given the client's opening.
    """

    def __init__(
        self,
        pump: Pump,
        client: socket.socket,
        inside: socket.socket,
        *,
        ended: Callable[[Relay], None],
        page: Callable[[Opening], bytes],
    ) -> None:
        """Takes over both sockets, which are not gevent's."""
        client.setblocking(False)
        inside.setblocking(False)
        self.pump = pump
        self.client, self.inside = client, inside
        self.opening = Opening()
        self._ended, self._page = ended, page
        self._timer: Any = None
        self.is_over = False
        self._up = _Way(self, client, inside, self.opening)
        self._down = _Way(self, inside, client)

    def start(self) -> None:
        """Begin, in the loop's next round."""
        self._up.start()
        self._down.start()

    def cut(self) -> None:
        """End it now; the client sees a reset, so that nothing cut short passes for whole."""
        if not self.is_over:
            _reset(self.client)
            self._close()

    # -- what the ways tell ----------------------------------------------------------------------

    def way_ended(self, way: _Way) -> None:
        """All that came is written, and no more will come."""
        if way is self._down:
            self._say_why_nothing_came()
            if not self._up.is_over and _is_gone(self.inside):
                self._up.sink_is_gone = True
        _shut(way.sink)
        if self._up.is_over and self._down.is_over:
            self._close()
        elif self._down.is_over and self._up.sink_is_gone:
            self._linger()

    def reading_broke(self, way: _Way) -> None:
        """A side that is there no longer. What it sent before is still passed on."""
        if way is self._up:
            self._close()
            return
        self._up.sink_is_gone = True
        way.end()

    def writing_broke(self, way: _Way) -> None:
        if way is self._down:
            self._close()
            return
        way.sink_is_gone = True
        if self._down.is_over:
            self._linger()

    def _say_why_nothing_came(self) -> None:
        if self._down.passed or not self.opening.is_http:
            return
        try:
            self.client.send(self._page(self.opening))
        except OSError:
            pass  # a client that is gone, or reads nothing, is closed next

    def _linger(self) -> None:
        if self._timer is None and not self.is_over:
            self._timer = self.pump.loop.timer(LINGER_S)
            self._timer.start(self._close)

    def _close(self) -> None:
        if self.is_over:
            return
        self.is_over = True
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
        # The watchers first: the number of a closed descriptor is soon another's.
        for way in (self._up, self._down):
            way.close()
        self.client.close()
        self.inside.close()
        self._ended(self)


class _Way:
    """One direction. Everything happens in callbacks of the loop, so nothing overlaps."""

    def __init__(
        self,
        relay: Relay,
        source: socket.socket,
        sink: socket.socket,
        opening: Opening | None = None,
    ) -> None:
        self._relay, self._pump = relay, relay.pump
        self.source, self.sink = source, sink
        self._reads = self._pump.loop.io(source.fileno(), READ)
        self._writes = self._pump.loop.io(sink.fileno(), WRITE)
        self._rest = b""
        self._opening = opening
        self.passed = False
        self.is_over = False
        self.sink_is_gone = False

    def start(self) -> None:
        self._reads.start(self._read)

    def end(self) -> None:
        """Nothing more comes from the source."""
        if not self.is_over:
            self._reads.stop()
            self.is_over = True
            self._relay.way_ended(self)

    def close(self) -> None:
        self._pump.kept -= len(self._rest)
        self._rest = b""
        for watcher in (self._reads, self._writes):
            watcher.stop()
            watcher.close()

    def _read(self) -> None:
        room = self._pump.room
        try:
            count = self.source.recv_into(room)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._relay.reading_broke(self)
            return
        if count == 0:
            self.end()
        elif not self.sink_is_gone:
            self._pass_on(room[:count])

    def _pass_on(self, received: memoryview) -> None:
        self.passed = True
        if self._opening is not None:
            self._opening.feed(received)
            if self._opening.is_decided:
                self._opening = None
        sent = self._send(received)
        if sent is not None and sent < len(received):
            self._rest = bytes(received[sent:])
            self._pump.kept += len(self._rest)
            self._reads.stop()
            self._writes.start(self._write)

    def _write(self) -> None:
        sent = self._send(memoryview(self._rest))
        if self._relay.is_over:
            return
        rest = b"" if sent is None else self._rest[sent:]
        self._pump.kept -= len(self._rest) - len(rest)
        self._rest = rest
        if not rest:
            self._writes.stop()
            self._reads.start(self._read)

    def _send(self, what: memoryview) -> int | None:
        """How many bytes the sink took; None where it never will again."""
        try:
            return self.sink.send(what)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self._relay.writing_broke(self)
            return None


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # it is gone already


def _is_gone(sock: socket.socket) -> bool:
    """Whether a unix socket's other side was closed, rather than shut for writing."""
    try:
        sock.send(b"")
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False


def _reset(sock: socket.socket) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE_GONE)
    except OSError:
        pass
