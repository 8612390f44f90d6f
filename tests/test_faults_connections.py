"""Clients that are slow, silent, too many or gone, and a server that runs out of descriptors."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from tests.server import Server, Session, wait_until

Make = Callable[..., dict[str, Any]]
CROWD = 400
IDLE = 80  # descriptors of two workers that do nothing, at most
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
MIB = 1024 * 1024


class Poor(Server):
    """A server whose processes may have few descriptors each."""

    descriptors = 256  # a worker needs up to 170 while it makes the template

    def _command(self) -> list[str]:
        return ["prlimit", f"--nofile={self.descriptors}:{self.descriptors}", *super()._command()]


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    with Server() as running:
        await_warmth(running)
        yield running


def await_warmth(server: Server) -> None:
    """Until each worker has made what the first sandbox needs, which takes descriptors."""
    wait_until(
        lambda: len(server.launcher_pids()) == 2 and descriptors(server) < IDLE,
        "both workers are ready",
        timeout=60,
    )


@pytest.fixture
def crowd() -> Iterator[Callable[..., list[socket.socket]]]:
    """`crowd(server, count, first)` opens so many connections that have sent so much."""
    with contextlib.ExitStack() as stack:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < 2 * CROWD:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * CROWD), hard))

        def gather(server: Server, count: int, first: bytes = b"") -> list[socket.socket]:
            found = []
            for _ in range(count):
                sock = socket.create_connection(("127.0.0.1", server.port), timeout=10)
                found.append(stack.enter_context(sock))
                sock.sendall(first)
            return found

        yield gather


def assert_health_answers(server: Server, within: float = 2.0) -> None:
    """On ten connections of their own: whichever worker takes them."""
    for _ in range(10):
        began = time.monotonic()
        answer = requests.get(f"{server.url}/health", timeout=10)
        assert answer.json() == {"status": "ok"}
        # Generous: machines that run tests are busy. A pinned worker would never answer.
        assert time.monotonic() - began < within


def descriptors(server: Server) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in server.worker_pids())


def post(path: str, length: int) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Content-Length: {length}", "", "")).encode()


# -- the slow and the silent ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"GET /hea",
        b"GET /health HTTP/1.1\r\nHost: localh",
        GET,
        post("/sandboxes", 1000) + b'{"na',
        b"POST /sandboxes HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    ],
    ids=["silent", "in the line", "in a header", "kept alive", "in the body", "in a chunk"],
)
def test_health_answers_beside_hundreds_who_do_not_go_on(
    first: bytes, own: Server, crowd: Callable[..., list[socket.socket]]
) -> None:
    slow = crowd(own, CROWD, first)
    wait_until(lambda: descriptors(own) >= CROWD, "the workers hold them")

    assert_health_answers(own)
    for sock in slow:
        with contextlib.suppress(OSError):
            sock.sendall(b"x")
    assert_health_answers(own)

    for sock in slow:
        sock.close()
    wait_until(lambda: descriptors(own) <= IDLE, "nothing is left of them")


def test_headers_that_trickle_are_not_waited_for_for_ever(
    crowd: Callable[..., list[socket.socket]],
) -> None:
    with Server(GUNICORN_CMD_ARGS="--keep-alive 2") as impatient:
        (sock,) = crowd(impatient, 1, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        sock.settimeout(0.1)
        began = time.monotonic()
        ended = False
        while not ended and time.monotonic() - began < 20:
            with contextlib.suppress(TimeoutError):
                try:
                    sock.sendall(b"x")
                    ended = sock.recv(4096) == b""
                except ConnectionError:
                    ended = True
        assert ended


def test_answers_that_nobody_reads_hold_nobody_up(
    own: Server, crowd: Callable[..., list[socket.socket]]
) -> None:
    with own.http() as http:
        path = f"/sandboxes/{http.post('/sandboxes', json={}).json()['id']}"
        made = f"truncate -s {64 * MIB} big"
        assert http.post(f"{path}/execute", json={"command": made}).json()["exit_code"] == 0
        crowd(own, 30, f"GET {path}/files/big HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

        assert_health_answers(own)
        assert http.post(f"{path}/execute", json={"command": "true"}).json()["exit_code"] == 0
        assert http.delete(path).status_code == 204


def test_clients_that_leave_in_the_middle_leave_nothing(
    own: Server, crowd: Callable[..., list[socket.socket]]
) -> None:
    with own.http() as http:
        path = f"/sandboxes/{http.post('/sandboxes', json={}).json()['id']}"
        http.post(f"{path}/execute", json={"command": f"truncate -s {64 * MIB} big"})
        body = b'{"command": "sleep 4716"}'
        everybody = [
            *crowd(own, 20, post(f"{path}/execute", len(body)) + body),
            *crowd(own, 20, f"GET {path}/files/big HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()),
            *crowd(
                own, 20, f"GET {path}?wait=stopped HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
            ),
            *crowd(own, 20, post(f"{path}/files/upload", 9 * MIB) + bytes(1000)),
        ]

        def sleeping() -> int:
            command = {"command": "pgrep -c -x -f 'sleep 4716'"}
            return int(http.post(f"{path}/execute", json=command).json()["stdout"])

        wait_until(lambda: sleeping() == 20, "the commands run")
        for sock in everybody:
            sock.close()

        wait_until(lambda: sleeping() == 0, "their commands have ended")
        # Who waits for a state looks at its client only when the wait is over.
        wait_until(lambda: descriptors(own) <= IDLE, "their connections are gone", timeout=45)


# -- no descriptors ------------------------------------------------------------------------------


def test_a_server_without_descriptors_refuses_and_recovers(
    crowd: Callable[..., list[socket.socket]],
) -> None:
    with Poor() as poor, poor.http() as http:
        await_warmth(poor)
        path = f"/sandboxes/{http.post('/sandboxes', json={}).json()['id']}"
        workers = poor.worker_pids()
        held = crowd(poor, 2 * Poor.descriptors + 100, GET)

        statuses = [status(poor, f"{path}/files") for _ in range(5)]
        statuses += [status(poor, path) for _ in range(5)]

        assert set(statuses) <= {200, 502, 503, None}, statuses
        assert {None, 502, 503} & set(statuses), "it never ran out of descriptors"
        for sock in held:
            sock.close()
        wait_until(lambda: answers(poor), "it answers again")
        assert poor.worker_pids() == workers
        with poor.http() as later:
            wait_until(lambda: execute(later, path) == 200, "commands run again")
            assert later.post(f"{path}/restart").json()["status"] == "running"
        assert len(poor.log) < MIB  # gevent tells of each failed accept, ever more seldom


def status(server: Server, path: str) -> int | None:
    """None where there is no answer within a second."""
    with contextlib.suppress(requests.RequestException):
        return requests.get(server.url + path, timeout=1).status_code
    return None


def answers(server: Server) -> bool:
    return all(status(server, "/health") == 200 for _ in range(10))


def execute(http: Session, path: str) -> int:
    return http.post(f"{path}/execute", json={"command": "true"}).status_code


def test_commands_beyond_the_descriptors_are_refused_and_the_others_run() -> None:
    with Poor() as poor, poor.http() as http:
        await_warmth(poor)
        path = f"/sandboxes/{http.post('/sandboxes', json={}).json()['id']}"

        def one(_: int) -> int | None:
            with contextlib.suppress(requests.RequestException):
                answer = requests.post(
                    f"{poor.url}{path}/execute", json={"command": "sleep 2"}, timeout=60
                )
                return answer.status_code
            return None

        with ThreadPoolExecutor(300) as pool:
            statuses = list(pool.map(one, range(300)))

        # 502: the agent, which may have no more descriptors than the server, has none left.
        assert set(statuses) <= {200, 502, 503, None}, statuses
        assert statuses.count(200) >= 20
        wait_until(lambda: execute(http, path) == 200, "commands run again")
        assert len(poor.log) < MIB
