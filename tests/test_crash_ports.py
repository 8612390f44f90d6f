"""SIGKILL to whoever makes, changes or removes endpoints, at each step: within seconds rows,
sockets, local ports and what agents listen on are one, and what was to be cut is cut."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import requests

from app import build
from heyvm import lifecycle, proxies, sockets
from heyvm.api.parts import Services
from heyvm.settings import from_env
from tests.server import Server, Session, command_line, create, read_bytes, wait_until

MENDED_WITHIN_S = 10.0
LINGER_S = 3.0  # what the agent may take to let go of a connection, and a second
PORT, SILENT = 8000, 8001
INSIDE = f"""
python3 -m http.server {PORT} --bind 127.0.0.1 -d /tmp &
exec python3 -c '
import socket
server, held = socket.create_server(("127.0.0.1", {SILENT}), backlog=1024), []
while True:
    held.append(server.accept())
'
"""
# Every how many lines a call is killed: all of them take minutes.
STRIDE = int(os.environ.get("HEYVM_TEST_STRIDE", "4"))
DELAYS_S = [step * 0.011 for step in range(24 // STRIDE)]
WATCHED = frozenset(module.__file__ for module in (lifecycle, proxies, sockets))


class World:
    """A server, a sandbox with a server inside, and what its endpoints are everywhere."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.named = "API_HOSTNAME" in server.environ
        self.http: Session = server.http()
        self.ref = create(self.http, start_command=INSIDE)["id"]
        self.path = f"/sandboxes/{self.ref}"
        one = self.post()
        wait_until(lambda: self.works(one), "it is served")
        self.clear()
        self.bare_agent = min(self.agent_sockets() for _ in self.moments(LINGER_S))

    def post(self, **fields: Any) -> dict[str, Any]:
        answer = self.http.post(f"{self.path}/proxy", json={"port": PORT, **fields})
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def listed(self) -> list[dict[str, Any]]:
        return list(self.http.get(f"{self.path}/proxy").json()["proxies"])

    def clear(self) -> None:
        for one in self.listed():
            self.http.delete(f"{self.path}/proxy?subdomain={one['subdomain']}")

    def status(self) -> str:
        return str(self.http.get(self.path).json()["status"])

    def call(self, what: str) -> None:
        answer = self.http.post(f"{self.path}/{what}")
        assert answer.status_code == 200, answer.text

    # -- what there is -----------------------------------------------------------------------------

    def files(self) -> set[str]:
        ports = self.server.run_dir / "ports"
        return {str(one.relative_to(ports)) for one in ports.glob("*/*")}

    def local_ports(self) -> set[int]:
        """What the keeper listens on."""
        found: set[int] = set()
        for pid in self.server.keeper_pids():
            mine = sockets_of(pid)
            for line in read_bytes(f"/proc/{pid}/net/tcp").decode().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in mine:
                    found.add(int(fields[1].rpartition(":")[2], 16))
        return found

    def moments(self, seconds: float) -> Iterator[None]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            yield
            time.sleep(0.1)

    def agent_sockets(self) -> int:
        """How many the agent has: as many more as it listens on, while nobody is connected."""
        (agent,) = [pid for pid in self.server.sandbox_pids() if is_first(pid)]
        return len(sockets_of(agent))

    def reach(self, endpoint: dict[str, Any]) -> socket.socket:
        """A connection to the port inside, by the endpoint's own way."""
        if not self.named:
            return socket.create_connection(("127.0.0.1", endpoint["local_port"]), timeout=5)
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(5)
        sock.connect(str(self.server.run_dir / "ports" / place(endpoint)))
        return sock

    def ask(self, endpoint: dict[str, Any]) -> socket.socket:
        """A request that waits, by a worker of the server."""
        host = "sandbox.test" if self.named else "localhost"
        sock = socket.create_connection(("127.0.0.1", self.server.port), timeout=5)
        sock.sendall(f"GET / HTTP/1.1\r\nHost: {endpoint['subdomain']}.{host}\r\n\r\n".encode())
        return sock

    def works(self, endpoint: dict[str, Any]) -> bool:
        if endpoint["port"] == SILENT:
            return True
        with contextlib.suppress(OSError), self.reach(endpoint) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return b" 200 " in sock.recv(4096).partition(b"\r\n")[0]
        return False

    def disorder(self) -> list[str]:
        """What does not fit together; empty when all does. The sandbox runs."""
        if self.status() != "running":
            return [f"the sandbox is {self.status()}"]
        rows = self.listed()
        wrong = [f"does not work: {one}" for one in rows if not self.works(one)]
        files = {place(one) for one in rows} if self.named else set()
        wrong += [f"file: {one}" for one in self.files() ^ files]
        ports = {one["local_port"] for one in rows if not self.named}
        wrong += [f"port: {one}" for one in self.local_ports() ^ ports]
        listeners = self.agent_sockets() - self.bare_agent
        if listeners != len(files):
            wrong.append(f"the agent has {listeners} sockets more for {len(files)} endpoints")
        return wrong

    def settle(self) -> None:
        found: list[str] = []

        def is_in_order() -> bool:
            found[:] = self.disorder()
            return not found

        wait_until(is_in_order, "in order", timeout=MENDED_WITHIN_S, check=False)
        assert found == []


