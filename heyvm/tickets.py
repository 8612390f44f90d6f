"""iroh's one door: `heyo://` tickets, endpoints that serve or dial them, and what they carry.

A ticket names an endpoint (its public key) and where it can be reached. One bidirectional QUIC
stream stands for one TCP connection, byte for byte, half-close included, without any handshake or
login: whoever knows the endpoint's key is in. iroh shows that key to whoever begins a handshake; so
there is a strict form too, in which the URL also holds a proof that each stream has to begin with.
Runs in an asyncio loop; one such loop for each process.
"""

from __future__ import annotations

import asyncio
import base64
import ctypes
import hmac
import ipaddress
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from heyvm.errors import Invalid, Unauthorized, Unavailable, Unsupported

if TYPE_CHECKING:
    import iroh

SCHEME = "heyo://"
ALPN = b"hey-proxy/tcp/0"
# The same, but each stream begins with a zero byte of whoever opens it: QUIC tells nobody of a
# stream on which nothing was sent, and there are servers that speak first (MySQL, SMTP).
ALPN_WITH_START = b"heyvm/tcp/1"
START = b"\0"
ALPN_WITH_PROOF = b"heyvm/tcp/1+proof"  # each stream begins with START and the URL's proof
PROOF_BYTES = 20
TICKET = re.compile(r"(endpoint[a-z2-7]{20,4096})(?:#([a-z2-7]{32}))?")
BROKERED = re.compile(r"(?:[^/\s]+:[0-9]{1,5}/)?[A-Za-z0-9_-]{1,63}")
PIECE_BYTES = 256 * 1024
ADDRESSES = 8  # in one ticket
HANDSHAKE_S = 10.0
# TLS's alert no_application_protocol (RFC 7301, 3.2), in the words of iroh's QUIC.
NO_SUCH_ALPN = "error 120:"
NEEDS_PROOF = "the server wants the whole connection URL: what follows the # is missing"
GONE = "the ticket has expired or was deleted"  # why a server closes a connection for good
CLOSE_S = 1.0
RESET = struct.pack("ii", 1, 0)  # linger for no time: the peer is reset
# With what code a stream is reset. A server inside cannot choose: its own resets are refusals.
REFUSED, NOBODY_LISTENS, NOT_RUNNING = 1, 2, 3
REASONS = {
    NOBODY_LISTENS: "nobody listens on that port inside (yet)",
    NOT_RUNNING: "the sandbox does not run",
}
LOOPBACKS = {4: "127.0.0.1", 6: "::1"}
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
# How many handshakes at once of whose client it is not known that it is at its address.
UNSURE_HANDSHAKES = 8


def url_of(ticket: str, proof: str | None = None) -> str:
    """What a user is given."""
    return SCHEME + ticket + (f"#{proof}" if proof else "")


def proof_of(secret: bytes) -> str:
    """What a client of the strict form has to show, of an endpoint with this private key."""
    proof = hmac.digest(secret, b"proof of a ticket", "sha256")[:PROOF_BYTES]
    return base64.b32encode(proof).decode().lower()


def ticket_of(url: str) -> str:
    """The ticket in a connection URL. `Invalid` says what it is instead."""
    return _parts_of(url)[0]


def _parts_of(url: str) -> tuple[str, str | None]:
    """The ticket, and the proof of a strict one."""
    if not url.startswith(SCHEME):
        raise Invalid(f"a connection URL begins with {SCHEME}")
    ticket = url.removeprefix(SCHEME).strip().rstrip("/")
    if found := TICKET.fullmatch(ticket):
        return found[1], found[2]
    if not ticket:
        raise Invalid(f"there is no ticket behind {SCHEME}")
    if BROKERED.fullmatch(ticket):
        raise Invalid("this is no ticket (a ticket broker's short code? heyvm uses no broker)")
    raise Invalid("this is no ticket: was it cut off when it was copied?")


def is_there() -> bool:
    """Whether iroh can be imported: it is built for some machines only."""
    try:
        import iroh
    except ImportError:
        return False
    return bool(iroh)


def _iroh() -> Any:
    try:
        import iroh
    except ImportError:
        raise Unsupported("iroh is not installed here, and not built for every machine") from None
    iroh.iroh_ffi.uniffi_set_event_loop(asyncio.get_running_loop())  # type: ignore[arg-type]
    _quicken(iroh.iroh_ffi)
    return iroh


