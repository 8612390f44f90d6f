"""Tickets: what is one, and what goes through one, between real iroh endpoints on loopback."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from heyvm import tickets
from heyvm.errors import Invalid, Unauthorized, Unavailable, Unsupported
from tests.server import PATIENCE, REPOSITORY

HOST = "127.0.0.1"
MANY_BYTES = 24 * 1024 * 1024


class Place:
    """A served ticket; each stream's far end comes out of `streams` as a blocking socket."""

    def __init__(self, served: tickets.Served, connections: int = 64, streams: int = 256) -> None:
        self.served = served
        self.port = served.port(HOST)
        self.url = tickets.url_of(served.ticket([HOST], self.port))
        self.streams: asyncio.Queue[socket.socket] = asyncio.Queue()
        self.task = asyncio.ensure_future(served.serve(self._take, connections, streams))

    async def _take(self, stream: tickets.Stream) -> None:
        ours, theirs = socket.socketpair()
        theirs.settimeout(10)
        await self.streams.put(theirs)
        await stream.carry(ours)


@contextlib.asynccontextmanager
async def place(
    secret: bytes | None = None, port: int = 0, *, strict: bool = False, **bounds: int
) -> AsyncIterator[Place]:
    secret = secret or os.urandom(32)
    served = await tickets.Served.open(secret, HOST, port, None, strict=strict)
    found = Place(served, **bounds)
    try:
        yield found
    finally:
        await served.close(b"the test is over")
        await asyncio.gather(found.task, return_exceptions=True)


@contextlib.asynccontextmanager
async def dialled(url: str) -> AsyncIterator[tickets.Link]:
    link = await tickets.dial(url, 15.0)
    try:
        yield link
    finally:
        await link.close()


@contextlib.asynccontextmanager
async def stream(place: Place) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """The client's end and the server's, both blocking."""
    async with dialled(place.url) as link, opened(link) as near:
        far = await asyncio.wait_for(place.streams.get(), 10)
        with far:
            yield near, far


@contextlib.asynccontextmanager
async def opened(link: tickets.Link) -> AsyncIterator[socket.socket]:
    near, ours = socket.socketpair()
    near.settimeout(10)
    carrying = asyncio.ensure_future(link.carry(ours))
    with near:
        yield near
    await asyncio.wait([carrying], timeout=5)
    carrying.cancel()
    await asyncio.gather(carrying, return_exceptions=True)


def through(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(40):
            await work()

    asyncio.run(bounded())


# -- what a ticket is ------------------------------------------------------------------------------


def test_a_connection_url_is_the_scheme_and_an_endpoint_ticket_in_lower_case() -> None:
    async def work() -> None:
        async with place() as there:
            assert there.url.startswith("heyo://endpoint")
            assert there.url == there.url.lower()
            assert tickets.ticket_of(there.url) == there.url.removeprefix("heyo://")

    through(work)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "begins with heyo://"),
        ("https://example.com", "begins with heyo://"),
        ("heyo://", "no ticket"),
        ("heyo://relay.example.com:8080/ab12cd", "heyvm uses no broker"),
        ("heyo://ab12cd", "heyvm uses no broker"),
        ("heyo://endpoint" + "A" * 90, "cut off"),
        ("heyo://endpoint" + "1" * 90, "cut off"),
        ("heyo://endpoint" + "a" * 9000, "cut off"),
        ("heyo://endpoint" + "a" * 90 + "\x1b[31m", "cut off"),
    ],
)
def test_what_is_no_ticket_is_told_what_it_is(url: str, why: str) -> None:
    with pytest.raises(Invalid, match=why):
        tickets.ticket_of(url)


@pytest.mark.parametrize("letters", [20, 90, 91, 4096])
def test_letters_that_are_no_ticket_are_refused_before_anything_is_dialled(letters: int) -> None:
    async def work() -> None:
        with pytest.raises((Invalid, Unavailable), match="no ticket|nobody answers"):
            await tickets.dial("heyo://endpoint" + "b" * letters, 1.0)

    through(work)


def test_a_cut_off_ticket_is_invalid() -> None:
    async def work() -> None:
        async with place() as there:
            with pytest.raises(Invalid, match="cut off"):
                await tickets.dial(there.url[:-4], 5.0)

    through(work)


def test_the_same_key_and_port_are_the_same_ticket() -> None:
    async def work() -> None:
        secret = os.urandom(32)
        async with place(secret) as first:
            url, port = first.url, first.port
        async with place(secret, port) as second:
            assert second.url == url
            async with stream(second) as (near, far):
                near.sendall(b"again")
                assert await asyncio.to_thread(far.recv, 5) == b"again"

    through(work)


