"""Ports, for the agent: carries connections from outside to servers inside, in the agent's loop.

Every byte of every proxied request comes through here, so there is little on the way: one read and
one write for each piece, descriptors registered once (edge-triggered), and no memory of a
connection but one piece that its other end had no room for.
"""

from __future__ import annotations

import _socket
import errno
import posix
import select
import sys

from heyvm import frames
from heyvm.agent import FULL_PAUSE_S, GONE_BITS, READ_BITS, Refused, close_all, number, octets

TYPE_CHECKING = False  # as in `agent`
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from heyvm.agent import Agent, Connection, Fields, Loop

MAX_RELAYS = 1024
MAX_LISTENERS = 1024
MAX_NAME_BYTES = 64
ACCEPTS_PER_EVENT = 16
MAX_BACKLOG = 4096
LINGER_S = 2.0
CHUNK_BYTES = 64 * 1024
CHUNKS_PER_EVENT = 4
# What all relays may hold together in pieces of full size; then pieces are small, so that a
# thousand readers that do not read cost a sandbox 24 MiB and not 128.
PLENTY_BYTES = 16 * 1024 * 1024
SMALL_BYTES = 4096
WRITE_BITS = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
HANGUP_BITS = select.EPOLLHUP | select.EPOLLERR
IN = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
IN_AND_OUT = IN | select.EPOLLOUT
PLACES = ((_socket.AF_INET, "127.0.0.1"), (_socket.AF_INET6, "::1"))
STREAM = _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC
READY = frames.header({"ready": 1})
OK = frames.header({"ok": 1})


def operate(agent: Agent, connection: Connection, request: Fields) -> None:
    """One of the operations on ports."""
    if agent.ports is None:
        agent.ports = Ports(agent)
    OPERATIONS[octets(request, "op", b"")](agent.ports, connection, request)


