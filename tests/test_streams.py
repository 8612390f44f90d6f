"""The host's side of what streams, against agents that misbehave: each is a socket's other end."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Thread
from typing import Any

import pytest

from heyvm import frames, streams
from heyvm.errors import BackendFailed, HeyvmError, Invalid, NotFound
from heyvm.streams import Command, Ended, Output, Taken, Terminal
from tests.agents import wait_until

READY = frames.header({"ready": 1, "seq": 0, "lost": 0})
END = frames.header({"ok": 1, "exit_code": 7})
NAME = "a-session-of-the-tests"
NEW: dict[str, Any] = {"argv": (), "env": {}, "cwd": "/", "user": "", "size": (80, 24), "keep": 0}


def piece(seq: int, some: bytes = b"x") -> bytes:
    return frames.frame(frames.STDOUT, seq.to_bytes(8, "big") + some)


class Peer:
    """What an agent would be: says what it is told to, and keeps what it hears."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.splitter = frames.Splitter(frames.MAX_REQUEST_BYTES)

    def say(self, some: bytes) -> None:
        self.sock.sendall(some)

    def hear(self, timeout: float = 5.0) -> tuple[int, bytes]:
        self.sock.settimeout(timeout)
        while (found := self.splitter.next()) is None:
            received = self.sock.recv(65536)
            assert received, "it hung up"
            self.splitter.feed(received)
        return found

    def header(self) -> dict[str, frames.Value]:
        kind, payload = self.hear()
        assert kind == frames.HEADER
        return frames.decode_header(payload)


@contextmanager
def attached(said: bytes = READY) -> Iterator[tuple[Terminal, Peer]]:
    """A terminal whose agent has begun with this."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(said)
        terminal = Terminal.attach(ours, NAME)
        peer = Peer(theirs)
        assert peer.header() == {"op": b"terminal", "session": NAME.encode(), "new": 0}
        try:
            yield terminal, peer
        finally:
            terminal.close()


@contextmanager
def command() -> Iterator[tuple[Command, Peer]]:
    ours, theirs = socket.socketpair()
    with theirs:
        running = Command.start(ours, argv=["prog"], env={}, cwd="/nowhere", user="")
        peer = Peer(theirs)
        peer.header()
        try:
            yield running, peer
        finally:
            running.close()


def in_thread(call: Callable[[], object]) -> Callable[[], object]:
    """Start it; what is returned waits for it, and gives or raises what it did."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(call())
        except HeyvmError as error:
            found.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()

    def result() -> object:
        thread.join(10)
        assert found, "it still waits"
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    return result


def test_what_is_asked_for_a_new_terminal() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(READY)
        new = {**NEW, "argv": ["a", "b"], "env": {"K": "v"}, "keep": 1.5, "size": (100, 50)}
        Terminal.open(ours, session=NAME, **new)

        assert Peer(theirs).header() == {
            "op": b"terminal",
            "session": NAME.encode(),
            "new": 1,
            "argv": [b"a", b"b"],
            "env": {"K": b"v"},
            "cwd": b"/",
            "user": b"",
            "cols": 100,
            "rows": 50,
            "keep_ms": 1500,
        }


def test_pieces_come_in_order_and_then_the_end_for_ever() -> None:
    with attached(frames.header({"ready": 1, "seq": 6, "lost": 4})) as (terminal, peer):
        assert (terminal.last_seq, terminal.lost) == (6, 4)
        peer.say(piece(5, b"five") + piece(6, b"six") + piece(7, b"seven") + END)

        came = [terminal.receive(5) for _ in range(5)]

    assert came[:3] == [Output(b"five", 5), Output(b"six", 6), Output(b"seven", 7)]
    assert came[3:] == [Ended(7), Ended(7)]