def test_a_port_that_is_taken_is_an_os_error() -> None:
    async def work() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind((HOST, 0))
            with pytest.raises(OSError, match="cannot be had: Address already in use"):
                await tickets.Served.open(os.urandom(32), HOST, other.getsockname()[1], None)

    through(work)


def test_it_listens_where_it_was_told_and_on_loopback_only() -> None:
    async def work() -> None:
        async with place() as there:
            bound = there.served._endpoint.bound_sockets()
            assert {one.rpartition(":")[0] for one in bound} <= {HOST, "[::1]"}

    through(work)


def test_without_iroh_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *more: Any, **options: Any) -> Any:
        if name == "iroh":
            raise ImportError(name)
        return real(name, *more, **options)

    monkeypatch.setattr(builtins, "__import__", without)

    async def work() -> None:
        assert not tickets.is_there()
        with pytest.raises(Unsupported, match="iroh is not installed here"):
            await tickets.Served.open(bytes(32), HOST, 0, None)

    through(work)


# -- what goes through it --------------------------------------------------------------------------


def test_bytes_go_both_ways_and_each_way_ends_by_itself() -> None:
    async def work() -> None:
        async with place() as there, stream(there) as (near, far):

            def talk() -> None:
                near.sendall(b"question")
                near.shutdown(socket.SHUT_WR)
                assert far.recv(100) == b"question"
                assert far.recv(100) == b""
                far.sendall(b"answer")
                assert near.recv(100) == b"answer"
                far.shutdown(socket.SHUT_WR)
                assert near.recv(100) == b""

            await asyncio.to_thread(talk)

    through(work)


def test_a_server_may_speak_first() -> None:
    async def work() -> None:
        async with place() as there, stream(there) as (near, far):
            far.sendall(b"220 hello")
            assert await asyncio.to_thread(near.recv, 100) == b"220 hello"

    through(work)


def test_a_client_that_knows_the_plain_form_alone_is_served() -> None:
    async def work() -> None:
        async with place() as there:
            lib = tickets._iroh()
            address = lib.EndpointTicket.from_string(tickets.ticket_of(there.url)).endpoint_addr()
            endpoint = await tickets._builder(lib, None).bind()
            connection = await endpoint.connect(address, b"hey-proxy/tcp/0")
            bi = await connection.open_bi()
            await bi.send().write_all(b"\0plain")
            with await asyncio.wait_for(there.streams.get(), 5) as far:
                assert await asyncio.to_thread(far.recv, 100) == b"\0plain"
            await endpoint.close()

    through(work)


def test_much_goes_through_whole_both_ways_at_once() -> None:
    async def work() -> None:
        async with place() as there, stream(there) as (near, far):
            both = await asyncio.gather(
                asyncio.to_thread(swap, near, b"up"), asyncio.to_thread(swap, far, b"down")
            )
            assert list(both) == [MANY_BYTES, MANY_BYTES]

    through(work)


def test_what_iroh_copies_byte_by_byte_is_still_where_it_was() -> None:
    """Another version may have moved it, and be slow again (bench/shells.py)."""

    async def work() -> None:
        lib = tickets._iroh()
        assert lib.iroh_ffi._UniffiRustBufferBuilder.write is tickets._write

    through(work)


def test_a_strict_ticket_is_for_who_shows_its_proof() -> None:
    secret = os.urandom(32)
    proof = tickets.proof_of(secret)

    async def work() -> None:
        async with place(secret, strict=True) as there:
            # Whoever has learnt the key has no more than this.
            with pytest.raises(Unauthorized, match="what follows the # is missing"):
                await tickets.dial(there.url, 5)
            async with dialled(f"{there.url}#{proof[::-1]}") as wrong:
                near, far = socket.socketpair()
                with near:
                    near.settimeout(10)
                    carrying = asyncio.ensure_future(wrong.carry(far))
                    assert await asyncio.to_thread(near.recv, 1) == b""
                    await carrying
            assert there.streams.empty()
        for strict in (True, False):
            async with place(secret, strict=strict) as there:
                url = tickets.url_of(tickets.ticket_of(there.url), proof)
                async with dialled(url) as right:
                    near, far = socket.socketpair()
                    carrying = asyncio.ensure_future(right.carry(far))
                    near.sendall(b"hello")
                    with await asyncio.wait_for(there.streams.get(), 5) as end:
                        assert await asyncio.to_thread(end.recv, 100) == b"hello"
                    near.close()
                    await carrying

    through(work)


