"""The tunnels' process: tickets of a real server, with whatever of it killed, hung or taken."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from heyvm import tickets
from heyvm.errors import HeyvmError, NotFound, StorageFull, Unavailable
from heyvm.lifecycle import Lifecycle
from heyvm.models import Tunnel
from heyvm.registry import Registry
from heyvm.settings import Settings
from heyvm.shells import Shells
from heyvm.tunnelproc import TunnelProcess
from heyvm.tunnels import LOCK_NAME, Tunnels
from tests.server import (
    PATIENCE,
    REPOSITORY,
    Server,
    Session,
    all_pids,
    command_line,
    create,
    environment,
    read_bytes,
    run,
    wait_until,
)

pytestmark = pytest.mark.root

T = TypeVar("T")
TIMEOUT_S = 20 * PATIENCE
NARROW_HOST = "127.0.0.2"
ECHO, GREETS, DEAF = 7001, 7002, 7003
# Echo says `bye` after its client's end; who greets waits for nothing; the deaf one never reads.
INSIDE = f"""
import socketserver, threading
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while received := self.request.recv(65536):
            self.request.sendall(received)
        self.request.sendall(b"bye")
class Greets(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"220 welcome")
class Deaf(socketserver.BaseRequestHandler):
    def handle(self):
        threading.Event().wait()
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address, daemon_threads, request_queue_size = True, True, 64
for number, kind in enumerate((Echo, Greets, Deaf)):
    server = Server(("127.0.0.1", {ECHO} + number), kind)
    threading.Thread(target=server.serve_forever).start()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Of its own: everything of it is killed here."""
    with Server() as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[Session]:
    with server.http() as session:
        yield session


@pytest.fixture(scope="module")
def ref(server: Server) -> str:
    """A sandbox in which servers listen."""
    with server.http() as http:
        return listening(http)


@pytest.fixture
def client() -> Iterator[Client]:
    with Client() as there:
        yield there


def listening(http: Session) -> str:
    ref = str(create(http, start_command=f"python3 -c '{INSIDE}'")["id"])
    look = f"python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", {DEAF}))'"
    wait_until(lambda: run(http, ref, look)["exit_code"] == 0, "the servers inside listen")
    return ref


class Client:
    """iroh's loop in a thread; a test has blocking sockets."""

    def __enter__(self) -> Client:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._links: list[tickets.Link] = []
        self._sockets: list[socket.socket] = []
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets:
            sock.close()
        for link in self._links:
            self.do(link.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(TIMEOUT_S)

    def dial(self, url: str, timeout: float = 10.0) -> tickets.Link:
        link = self.do(tickets.dial(url, timeout))
        self._links.append(link)
        return link

    def stream(self, link: tickets.Link) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.settimeout(TIMEOUT_S)
        self._sockets.append(ours)
        asyncio.run_coroutine_threadsafe(link.carry(theirs), self._loop)
        return ours

    def connect(self, url: str) -> socket.socket:
        return self.stream(self.dial(url))


def session(http: Session, ref: str, **fields: Any) -> dict[str, Any]:
    answer = http.post(f"/sandboxes/{ref}/shell-session", json=fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def tunnel(http: Session, ref: str, port: int = ECHO) -> dict[str, Any]:
    answer = http.post(f"/sandboxes/{ref}/tcp-tunnel", json={"port": port})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def all_of(sock: socket.socket) -> bytes:
    received = bytearray()
    with suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            received += chunk
    return bytes(received)


def echoes(sock: socket.socket) -> bool:
    sock.sendall(b"hello")
    return sock.recv(5) == b"hello"


def is_cut(sock: socket.socket, within: float) -> bool:
    sock.settimeout(within * PATIENCE)
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def leads_nowhere(client: Client, url: str) -> bool:
    try:
        client.dial(url, 1.0)
    except Unavailable:
        return True
    return False


def process_of(server: Server) -> int | None:
    found = [pid for pid in server.server_pids() if b"heyvm.tunnels" in command_line(pid)]
    assert len(found) < 2
    return found[0] if found else None


def udp_ports(server: Server) -> dict[str, int | None]:
    registry = Registry(server.data_dir / "registry.db")
    try:
        return {row.id: row.udp_port for row in registry.tunnels()}
    finally:
        registry.close()


# -- what a ticket leads to ------------------------------------------------------------------------


def test_a_tunnel_carries_bytes_and_each_direction_ends_by_itself(
    http: Session, ref: str, client: Client
) -> None:
    sock = client.connect(tunnel(http, ref)["connection_url"])
    blob = os.urandom(3_000_001)

    with ThreadPoolExecutor() as pool:
        received = pool.submit(all_of, sock)
        sock.sendall(blob)
        sock.shutdown(socket.SHUT_WR)

        assert received.result() == blob + b"bye"


def test_a_server_inside_may_speak_first(http: Session, ref: str, client: Client) -> None:
    assert all_of(client.connect(tunnel(http, ref, GREETS)["connection_url"])) == b"220 welcome"


def test_a_foreign_client_knows_the_plain_protocol_alone(
    http: Session, ref: str, client: Client
) -> None:
    url = tunnel(http, ref)["connection_url"]

    assert client.do(foreign(url, b"hello")) == b"hellobye"


async def foreign(url: str, said: bytes) -> bytes:
    """What somebody else's program would do: nothing of ours."""
    import iroh

    iroh.iroh_ffi.uniffi_set_event_loop(asyncio.get_running_loop())  # type: ignore[arg-type]
    options = iroh.EndpointOptions(
        preset=iroh.preset_minimal(), relay_mode=iroh.RelayMode.disabled()
    )
    endpoint = await iroh.Endpoint.bind(options)
    there = iroh.EndpointTicket.from_string(url.removeprefix("heyo://")).endpoint_addr()
    connection = await endpoint.connect(there, b"hey-proxy/tcp/0")
    stream = await connection.open_bi()
    await stream.send().write_all(said)
    await stream.send().finish()
    answer = await stream.recv().read_to_end(1000)
    await endpoint.close()
    return bytes(answer)


def test_a_port_on_which_nobody_listens_is_a_reset(http: Session, ref: str, client: Client) -> None:
    link = client.dial(tunnel(http, ref, 7999)["connection_url"])

    assert is_cut(client.stream(link), 5)
    assert not link.is_closed()


def test_a_port_has_one_ticket_whoever_asks_at_once(http: Session, ref: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: tunnel(http, ref, 7100), range(8)))

    assert len({one["connection_url"] for one in made}) == 1
    assert len({one["tunnel_id"] for one in made}) == 1


def test_a_shell_session_is_an_ssh_server_of_the_same_key_each_time(
    http: Session, ref: str, client: Client
) -> None:
    first, second = session(http, ref), session(http, ref)

    assert client.connect(first["connection_url"]).recv(8) == b"SSH-2.0-"
    assert first["ssh_host_key"] == second["ssh_host_key"]
    assert first["connection_url"] != second["connection_url"]


def test_a_sandbox_has_128_tickets_and_they_cost_nothing_while_nobody_comes(
    server: Server, http: Session, client: Client
) -> None:
    ref = str(create(http)["id"])

    with ThreadPoolExecutor(8) as pool:
        asked = pool.map(lambda _: http.post(f"/sandboxes/{ref}/shell-session"), range(130))
        answers = list(asked)
    codes = [answer.status_code for answer in answers]
    last = next(answer for answer in reversed(answers) if answer.status_code == 200)

    assert (codes.count(200), codes.count(429)) == (128, 2)
    assert client.connect(last.json()["connection_url"]).recv(4) == b"SSH-"
    wait_until(lambda: cpu_used(process_of(server), 1.0) < 0.1, "it is idle")
    assert http.delete(f"/sandboxes/{ref}").status_code == 204


def cpu_used(pid: int | None, seconds: float) -> float:
    def used() -> int:
        fields = read_bytes(f"/proc/{pid}/stat").rpartition(b") ")[2].split()
        return int(fields[11]) + int(fields[12])

    before = used()
    time.sleep(seconds)
    return (used() - before) / os.sysconf("SC_CLK_TCK")


def test_a_server_that_does_not_read_stops_its_client(
    server: Server, http: Session, ref: str, client: Client
) -> None:
    url = tunnel(http, ref, DEAF)["connection_url"]
    before = resident(process_of(server))
    sock = client.connect(url)
    sock.settimeout(1.0)

    with pytest.raises(TimeoutError):
        for _ in range(100):
            sock.sendall(bytes(1 << 20))

    assert resident(process_of(server)) - before < 40 << 20


def resident(pid: int | None) -> int:
    return int(read_bytes(f"/proc/{pid}/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- the end of a ticket ---------------------------------------------------------------------------


def test_a_deleted_ticket_is_gone_and_who_was_in_is_cut(
    http: Session, ref: str, client: Client
) -> None:
    made = tunnel(http, ref)
    link = client.dial(made["connection_url"])
    sock = client.stream(link)
    assert echoes(sock)

    assert http.delete(f"/sandboxes/{ref}/tcp-tunnel/{made['tunnel_id']}").status_code == 204

    assert is_cut(sock, 1)
    assert link.why() == "the ticket has expired or was deleted"
    assert http.delete(f"/sandboxes/{ref}/tcp-tunnel/{made['tunnel_id']}").status_code == 404
    assert leads_nowhere(client, made["connection_url"])
    assert tunnel(http, ref)["connection_url"] != made["connection_url"]


def test_an_expired_ticket_is_gone_and_who_was_in_is_cut(
    server: Server, http: Session, ref: str, client: Client
) -> None:
    made = session(http, ref, ttl_seconds=1)
    sock = client.connect(made["connection_url"])
    assert sock.recv(4) == b"SSH-"

    wait_until(lambda: is_over(sock), "it is cut", timeout=4)

    assert leads_nowhere(client, made["connection_url"])
    wait_until(lambda: made["session_id"] not in udp_ports(server), "its row is gone", timeout=4)


def is_over(sock: socket.socket) -> bool:
    sock.settimeout(0.2)
    try:
        while sock.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


def test_a_ticket_survives_a_stop_and_ends_with_its_sandbox(http: Session, client: Client) -> None:
    ref = listening(http)
    shell, port = session(http, ref)["connection_url"], tunnel(http, ref)["connection_url"]
    link = client.dial(port)
    sock = client.stream(link)
    assert echoes(sock)

    assert http.post(f"/sandboxes/{ref}/stop").status_code == 200
    assert is_cut(sock, 2)
    assert is_cut(client.stream(link), 2)  # a connection as before, a stream that is refused
    said = shell_says(shell)
    assert said.returncode == 255 and "is stopped" in said.stderr

    assert http.post(f"/sandboxes/{ref}/start").status_code == 200
    wait_until(lambda: answers(client, link), "the same ticket leads there again")
    assert shell_says(shell).stdout == "in\n"

    sock = client.stream(link)
    assert http.delete(f"/sandboxes/{ref}").status_code == 204
    assert is_cut(sock, 2)
    wait_until(link.is_closed, "the connection is closed too", timeout=3)
    assert leads_nowhere(client, port)


def answers(client: Client, link: tickets.Link) -> bool:
    try:
        return echoes(client.stream(link))
    except OSError:
        return False


def shell_says(url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "heyvm.cli", "connect", url, "--shell", "--", "echo in"]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


# -- faults ----------------------------------------------------------------------------------------


def test_a_killed_process_is_replaced_and_its_tickets_work_again(
    server: Server, http: Session, ref: str, client: Client
) -> None:
    url = tunnel(http, ref)["connection_url"]
    before = process_of(server)
    assert before is not None

    os.kill(before, signal.SIGKILL)

    wait_until(lambda: process_of(server) not in (None, before), "there is another", timeout=3)
    assert echoes(client.connect(url))
    assert tunnel(http, ref)["connection_url"] == url


def test_a_killed_keepers_clients_are_told_and_come_back_by_the_same_ticket(
    server: Server, http: Session, ref: str, client: Client
) -> None:
    url = tunnel(http, ref)["connection_url"]
    link = client.dial(url)
    sock = client.stream(link)
    assert echoes(sock)

    for pid in server.keeper_pids():
        os.kill(pid, signal.SIGKILL)

    assert is_cut(sock, 2)
    assert link.why() == "the server's keeper has ended: connect again in a moment"
    assert echoes(client.connect(url))


def test_nothing_of_it_stays_when_everything_else_is_killed(
    server: Server, http: Session, ref: str, client: Client
) -> None:
    url = tunnel(http, ref)["connection_url"]
    tunnels = process_of(server)
    assert tunnels is not None

    for pid in {*server.server_pids(), *server.launcher_pids()} - {tunnels}:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    wait_until(lambda: tunnels not in all_pids(), "it has ended by itself", timeout=4)
    server.kill()
    server.start()
    wait_until(lambda: answers_at(client, url), "the same ticket works")


def answers_at(client: Client, url: str) -> bool:
    try:
        return echoes(client.connect(url))
    except (HeyvmError, OSError):
        return False


def test_a_port_that_somebody_took_meanwhile_is_told_and_tried_again(
    server: Server, http: Session, ref: str, client: Client
) -> None:
    made = tunnel(http, ref)
    port = udp_ports(server)[made["tunnel_id"]]
    assert port is not None
    server.stop()
    assert process_of(server) is None

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", port))
        server.start()
        with server.http() as http:
            answer = http.post(f"/sandboxes/{ref}/tcp-tunnel", json={"port": ECHO})
            assert answer.status_code == 503
            assert f"UDP port {port} of 127.0.0.1 cannot be had" in answer.json()["detail"]
            assert session(http, ref)  # the others are served
            assert made["tunnel_id"] in udp_ports(server)

    wait_until(lambda: answers_at(client, made["connection_url"]), "it works when that is gone")


@contextmanager
def process(data_dir: Path) -> Iterator[TunnelProcess]:
    """The process alone, on a registry of its own, as the keeper has it."""
    Registry(data_dir / "registry.db").open()
    there = TunnelProcess(
        {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "HEYVM_DATA_DIR": str(data_dir),
            "HEYVM_RUN_DIR": str(data_dir / "run"),
        }
    )
    try:
        yield there
    finally:
        there.close()


@pytest.fixture
def data_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hv-") as name:
        yield Path(name)


def pid_in(data_dir: Path) -> int:
    """Of the process, once it has the lock of its directory."""
    found = [
        pid
        for pid in all_pids()
        if b"heyvm.tunnels" in command_line(pid) and os.fsencode(data_dir) in environment(pid)
    ]
    return found[0] if len(found) == 1 else 0


def test_a_process_that_hangs_is_killed_in_time_and_replaced(data_dir: Path) -> None:
    with process(data_dir) as tunnels:
        assert tunnels.ask({"op": "sync"}, 10) == {"ok": True}
        hung = pid_in(data_dir)
        os.kill(hung, signal.SIGSTOP)
        began = time.monotonic()

        with ThreadPoolExecutor() as pool:  # who waits for the turn waits no longer
            asked = [pool.submit(tunnels.ask, {"op": "sync"}, 1.0) for _ in range(3)]
            failed = [isinstance(one.exception(), Unavailable) for one in asked]
        waited = time.monotonic() - began

        assert True in failed and waited < 4 * PATIENCE
        assert hung not in all_pids()
        assert tunnels.is_needed_again() or False in failed
        assert tunnels.ask({"op": "sync"}, 10) == {"ok": True}
        with pytest.raises(NotFound):
            tunnels.ask({"op": "tunnel", "id": "none"}, 10)


def test_the_next_process_waits_for_the_last_and_kills_one_that_hangs(data_dir: Path) -> None:
    with process(data_dir) as last:
        last.ask({"op": "sync"}, 10)
        hung = pid_in(data_dir)
        os.kill(hung, signal.SIGSTOP)

        with process(data_dir) as following:
            assert following.ask({"op": "sync"}, 10) == {"ok": True}

        assert not last.is_running()
        assert (data_dir / LOCK_NAME).stat().st_mode & 0o077 == 0


def test_it_ends_only_where_it_is_not_needed_and_not_for_ever(data_dir: Path) -> None:
    with process(data_dir) as tunnels:
        tunnels.ask({"op": "sync"}, 10)

        tunnels.end_unless(lambda: True)
        assert tunnels.is_running()

        tunnels.end_unless(lambda: False)
        assert not tunnels.is_running() and not tunnels.is_needed_again()
        assert tunnels.ask({"op": "sync"}, 10) == {"ok": True}


def test_a_keeper_that_ends_waits_for_no_answer(data_dir: Path) -> None:
    with process(data_dir) as tunnels, ThreadPoolExecutor() as pool:
        tunnels.ask({"op": "sync"}, 10)
        os.kill(pid_in(data_dir), signal.SIGSTOP)
        asked = pool.submit(tunnels.ask, {"op": "sync"}, 30)
        time.sleep(0.1)
        began = time.monotonic()

        tunnels.close()

        assert time.monotonic() - began < 8 * PATIENCE
        assert isinstance(asked.exception(), Unavailable)
        assert not pid_in(data_dir)
        with pytest.raises(Unavailable):
            tunnels.ask({"op": "sync"}, 1)


class FullRegistry(Registry):
    """Of a disk that is full when a port is to be written; `is_full` says until when."""

    is_full = True

    def set_udp_port(self, tunnel_id: str, port: int) -> None:
        self.tried = port
        if self.is_full:
            raise StorageFull("no space left")
        super().set_udp_port(tunnel_id, port)


def test_a_port_that_cannot_be_written_down_is_not_kept(server: Server, ref: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        there = Registry(server.data_dir / "registry.db")
        there.snapshot(Path(name) / "registry.db")
        there.close()
        registry = FullRegistry(Path(name) / "registry.db")
        for row in registry.tunnels():
            registry.remove_tunnel(row.id)
        registry.add_tunnel(Tunnel("tcp-1", ref, "tcp", os.urandom(32), 1.0, port=80), limit=1)
        settings = Settings(Path(name), Path(name), tunnel_host="127.0.0.1")
        shells = Shells(Lifecycle(registry, {}, settings), lambda _: {})

        asyncio.run(fill(Tunnels(settings, registry, shells), registry))
        registry.close()


async def fill(tunnels: Tunnels, registry: FullRegistry) -> None:
    ask = {"op": "tunnel", "id": "tcp-1"}
    with pytest.raises(StorageFull, match="cannot be served: no space left"):
        await tunnels.answer(ask)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", registry.tried))

    registry.is_full = False
    assert (await tunnels.answer(ask))["url"].startswith("heyo://")
    assert registry.tunnels()[0].udp_port == registry.tried
    await tunnels.close()


def test_a_restore_forgets_every_ticket(server: Server, http: Session, ref: str) -> None:
    tunnel(http, ref)
    with tempfile.TemporaryDirectory() as name:
        there = Registry(server.data_dir / "registry.db")
        there.snapshot(Path(name) / "registry.db")
        there.close()
        copy = Registry(Path(name) / "registry.db")
        ids = frozenset(copy.known_ids())
        assert copy.tunnels()

        copy.settle_restored(ids, frozenset(), time.time())

        assert (copy.tunnels(), copy.known_ids()) == ([], ids)
        copy.close()


# -- settings --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow() -> Iterator[Server]:
    """A server with two UDP ports, which says all that it can."""
    first = two_free_ports()
    ports = f"{first}-{first + 1}"
    with Server(
        HEYVM_TUNNEL_HOST=NARROW_HOST, HEYVM_TUNNEL_PORTS=ports, HEYVM_LOG="json", HEYVM_DEBUG="1"
    ) as running:
        yield running


def test_tickets_have_the_address_and_the_ports_that_are_set_and_no_others(
    narrow: Server, client: Client
) -> None:
    with narrow.http() as http:
        ref = str(create(http)["id"])
        made = [session(http, ref) for _ in range(2)]
        answer = http.post(f"/sandboxes/{ref}/shell-session")

        ports = sorted(map(int, filter(None, udp_ports(narrow).values())))
        assert narrow.environ["HEYVM_TUNNEL_PORTS"] == f"{ports[0]}-{ports[1]}"
        for one in made:
            assert [at.rpartition(":")[0] for at in addresses(client, one)] == [NARROW_HOST]
            assert client.connect(one["connection_url"]).recv(4) == b"SSH-"
        assert answer.status_code == 503
        assert "HEYVM_TUNNEL_PORTS" in answer.json()["detail"]
        assert len(udp_ports(narrow)) == 2

        name = made[0]["session_id"]
        assert http.delete(f"/sandboxes/{ref}/shell-session/{name}").status_code == 204
        assert session(http, ref)
        assert http.delete(f"/sandboxes/{ref}").status_code == 204


def two_free_ports() -> int:
    # Another worker of pytest may look at the same time.
    for first in range(24000 + os.getpid() % 1000 * 4, 32000, 2):
        with suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as one:
            one.bind((NARROW_HOST, first))
            with socket.socket(type=socket.SOCK_DGRAM) as other:
                other.bind((NARROW_HOST, first + 1))
                return first
    raise AssertionError("there are no two free ports")


def addresses(client: Client, made: dict[str, Any]) -> list[str]:
    async def look() -> list[str]:
        import iroh

        ticket = iroh.EndpointTicket.from_string(tickets.ticket_of(made["connection_url"]))
        return list(ticket.endpoint_addr().direct_addresses())

    return client.do(look())


def test_without_iroh_all_else_works(data_dir: Path) -> None:
    (data_dir / "iroh.py").write_text("raise ImportError('not for this machine')\n")
    with Server(PYTHONPATH=f"{data_dir}:{REPOSITORY}") as server, server.http() as http:
        ref = str(create(http)["id"])

        for path, body in (("shell-session", {}), ("tcp-tunnel", {"port": 80})):
            answer = http.post(f"/sandboxes/{ref}/{path}", json=body)
            assert answer.status_code == 501, answer.text
            assert "iroh is not installed here" in answer.json()["detail"]

        assert udp_ports(server) == {}
        assert run(http, ref, "echo in")["stdout"] == "in\n"
        wait_until(lambda: process_of(server) is None, "the process has ended", timeout=5)
        assert "Traceback" not in server.log


# -- secrets ---------------------------------------------------------------------------------------


def test_no_ticket_and_no_key_is_where_it_should_not_be(narrow: Server, client: Client) -> None:
    with narrow.http() as http:
        ref = str(create(http)["id"])
        made = session(http, ref)
        assert client.connect(made["connection_url"]).recv(4) == b"SSH-"
        exposed = [http.get(f"/sandboxes/{ref}/shell-session").content]
        registry = Registry(narrow.data_dir / "registry.db")
        secret = registry.tunnels()[0].secret
        registry.close()
        first = process_of(narrow)
        assert first is not None
        limits = read_bytes(f"/proc/{first}/limits")
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: process_of(narrow) not in (None, first), "there is another")
        for pid in narrow.server_pids():
            exposed += [command_line(pid), environment(pid)]
        exposed += [narrow.log.encode(), *map(Path.read_bytes, records(narrow))]
        assert http.delete(f"/sandboxes/{ref}").status_code == 204

    ticket = tickets.ticket_of(made["connection_url"]).encode()
    for needle in (ticket, ticket[8:60], secret, secret.hex().encode(), repr(secret).encode()):
        assert not any(needle in place for place in exposed)
    assert re.search(rb"Max core file size\s+0\s+0\s", limits)


def records(server: Server) -> list[Path]:
    """What it has written down but for the registry."""
    found = [*(server.data_dir / "audit").rglob("*"), *server.run_dir.rglob("*")]
    return [path for path in found if path.is_file()]


def test_the_process_of_tickets_can_ask_no_router(server: Server, http: Session, ref: str) -> None:
    """What the filter keeps from it: tests/test_tickets.py."""
    tunnel(http, ref)

    assert filters(process_of(server)) == filters(server.pid) + 1


def filters(pid: int | None) -> int:
    found = re.search(rb"^Seccomp_filters:\s+([0-9]+)$", read_bytes(f"/proc/{pid}/status"), re.M)
    assert found is not None
    return int(found[1])