def _quicken(ffi: Any) -> None:
    """iroh 1.2's Python part copies what is sent byte by byte, in Python: 7 MB/s, and a whole core
    for it. At once it is 100 to 150 MB/s."""
    builder = getattr(ffi, "_UniffiRustBufferBuilder", None)
    if builder is not None:
        builder.write = _write


def _write(builder: Any, data: bytes) -> None:
    """In place of `_UniffiRustBufferBuilder.write`."""
    with builder._reserve(len(data)):
        begin = ctypes.addressof(builder.rbuf.data.contents)
        ctypes.memmove(begin + builder.rbuf.len, bytes(data), len(data))


def _builder(lib: Any, relay: str | None) -> Any:
    """No relay but this one, and nobody is told or asked of addresses."""
    builder = lib.EndpointBuilder()
    builder.apply_minimal()
    mode = lib.RelayMode.custom_from_urls([relay]) if relay else lib.RelayMode.disabled()
    builder.relay_mode(mode)
    return builder


def _why_not(host: str, port: int) -> str | None:
    """The kernel's reason, which iroh keeps for itself."""
    with socket.socket(FAMILIES[ipaddress.ip_address(host).version], socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror
    return None


def _binds(host: str, port: int) -> list[str]:
    """Left alone, iroh would listen on all addresses of the other family: it gets loopback's."""
    other = 10 - ipaddress.ip_address(host).version
    found = [_authority(host, port)]
    with suppress(OSError), socket.socket(FAMILIES[other], socket.SOCK_DGRAM) as probe:
        probe.bind((LOOPBACKS[other], 0))
        found.append(_authority(LOOPBACKS[other], 0))
    return found


# -- serving ---------------------------------------------------------------------------------------


class Stream:
    """One stream of a client's, for whoever serves it."""

    def __init__(self, bi: Any) -> None:
        self._bi = bi

    async def carry(self, sock: socket.socket) -> None:
        """Be the other end of `sock` until both directions are over; closes it."""
        await carry(self._bi.send(), self._bi.recv(), sock)

    async def refuse(self, code: int = REFUSED) -> None:
        """Reset it; our own client says why, if `code` is one of `REASONS`."""
        with suppress(Exception):
            await self._bi.send().reset(code)
            await self._bi.recv().stop(code)


class Served:
    """An endpoint that serves one ticket."""

    def __init__(
        self, lib: Any, endpoint: iroh.Endpoint, relay: str | None, starts: dict[bytes, bytes]
    ) -> None:
        self._lib = lib
        self._starts = starts
        self._endpoint: Any = endpoint
        self._relay = relay
        self._connections: set[Any] = set()
        self._handshakes = 0

    @classmethod
    async def open(
        cls, secret: bytes, host: str, port: int, relay: str | None, *, strict: bool = False
    ) -> Served:
        """Listen on this UDP port (0: any) of an address, with this private key. `strict`: for who
        shows the proof alone. `OSError` where the port is taken."""
        lib = _iroh()
        builder = _builder(lib, relay)
        starts = {ALPN_WITH_PROOF: START + proof_of(secret).encode()}
        if not strict:
            starts |= {ALPN: b"", ALPN_WITH_START: START}
        builder.alpns(list(starts))
        builder.secret_key(secret)
        try:
            for address in _binds(host, port):
                builder.bind_addr(address)
            endpoint = await builder.bind()
        except lib.IrohError as error:
            why = _why_not(host, port) or _said(error)
            raise OSError(f"UDP port {port} of {host} cannot be had: {why}") from None
        return cls(lib, endpoint, relay, starts)

    def port(self, host: str) -> int:
        """The UDP port that it got there; it has another one on the other family's loopback."""
        wanted = ipaddress.ip_address(host).version
        for bound in self._endpoint.bound_sockets():
            address, _, port = bound.rpartition(":")
            if ipaddress.ip_address(address.strip("[]")).version == wanted:
                return int(port)
        raise OSError(f"iroh listens on no address like {host}")

    def ticket(self, addresses: Sequence[str], port: int) -> str:
        """For clients who reach this machine at these addresses."""
        direct = [_authority(one, port) for one in addresses[:ADDRESSES]]
        address = self._lib.EndpointAddr(self._endpoint.id(), self._relay, direct)
        return str(self._lib.EndpointTicket.from_addr(address))

    async def serve(
        self, served: Callable[[Stream], Awaitable[None]], connections: int, streams: int
    ) -> None:
        """Have `served` called for each stream, at most so many at once, until `close`."""
        tasks: set[asyncio.Task[None]] = set()
        room = asyncio.Semaphore(streams)
        try:
            while self._endpoint and (incoming := await self._endpoint.accept_next()):
                if len(self._connections) >= connections or len(tasks) >= connections:
                    with suppress(self._lib.IrohError):
                        await incoming.refuse()
                    continue
                task = asyncio.ensure_future(self._client(incoming, served, room))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        finally:
            for task in tasks:
                task.cancel()

    async def _client(
        self, incoming: Any, served: Callable[[Stream], Awaitable[None]], room: asyncio.Semaphore
    ) -> None:
        """One connection: all that a hostile client can do is to end it."""
        with suppress(self._lib.IrohError, TimeoutError):
            if self._handshakes >= UNSURE_HANDSHAKES and not await incoming.remote_addr_validated():
                await incoming.retry()
                return
            connection = await self._handshake(incoming)
            self._connections.add(connection)
            lone = asyncio.ensure_future(self._forbid_lone_streams(connection))
            try:
                await self._streams(connection, served, room)
            finally:
                lone.cancel()
                self._connections.discard(connection)

    async def _handshake(self, incoming: Any) -> Any:
        self._handshakes += 1
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                return await (await incoming.accept()).connect()
        finally:
            self._handshakes -= 1

    async def _forbid_lone_streams(self, connection: Any) -> None:
        """Nobody reads those of one direction: each would keep 1.2 MB of ours, a hundred for each
        connection."""
        with suppress(self._lib.IrohError):
            await connection.accept_uni()
            connection.close(1, b"streams go both ways here")

    async def _streams(
        self, connection: Any, served: Callable[[Stream], Awaitable[None]], room: asyncio.Semaphore
    ) -> None:
        start = self._starts[connection.alpn()]
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                bi = await connection.accept_bi()
                if room.locked():
                    await Stream(bi).refuse()
                    continue
                await room.acquire()
                task = asyncio.ensure_future(self._stream(bi, served, start))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                task.add_done_callback(lambda _: room.release())
        finally:
            # Whoever carries a stream sees its end by itself, and tells the other side of it.
            if tasks:
                await asyncio.wait(tasks, timeout=CLOSE_S)
            for task in tasks:
                task.cancel()

    async def _stream(
        self, bi: Any, served: Callable[[Stream], Awaitable[None]], start: bytes
    ) -> None:
        with suppress(self._lib.IrohError, TimeoutError):
            if start:
                async with asyncio.timeout(HANDSHAKE_S):
                    shown = await bi.recv().read_exact(len(start))
                if not hmac.compare_digest(shown, start):
                    await Stream(bi).refuse()
                    return
            await served(Stream(bi))

    async def close(self, reason: bytes) -> None:
        """Tell every client why, and listen no more."""
        for connection in list(self._connections):
            connection.close(1, reason)
        # iroh lets go of the port with the last reference.
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            with suppress(TimeoutError, self._lib.IrohError):
                async with asyncio.timeout(CLOSE_S):
                    await endpoint.close()


# -- dialling --------------------------------------------------------------------------------------


class Link:
    """A connection to a ticket's endpoint."""

    def __init__(
        self, lib: Any, endpoint: iroh.Endpoint, connection: Any, proof: str | None
    ) -> None:
        self._lib = lib
        self._endpoint = endpoint
        self._connection = connection
        self._start = b"" if connection.alpn() == ALPN else START + (proof or "").encode()

    async def carry(self, sock: socket.socket) -> None:
        """Open a stream, and be the other end of `sock` until both directions are over; closes it.
        `Unavailable` where there is no stream to be had (`sock` is as it was), or the other side
        refused it."""
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                bi = await self._connection.open_bi()
                if self._start:
                    await bi.send().write_all(self._start)
        except (TimeoutError, self._lib.IrohError):
            why = self.why() or "it takes no more connections"
            raise Unavailable(f"the other side of the ticket is gone: {why}") from None
        fault = await carry(bi.send(), bi.recv(), sock)
        if fault is not None and (reason := _reason_of_reset(fault)):
            raise Unavailable(reason)

    def is_closed(self) -> bool:
        return self._connection.close_reason() is not None

    async def ended(self) -> str:
        """Wait for its end; why."""
        return _reason(await self._connection.closed())

    def why(self) -> str:
        """Why it has ended; empty while it has not."""
        return _reason(self._connection.close_reason() or "")

    async def close(self) -> None:
        self._connection.close(0, b"")
        with suppress(self._lib.IrohError):
            await self._endpoint.close()


async def dial(url: str, timeout: float) -> Link:
    """Connect to whoever serves this ticket. `Invalid` for what is none; `Unavailable` where nobody
    answers within so many seconds."""
    ticket, proof = _parts_of(url)
    lib = _iroh()
    try:
        address = lib.EndpointTicket.from_string(ticket).endpoint_addr()
    except lib.IrohError:
        raise Invalid("this is no ticket: was it cut off when it was copied?") from None
    try:
        endpoint = await _builder(lib, address.relay_url()).bind()
    except lib.IrohError as error:
        raise Unavailable(f"no UDP socket can be had: {_said(error)}") from None
    try:
        async with asyncio.timeout(timeout):
            connection = await _connected(lib, endpoint, address, proof)
            return Link(lib, endpoint, connection, proof)
    except (TimeoutError, lib.IrohError) as error:
        with suppress(TimeoutError, lib.IrohError):
            async with asyncio.timeout(CLOSE_S):
                await endpoint.close()
        if proof is None and NO_SUCH_ALPN in repr(error):
            raise Unauthorized(NEEDS_PROOF) from None
        raise Unavailable(
            "nobody answers at this ticket: it may have expired or been deleted, or its server"
            " cannot be reached from here (UDP)"
        ) from None


async def _connected(lib: Any, endpoint: iroh.Endpoint, address: Any, proof: str | None) -> Any:
    if proof:
        return await endpoint.connect(address, ALPN_WITH_PROOF)
    try:
        return await endpoint.connect(address, ALPN_WITH_START)
    except lib.IrohError:  # a server that knows the plain form alone
        return await endpoint.connect(address, ALPN)


# -- bytes -----------------------------------------------------------------------------------------


async def carry(send: Any, recv: Any, sock: socket.socket) -> BaseException | None:
    """Bytes both ways between a stream and a socket, and the end of each direction by itself. A
    reset on one side is one on the other; what it was on the first is returned."""
    sock.setblocking(False)
    ways = [
        asyncio.ensure_future(_to_stream(sock, send)),
        asyncio.ensure_future(_to_socket(recv, sock)),
    ]
    is_whole = False
    try:
        done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
        faults = [fault for way in done if (fault := way.exception())]
        is_whole = not faults
    finally:
        # First the ways: a write that waits for its reader would have the reset wait as well.
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        if not is_whole:
            await _reset(send, recv, sock)
        sock.close()
    return faults[0] if faults else None


async def _to_stream(sock: socket.socket, send: Any) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(sock, PIECE_BYTES):
        await send.write_all(data)
    await send.finish()


async def _to_socket(recv: Any, sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while data := await recv.read(PIECE_BYTES):
        await loop.sock_sendall(sock, data)
    with suppress(OSError):
        sock.shutdown(socket.SHUT_WR)


async def _reset(send: Any, recv: Any, sock: socket.socket) -> None:
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    with suppress(Exception):
        await send.reset(1)
    with suppress(Exception):
        await recv.stop(1)


# -- words -----------------------------------------------------------------------------------------


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _said(error: BaseException) -> str:
    """iroh's own words, fit for a terminal and for one line."""
    text = getattr(error, "message", None)
    return _plain(str(text() if callable(text) else text or error))


def _reason(text: str) -> str:
    """What the peer said at the end, out of iroh's words for it: `closed by peer: WHY (code 1)`."""
    plain = _plain(text)
    found = re.fullmatch(r"closed by peer: (.*) \(code [0-9]+\)", plain)
    return found[1] if found else plain


def _reason_of_reset(fault: BaseException) -> str:
    """Out of iroh's words for it: `Reset(CODE)`, or `Stopped(CODE)`."""
    found = re.fullmatch(r"(?:Reset|Stopped)\(([0-9]{1,9})\)", _said(fault))
    return REASONS.get(int(found[1]), "") if found else ""


def _plain(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:300].strip()
