"""Attacks on the ways in to endpoints: by servers inside sandboxes, and by whoever may use one."""

from __future__ import annotations

import errno
import resource
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import requests

from heyvm import serving
from heyvm.errors import NotFound
from heyvm.gateway import Gateway
from heyvm.models import Endpoint
from heyvm.proxies import MAX_ENDPOINTS
from heyvm.settings import Settings
from tests.gatewayapp import BASE, KEY, PUBLIC, SECRET
from tests.gateways import Front, all_of, gateway, request
from tests.nginx import HOSTNAME, Nginx, traversable
from tests.server import Server


class Liar:
    """A server that says one thing to whoever comes, and keeps what it hears."""

    def __init__(self, listener: socket.socket) -> None:
        self.answer = b""
        self.heard: list[bytes] = []
        self._listener = listener
        Thread(target=self._serve, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def say(self, answer: bytes) -> None:
        """From now on, and forget what was heard."""
        self.answer = answer
        self.heard.clear()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                self.heard.append(client.recv(65536))
                client.sendall(self.answer)
                client.settimeout(0.5)
                try:
                    while piece := client.recv(65536):
                        self.heard.append(piece)
                except OSError:
                    pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(scope="module")
def inside() -> Iterator[Liar]:
    liar = Liar(socket.create_server(("127.0.0.1", 0)))
    yield liar
    liar.close()


@pytest.fixture(scope="module")
def at_socket() -> Iterator[tuple[Nginx, Liar]]:
    """nginx, with no server, and a liar at the socket of a public endpoint."""
    with traversable() as ports_dir:
        path = ports_dir / "public" / f"{PUBLIC}.sock"
        path.parent.mkdir()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        path.chmod(0o777)
        listener.listen()
        liar = Liar(listener)
        with Nginx(upstream="127.0.0.1:1", ports_dir=ports_dir) as running:
            yield running, liar
        liar.close()


@pytest.fixture(scope="module", params=["gunicorn", "localhttp"])
def front(
    request: pytest.FixtureRequest, inside: Liar, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    with gateway(request.param, inside.port, tmp_path_factory.mktemp("front")) as running:
        yield running


# -- what a server inside answers ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "became"), [("h2c", "h2c"), ("websocket", "h2c"), ("tls/1.2", "websocket")]
)
def test_no_protocol_but_a_websocket_carries_the_next_request_s_credentials_in(
    asked: str, became: str, front: Front, inside: Liar
) -> None:
    inside.say(f"HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: {became}\r\n\r\n".encode())
    with front.connect() as sock:
        sock.sendall(request("/", f"Upgrade: {asked}", "Connection: Upgrade"))
        assert b" 502 " in sock.recv(65536)
        sock.sendall(request("/", "Authorization: Basic aHVzaA==", "Connection: close"))
        all_of(sock)
    assert len(inside.heard) == 2  # each on a connection of its own
    assert b"upgrade: h2c" not in b"".join(inside.heard).lower()


@pytest.mark.parametrize("asked", ["h2c", "tls/1.2", "websocket, h2c", "xwebsocket"])
def test_nginx_becomes_no_tunnel_for_anything_else_either(
    asked: str, at_socket: tuple[Nginx, Liar]
) -> None:
    nginx, inside = at_socket
    inside.say(b"HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
    with nginx.connect(f"{PUBLIC}.{HOSTNAME}") as sock:
        host = f"{PUBLIC}.{HOSTNAME}"
        sock.sendall(request("/", f"Upgrade: {asked}", "Connection: Upgrade", host=host))
        assert sock.recv(65536).startswith(b"HTTP/1.1 400 ")
    assert inside.heard == []


def test_no_answer_moves_another_proxy_to_send_a_file_of_its_own(
    front: Front, inside: Liar
) -> None:
    headers = ("X-Accel-Redirect: /etc/passwd", "X-Sendfile: /etc/passwd", "X-Accel-Buffering: no")
    lines = ["HTTP/1.1 200 OK", "Content-Length: 2", *headers, "", "ok"]
    inside.say("\r\n".join(lines).encode())

    answer = front.get("/")

    assert answer.body == b"ok"
    assert b"/etc/passwd" not in answer.raw
    assert answer.header("X-Accel-Buffering") == ["no"]


@pytest.mark.parametrize("given", ["", "no\tid", 'x"} {"kind":"event', "i" * 129])
def test_the_application_gets_an_id_that_can_stand_in_a_log(
    given: str, front: Front, inside: Liar
) -> None:
    inside.say(b"nothing that is HTTP")

    answer = front.get("/", f"X-Request-Id: {given}")

    (told,) = answer.header("X-Request-Id")
    assert answer.status == 502 and told != given
    assert f"X-Request-Id: {told}\r\n".encode() in inside.heard[0]
    assert f'"request_id": "{told}"'.encode() in answer.body


# -- what is inside ------------------------------------------------------------------------------

STEAL = """
import ctypes
syscall = ctypes.CDLL(None).syscall
PIDFD_OPEN, PIDFD_GETFD = 434, 438
agent = syscall(PIDFD_OPEN, 1, 0)
print(sum(syscall(PIDFD_GETFD, agent, number, 0) >= 0 for number in range(64)))
"""


def test_nobody_inside_takes_a_listener_or_the_host_s_connection_from_the_agent(
    ref: str, run: Callable[..., dict[str, Any]]
) -> None:
    assert run(ref, f"python3 -c '{STEAL}'")["stdout"] == "0\n"


# -- changes of who may use it -------------------------------------------------------------------


class Late:
    """Endpoints, one of which is changed just before somebody who was let in is connected."""

    def __init__(self, now: Endpoint | None) -> None:
        self.row: Endpoint | None = Endpoint(PUBLIC, "sb-1", 80, 0.0)
        self.now = now
        self.inside, self.stream = socket.socketpair()

    def find(self, subdomain: str) -> Endpoint:
        if self.row is None:
            raise NotFound("it was deleted")
        return self.row

    def connect(self, endpoint: Endpoint) -> socket.socket:
        self.row = self.now
        return self.stream


@pytest.mark.parametrize(("now", "status"), [("private", "503"), ("gone", "404")])
def test_who_was_let_in_before_a_change_is_not_connected_after_it(now: str, status: str) -> None:
    private = Endpoint(PUBLIC, "sb-1", 80, 0.0, is_public=False)
    rows = Late(private if now == "private" else None)
    nowhere = Path("/nonexistent")
    settings = Settings(nowhere, nowhere, jwt_secret=SECRET, api_hostname=BASE)
    entry = Gateway(settings, rows, lambda: KEY).wrap(lambda *_: [])
    told: list[str] = []
    environ: dict[str, Any] = {
        "REQUEST_METHOD": "GET",
        "RAW_URI": "/",
        "HTTP_HOST": f"{PUBLIC}.{BASE}",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "192.0.2.1",
    }
    answer: Any = entry(environ, lambda status, *_: told.append(status))
    list(answer)
    answer.close()

    assert [one[:3] for one in told] == [status]
    rows.inside.settimeout(5)
    with rows.inside:
        assert rows.inside.recv(1000) == b""


# -- floods --------------------------------------------------------------------------------------


def test_clients_of_endpoints_find_descriptors_and_leave_some_for_the_api() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # what a shell has
    try:
        server = Server()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with server:
        # Up to four for each connection that is forwarded.
        enough = min(hard, 4 * serving.worker_connections + 256)
        for pid in server.worker_pids():
            assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] >= enough


def test_many_who_create_and_delete_at_once_get_what_there_is_and_leave_nothing(
    server: Server, ref: str
) -> None:
    local = threading.local()

    def ask(method: str, path: str, **options: Any) -> requests.Response:
        if not hasattr(local, "http"):
            local.http = server.http()
        answer: requests.Response = local.http.request(method, f"/sandboxes/{ref}{path}", **options)
        return answer

    def create(number: int) -> requests.Response:
        return ask("POST", "/proxy", json={"port": 1 + number, "is_public": number % 2 == 0})

    with ThreadPoolExecutor(8) as crowd:
        internal = list(crowd.map(lambda _: ask("GET", "/internal-url?port=7"), range(16)))
        answers = list(crowd.map(create, range(MAX_ENDPOINTS + 15)))
        made = [one.json() for one in answers if one.status_code == 201]
        ports = {one["local_port"] for one in made} | {internal[0].json()["port"]}
        listed = ask("GET", "/proxy").json()["proxies"]
        names = [one["subdomain"] for one in made]
        gone = list(crowd.map(lambda name: ask("DELETE", f"/proxy?subdomain={name}"), names * 2))

    assert {one.status_code for one in internal} == {200}
    assert len({one.json()["port"] for one in internal}) == 1
    assert Counter(one.status_code for one in answers) == {201: MAX_ENDPOINTS - 1, 429: 16}
    assert {one["subdomain"] for one in listed} == set(names)
    assert len(ports) == MAX_ENDPOINTS
    assert Counter(one.status_code for one in gone) == {204: len(names), 404: len(names)}
    assert ask("GET", "/proxy").json() == {"proxies": []}
    for port in ports - {internal[0].json()["port"]}:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED
