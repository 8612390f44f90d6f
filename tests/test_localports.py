"""Local ports: a real server, a sandbox, and clients of every kind on 127.0.0.1."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import requests

from heyvm.models import Endpoint
from heyvm.registry import Registry
from heyvm.relay import Opening
from tests.server import Server, Session, create, read_bytes, wait_until

HTTP, ECHO, HANGS_UP, POURS, SILENT, NOBODY = range(8080, 8086)
# All that listens inside. Echo says `bye` after its client's end; what hangs up reads once first.
INSIDE = f"""
import http.server, socketserver, threading, sys
class Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")
    def log_message(self, *_):
        pass
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while received := self.request.recv(65536):
            self.request.sendall(received)
        self.request.sendall(b"bye")
class HangsUp(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.recv(65536)
class Pours(socketserver.BaseRequestHandler):
    def handle(self):
        for _ in range(64):
            self.request.sendall(bytes(1 << 20))
class Silent(socketserver.BaseRequestHandler):
    def handle(self):
        while self.request.recv(65536):
            pass
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address, daemon_threads, request_queue_size = True, True, 1024
for number, kind in enumerate((Page, Echo, HangsUp, Pours, Silent)):
    server = Server(("127.0.0.1", {HTTP} + number), kind)
    threading.Thread(target=server.serve_forever).start()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Of its own: its keeper is killed here."""
    with Server(JWT_SECRET="of the tests of local ports, long enough") as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[Session]:
    with server.http() as session:
        session.headers.update(server.authorization())
        yield session


@pytest.fixture(scope="module")
def ref(server: Server) -> str:
    """A sandbox in which servers listen, with one open port."""
    http = server.http()
    http.headers.update(server.authorization())
    made = create(http, start_command=f"python3 -c '{INSIDE}'", open_ports=[HTTP])
    wait_until(lambda: is_served(made["port_mappings"][0]["host_port"]), "it is served")
    return str(made["id"])


@pytest.fixture
def bind(http: Session, ref: str) -> Iterator[Callable[..., int]]:
    """`bind(port)` gives a local port that leads there."""
    names: list[str] = []

    def make(port: int, **fields: Any) -> int:
        answer = http.post(f"/sandboxes/{ref}/proxy", json={"port": port, **fields})
        assert answer.status_code == 201, answer.text
        names.append(answer.json()["subdomain"])
        return int(answer.json()["local_port"])

    yield make
    for name in names:
        http.delete(f"/sandboxes/{ref}/proxy?subdomain={name}")


def is_served(port: int) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{port}/", timeout=20).text == "hello"
    except requests.RequestException:
        return False


def dial(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def all_of(sock: socket.socket) -> bytes:
    """What comes until the end, however that looks."""
    received = bytearray()
    try:
        while chunk := sock.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return bytes(received)


def refuses(port: int) -> bool:
    try:
        dial(port).close()
    except ConnectionRefusedError:
        return True
    return False


def proxies(http: Session, ref: str) -> dict[str, dict[str, Any]]:
    rows = http.get(f"/sandboxes/{ref}/proxy").json()["proxies"]
    return {row["subdomain"]: row for row in rows}


# -- what passes -----------------------------------------------------------------------------------


def test_endpoints_open_ports_and_internal_urls_lead_inside(
    http: Session, ref: str, bind: Callable[..., int]
) -> None:
    (mapping,) = http.get(f"/sandboxes/{ref}").json()["port_mappings"]
    internal = http.get(f"/sandboxes/{ref}/internal-url?port={ECHO}").json()

    assert mapping["guest_port"] == HTTP and is_served(mapping["host_port"])
    assert is_served(bind(HTTP))
    with dial(internal["port"]) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
    with requests.Session() as keeps_alive:
        url = f"http://127.0.0.1:{bind(HTTP)}/"
        assert {keeps_alive.get(url, timeout=20).text for _ in range(5)} == {"hello"}


def test_the_end_of_one_way_leaves_the_other_open(bind: Callable[..., int]) -> None:
    with dial(bind(ECHO)) as sock:
        sock.sendall(b"over to you")
        sock.shutdown(socket.SHUT_WR)

        assert all_of(sock) == b"over to youbye"


def test_every_byte_arrives_in_both_directions(bind: Callable[..., int]) -> None:
    sent = os.urandom(16 << 20)
    with dial(bind(ECHO)) as sock, ThreadPoolExecutor() as pool:
        receiving = pool.submit(all_of, sock)
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)

        assert receiving.result(60) == sent + b"bye"


def test_clients_that_do_not_read_cost_little_and_hold_nobody_up(
    server: Server, bind: Callable[..., int]
) -> None:
    (keeper,) = server.keeper_pids()
    port, before = bind(POURS), resident_bytes(keeper)
    with ExitStack() as clients:
        idle = [clients.enter_context(dial(port)) for _ in range(150)]
        for one in idle:
            assert one.recv(1) == b"\0"
        assert is_served(bind(HTTP))

        assert resident_bytes(keeper) - before < 48 << 20
        assert len(all_of(idle[0])) == (64 << 20) - 1


def resident_bytes(pid: int) -> int:
    return int(read_bytes(f"/proc/{pid}/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- what is told where nobody answers -------------------------------------------------------------

REQUESTS = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"PROPFIND http://x/%20?a HTTP/1.0\n"]
OTHERS = [
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET /\r\n",
    b"get / HTTP/1.1\r\n",
    b"GET  / HTTP/1.1\r\n",
    b"GET / HTTP/2.0\r\n",
    b"GET /\x00 HTTP/1.1\r\n",
    b"GET\t/ HTTP/1.1\r\n",
    b"G" * 30 + b" / HTTP/1.1\r\n",
    b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n",
    b"\r\nGET / HTTP/1.1\r\n",
]


@pytest.mark.parametrize("line", REQUESTS)
def test_a_request_line_is_known_however_it_is_cut(line: bytes) -> None:
    for size in (1, 2, 7, len(line)):
        opening = Opening()
        assert not opening.is_http
        for at in range(0, len(line), size):
            opening.feed(line[at : at + size])
        assert opening.is_http and opening.is_decided


@pytest.mark.parametrize("line", OTHERS)
def test_nothing_else_passes_for_one(line: bytes) -> None:
    for size in (1, len(line)):
        opening = Opening()
        for at in range(0, len(line), size):
            opening.feed(line[at : at + size])
        assert opening.is_decided and not opening.is_http


@pytest.mark.parametrize(("port", "slug"), [(NOBODY, "port-closed"), (HANGS_UP, "port-closed")])
def test_who_speaks_http_gets_a_page_where_nobody_answers(
    bind: Callable[..., int], port: int, slug: str
) -> None:
    local = bind(port)
    answer = requests.get(f"http://127.0.0.1:{local}/", timeout=20)
    head = requests.head(f"http://127.0.0.1:{local}/", timeout=20)

    assert (answer.status_code, answer.json()["type"]) == (502, f"urn:heyvm:problem:{slug}")
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert (head.status_code, head.content) == (502, b"")
    with dial(local) as sock:
        sock.sendall(b"HEAD / HTTP/1.1\r\n\r\n")
        assert all_of(sock).endswith(b"\r\n\r\n")
    with dial(local) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nContent-Length: 8388608\r\n\r\n" + bytes(8 << 20))
        assert all_of(sock).startswith(b"HTTP/1.1 502 ")


def test_a_request_in_pieces_gets_it_too_and_nothing_else_does(bind: Callable[..., int]) -> None:
    local = bind(NOBODY)
    with dial(local) as pieces, ExitStack() as others, dial(local) as silent:
        silent_since = time.monotonic()
        closed = [others.enter_context(dial(local)) for _ in OTHERS]
        for sock, line in zip(closed, OTHERS):
            sock.sendall(line)
        for at in range(len(REQUESTS[0])):
            pieces.sendall(REQUESTS[0][at : at + 1])
            time.sleep(0.01)  # a piece of its own

        assert all_of(pieces).startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
        assert [all_of(sock) for sock in closed] == [b""] * len(OTHERS)
        assert all_of(silent) == b""
        assert 1.5 < time.monotonic() - silent_since < 10


def test_what_hangs_up_on_others_closes_without_a_word(bind: Callable[..., int]) -> None:
    with dial(bind(HANGS_UP)) as sock:
        sock.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        assert all_of(sock) == b""


# -- private ones ----------------------------------------------------------------------------------


def test_a_private_port_asks_for_a_token(server: Server, bind: Callable[..., int]) -> None:
    url = f"http://127.0.0.1:{bind(HTTP, is_public=False)}/"
    with requests.Session() as plain, requests.Session() as trusted:
        trusted.headers.update(server.authorization())

        assert [plain.get(url, timeout=20).status_code for _ in range(2)] == [401] * 2
        assert [trusted.get(url, timeout=20).text for _ in range(2)] == ["hello"] * 2


def test_nothing_but_http_passes_a_private_port(bind: Callable[..., int]) -> None:
    with dial(bind(ECHO, is_public=False)) as sock:
        sock.sendall(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        assert b"SSH" not in all_of(sock)


def test_what_is_made_private_is_so_at_once_and_on_the_same_port(http: Session, ref: str) -> None:
    made = http.post(f"/sandboxes/{ref}/proxy", json={"port": ECHO}).json()
    where = f"/sandboxes/{ref}/proxy/{made['subdomain']}"
    with dial(made["local_port"]) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        changed = http.patch(where, json={"is_public": False})
        assert changed.status_code == 200 and all_of(sock) == b""

    answer = requests.get(made["url"], timeout=20)
    assert (answer.status_code, changed.json()["local_port"]) == (401, made["local_port"])
    http.patch(where, json={"is_public": True})
    with dial(made["local_port"]) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
    http.delete(f"/sandboxes/{ref}/proxy?subdomain={made['subdomain']}")


def test_a_private_request_that_waits_inside_is_cut_with_its_endpoint(
    server: Server, http: Session, ref: str
) -> None:
    made = http.post(f"/sandboxes/{ref}/proxy", json={"port": SILENT, "is_public": False}).json()
    token = server.authorization()["Authorization"]
    with dial(made["local_port"]) as sock, ThreadPoolExecutor() as pool:
        request = f"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: {token}\r\n\r\n"
        sock.sendall(request.encode())
        reading = pool.submit(all_of, sock)
        time.sleep(0.3)  # it has reached the server inside, where nothing can be seen of it
        assert not reading.done()
        http.delete(f"/sandboxes/{ref}/proxy?subdomain={made['subdomain']}")

        # The agent cuts its end first, and there may be time to say so.
        assert reading.result(10)[:12] in (b"", b"HTTP/1.1 502")
        assert refuses(made["local_port"])


# -- what goes -------------------------------------------------------------------------------------


def test_a_deleted_endpoint_refuses_and_what_was_open_is_cut(http: Session, ref: str) -> None:
    made = http.post(f"/sandboxes/{ref}/proxy", json={"port": ECHO}).json()
    with dial(made["local_port"]) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        gone = http.delete(f"/sandboxes/{ref}/proxy?subdomain={made['subdomain']}")

        assert gone.status_code == 204 and refuses(made["local_port"])
        assert all_of(sock) == b""


def test_open_ports_come_and_go_with_a_patch(http: Session, ref: str) -> None:
    def change(*ports: int) -> dict[int, int]:
        answer = http.patch(f"/sandboxes/{ref}", json={"open_ports": ports}).json()
        return {one["guest_port"]: one["host_port"] for one in answer["port_mappings"]}

    before = change(HTTP)
    both = change(HTTP, ECHO)
    with dial(both[ECHO]) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        after = change(HTTP)
        assert all_of(sock) == b""

    assert before == after == {HTTP: both[HTTP]} and refuses(both[ECHO])
    assert is_served(after[HTTP])


def test_ports_go_with_their_sandbox(http: Session) -> None:
    made = create(http, open_ports=[80])
    bound = http.post(f"/sandboxes/{made['id']}/proxy", json={"port": 80}).json()["local_port"]
    ports = [made["port_mappings"][0]["host_port"], bound]
    assert not any(map(refuses, ports))

    assert http.delete(f"/sandboxes/{made['id']}").status_code == 204

    assert all(map(refuses, ports))


def test_an_endpoint_whose_maker_died_is_removed(server: Server, ref: str) -> None:
    registry = Registry(server.data_dir / "registry.db")
    half_made = Endpoint("abcdefgh01234567", ref, ECHO, time.time())
    registry.add_endpoint(half_made, limit=256)
    try:
        wait_until(lambda: registry.unready_endpoints() == [], "it is removed")
        assert registry.endpoint(half_made.subdomain) is None
    finally:
        registry.close()


# -- what stays ------------------------------------------------------------------------------------


def test_a_port_is_kept_while_its_sandbox_is_stopped(
    http: Session, ref: str, bind: Callable[..., int]
) -> None:
    port = bind(HTTP)
    http.post(f"/sandboxes/{ref}/stop")
    stopped = requests.get(f"http://127.0.0.1:{port}/", timeout=20)
    http.post(f"/sandboxes/{ref}/start")

    assert (stopped.status_code, stopped.json()["type"]) == (503, "urn:heyvm:problem:unavailable")
    wait_until(lambda: is_served(port), "it is served again")


def test_a_killed_keeper_costs_open_connections_and_nothing_else(
    server: Server, http: Session, ref: str, bind: Callable[..., int]
) -> None:
    port = bind(ECHO)
    before = proxies(http, ref)
    with dial(port) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        kill_keeper(server)
        assert all_of(sock) == b""

    wait_until(lambda: not refuses(port), "the next keeper listens")
    assert proxies(http, ref) == before


def test_a_call_that_waits_for_a_keeper_is_answered_by_the_next(
    server: Server, http: Session, ref: str
) -> None:
    (keeper,) = server.keeper_pids()
    registry = Registry(server.data_dir / "registry.db")
    os.kill(keeper, signal.SIGSTOP)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(http.post, f"/sandboxes/{ref}/proxy", json={"port": HTTP})
        wait_until(registry.unready_endpoints, "its row is there")
        os.kill(keeper, signal.SIGKILL)
        made = waiting.result(60)
    registry.close()

    assert made.status_code == 201, made.text
    assert is_served(made.json()["local_port"])
    http.delete(f"/sandboxes/{ref}/proxy?subdomain={made.json()['subdomain']}")


def test_ports_outlive_the_server_and_one_that_was_taken_is_replaced(
    server: Server, http: Session, ref: str, bind: Callable[..., int]
) -> None:
    kept, taken = bind(HTTP), bind(HTTP)
    http.close()  # the server waits for connections that are open
    server.stop()
    with socket.create_server(("127.0.0.1", taken)):
        server.start()
        http.base = server.url
        wait_until(lambda: is_served(kept), "the keeper has started")
        rows = proxies(http, ref).values()

    (row,) = (one for one in rows if one["warnings"])
    ports = {one["local_port"] for one in rows}
    assert kept in ports and taken not in ports
    assert row["warnings"] == [
        f"local port {taken} was taken by another program: it is {row['local_port']} now"
    ]
    assert is_served(row["local_port"])


def kill_keeper(server: Server) -> None:
    (keeper,) = server.keeper_pids()
    os.kill(keeper, signal.SIGKILL)


# -- floods ----------------------------------------------------------------------------------------


def test_a_flood_is_bounded_and_the_keeper_goes_on_with_its_work(
    http: Session, ref: str, bind: Callable[..., int]
) -> None:
    port = bind(ECHO)
    brief = create(http, ttl_seconds=2)
    with ExitStack() as flood:
        opened = [flood.enter_context(dial(port)) for _ in range(2000)]
        wait_until(
            lambda: http.get(f"/sandboxes/{brief['id']}").status_code == 404,
            "it expires",
            timeout=8,
        )
        answers = sum(map(echoes_at_once, opened))

    assert 900 < answers <= 1024
    wait_until(lambda: echoes_anew(port), "there is room again")


def echoes(sock: socket.socket) -> bool:
    try:
        sock.sendall(b"x")
        return sock.recv(1) == b"x"
    except OSError:
        return False


def echoes_at_once(sock: socket.socket) -> bool:
    """The server inside has descriptors for a few less than may wait for it."""
    sock.settimeout(0.5)
    return echoes(sock)


def echoes_anew(port: int) -> bool:
    with dial(port) as sock:
        return echoes(sock)


def test_the_page_is_json_that_names_no_path(bind: Callable[..., int]) -> None:
    with dial(bind(NOBODY)) as sock:
        sock.sendall(REQUESTS[0])
        _, _, body = all_of(sock).partition(b"\r\n\r\n")
    assert json.loads(body)["detail"] == f"nobody listens on port {NOBODY} in the sandbox"
