"""The unix sockets of proxy endpoints, with a real sandbox behind them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from heyvm import guest, locks
from heyvm.errors import BackendFailed, HeyvmError, Misconfigured, NotFound
from heyvm.models import Endpoint, Sandbox, Status
from heyvm.registry import Registry
from heyvm.settings import Settings
from heyvm.sockets import Sockets
from tests.boxes import Box, Boxes
from tests.server import ORDINARY, REPOSITORY, Server, create, run, wait_until

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs another group, or user: run as root")
GROUP = 33  # www-data
ECHO = """
import socket, sys, threading
def serve(sock):
    while some := sock.recv(65536):
        sock.sendall(some)
    sock.close()
server = socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=100,
    family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
print("up", flush=True)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],)).start()
"""
PORT, PORT_6 = 8000, 8006


class World:
    """A sandbox that runs, its row, and `sockets` for its endpoints."""

    def __init__(self, boxes: Boxes) -> None:
        group = GROUP if os.geteuid() == 0 else None
        self.settings = dataclasses.replace(
            boxes.settings,
            api_hostname="sandbox.test",
            ports_dir=boxes.home / "ports",
            ports_group=group,
        )
        self.registry = Registry(boxes.home / "registry.db")
        self.registry.open()
        self.box: Box = boxes.start()
        self.registry.add(self.box.sandbox)
        self.sockets = Sockets(self.settings, self.registry, lambda _: boxes.backend)
        self.sockets.open_directories()
        self._number = 0

    @property
    def sandbox(self) -> Sandbox:
        return self.registry.get(self.box.sandbox.id)

    def row(self, port: int = PORT, *, is_public: bool = True, ready: bool = True) -> Endpoint:
        self._number += 1
        name = f"endpoint{self._number:08}"
        endpoint = Endpoint(name, self.box.sandbox.id, port, 0.0, is_public=is_public)
        self.registry.add_endpoint(endpoint, limit=1000, ready=ready)
        return endpoint

    def endpoint(self, port: int = PORT, *, is_public: bool = True) -> Endpoint:
        endpoint = self.row(port, is_public=is_public)
        self.sockets.open(self.sandbox, endpoint)
        return endpoint

    def files(self) -> list[str]:
        ports = self.settings.ports
        return sorted(str(one.relative_to(ports)) for one in ports.glob("*/*"))

    def connect(self, endpoint: Endpoint, place: str = "public") -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(str(self.settings.ports / place / f"{endpoint.subdomain}.sock"))
        return sock

    def works(self, endpoint: Endpoint, place: str = "public") -> bool:
        return echoes(self.settings.ports / place / f"{endpoint.subdomain}.sock")

    def mend(self) -> None:
        self.sockets.mend([one.sandbox for one in self.registry.running()])

    def set_status(self, status: Status) -> None:
        claimed = self.registry.claim(self.sandbox.id, expect=frozenset(Status), become=status)
        assert claimed is not None

    def reset(self) -> None:
        self.set_status(Status.RUNNING)
        for endpoint in (*self.registry.endpoints(), *self.registry.unready_endpoints()):
            self.registry.remove_endpoint(endpoint.subdomain)
            self.sockets.close(self.sandbox, endpoint)


@pytest.fixture(scope="module")
def running() -> Iterator[World]:
    with Boxes() as boxes:
        world = World(boxes)
        script = "/workspace/echo.py"
        with boxes.backend.connect(world.box.sandbox) as sock:
            guest.write(sock, "/workspace", "echo.py", iter([ECHO.encode()]))
        for host, port in (("127.0.0.1", PORT), ("::1", PORT_6)):
            line = f"python3 {script} {host} {port} >/tmp/{port} 2>&1 </dev/null & "
            world.box.output(line + f"until grep up /tmp/{port}; do sleep 0.05; done")
        yield world
        world.registry.close()


@pytest.fixture
def world(running: World) -> Iterator[World]:
    yield running
    running.reset()
    assert running.files() == []


# -- one endpoint ----------------------------------------------------------------------------------


def test_it_works_when_it_is_open_and_is_gone_when_it_is_closed(world):
    endpoint = world.endpoint()
    assert world.works(endpoint)
    with world.connect(endpoint) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"

        world.registry.remove_endpoint(endpoint.subdomain)
        world.sockets.close(world.sandbox, endpoint)

        assert sock.recv(1) == b""
    assert world.files() == []


def test_a_private_one_lies_elsewhere(world):
    endpoint = world.endpoint(is_public=False)

    assert world.files() == [f"private/{endpoint.subdomain}.sock"]
    assert world.works(endpoint, "private")


def test_a_server_on_the_other_loopback_address_is_found(world):
    assert world.works(world.endpoint(PORT_6))


def test_where_nobody_listens_the_connection_is_closed(world):
    with world.connect(world.endpoint(9)) as sock:
        assert sock.recv(1) == b""


@AS_ROOT
def test_the_group_may_use_it_and_nobody_else(world):
    endpoint = world.endpoint()

    found = (world.settings.ports / "public" / f"{endpoint.subdomain}.sock").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o760, 0, GROUP)
    for place in ("", "public", "private", "paused"):
        above = (world.settings.ports / place).stat()
        assert (stat.S_IMODE(above.st_mode), above.st_gid) == (0o750, GROUP)


def test_nothing_of_it_is_to_be_found_inside(world):
    endpoint = world.endpoint()
    line = f"find / -xdev -name '*{endpoint.subdomain}*' 2>/dev/null; cat /proc/net/unix"

    seen = world.box.output(line)

    assert endpoint.subdomain not in seen
    assert str(world.settings.ports) not in seen


def test_an_agent_that_does_not_answer_leaves_nothing(world):
    gone = dataclasses.replace(world.sandbox, state={"socket": "/nowhere"})
    endpoint = world.row()

    with pytest.raises(BackendFailed):
        world.sockets.open(gone, endpoint)

    assert world.files() == []


def test_one_that_is_deleted_while_it_is_made_is_not_there_afterwards(world):
    endpoint = world.row()
    world.registry.remove_endpoint(endpoint.subdomain)

    with pytest.raises(NotFound):
        world.sockets.open(world.sandbox, endpoint)

    assert world.files() == []


def test_one_that_became_private_while_it_was_made_is_private(world):
    endpoint = world.row()
    world.registry.set_public(endpoint.subdomain, False)

    world.sockets.open(world.sandbox, endpoint)

    assert world.files() == [f"private/{endpoint.subdomain}.sock"]


def test_to_make_it_private_is_to_cut_who_came_in_before(world):
    endpoint = world.endpoint()
    with world.connect(endpoint) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        changed = world.registry.set_public(endpoint.subdomain, False)

        world.sockets.change(world.sandbox, changed)

        assert sock.recv(1) == b""
    assert world.files() == [f"private/{endpoint.subdomain}.sock"]
    assert world.works(endpoint, "private")


def test_without_a_host_name_there_are_no_sockets_but_connections_are_cut(world):
    local = Sockets(
        dataclasses.replace(world.settings, api_hostname=None),
        world.registry,
        lambda _: world.box.backend,
    )
    endpoint = world.row()
    local.open(world.sandbox, endpoint)
    local.mend([world.sandbox])
    assert world.files() == []
    with world.box.backend.connect(world.sandbox) as sock:
        guest.connect_port(sock, PORT, endpoint.subdomain)

        local.close(world.sandbox, endpoint)

        sock.settimeout(10)
        assert sock.recv(1) == b""


# -- pause -----------------------------------------------------------------------------------------


def test_a_halted_sandbox_has_none_until_it_goes_on(world):
    public, private = world.endpoint(), world.endpoint(is_public=False)
    world.set_status(Status.PAUSED)
    world.sockets.hide(world.sandbox)
    names = sorted((public.subdomain, private.subdomain))
    assert world.files() == [f"paused/{name}.sock" for name in names]
    world.mend()
    assert world.files() == [f"paused/{name}.sock" for name in names]

    world.sockets.show(world.sandbox)

    assert world.works(public)
    assert world.works(private, "private")


def test_what_is_made_private_meanwhile_comes_back_private(world):
    endpoint = world.endpoint()
    world.set_status(Status.PAUSED)
    world.sockets.hide(world.sandbox)
    changed = world.registry.set_public(endpoint.subdomain, False)
    world.sockets.change(world.sandbox, changed)
    assert world.files() == [f"paused/{endpoint.subdomain}.sock"]

    world.sockets.show(world.sandbox)

    assert world.files() == [f"private/{endpoint.subdomain}.sock"]


def test_one_that_is_deleted_while_it_is_halted_is_cut_when_it_goes_on(world):
    endpoint = world.endpoint()
    with world.connect(endpoint) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        world.set_status(Status.PAUSED)
        with contextlib.suppress(HeyvmError):
            world.box.backend.pause(world.sandbox)
        world.registry.remove_endpoint(endpoint.subdomain)
        world.sockets.close(world.sandbox, endpoint)

        world.box.backend.resume(world.sandbox)

        assert sock.recv(1) == b""


# -- mending ---------------------------------------------------------------------------------------


def test_what_somebody_removed_comes_back(world):
    endpoint = world.endpoint()
    (world.settings.ports / "public" / f"{endpoint.subdomain}.sock").unlink()

    world.mend()

    assert world.works(endpoint)


def test_all_that_is_right_stays_as_it_is(world):
    endpoint = world.endpoint()
    path = world.settings.ports / "public" / f"{endpoint.subdomain}.sock"
    before = path.stat()

    world.mend()

    assert path.stat() == before


def test_the_directories_come_back_too(world):
    endpoint = world.endpoint(is_public=False)
    for path in (world.settings.ports / "private").glob("*"):
        path.unlink()
    (world.settings.ports / "private").rmdir()

    world.mend()

    assert world.works(endpoint, "private")


@pytest.mark.parametrize("place", ["private", "paused"])
def test_what_lies_in_the_wrong_place_is_moved_and_cut(world, place):
    """Where a worker died in the midst of a change, or of a resume."""
    endpoint = world.endpoint()
    with world.connect(endpoint) as sock:
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        ports, name = world.settings.ports, f"{endpoint.subdomain}.sock"
        (ports / "public" / name).rename(ports / place / name)

        world.mend()

        assert world.files() == [f"public/{name}"]
        assert sock.recv(1) == b""
    assert world.works(endpoint)


def test_what_is_half_made_or_nobodys_goes(world):
    endpoint = world.endpoint()
    for name in (f"paused/{endpoint.subdomain}.sock.new", "public/nobodys.sock"):
        (world.settings.ports / name).touch()

    world.mend()

    assert world.files() == [f"public/{endpoint.subdomain}.sock"]
    assert world.works(endpoint)


def test_what_somebody_is_just_making_is_left_alone(world):
    unready, missing = world.row(ready=False), world.row()
    half = world.settings.ports / "paused" / f"{unready.subdomain}.sock.new"
    half.touch()
    held = locks.try_lock(world.settings.run_dir / "locks", world.sandbox.id)
    assert held is not None
    with held:
        world.mend()

        assert world.files() == [f"paused/{unready.subdomain}.sock.new"]
    world.mend()
    assert world.works(missing)


def test_a_sandbox_that_starts_keeps_what_it_has_made_and_one_that_stopped_has_none(world):
    endpoint = world.endpoint()
    world.set_status(Status.PROVISIONING)
    held = locks.try_lock(world.settings.run_dir / "locks", world.sandbox.id)
    assert held is not None
    with held:
        world.mend()
        assert world.works(endpoint)
    world.set_status(Status.STOPPED)

    world.mend()

    assert world.files() == []


def test_all_of_a_sandbox_are_opened_and_removed_together(world):
    rows = [world.row(), world.row(is_public=False)]
    world.sockets.open_all(world.sandbox)
    assert world.works(rows[0])
    assert world.works(rows[1], "private")

    world.sockets.remove_all(world.sandbox.id)

    assert world.files() == []


# -- where they lie --------------------------------------------------------------------------------


def sockets_in(tmp_path: Path, **settings: object) -> Sockets:
    run_dir = tmp_path / "run"
    run_dir.mkdir(mode=0o700, exist_ok=True)
    given = Settings(data_dir=tmp_path, run_dir=run_dir, api_hostname="sandbox.test")
    given = dataclasses.replace(given, **settings)  # type: ignore[arg-type]
    return Sockets(given, Registry(tmp_path / "registry.db"), lambda _: None)  # type: ignore[arg-type, return-value]


@pytest.fixture
def short():
    """A directory with a short path: a socket's has at most 107 bytes, and pytest's own are long
    where several workers run."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="hs-") as place:
        os.chmod(place, 0o755)
        yield Path(place)


