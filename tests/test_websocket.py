"""The server's end of a WebSocket, against a client that says what it likes."""

from __future__ import annotations

import socket
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress

import pytest

from heyvm import websocket
from heyvm.errors import BadRequest, UpgradeRequired
from heyvm.websocket import Closed, Received, WebSocket, switching
from tests.server import wait_until
from tests.ws import Client, frame

TEXT, BINARY, MORE, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
HEAD = switching(KEY, "13")


class Pair:
    """Both ends of a WebSocket on one TCP connection of loopback."""

    def __init__(self, early: bytes = b"") -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            self.sock, _ = listener.accept()
        self.server = WebSocket(self.sock, HEAD, early).__enter__()
        self.client = Client(ours, b"")

    def close(self) -> None:
        self.server.__exit__()
        self.sock.close()
        self.client.sock.close()

    def says(self, *frames: bytes) -> None:
        self.client.raw(b"".join(frames))

    def hears(self) -> Received | None:
        return self.server.receive(5)

    def ends_with(self) -> int:
        """The code by which the server takes it for ended, and which the client is told."""
        with pytest.raises(Closed) as closed:
            while self.server.receive(5):
                pass
        assert self.client.end() == []
        assert self.client.closed == closed.value.code
        return closed.value.code


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


# -- the handshake ---------------------------------------------------------------------------------


def test_the_answer_is_that_of_the_rfc() -> None:
    lines = HEAD.decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 101 Switching Protocols"
    assert "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in lines
    assert not [line for line in lines if "xtensions" in line]


@pytest.mark.parametrize("version", [None, "", "8", "14", "13, 8"])
def test_other_versions_are_refused(version: str | None) -> None:
    with pytest.raises(UpgradeRequired):
        switching(KEY, version)


@pytest.mark.parametrize(
    "key", [None, "", "x", "AAAA", KEY + KEY, f"{KEY},{KEY}", f"{KEY}\r\nX: y", "\xfc" * 24]
)
def test_a_bad_key_is_refused(key: str | None) -> None:
    with pytest.raises(BadRequest):
        switching(key, "13")


# -- what comes ------------------------------------------------------------------------------------


def test_messages_come_whole_and_in_order_whatever_their_pieces(pair: Pair) -> None:
    pair.says(
        frame(TEXT, b'{"a":', first=0),
        frame(PING, b"one"),
        frame(MORE, b"", first=0),
        frame(MORE, "ä".encode()[:1], first=0),
        frame(PING, b"two"),
        frame(MORE, "ä".encode()[1:] + b"}"),
        frame(BINARY, b"\x01abc"),
        frame(BINARY),
    )
    assert pair.hears() == Received('{"a":ä}'.encode(), is_text=True)
    assert pair.hears() == Received(b"\x01abc", is_text=False)
    assert pair.hears() == Received(b"", is_text=False)
    assert pair.server.receive(0.01) is None


def test_what_came_with_the_handshake_is_not_lost() -> None:
    pair = Pair(frame(TEXT, b"early") + frame(BINARY, b"half")[:3])
    try:
        pair.says(frame(BINARY, b"half")[3:])
        assert pair.hears() == Received(b"early", is_text=True)
        assert pair.hears() == Received(b"half", is_text=False)
    finally:
        pair.close()


@pytest.mark.parametrize(
    ("sent", "code"),
    {
        "not masked": (frame(TEXT, b"{}", mask=False), 1002),
        "a reserved bit": (frame(TEXT, b"{}", first=0xC0), 1002),
        "a reserved opcode": (frame(3, b"{}"), 1002),
        "a long ping": (frame(PING, bytes(126)), 1002),
        "a ping in pieces": (frame(PING, b"", first=0), 1002),
        "a piece of nothing": (frame(MORE, b"x"), 1002),
        "a message in a message": (frame(TEXT, b"a", first=0) + frame(TEXT, b"b"), 1002),
        "no UTF-8": (frame(TEXT, b"\xff"), 1007),
        "half a letter": (frame(TEXT, b"\xc3"), 1007),
        "a close with half a code": (frame(CLOSE, b"\x03"), 1002),
        "a close with no code": (frame(CLOSE, b"\x03\xec"), 1002),
        "deflated": (frame(TEXT, zlib.compress(bytes(1000)), first=0xC0), 1002),
    }.values(),
)
def test_nonsense_ends_it_with_its_code(pair: Pair, sent: bytes, code: int) -> None:
    pair.says(sent)
    assert pair.ends_with() == code