@pytest.mark.parametrize(
    "said",
    [
        piece(0),
        piece(1) + piece(1),
        piece(1) + piece(3),
        piece(2),
        piece(1 << 63),
        piece(1, b""),
        piece(1, b"x" * (32 * 1024 + 1)),
        frames.frame(frames.STDOUT, b"short"),
        frames.frame(frames.STDERR, bytes(9)),
        frames.frame(frames.DATA, b"x"),
        frames.frame(frames.END),
        frames.header({}),
        frames.header({"ok": 1}),
        frames.header({"ok": 1, "exit_code": 256}),
        frames.header({"ok": 1, "exit_code": -1}),
        frames.header({"ok": 1, "exit_code": "0"}),
        frames.header({"ok": 2, "exit_code": 0}),
        frames.header({"error": "weird", "message": "\x1b[31m"}),
        frames.header({"error": "taken" * 100, "message": ""}),
        frames.frame(frames.HEADER, b"i1e"),
        b"\xff\xff\xff\xffO",
        b"\x00\x00\x00\x00Z",
        (1 << 20).to_bytes(4, "big") + b"H",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_nonsense_is_a_failure_of_the_agent(said: bytes) -> None:
    with attached() as (terminal, peer):
        peer.say(said)

        with pytest.raises(BackendFailed):
            while terminal.receive(5):
                pass


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (frames.header({"error": "gone", "message": "x"}), NotFound),
        (frames.header({"error": "taken", "message": "x"}), Taken),
        (frames.header({"error": "failed", "message": "too many"}), BackendFailed),
        (frames.header({"error": "bad-cwd", "message": "x"}), Invalid),
        (frames.header({"ok": 1}), BackendFailed),
        (frames.header({"ready": 1}), BackendFailed),
        (frames.header({"ready": 1, "seq": 3, "lost": 4}), BackendFailed),
        (frames.header({"ready": 1, "seq": -1, "lost": 0}), BackendFailed),
        (frames.header({"ready": 1, "seq": 1 << 63, "lost": 0}), BackendFailed),
        (piece(1), BackendFailed),
        (b"", BackendFailed),
    ],
)
def test_a_terminal_that_is_refused(said: bytes, error: type[HeyvmError]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)

        with pytest.raises(error):
            Terminal.attach(ours, NAME)


def test_who_is_taken_over_is_told() -> None:
    with attached() as (terminal, peer):
        peer.say(piece(1) + frames.header({"error": "taken", "message": "x"}))

        assert terminal.receive(5) == Output(b"x", 1)
        with pytest.raises(Taken):
            terminal.receive(5)


def test_silence_is_none_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "FRAME_TIMEOUT_S", 0.05)
    with attached() as (terminal, peer):
        begun = time.monotonic()

        assert terminal.receive(0) is None
        assert terminal.receive(0.2) is None
        assert time.monotonic() - begun >= 0.2
        peer.say(piece(1))
        assert terminal.receive(None) == Output(b"x", 1)


def test_a_frame_that_is_not_ended_is_a_failure_however_it_trickles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "FRAME_TIMEOUT_S", 0.3)
    with attached() as (terminal, peer):
        over = threading.Event()

        def trickle() -> None:
            for byte in piece(1, b"x" * 1000):
                if over.wait(0.02):
                    return
                peer.say(bytes([byte]))

        wait = in_thread(trickle)
        with pytest.raises(BackendFailed, match="did not end it"):
            while True:
                terminal.receive(0.01)  # no fresh patience for each call
        over.set()
        wait()


def test_who_reads_late_does_not_blame_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "FRAME_TIMEOUT_S", 0.1)
    with attached() as (terminal, peer):
        half = piece(1, b"x" * 100)
        peer.say(half[:50])
        assert terminal.receive(0.01) is None
        peer.say(half[50:])
        time.sleep(0.15)

        assert terminal.receive(0) == Output(b"x" * 100, 1)


def test_frames_are_whole_whoever_sends_and_however_slowly_they_are_read() -> None:
    with attached() as (terminal, peer):
        pastes = [bytes([65 + at]) * 300_000 for at in range(3)]
        waits = [in_thread(partial(terminal.send, paste)) for paste in pastes]
        for at in range(1, 2001):
            terminal.resize(at % 500 + 1, 24)
            terminal.ack(at)

        typed: dict[int, int] = {}
        seen: dict[str, frames.Value] = {}
        while sum(typed.values()) < 900_000 or (seen.get("ack"), seen.get("resize")) != (
            2000,
            [1, 24],
        ):
            kind, payload = peer.hear()
            if kind == frames.HEADER:
                seen |= frames.decode_header(payload)
            else:
                assert len(set(payload)) == 1
                typed[payload[0]] = typed.get(payload[0], 0) + len(payload)
        for wait in waits:
            wait()

    assert typed == {65: 300_000, 66: 300_000, 67: 300_000}