def test_too_long_a_directory_is_refused(tmp_path):
    with pytest.raises(Misconfigured, match="set HEYVM_PORTS_DIR to a shorter path"):
        sockets_in(tmp_path, ports_dir=tmp_path / ("x" * 90)).open_directories()


def test_a_group_that_could_not_get_there_is_refused(short):
    with pytest.raises(Misconfigured, match="set HEYVM_PORTS_DIR to one outside"):
        sockets_in(short, ports_group=GROUP).open_directories()


def test_a_directory_that_everybody_can_write_is_refused(short):
    (short / "all").mkdir()
    (short / "all").chmod(0o777)

    with pytest.raises(Misconfigured, match="everybody can write"):
        sockets_in(short, ports_dir=short / "all/ports").open_directories()


def test_a_link_in_its_place_is_refused(short):
    (short / "real").mkdir()
    (short / "ports").symlink_to(short / "real")

    with pytest.raises(Misconfigured, match="not a directory of the server's own"):
        sockets_in(short, ports_dir=short / "ports").open_directories()


BY_ANOTHER_USER = """
import sys
from pathlib import Path
from heyvm.errors import Misconfigured
from heyvm.settings import Settings
from heyvm.sockets import Sockets

place = Path(sys.argv[1])
given = {"ports_dir": place / "ports", "ports_group": int(sys.argv[2]), "api_hostname": "a.test"}
try:
    Sockets(Settings(place, place / "run", **given), None, None).open_directories()
except Misconfigured as error:
    print(error.detail)
"""