class Ports:
    """Everything that is forwarded: listeners by name, and the connections under way."""

    def __init__(self, agent: Agent) -> None:
        import resource

        self.agent = agent
        self.loop: Loop = agent.loop
        self.listeners: dict[bytes, Listener] = {}
        self.relays: set[Relay] = set()
        self.held = 0  # bytes in all relays
        self.crowded = False
        # A relay has two descriptors. A quarter is for the rest: commands, the host's connections.
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.most = min(MAX_RELAYS, files * 3 // 8)

    @property
    def full(self) -> bool:
        return len(self.relays) >= self.most

    def crowd(self) -> None:
        """No room: whoever connects waits in the kernel, or is refused there."""
        self.crowded = True
        for listener in self.listeners.values():
            self.loop.forget(listener.fd)

    def left(self, relay: Relay) -> None:
        self.relays.discard(relay)
        if self.crowded:
            self.crowded = False
            self.loop.after_turn.append(self.listen_again)

    def listen_again(self) -> None:
        if not self.crowded:
            for listener in self.listeners.values():
                listener.watch()

    def dial(self, relay: Relay, port: int) -> None:
        try:
            relay.dial(port)
        except BaseException:
            relay.close()
            raise

    def listen(self, port: int, name: bytes, sock: _socket.socket) -> None:
        """In place of one of this name, whose connections go on."""
        self.end_listener(name)
        self.listeners[name] = Listener(self, port, name, sock)

    def end_listener(self, name: bytes) -> None:
        listener = self.listeners.pop(name, None)
        if listener is not None:
            listener.close()

    def cut(self, name: bytes) -> None:
        for relay in [one for one in self.relays if one.name == name]:
            relay.close()


class Listener:
    """A listening unix socket that the host has made: each connection is one to the port."""

    def __init__(self, ports: Ports, port: int, name: bytes, sock: _socket.socket) -> None:
        self.ports, self.port, self.name, self.sock = ports, port, name, sock
        self.fd = sock.fileno()
        self.watch()

    def watch(self) -> None:
        if self.fd >= 0:
            self.ports.loop.watch(self.fd, select.EPOLLIN, self.ready)

    def ready(self, _events: int) -> None:
        ports = self.ports
        for _ in range(ACCEPTS_PER_EVENT):
            if ports.full:
                ports.crowd()
                return
            try:
                fd, _ = self.sock._accept()  # type: ignore[attr-defined]
            except BlockingIOError:
                return
            except OSError:  # no descriptor left: it would be told without a pause
                ports.loop.forget(self.fd)
                ports.loop.after(FULL_PAUSE_S, self.watch)
                return
            posix.set_blocking(fd, False)
            ports.dial(Accepted(ports, self.name, fd), self.port)

    def turn_away(self) -> None:
        """Those who have connected and were not accepted yet."""
        for _ in range(MAX_BACKLOG):
            try:
                posix.close(self.sock._accept()[0])  # type: ignore[attr-defined]
            except OSError:
                return

    def close(self) -> None:
        if self.fd >= 0:
            self.ports.loop.close(self.sock.detach())
            self.fd = -1


class Relay:
    """A connection from outside, and the one inside that is made for it.

    It is dialled first; then each side hands on what it reads until both have come to their end.
    """

    def __init__(self, ports: Ports, name: bytes) -> None:
        self.ports, self.loop, self.name = ports, ports.loop, name
        self.closed = False
        self.timer: object = None
        self.dialled: _socket.socket | None = None
        self.sides: tuple[Side, ...] = ()
        ports.relays.add(self)

    def dial(self, port: int, places: Sequence[tuple[int, str]] = PLACES) -> None:
        """Connect to the port at the first of these places where somebody listens."""
        for at, (family, host) in enumerate(places):
            try:
                sock = _socket.socket(family, STREAM, 0)
            except OSError:  # no such family here, or no descriptor
                continue
            failure = sock.connect_ex((host, port))
            if failure == errno.EINPROGRESS:
                # Always, for the socket was busy with the call when the answer came. On loopback
                # that is there already; asked again, the kernel tells.
                failure = sock.connect_ex((host, port))
            if failure in (errno.EALREADY, errno.EINPROGRESS):
                self._wait(sock, port, places[at + 1 :])
                return
            if not failure and is_another(sock, port):
                self._carry(sock)
                return
            sock.close()
        self.refused()

    def _wait(self, sock: _socket.socket, port: int, rest: Sequence[tuple[int, str]]) -> None:
        """The server inside is behind with its connections."""

        def answered(_events: int) -> None:
            self.dialled = None
            self.loop.forget(sock.fileno())
            if sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR) or not is_another(sock, port):
                self.loop.close(sock.detach())
                self.dial(port, rest)
            else:
                self._carry(sock)

        self.dialled = sock
        self.loop.watch(sock.fileno(), select.EPOLLOUT, answered)
        self.waiting()

    def _carry(self, sock: _socket.socket) -> None:
        sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        inner, outer = Side(self, sock.detach(), False), Side(self, self.taken_over(), True)
        inner.other, outer.other = outer, inner
        self.sides = (outer, inner)
        # Who connects speaks first, mostly, and has by now.
        outer.pump()
        for side in self.sides:
            if not self.closed:
                self.loop.watch(side.fd, IN_AND_OUT if side.pending else IN, side.ready)

    def linger(self) -> None:
        """Close it in a moment."""
        if self.timer is None:
            self.timer = self.loop.after(LINGER_S, self.close)

    def waiting(self) -> None:
        """The dialling takes more than a moment."""

    def refused(self) -> None:
        """Nobody listens there."""

    def taken_over(self) -> int:
        """The descriptor of the connection from outside, to be watched by nobody else now."""
        return -1

    def close(self) -> None:
        """Of both connections, at once. Twice is fine."""
        if self.closed:
            return
        self.closed = True
        self.loop.cancel(self.timer)
        self.ports.left(self)
        if self.dialled is not None:
            self.loop.close(self.dialled.detach())
        for side in self.sides:
            side.over = True
            side.keep(b"")
            self.loop.close(side.fd)


class Accepted(Relay):
    """From a listener."""

    def __init__(self, ports: Ports, name: bytes, fd: int) -> None:
        super().__init__(ports, name)
        self.fd = fd

    def waiting(self) -> None:
        self.loop.watch(self.fd, IN, self._look)

    def _look(self, events: int) -> None:
        if events & HANGUP_BITS:
            self.close()

    def refused(self) -> None:
        self.close()

    def taken_over(self) -> int:
        fd, self.fd = self.fd, -1
        self.loop.forget(fd)
        return fd

    def close(self) -> None:
        if self.fd >= 0:
            self.loop.close(self.taken_over())
        super().close()