def test_resize_and_ack_never_wait_and_the_latest_is_sent_by_who_receives() -> None:
    with attached() as (terminal, peer):
        wait = in_thread(lambda: terminal.send(b"x" * 4_000_000))
        wait_until(lambda: terminal._wire._turn.locked())
        begun = time.monotonic()
        for at in range(10_000):
            terminal.resize(at + 1, 24)
            terminal.ack(at + 1)
        assert time.monotonic() - begun < 5
        waiting = in_thread(lambda: terminal.receive(10))

        count = 0
        while count < 4_000_000:
            kind, payload = peer.hear()
            if kind == frames.STDIN:
                count += len(payload)
            else:
                last = frames.decode_header(payload)
        wait()
        while last != {"ack": 10_000, "resize": [10_000, 24]}:
            last = peer.header()
        peer.say(END)
        assert waiting() == Ended(7)


def test_sizes_that_are_none_are_not_sent() -> None:
    with attached() as (terminal, peer):
        for size in ((0, 24), (80, 0), (65536, 24), (80, -1)):
            terminal.resize(*size)
        terminal.resize(1, 65535)

        assert peer.header() == {"resize": [1, 65535]}


def test_closing_ends_every_wait() -> None:
    with attached() as (terminal, _):
        waiting = in_thread(terminal.receive)
        sending = in_thread(lambda: terminal.send(b"x" * 4_000_000))
        wait_until(lambda: terminal._wire._users == 2)

        terminal.close()
        terminal.close()

        for wait in (waiting, sending):
            with pytest.raises(BackendFailed):
                wait()
        assert wait_until(lambda: terminal.fileno() == -1)
        for call in (terminal.receive, lambda: terminal.send(b"x")):
            with pytest.raises(BackendFailed):
                call()
        terminal.resize(1, 1)
        terminal.ack(1)


def test_an_agent_that_has_hung_up_is_told_of_by_receive_alone() -> None:
    with attached() as (terminal, peer):
        peer.say(END)
        peer.sock.close()

        for _ in range(3):
            terminal.send(b"x" * 100_000)
        assert terminal.receive(5) == Ended(7)
    with attached() as (terminal, peer):
        peer.sock.close()
        with pytest.raises(BackendFailed):
            terminal.receive(5)


def test_a_flood_of_tiny_frames_costs_no_memory() -> None:
    with attached() as (terminal, peer):
        flood = b"".join(piece(at) for at in range(1, 20_001))
        wait = in_thread(lambda: peer.say(flood))
        for _ in range(20_000):
            terminal.receive(5)
            assert len(terminal._wire._splitter._buffer) <= 512 * 1024
        wait()


def test_a_command_streams_both_ways() -> None:
    with command() as (running, peer):
        running.send(b"in")
        running.end_input()
        running.end_input()
        running.send(b"too late")
        assert [peer.hear(), peer.hear()] == [(frames.STDIN, b"in"), (frames.END, b"")]
        peer.say(frames.frame(frames.STDOUT, b"out") + frames.frame(frames.STDERR, b"err") + END)

        came = [running.receive(5) for _ in range(4)]

        assert came == [Output(b"out"), Output(b"err", is_error=True), Ended(7), Ended(7)]
        peer.sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            peer.sock.recv(1)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (frames.header({"error": "bad-cwd", "message": "x"}), Invalid),
        (frames.header({"error": "bad-user", "message": "x"}), Invalid),
        (frames.header({"error": "failed", "message": "x"}), BackendFailed),
        (frames.frame(frames.STDOUT), BackendFailed),
        (frames.frame(frames.STDIN, b"x"), BackendFailed),
        (frames.header({"ok": 1, "exit_code": 1 << 40}), BackendFailed),
    ],
)
def test_what_a_command_comes_to_otherwise(said: bytes, error: type[HeyvmError]) -> None:
    with command() as (running, peer):
        peer.say(said)

        with pytest.raises(error):
            running.receive(5)


def test_it_works_with_gevents_sockets_too() -> None:
    """As in the workers: greenlets instead of threads, in a process of their own."""
    import subprocess
    import sys

    code = """
from gevent import monkey; monkey.patch_all()
import gevent
from tests.test_streams import (
    test_closing_ends_every_wait,
    test_frames_are_whole_whoever_sends_and_however_slowly_they_are_read,
    test_resize_and_ack_never_wait_and_the_latest_is_sent_by_who_receives,
    test_silence_is_none_and_no_failure,
)
from pytest import MonkeyPatch
test_closing_ends_every_wait()
test_frames_are_whole_whoever_sends_and_however_slowly_they_are_read()
test_resize_and_ack_never_wait_and_the_latest_is_sent_by_who_receives()
test_silence_is_none_and_no_failure(MonkeyPatch())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
