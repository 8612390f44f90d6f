"""The TCP ports of 127.0.0.1 that lead to ports inside sandboxes: the keeper listens on them.

Runs in a process that gevent has patched. Knows the rows of endpoints and who connects to them
(proxies.py), and of HTTP only what a client is told where no server inside answers; private ports
are localhttp.py's and the gateway's.
"""

from __future__ import annotations

import errno
import random
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from gevent import get_hub, monkey
from gevent.pool import Group
from gevent.server import StreamServer

from heyvm import localhttp, problems
from heyvm.errors import HeyvmError, NotFound, PortClosed, Unavailable
from heyvm.localhttp import App
from heyvm.models import Endpoint
from heyvm.registry import Registry
from heyvm.relay import LINGER_S, Opening, Pump, Relay
from heyvm.settings import Settings

HOST = "127.0.0.1"
BACKLOG = 1024
# What the kernel gives to whoever connects begins above: a port from there could be in use by
# some client at the moment in which the next keeper wants it back.
LOWEST_PORT = 20000
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
TRIES = 50
MAX_CONNECTIONS = 1024  # of one sandbox
FIRST_BYTES_S = 2.0
DRAINED_BYTES = 64 * 1024 * 1024
RECEIVE_BYTES = 64 * 1024
# Descriptors: enough for every port to be used, and no more than a select() of old code can bear.
MOST_FILES = 65536
# For all but connections and listeners: the registry, agents, what backends open.
RESERVED_FILES = 256
ACCEPTED_AT_ONCE = 16
TAKEN = (errno.EADDRINUSE, errno.EACCES)


class Proxies(Protocol):
    """What is asked of proxies.py."""

    def connect(self, endpoint: Endpoint) -> socket.socket: ...


class LocalPorts:
    """The listeners of all sandboxes. Safe from any number of greenlets."""

    def __init__(
        self,
        registry: Registry,
        proxies: Proxies,
        settings: Settings,
        gateway: Callable[[Endpoint], App],
    ) -> None:
        """`gateway` gives the WSGI application for a private endpoint's port."""
        self._registry = registry
        self._settings = settings
        self._gateway = gateway
        self._ways = _Ways(proxies)
        self._ports: dict[str, _Port] = {}
        self._turn = threading.Lock()
        self._has_synced = False

    def sync(self, sandbox_id: str | None = None) -> None:
        """Make the listeners of a sandbox, or all, what the rows say.

        When this returns, each endpoint's port accepts, and that of one that is gone refuses and
        its connections are cut. A recorded port is opened again; where another program has it, the
        endpoint gets another one and a warning. Raises the first failure, after all are tried.
        """
        with self._turn:
            # A port that is recorded for one must not be drawn for another.
            ref = sandbox_id if self._has_synced else None
            wanted = {one.subdomain: one for one in self._rows(ref)}
            self._close_all_but(wanted, ref)
            missing = [one for one in wanted.values() if one.subdomain not in self._ports]
            missing.sort(key=lambda one: one.local_port is None)
            failures = [failure for one in missing if (failure := self._try_open(one))]
            self._has_synced = True
        if failures:
            raise failures[0]

    def close(self) -> None:
        """Close all of them, and cut what is open."""
        with self._turn:
            self._close_all_but({}, None)

    def _rows(self, sandbox_id: str | None) -> Iterable[Endpoint]:
        unready = self._registry.unready_endpoints()
        rows = [*self._registry.endpoints(sandbox_id), *unready]
        return (
            one
            for one in rows
            if sandbox_id in (None, one.sandbox_id) and self._has_local_port(one)
        )

    def _has_local_port(self, endpoint: Endpoint) -> bool:
        return endpoint.kind != "proxy" or self._settings.api_hostname is None

    def _close_all_but(self, wanted: dict[str, Endpoint], sandbox_id: str | None) -> None:
        for name, port in list(self._ports.items()):
            if sandbox_id in (None, port.endpoint.sandbox_id) and not port.serves(wanted.get(name)):
                del self._ports[name]
                port.close()

    def _try_open(self, endpoint: Endpoint) -> HeyvmError | None:
        try:
            self._open(endpoint)
        except NotFound:
            return None  # it went meanwhile
        except HeyvmError as failure:
            return failure
        except OSError as failure:
            return Unavailable(f"no local port can be opened: {failure.strerror or failure}")
        return None

    def _open(self, endpoint: Endpoint) -> None:
        listener, warning = _listen_again(endpoint)
        try:
            number = listener.getsockname()[1]
            if number != endpoint.local_port:
                endpoint = self._registry.set_local_port(endpoint.subdomain, number, warning)
            self._ports[endpoint.subdomain] = self._serve(endpoint, listener)
        except BaseException:
            listener.close()
            raise

    def _serve(self, endpoint: Endpoint, listener: socket.socket) -> _Port:
        if endpoint.is_public:
            return _RawPort(endpoint, listener, self._ways)
        return _PrivatePort(endpoint, listener, self._ways, self._gateway(endpoint))