def place(endpoint: dict[str, Any]) -> str:
    where = "public" if endpoint["is_public"] else "private"
    return f"{where}/{endpoint['subdomain']}.sock"


def is_first(pid: int) -> bool:
    status = read_bytes(f"/proc/{pid}/status").decode()
    (line,) = [one for one in status.splitlines() if one.startswith("NSpid:")] or [""]
    return line.split()[-1:] == ["1"]


def sockets_of(pid: int) -> set[str]:
    found: set[str] = set()
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except FileNotFoundError:  # a keeper that another has taken the place of
        return found
    for number in numbers:
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/{pid}/fd/{number}")
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


@pytest.fixture(scope="module", params=["by local port", "by name"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    by_name = request.param == "by name"
    with Server(API_HOSTNAME="sandbox.test") if by_name else Server() as server:
        yield World(server)


@pytest.fixture(autouse=True)
def _orderly(world: World) -> Iterator[None]:
    yield
    if world.status() != "running":
        assert world.http.post(f"{world.path}/start").status_code == 200
    world.clear()


# -- a process of its own, that dies ---------------------------------------------------------------


def killed(world: World, at: int, act: Callable[[Services], object]) -> bool:
    """Whether a worker that did this died at that line of what makes endpoints; else it ended."""
    pid = os.fork()
    if not pid:
        try:
            _act_and_die(world, at, act)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def _act_and_die(world: World, at: int, act: Callable[[Services], object]) -> None:
    lines = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in WATCHED:
            return None
        lines += event == "line"
        if lines == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    server = world.server
    places = {"HEYVM_DATA_DIR": str(server.data_dir), "HEYVM_RUN_DIR": str(server.run_dir)}
    services = build(from_env({"PATH": os.environ["PATH"], **places, **server.environ}))
    sys.settrace(trace)
    act(services)
    sys.settrace(None)
    os._exit(0)


def at_each_line(
    world: World,
    act: Callable[[Services], object],
    prepare: Callable[[], object] = lambda: None,
    stride: int = STRIDE,
) -> int:
    """Do it, killed ever later, until it is done. How often it was killed."""
    for times in itertools.count():
        prepare()
        if not killed(world, 1 + times * stride, act):
            return times
    raise AssertionError


def test_a_create_that_is_killed_leaves_all_or_nothing(world: World) -> None:
    times = at_each_line(world, lambda services: services.proxies.create(world.ref, PORT))

    assert times > 40 // STRIDE
    world.settle()


def test_a_delete_that_is_killed_is_finished_and_who_was_in_is_cut(world: World) -> None:
    held: dict[str, list[socket.socket]] = {}

    def prepare() -> None:
        made = world.post(port=SILENT)
        held[made["subdomain"]] = [world.reach(made), world.ask(made)]

    def delete(services: Services) -> None:
        services.proxies.delete(world.ref, list(held)[-1])

    assert at_each_line(world, delete, prepare) > 20 // STRIDE
    kept = {one["subdomain"] for one in world.listed()}
    assert len(kept) < len(held)
    for name, connections in held.items():
        for one in connections:
            if name not in kept:
                wait_until(lambda: is_over(one), "it is cut", timeout=MENDED_WITHIN_S)
            reset(one)
    world.settle()


def test_a_change_that_is_killed_is_finished_and_who_was_in_is_cut(world: World) -> None:
    held: dict[str, socket.socket] = {}

    def prepare() -> None:
        made = world.post(port=SILENT)
        held[made["subdomain"]] = world.reach(made)

    def change(services: Services) -> None:
        services.proxies.change(world.ref, list(held)[-1], is_public=False)

    assert at_each_line(world, change, prepare) > 20 // STRIDE
    private = {one["subdomain"] for one in world.listed() if not one["is_public"]}
    assert private
    for name, connection in held.items():
        if name in private:
            wait_until(lambda: is_over(connection), "it is cut", timeout=MENDED_WITHIN_S)
        reset(connection)
    world.settle()


@pytest.mark.parametrize("call", ["pause", "resume"])
def test_a_pause_or_resume_that_is_killed_leaves_endpoints_that_a_resume_brings_back(
    call: str, world: World
) -> None:
    world.post()
    world.post(is_public=False)

    def prepare() -> None:
        if call == "resume":
            world.call("pause")
        else:
            world.call("resume")

    def act(services: Services) -> None:
        getattr(services.lifecycle, call)(world.ref)

    assert at_each_line(world, act, prepare) > 8 // STRIDE
    world.call("resume")
    world.settle()


def test_a_start_that_is_killed_leaves_no_socket_until_the_next(world: World) -> None:
    world.post()
    world.post(is_public=False)
    ports = world.local_ports()

    def prepare() -> None:
        wait_until(lambda: world.status() != "provisioning", "settled", timeout=MENDED_WITHIN_S)
        world.call("force-stop")
        wait_until(lambda: not world.files(), "no socket is left", timeout=MENDED_WITHIN_S)

    def start(services: Services) -> None:
        services.lifecycle.start(world.ref)

    assert at_each_line(world, start, prepare, 8 * STRIDE) > 1
    world.call("start")
    world.settle()
    assert world.local_ports() == ports


# -- anybody, at any moment ------------------------------------------------------------------------

VICTIMS: dict[str, Callable[[Server], list[int]]] = {
    "a worker": lambda server: server.worker_pids()[:1],
    "the keeper": lambda server: server.keeper_pids(),
    "worker and keeper": lambda server: server.worker_pids()[:1] + server.keeper_pids(),
}


class Load(threading.Thread):
    """Makes, uses, changes and removes endpoints until told to stop; errors are expected."""

    def __init__(self, world: World) -> None:
        super().__init__(daemon=True)
        self.world, self.over = world, threading.Event()
        self.start()

    def run(self) -> None:
        with self.world.server.http() as http:
            while not self.over.is_set():
                with contextlib.suppress(requests.RequestException):
                    self.once(http)

    def once(self, http: Session) -> None:
        path = f"{self.world.path}/proxy"
        made = http.post(path, json={"port": PORT}, timeout=30)
        if made.status_code != 201:
            return
        # Where the keeper dies just then, the next one has it in a moment.
        wait_until(lambda: self.world.works(made.json()), "what was answered works", timeout=5)
        one = made.json()["subdomain"]
        http.patch(f"{path}/{one}", json={"is_public": False}, timeout=30)
        http.post(f"{self.world.path}/pause", timeout=30)
        http.post(f"{self.world.path}/resume", timeout=30)
        http.delete(f"{path}?subdomain={one}", timeout=30)


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.timeout(240)
def test_a_kill_at_any_moment_is_mended(victim: str, world: World) -> None:
    for delay in DELAYS_S:
        load = [Load(world) for _ in range(2)]
        time.sleep(0.05 + delay)  # what is killed is killed at another point each time
        victims = VICTIMS[victim](world.server)
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda gone=victims: not any(map(command_line, gone)), "they are gone")
        for one in load:
            one.over.set()
        for one in load:
            one.join(60)
            assert not one.is_alive()
        wait_until(lambda: answers(world), "the server answers")
        world.call("resume")
        world.settle()
        world.clear()


def answers(world: World) -> bool:
    with contextlib.suppress(requests.RequestException):
        return world.server.http().get("/health", timeout=2).ok
    return False


def is_over(connection: socket.socket) -> bool:
    """Whether it was closed, or answered."""
    connection.settimeout(0.05)
    try:
        connection.recv(4096)
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def reset(connection: socket.socket) -> None:
    """Not just its end: a server inside that does not care might have more to say."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