@pytest.mark.parametrize(
    ("opcode", "most"), [(TEXT, websocket.MAX_TEXT_BYTES), (BINARY, websocket.MAX_BINARY_BYTES)]
)
@pytest.mark.parametrize("pieces", [1, 8])
def test_a_message_has_a_bound_in_one_frame_or_several(
    pair: Pair, opcode: int, most: int, pieces: int
) -> None:
    def send(size: int) -> None:
        whole, each = b"x" * size, -(-size // pieces)
        with suppress(OSError):
            for at in range(0, size, each):
                part, is_last = whole[at : at + each], at + each >= size
                pair.says(frame(MORE if at else opcode, part, first=0x80 if is_last else 0))

    fits = threading.Thread(target=send, args=(most,))
    fits.start()
    found = pair.hears()
    assert found is not None and len(found.content) == most
    fits.join()
    flood = threading.Thread(target=send, args=(most + 1,))
    flood.start()
    with pytest.raises(Closed) as closed:
        pair.hears()
    assert closed.value.code == 1009
    assert pair.client.end() == [] and pair.client.closed == 1009
    pair.sock.close()
    pair.server.__exit__()
    flood.join()


def test_a_size_that_is_only_announced_takes_no_memory(pair: Pair) -> None:
    pair.says(b"\x82\xff" + (1 << 62).to_bytes(8, "big") + bytes(4) + b"x" * 100)
    assert pair.server.receive(0.05) is None
    pair.client.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(Closed):
        pair.hears()


def test_of_many_pings_some_are_answered_and_nobody_is_held_up(pair: Pair) -> None:
    flood = frame(PING, b"p" * 100) * 20_000

    def push() -> None:
        with suppress(OSError):
            pair.says(flood, frame(TEXT, b"{}"))

    thread = threading.Thread(target=push)
    thread.start()  # and reads not one answer
    assert pair.hears() == Received(b"{}", is_text=True)
    thread.join()
    pair.server.close(1000)
    assert pair.client.end() == []
    assert 1 <= pair.client.pongs <= 2_000


def test_a_receive_ends_in_time_under_a_flood_of_pings(pair: Pair) -> None:
    over = threading.Event()

    def push() -> None:
        with suppress(OSError):
            while not over.is_set():
                pair.says(frame(PING) * 1000)

    thread = threading.Thread(target=push)
    thread.start()
    began = time.monotonic()
    assert pair.server.receive(0.2) is None
    assert time.monotonic() - began < 2
    over.set()
    pair.server.__exit__()
    pair.sock.close()
    thread.join()


# -- the end ---------------------------------------------------------------------------------------


def test_a_close_is_answered(pair: Pair) -> None:
    pair.client.close(1000)
    assert pair.ends_with() == 1000
    with pytest.raises(Closed):
        pair.server.send_text("late")


def test_our_own_close_waits_for_the_clients(pair: Pair) -> None:
    pair.server.send_text("last")
    pair.server.close(1012)
    pair.server.close(1000)
    assert pair.client.end() == ["last"]
    assert pair.client.closed == 1012
    with pytest.raises(Closed):
        pair.hears()


def test_half_a_connection_is_none(pair: Pair) -> None:
    pair.client.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(Closed) as closed:
        pair.hears()
    assert closed.value.code == websocket.LOST


# -- what goes -------------------------------------------------------------------------------------


def test_a_client_that_takes_nothing_is_cut_in_time(pair: Pair) -> None:
    began = time.monotonic()
    with pytest.raises(Closed):
        while True:
            pair.server.send_bytes(bytes(1 << 20), patience=0.3)
    assert time.monotonic() - began < 5
    with pytest.raises(Closed):
        pair.hears()


def test_a_cut_ends_who_sends_and_who_closes_does_not_wait_for_him(pair: Pair) -> None:
    ended = threading.Event()

    def push() -> None:
        with suppress(Closed):
            while True:
                pair.server.send_bytes(bytes(1 << 20))
        ended.set()

    thread = threading.Thread(target=push)
    thread.start()
    wait_until(lambda: pair.server._sending.locked(), "he sends")
    time.sleep(0.2)
    pair.server.ping(0)  # has to wait for nobody
    pair.server.close(1008, patience=0.2)
    assert ended.wait(5)
    thread.join()


def test_many_may_send_at_once_and_pongs_come_between(pair: Pair) -> None:
    def push(letter: bytes) -> None:
        for _ in range(50):
            pair.server.send_bytes(letter * 30_000)

    threads = [threading.Thread(target=push, args=(bytes([65 + n]),)) for n in range(4)]
    listening = threading.Thread(target=lambda: pair.server.receive(30))
    for thread in (*threads, listening):
        thread.start()
    pair.says(frame(PING, b"x"))
    found = [pair.client.receive() for _ in range(200)]
    assert all(isinstance(one, bytes) and set(one) == {one[0]} for one in found)
    wait_until(lambda: bool(pair.client.pongs) or pair.client.has_something(), "a pong")
    pair.says(frame(TEXT, b"{}"))
    for thread in (*threads, listening):
        thread.join()


def test_progress_is_a_sign_of_life(pair: Pair) -> None:
    thread = threading.Thread(target=pair.server.send_bytes, args=(bytes(16 << 20),))
    thread.start()
    time.sleep(0.3)
    before = time.monotonic()
    assert len(pair.client.receive() or b"") == 16 << 20
    thread.join()
    assert pair.server.heard_at > before


def test_nothing_stays_open() -> None:
    pair = Pair()
    sender = pair.server._sender
    pair.close()
    assert sender.fileno() == -1
