"""SIGHUP and SIGTERM under a client that keeps asking: nobody is refused, reset or cut short."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.server import Server, create, run, wait_until

RELOADS = 3


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    with Server(HEYVM_LOG="json") as server:
        yield server


class Asker(threading.Thread):
    """Asks again and again until it is told to stop; `failures` says what went wrong."""

    def __init__(self, port: int, ask: Callable[[int], None]) -> None:
        super().__init__(daemon=True)
        self.port, self.ask = port, ask
        self.over = threading.Event()
        self.asked, self.failures = 0, list[str]()

    def run(self) -> None:
        while not self.over.is_set():
            try:
                self.ask(self.port)
                self.asked += 1
            except Exception as error:
                self.failures.append(f"{time.time():.3f} {error!r}")


def ask_anew(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b'{"status":"ok"}\n')
    finally:
        connection.close()


class AskOn:
    """One connection for as long as the server does not say that it ends it."""

    def __init__(self) -> None:
        self.connection: http.client.HTTPConnection | None = None
        self.closed = 0

    def __call__(self, port: int) -> None:
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection, self.connection = self.connection, None
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b'{"status":"ok"}\n')
        if answer.headers.get("Connection", "").lower() == "close":
            self.closed += 1
            connection.close()
        else:
            self.connection = connection


@contextmanager
def asking(server: Server, *asks: Callable[[int], None]) -> Iterator[list[Asker]]:
    askers = [Asker(server.port, ask) for ask in asks]
    for asker in askers:
        asker.start()
    try:
        yield askers
    finally:
        for asker in askers:
            asker.over.set()
        for asker in askers:
            asker.join(15)


def reload(server: Server) -> None:
    before = set(server.worker_pids())
    os.kill(server.pid, signal.SIGHUP)
    wait_until(
        lambda: len(server.worker_pids()) == 2 and not before & set(server.worker_pids()),
        "all workers are new",
        timeout=30,
    )


def open_connection(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def events(server: Server, name: str) -> int:
    return sum(json.loads(line).get("event") == name for line in server.log.splitlines())


def test_reloads_refuse_and_reset_nobody(own: Server) -> None:
    keepers = own.keeper_pids()
    steady = AskOn()

    with asking(own, ask_anew, ask_anew, steady) as askers:
        for _ in range(RELOADS):
            reload(own)

    assert [asker.failures for asker in askers] == [[], [], []]
    assert min(asker.asked for asker in askers) > 3 * RELOADS
    assert steady.closed >= RELOADS
    assert own.keeper_pids() == keepers
    assert len(keepers) == 1
    assert events(own, "server.reloaded") == RELOADS


def test_a_reload_lets_a_request_finish(own: Server) -> None:
    with own.http() as http_:
        create(http_, slug="slow")
        found: dict[str, object] = {}

        def execute() -> None:
            with own.http() as other:
                found.update(run(other, "slow", "sleep 3; echo done"))

        thread = threading.Thread(target=execute)
        thread.start()
        wait_until(lambda: "in progress" in http_.get("/audit?limit=1").text, "it runs")
        reload(own)
        thread.join(10)

        assert found["stdout"] == "done\n"


def test_an_idle_connection_is_closed_without_a_word(own: Server) -> None:
    with open_connection(own) as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"ok" in read_answer(idle)
        began = time.monotonic()

        reload(own)

        assert idle.recv(100) == b""
        assert time.monotonic() - began < 5


def test_a_connection_that_has_not_asked_yet_is_answered(own: Server) -> None:
    """More of them than are given to one worker, from just before the signal."""
    waiting = [open_connection(own) for _ in range(20)]
    try:
        os.kill(own.pid, signal.SIGHUP)
        time.sleep(1.5)
        for one in waiting:
            one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert [b"200 OK" in read_answer(one) for one in waiting] == [True] * 20
    finally:
        for one in waiting:
            one.close()


def executing(own: Server, slug: str, command: str) -> socket.socket:
    """The connection of a request that is under way."""
    slow = open_connection(own)
    body = json.dumps({"command": command}).encode()
    head = f"POST /sandboxes/{slug}/execute HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    slow.sendall(head.encode() + body)
    with own.http() as http_:
        wait_until(lambda: "in progress" in http_.get("/audit?limit=1").text, "it runs")
    return slow


def test_sigterm_ends_in_time_and_lets_sandboxes_live(own: Server) -> None:
    with own.http() as http_:
        create(http_, slug="lives", start_command="sleep 1000")
        processes = run(http_, "lives", "pgrep -f 'sleep [1]000'")["stdout"]
    idle = open_connection(own)
    idle.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    read_answer(idle)
    slow = executing(own, "lives", "sleep 2; echo done")

    took = own.stop()

    assert took < 7
    answer = read_answer(slow)
    assert b"200 OK" in answer
    assert b"done" in answer
    assert b"connection: close" in answer.lower()
    assert idle.recv(100) == b""
    own.start()
    with own.http() as http_:
        assert run(http_, "lives", "pgrep -f 'sleep [1]000'")["stdout"] == processes


def test_a_request_that_takes_too_long_is_cut_off_with_its_command(own: Server) -> None:
    with own.http() as http_:
        create(http_, slug="endless")
    slow = executing(own, "endless", "sleep 999")

    took = own.stop()

    assert took < 9
    assert slow.recv(100) == b""  # nothing that could be taken for an answer
    own.start()
    with own.http() as http_:
        wait_until(
            lambda: run(http_, "endless", "pgrep -fc '[s]leep 999' || true")["stdout"] == "0\n",
            "the command is gone",
        )
        record = http_.get("/audit?sandbox=endless&limit=1000").json()["records"]
        assert "interrupted" in [one["outcome"] for one in record]


class Configured(Server):
    """A server with a configuration of its own."""

    @property
    def config(self) -> Path:
        return self.home / "conf.py"

    def start(self) -> None:
        self.config.write_text("from heyvm.serving import *\n")
        super().start()

    def _command(self) -> list[str]:
        return [*super()._command()[:4], str(self.config), *super()._command()[5:]]


def test_a_broken_configuration_keeps_the_server() -> None:
    with Configured(with_gunicorn=True) as server:
        server.config.write_text("def : this is no Python\n")

        reload(server)

        with server.http() as http_:
            assert http_.get("/health").ok
        assert "the one of before is kept" in server.log


def read_answer(sock: socket.socket) -> bytes:
    """One whole answer, with its body."""
    found = b""
    while b"\r\n\r\n" not in found:
        piece = sock.recv(65536)
        if not piece:
            return found
        found += piece
    head, _, rest = found.partition(b"\r\n\r\n")
    lengths = [
        int(line.split(b":")[1])
        for line in head.lower().split(b"\r\n")
        if line.startswith(b"content-length")
    ]
    while len(rest) < sum(lengths):
        rest += sock.recv(65536)
    return head + b"\r\n\r\n" + rest