@AS_ROOT
def test_who_may_not_give_it_to_the_group_is_told_so(short):
    os.chown(short, ORDINARY, -1)

    # In a process of its own: the C library tells all threads of a change of user by a signal
    # that conftest.py has given back to the system.
    done = subprocess.run(
        [sys.executable, "-c", BY_ANOTHER_USER, str(short), str(GROUP)],
        user=ORDINARY,
        group=ORDINARY,
        extra_groups=[],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )

    assert re.search("cannot be given to the group 33.*permitted", done.stdout), done.stderr


# -- whoever runs the server -----------------------------------------------------------------------


@AS_ROOT
def test_an_ordinary_users_server_has_them_too_and_its_keeper_mends_them():
    with Server(user=ORDINARY, API_HOSTNAME="sandbox.test") as server, server.http() as http:
        ref = create(http)["id"]
        run(http, ref, f"cat >/tmp/echo.py <<'EOF'\n{ECHO}\nEOF")
        line = "python3 /tmp/echo.py 127.0.0.1 8000 >/tmp/out 2>&1 </dev/null &"
        run(http, ref, line + " until grep up /tmp/out; do sleep 0.05; done")
        made = http.post(f"/sandboxes/{ref}/proxy", json={"port": 8000})
        assert made.status_code == 201, made.text
        path = server.run_dir / "ports/public" / f"{made.json()['subdomain']}.sock"
        assert path.stat().st_uid == ORDINARY
        assert echoes(path)

        path.unlink()
        wait_until(path.exists, "it is made anew")
        assert echoes(path)
        assert http.post(f"/sandboxes/{ref}/stop").status_code == 200
        assert not path.exists()
        assert http.post(f"/sandboxes/{ref}/start").status_code == 200
        assert path.exists()
        assert http.delete(f"/sandboxes/{ref}").status_code == 204
        assert not path.exists()


def echoes(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        sock.sendall(b"hello")
        return sock.recv(5) == b"hello"