def swap(sock: socket.socket, word: bytes) -> int:
    """Send so many bytes while as many others arrive; how many did."""
    piece = word * (65536 // len(word))

    def send() -> None:
        for _ in range(MANY_BYTES // 65536):
            sock.sendall(piece[:65536].ljust(65536, b"."))
        sock.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    received = 0
    while data := sock.recv(1 << 20):
        received += len(data)
    sender.join(10)
    return received


def test_a_reader_that_stands_still_stops_the_sender() -> None:
    """What is kept meanwhile is bounded: buffers of two sockets, and a window of iroh's."""

    async def work() -> None:
        async with place() as there, stream(there) as (near, _far):
            near.setblocking(False)
            sent, quiet = 0, 0
            while quiet < 20:
                try:
                    sent += near.send(bytes(65536))
                    quiet = 0
                except BlockingIOError:
                    quiet += 1
                await asyncio.sleep(0.02)
                assert sent < 16 * 1024 * 1024

    through(work)


def test_a_reset_on_one_side_is_one_on_the_other_even_of_who_reads_nothing() -> None:
    async def work() -> None:
        async with place() as there:
            with socket.create_server((HOST, 0)) as listener:
                async with dialled(there.url) as link:
                    near = socket.create_connection(listener.getsockname())
                    ours, _ = listener.accept()
                    carrying = asyncio.ensure_future(link.carry(ours))
                    far = await asyncio.wait_for(there.streams.get(), 5)
                    # The way back is full: nobody reads it.
                    far.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        while far.send(bytes(65536)):
                            await asyncio.sleep(0.001)
                    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    near.close()
                    await asyncio.wait_for(carrying, 5)
                    far.settimeout(5)
                    with contextlib.suppress(ConnectionError):
                        assert await asyncio.to_thread(far.recv, 1) == b""
                    with pytest.raises(OSError):
                        await asyncio.to_thread(far.sendall, bytes(8 << 20))
                    far.close()

    through(work)


def test_when_it_closes_the_client_is_told_why_and_every_stream_is_cut() -> None:
    async def work() -> None:
        async with place() as there, dialled(there.url) as link:
            async with opened(link) as near:
                with await asyncio.wait_for(there.streams.get(), 5) as far:
                    began = time.monotonic()
                    await there.served.close(b"the ticket has expired")
                    with contextlib.suppress(ConnectionError):
                        assert await asyncio.to_thread(near.recv, 1) == b""
                    with contextlib.suppress(ConnectionError):
                        assert await asyncio.to_thread(far.recv, 1) == b""
                    assert time.monotonic() - began < 2
            assert link.why() == "the ticket has expired"
            assert link.is_closed()

    through(work)


def test_a_quiet_stream_whose_client_has_said_all_ends_with_the_connection() -> None:
    async def work() -> None:
        async with place() as there, dialled(there.url) as link:
            async with opened(link) as near:
                near.shutdown(socket.SHUT_WR)
                with await asyncio.wait_for(there.streams.get(), 5) as far:
                    assert await asyncio.to_thread(far.recv, 1) == b""
                    await link.close()
                    with pytest.raises(OSError):
                        while True:
                            await asyncio.to_thread(far.sendall, bytes(65536))

    through(work)


# -- who means harm --------------------------------------------------------------------------------


def test_nobody_answers_at_a_ticket_that_has_ended() -> None:
    async def work() -> None:
        async with place() as there:
            url = there.url
        began = time.monotonic()
        with pytest.raises(Unavailable, match="nobody answers at this ticket"):
            await tickets.dial(url, 1.0)
        assert time.monotonic() - began < 4

    through(work)


def test_another_key_at_the_same_address_is_not_taken_for_it() -> None:
    async def work() -> None:
        async with place() as there:
            url, port = there.url, there.port
        async with place(os.urandom(32), port):
            with pytest.raises(Unavailable):
                await tickets.dial(url, 1.0)

    through(work)


def test_connections_and_streams_beyond_the_bounds_are_refused() -> None:
    async def work() -> None:
        async with place(connections=2, streams=2) as there, contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(dialled(there.url))
            await stack.enter_async_context(dialled(there.url))
            with pytest.raises(Unavailable):
                await tickets.dial(there.url, 1.0)
            for _ in range(2):
                await stack.enter_async_context(opened(first))
                stack.enter_context(await asyncio.wait_for(there.streams.get(), 5))
            over = await stack.enter_async_context(opened(first))
            with contextlib.suppress(ConnectionError):
                assert await asyncio.to_thread(over.recv, 1) == b""
            assert there.streams.empty()

    through(work)


def test_who_opens_a_stream_that_nobody_would_read_is_sent_away() -> None:
    async def work() -> None:
        async with place() as there, dialled(there.url) as link:
            lone = await link._connection.open_uni()
            await lone.write_all(b"x" * 1000)
            assert "both ways" in await asyncio.wait_for(link._connection.closed(), 5)
            async with stream(there) as (near, far):
                near.sendall(b"others")
                assert await asyncio.to_thread(far.recv, 10) == b"others"

    through(work)


def test_noise_and_other_protocols_disturb_nobody() -> None:
    async def work() -> None:
        async with place() as there:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as noise:
                for size in (1, 20, 1200, 9000):
                    for head in (b"\xc0\x00\x00\x00\x01", b"\x00", b"\x40"):
                        noise.sendto(head + os.urandom(size), (HOST, there.port))
            lib = tickets._iroh()
            address = lib.EndpointTicket.from_string(tickets.ticket_of(there.url)).endpoint_addr()
            endpoint = await tickets._builder(lib, None).bind()
            for alpn in (b"h3", b"\x1b[31m", b"hey-proxy/tcp/1"):
                with pytest.raises(lib.IrohError):
                    await endpoint.connect(address, alpn)
            await endpoint.close()
            async with stream(there) as (near, far):
                near.sendall(b"still here")
                assert await asyncio.to_thread(far.recv, 10) == b"still here"

    through(work)


def test_handshakes_that_never_end_keep_nobody_out() -> None:
    async def work() -> None:
        async with place(connections=16) as there:
            hellos = await first_datagrams(there, 24)
            with contextlib.ExitStack() as stack:
                senders = [stack.enter_context(udp()) for _ in hellos]
                for sender, hello in zip(senders, hellos, strict=True):
                    sender.sendto(hello, (HOST, there.port))
                begun = time.monotonic()
                async with stream(there) as (near, far):
                    near.sendall(b"in")
                    assert await asyncio.to_thread(far.recv, 2) == b"in"
                assert time.monotonic() - begun < 5 * PATIENCE
                # The others were told to prove where they are (RFC 9000 section 8.1.2: a Retry).
                answers = [await asyncio.to_thread(sender.recv, 2000) for sender in senders]
                retries = [one for one in answers if one[0] >> 4 & 3 == 3]
                assert len(hellos) - tickets.UNSURE_HANDSHAKES <= len(retries) < len(hellos)

    through(work)


async def first_datagrams(place: Place, count: int) -> list[bytes]:
    """What so many clients send first, none of whom is answered."""
    with udp() as silent:
        silent.bind((HOST, 0))
        url = tickets.url_of(place.served.ticket([HOST], silent.getsockname()[1]))
        dials = [tickets.dial(url, 0.2) for _ in range(count)]
        await asyncio.gather(*dials, return_exceptions=True)
        silent.settimeout(0)
        found: dict[Any, bytes] = {}
        with contextlib.suppress(BlockingIOError):
            while True:
                hello, client = silent.recvfrom(2000)
                found.setdefault(client, hello)
    assert len(found) > 3 * count // 4
    return list(found.values())


def udp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(5)
    return sock


ASKING_NO_ROUTER = """
import asyncio, os, socket
from heyvm import tickets, tunnels
tunnels.ask_no_router()
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    for address in (("239.255.255.250", 1900), ("127.0.0.1", 9)):
        try:
            sock.sendto(b"M-SEARCH", address)
        except PermissionError:
            print("refused")
    sock.connect(("127.0.0.1", sock.getsockname()[1] or 9))
    sock.send(b"")
async def talk():
    served = await tickets.Served.open(os.urandom(32), "127.0.0.1", 0, None)
    ours, theirs = socket.socketpair()
    task = asyncio.ensure_future(served.serve(lambda stream: stream.carry(theirs), 1, 1))
    ticket = served.ticket(["127.0.0.1"], served.port("127.0.0.1"))
    link = await tickets.dial(tickets.url_of(ticket), 10)
    mine, other = socket.socketpair()
    carrying = asyncio.ensure_future(link.carry(other))
    ours.sendall(b"served")
    print((await asyncio.to_thread(mine.recv, 6)).decode(), flush=True)
    os._exit(0)
asyncio.run(talk())
"""


def test_no_router_can_be_asked_to_let_the_internet_in() -> None:
    """iroh would, by UPnP; what it sends so, the kernel refuses to this process."""
    done = subprocess.run(
        [sys.executable, "-c", ASKING_NO_ROUTER],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30 * PATIENCE,
    )

    assert done.stdout.split() == ["refused", "refused", "served"], done.stderr