def raise_file_limit() -> None:
    """Two descriptors for each connection: more than the usual 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


# -- listening -------------------------------------------------------------------------------------


def _listen_again(endpoint: Endpoint) -> tuple[socket.socket, str | None]:
    """A listener on its port of before, or another and what to say about that."""
    before = endpoint.local_port
    if before is None:
        return _listen_anywhere(), None
    try:
        return _listen(before), None
    except OSError as error:
        if error.errno not in TAKEN:
            raise
    listener = _listen_anywhere()
    now = listener.getsockname()[1]
    return listener, f"local port {before} was taken by another program: it is {now} now"


def _listen_anywhere() -> socket.socket:
    for port in _candidates():
        try:
            return _listen(port)
        except OSError as error:
            if error.errno not in TAKEN:
                raise
    return _listen(0)


def _candidates() -> Sequence[int]:
    """Some ports below those that the kernel gives to clients; none where these begin low."""
    highest = _lowest_ephemeral()
    if highest - LOWEST_PORT < TRIES:
        return ()
    return random.sample(range(LOWEST_PORT, highest), TRIES)


def _lowest_ephemeral() -> int:
    try:
        return int(EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # What connections of the last keeper are still ending does not count.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


class _Ways:
    """What the ports share: who connects, what passes on, and how many there may be."""

    def __init__(self, proxies: Proxies) -> None:
        self.proxies = proxies
        self.pump = Pump(get_hub().loop)
        self.open: Counter[str] = Counter()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # Two descriptors each, and as much again for listeners.
        self.most = max(1, (soft - RESERVED_FILES) // 4)

    def enter(self, sandbox_id: str) -> bool:
        """Count one more connection of a sandbox; False where there are too many."""
        if self.open[sandbox_id] >= MAX_CONNECTIONS or self.open.total() >= self.most:
            return False
        self.open[sandbox_id] += 1
        return True

    def leave(self, sandbox_id: str) -> None:
        self.open[sandbox_id] -= 1
        if not self.open[sandbox_id]:
            del self.open[sandbox_id]


class _Port:
    """A listener and what came through it. Each connection begins in a greenlet of its own."""

    def __init__(self, endpoint: Endpoint, listener: socket.socket, ways: _Ways) -> None:
        self.endpoint = endpoint
        self._ways = ways
        self._clients: set[socket.socket] = set()
        self._greenlets = Group()
        self._is_closed = False
        spawn: Any = self._greenlets.spawn
        self._server = StreamServer(listener, self._take, spawn=spawn)
        self._server.max_accept = ACCEPTED_AT_ONCE
        self._server.start()

    def serves(self, row: Endpoint | None) -> bool:
        """Whether this is what the row asks for."""
        mine = self.endpoint
        return row is not None and (mine.local_port, mine.port, mine.is_public) == (
            row.local_port,
            row.port,
            row.is_public,
        )

    def close(self) -> None:
        """Refuse, and cut what is open."""
        self._is_closed = True
        self._server.close()
        for client in list(self._clients):
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def _take(self, client: socket.socket, address: object) -> None:
        if not self._ways.enter(self.endpoint.sandbox_id):
            return
        self._clients.add(client)
        goes_on = False
        try:
            goes_on = self._serve(client, address)
        finally:
            self._clients.discard(client)
            if not goes_on:
                self._ways.leave(self.endpoint.sandbox_id)

    def _serve(self, client: socket.socket, address: object) -> bool:
        """Whether the connection lives on when this returns; then it `leave`s by itself."""
        raise NotImplementedError


class _PrivatePort(_Port):
    """Speaks HTTP, to see who asks."""

    def __init__(self, endpoint: Endpoint, listener: socket.socket, ways: _Ways, app: App) -> None:
        self._app = app
        super().__init__(endpoint, listener, ways)

    def close(self) -> None:
        super().close()
        # One that waits for the server inside does not look at its client.
        self._greenlets.kill(block=False)

    def _serve(self, client: socket.socket, address: object) -> bool:
        with suppress(OSError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        localhttp.serve(client, address, self._app)
        return False


class _RawPort(_Port):
    """Passes bytes on as they are."""

    def __init__(self, endpoint: Endpoint, listener: socket.socket, ways: _Ways) -> None:
        self._relays: set[Relay] = set()
        super().__init__(endpoint, listener, ways)

    def close(self) -> None:
        super().close()
        for relay in list(self._relays):
            relay.cut()

    def _serve(self, client: socket.socket, address: object) -> bool:
        try:
            inside = self._ways.proxies.connect(self.endpoint)
        except HeyvmError as error:
            _refuse(client, error)
            return False
        if self._is_closed:
            inside.close()
            return False
        with suppress(OSError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        relay = Relay(
            self._ways.pump,
            _bare(client),
            _bare(inside),
            ended=self._forget,
            page=partial(_page_of, PortClosed("the server inside hung up without an answer")),
        )
        self._relays.add(relay)
        relay.start()
        return True

    def _forget(self, relay: Relay) -> None:
        self._relays.discard(relay)
        self._ways.leave(self.endpoint.sandbox_id)


def _bare(sock: socket.socket) -> socket.socket:
    """The same connection as a socket of the standard library's: its calls do not switch."""
    plain: type[socket.socket] = monkey.get_original("socket", "socket")
    return plain(sock.family, sock.type, sock.proto, fileno=sock.detach())