class Asked(Relay):
    """By the host, whose connection to us becomes the one inside."""

    def __init__(self, ports: Ports, name: bytes, connection: Connection) -> None:
        super().__init__(ports, name)
        self.connection = connection

    def waiting(self) -> None:
        # One of ours, and none of the host's own few any more.
        self.ports.agent.connections.discard(self.connection)
        self.connection.on_gone = self.close

    def refused(self) -> None:
        self.connection.on_gone = None
        self.connection.fail("refused", "nobody listens on that port")
        self.close()

    def taken_over(self) -> int:
        connection = self.connection
        self.ports.agent.connections.discard(connection)
        connection.closed, connection.on_gone = True, None
        self.loop.forget(connection.fd)
        try:
            posix.write(connection.fd, OK)  # the first that it is told: there is room
        except OSError:  # gone: the first read finds that too
            pass
        return connection.fd

    def close(self) -> None:
        if not self.connection.finishing:
            self.connection.close()
        super().close()


class Side:
    """One of a relay's two connections: what it says goes to the other."""

    __slots__ = (
        "deaf",
        "fd",
        "gone",
        "loop",
        "other",
        "outer",
        "over",
        "pending",
        "ports",
        "relay",
    )
    other: Side

    def __init__(self, relay: Relay, fd: int, outer: bool) -> None:
        self.relay, self.fd, self.outer = relay, fd, outer
        self.ports, self.loop = relay.ports, relay.loop
        self.pending: bytes = b""  # for it to take
        self.over = False  # nothing more is read from it
        self.deaf = False  # it takes nothing more
        self.gone = 0  # the bits with which it told of an end

    def ready(self, events: int) -> None:
        if events & GONE_BITS:
            self.gone |= events & GONE_BITS
        if self.pending and events & WRITE_BITS:
            self.flush()
        if events & READ_BITS and not self.relay.closed:
            self.pump()

    def pump(self) -> None:
        """Read, and write to the other at once. What it has no room for waits, and we with it."""
        other = self.other
        for _ in range(CHUNKS_PER_EVENT):
            if self.over or other.pending:
                break
            size = CHUNK_BYTES if self.ports.held < PLENTY_BYTES else SMALL_BYTES
            try:
                chunk = posix.read(self.fd, size)
            except BlockingIOError:
                return
            except OSError:
                self.reset()
                return
            if not chunk:
                self.end()
                return
            other.write(chunk)
            # A short read has emptied it (epoll(7), question 9), unless the end is yet to be read.
            if len(chunk) < size and not self.gone:
                return
        else:
            # Others are served meanwhile. Asked anew, epoll tells of what is there already.
            if not self.relay.closed:
                self.loop.watch(self.fd, IN_AND_OUT if self.pending else IN, self.ready)
            return
        if self.over and self.gone & HANGUP_BITS and not other.pending:
            self.lost()

    def write(self, chunk: bytes) -> None:
        if self.deaf:
            return
        try:
            sent = posix.write(self.fd, chunk)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.deafen()
            return
        if sent < len(chunk):
            self.keep(chunk[sent:])
            self.loop.watch(self.fd, IN_AND_OUT, self.ready)

    def flush(self) -> None:
        """There is room again."""
        try:
            self.keep(self.pending[posix.write(self.fd, self.pending) :])
        except BlockingIOError:
            return
        except OSError:
            self.deafen()
        if self.pending or self.relay.closed:
            return
        self.loop.watch(self.fd, IN, self.ready)
        if self.other.over:
            self.told_the_end()
        else:
            self.other.pump()

    def end(self) -> None:
        """It has said all that it will say."""
        self.over = True
        if not self.other.pending:
            self.other.told_the_end()

    def told_the_end(self) -> None:
        """All that the other has said is written: say so, or close where nothing is left to do."""
        other, relay = self.other, self.relay
        if (self.over and not other.pending) or (other.outer and other.gone & HANGUP_BITS):
            relay.close()
            return
        try:
            shut = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, self.fd)
            try:
                shut.shutdown(_socket.SHUT_WR)
            finally:
                shut.detach()
        except OSError:
            relay.close()
            return
        if other.deaf:
            other.lost()

    def lost(self) -> None:
        """It is gone, and all that it had said is handed on."""
        if self.outer:
            self.relay.close()
        else:
            self.relay.linger()

    def reset(self) -> None:
        """All that it had said is read."""
        self.deaf = True
        self.keep(b"")
        if self.outer:
            self.relay.close()
        else:
            self.end()

    def deafen(self) -> None:
        """It hears no more, but what it has said is still to be carried: an answer, say, to a
        request that it did not read to its end. Whoever sends that would not see the answer if it
        were cut off: it is let go on, into the void, for a moment."""
        self.deaf = True
        self.keep(b"")
        self.gone |= select.EPOLLERR
        self.pump()

    def keep(self, rest: bytes) -> None:
        self.ports.held += len(rest) - len(self.pending)
        self.pending = rest