def _refuse(client: socket.socket, error: HeyvmError) -> None:
    """Tell a client that speaks HTTP why; whoever does not is closed without a word."""
    with suppress(OSError):
        opening = _opening_of(client)
        if opening.is_http:
            client.sendall(_page_of(error, opening))
            client.shutdown(socket.SHUT_WR)
            _drain(client)


def _opening_of(client: socket.socket) -> Opening:
    opening = Opening()
    deadline = time.monotonic() + FIRST_BYTES_S
    while not opening.is_decided and (left := deadline - time.monotonic()) > 0:
        client.settimeout(left)
        received = client.recv(RECEIVE_BYTES)
        if not received:
            break
        opening.feed(received)
    return opening


def _drain(client: socket.socket) -> None:
    """Take what else it sends, for a while: see relay.LINGER_S."""
    deadline = time.monotonic() + LINGER_S
    rest = DRAINED_BYTES
    while rest > 0 and (left := deadline - time.monotonic()) > 0:
        client.settimeout(left)
        received = client.recv(RECEIVE_BYTES)
        if not received:
            return
        rest -= len(received)
        time.sleep(0)  # what never has to wait would never let others have their turn


def _page_of(error: HeyvmError, opening: Opening) -> bytes:
    page = problems.raw_page(error)
    return page[: page.index(b"\r\n\r\n") + 4] if opening.is_head else page