def is_another(sock: _socket.socket, port: int) -> bool:
    """Not itself: where nobody listens on a port of those that the kernel gives out, it may give
    just that one to a connection to it, which is then its own other end."""
    return bool(sock.getsockname()[1] != port)


def connect(ports: Ports, connection: Connection, request: Fields) -> None:
    port, name = port_of(request), name_of(request)
    if connection.splitter.begun:
        raise frames.FrameError("bytes before the answer")
    if ports.full:
        raise Refused("failed", "too many connections")
    ports.dial(Asked(ports, name, connection), port)


def listen(ports: Ports, connection: Connection, request: Fields) -> None:
    port, name = port_of(request), name_of(request)
    if connection.splitter.begun:
        raise frames.FrameError("bytes before the answer")
    if len(ports.listeners) >= MAX_LISTENERS and name not in ports.listeners:
        raise Refused("failed", "too many listeners")
    connection.send(READY)
    connection.flush()
    if not connection.closed:
        arrived = taker(ports, connection, port, name)
        ports.loop.watch(connection.fd, select.EPOLLIN | select.EPOLLRDHUP, arrived)


def unlisten(ports: Ports, connection: Connection, request: Fields) -> None:
    name = name_of(request)
    listener = ports.listeners.get(name)
    if number(request, "keep", 0) and listener is not None:
        listener.turn_away()
    else:
        ports.end_listener(name)
    ports.cut(name)
    done(connection)


def taker(ports: Ports, connection: Connection, port: int, name: bytes) -> Callable[[int], None]:
    """What takes the descriptor that is to follow."""

    def arrived(_events: int) -> None:
        try:
            sock = received(connection.fd)
        except BlockingIOError:
            return
        except OSError as error:
            connection.fail("failed", str(error))
            return
        ports.listen(port, name, sock)
        done(connection)

    return arrived


def done(connection: Connection) -> None:
    """Say so in the next turn: what was closed in this one is closed at its end."""
    connection.loop.after(0, lambda: connection.finish({"ok": 1}))


def received(fd: int) -> _socket.socket:
    """The listening socket that is sent with one byte. Raises `OSError`, keeping no descriptor."""
    talk = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)
    try:
        # Room for one: the kernel closes what else there is.
        flags = _socket.MSG_CMSG_CLOEXEC | _socket.MSG_DONTWAIT
        said, extra, _, _ = talk.recvmsg(2, _socket.CMSG_LEN(4), flags)
    finally:
        talk.detach()
    found = descriptors_of(extra)
    if len(said) == 1 and len(found) == 1:
        return listening(found[0])
    close_all(found)
    raise OSError(errno.EPROTO, "not one byte with one descriptor")


def descriptors_of(extra: list[tuple[int, int, bytes]]) -> list[int]:
    joined = b"".join([some for _, kind, some in extra if kind == _socket.SCM_RIGHTS])
    return [int.from_bytes(joined[at : at + 4], sys.byteorder) for at in range(0, len(joined), 4)]


def listening(fd: int) -> _socket.socket:
    """The socket of this descriptor, if that is what it is: else the descriptor is closed."""
    try:
        sock = _socket.socket(fileno=fd)
    except OSError:
        posix.close(fd)
        raise
    if (sock.family, sock.type) == (_socket.AF_UNIX, _socket.SOCK_STREAM) and sock.getsockopt(
        _socket.SOL_SOCKET, _socket.SO_ACCEPTCONN
    ):
        sock.settimeout(0)
        return sock
    sock.close()
    raise OSError(errno.EINVAL, "not a listening unix socket")


def port_of(request: Fields) -> int:
    port = number(request, "port", 0)
    if not 1 <= port <= 65535:
        raise Refused("failed", "no such port")
    return port


def name_of(request: Fields) -> bytes:
    name = octets(request, "name", b"")
    if not 1 <= len(name) <= MAX_NAME_BYTES:
        raise Refused("failed", "no name")
    return name


OPERATIONS: dict[bytes, Callable[[Ports, Connection, Fields], None]] = {
    b"connect": connect,
    b"listen": listen,
    b"unlisten": unlisten,
}
