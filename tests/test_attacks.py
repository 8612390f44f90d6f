"""Attacks on a real server: from inside a sandbox, over HTTP, and by other users of the machine.

What one line of attack needs in breadth stands in the test of its module; here is what crosses
several.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from heyvm.backends import netns
from tests.server import (
    ORDINARY,
    Server,
    Session,
    all_pids,
    command_line,
    parent_of,
    read_bytes,
    wait_until,
)

ANN = 23456  # an ordinary user of the host, whose directory a sandbox is shown
BOB = 23457  # an ordinary user of the host, who has nothing to do with the server
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="acts as several users of the host")
USERS = [0, ORDINARY] if os.geteuid() == 0 else [os.geteuid()]


# --- from inside ----------------------------------------------------------------------------------


class Inside:
    """A sandbox with a writable directory of the host at /data."""

    def __init__(self, server: Server, http: Session, shared: Path) -> None:
        self.server, self.http, self.shared = server, http, shared
        mounts = [{"host_path": str(shared), "sandbox_path": "/data"}]
        answer = http.post("/sandboxes", json={"mounts": mounts})
        assert answer.status_code == 201, answer.text
        self.ref = answer.json()["id"]
        self.path = f"/sandboxes/{self.ref}"

    def run(self, line: str, **options: Any) -> dict[str, Any]:
        answer = self.http.post(f"{self.path}/execute", json={"command": line, **options})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def python(self, program: str) -> dict[str, Any]:
        return self.run('exec /usr/bin/python3 -c "$P"', env={"P": program})


@pytest.fixture(scope="module", params=USERS, ids=lambda uid: "root" if uid == 0 else "ordinary")
def box(request: pytest.FixtureRequest) -> Iterator[Inside]:
    """In a server of root's, and in one of an ordinary user's."""
    user = request.param if request.param != os.geteuid() else None
    shared = Path(tempfile.mkdtemp(prefix="hv-attacks-"))
    shared.chmod(0o755)
    if os.geteuid() == 0:
        owner = user or ANN
        os.chown(shared, owner, owner)
    with Server(user=user) as server, server.http() as http:
        yield Inside(server, http, shared)
    shutil.rmtree(shared)


# An access list (acl(5)) whose entry for the group lets it execute.
ACCESS_LIST = """
import os, shutil, struct
shutil.copy("/bin/sh", "/data/sgid")
for mode in (0o2744, 0o2644):
    try:
        os.chmod("/data/sgid", mode)
    except PermissionError:
        print("refused")
entries = [(1, 7), (4, 5), (32, 5)]
packed = b"".join(struct.pack("<HHI", tag, bits, 0xFFFFFFFF) for tag, bits in entries)
os.setxattr("/data/sgid", "system.posix_acl_access", struct.pack("<I", 2) + packed)
"""


def test_an_access_list_completes_no_set_id_program(box: Inside) -> None:
    seen = box.python(ACCESS_LIST)
    mode = (box.shared / "sgid").stat().st_mode
    assert mode & stat.S_IXGRP, seen
    assert not mode & (stat.S_ISUID | stat.S_ISGID), oct(mode)
    assert seen["stdout"] == "refused\n" * 2


@pytest.mark.parametrize(
    "line",
    [
        "renice -n 19 -p 1",
        "renice -n 19 -u 0",
        "renice -n 19 -g 1",
        "chrt --idle --pid 0 1",
        "chrt --other --reset-on-fork --pid 0 1",
        "taskset --pid 1 1",
        "ionice -c 3 -p 1",
        "sh -c 'echo 19 > /proc/1/autogroup'",
        "prlimit --pid 1 --nofile=3:3",
    ],
)
def test_pid_1_keeps_its_share_of_the_machine(box: Inside, line: str) -> None:
    before = box.run(SHARE_OF_PID_1)["stdout"]
    assert box.run(line)["exit_code"] != 0
    assert box.run(SHARE_OF_PID_1)["stdout"] == before


SHARE_OF_PID_1 = (
    "cut -d' ' -f18-19,40-41 /proc/1/stat; grep allowed_list /proc/1/status;"
    " cat /proc/1/autogroup | grep -o 'nice.*'; ionice -p 1; true"
)


# As much as is read of a log, in the shortest lines: over a million of them.
FLOOD = """
for name in ("log", "log.1"):
    with open("/.heyvm/log/" + name, "w") as file:
        file.write("a\\n" * 600_000)
"""


def test_a_flood_in_the_log_fills_no_worker(box: Inside) -> None:
    box.python(FLOOD)
    before = peak_kib(box.server)
    answer = box.http.get(f"{box.path}/logs?limit=2")
    assert [entry["message"] for entry in answer.json()["logs"]] == ["a", "a"]
    assert answer.json()["total"] == 1_200_000
    assert peak_kib(box.server) - before < 100 * 1024


def peak_kib(server: Server) -> int:
    """The most memory that its workers have had, together."""
    status = b"".join(read_bytes(f"/proc/{pid}/status") for pid in server.worker_pids())
    return sum(int(line.split()[1]) for line in status.splitlines() if b"VmHWM" in line)


def test_nothing_is_loaded_into_pid_1_beforehand(box: Inside) -> None:
    """As ld.so(8) does with whatever it starts; what an image names may not even fit."""
    box.run("find /usr/lib -name libbz2.so.1.0 | head -1 > /etc/ld.so.preload")
    try:
        assert "libbz2" in box.run("cat /proc/self/maps")["stdout"]
        for act in ("stop", "start"):
            assert box.http.post(f"{box.path}/{act}").status_code == 200
        maps = [read_bytes(f"/proc/{pid}/maps") for pid in box.server.sandbox_pids()]
        assert any(b"/.heyvm/lib" in one or b"python3" in one for one in maps)
        assert not any(b"libbz2" in one for one in maps)
    finally:
        box.run("rm /etc/ld.so.preload")


# Sockets that pick the interface: what the routes refuse is a neighbour to them.
NEIGHBOURS = """
import contextlib, socket, time
end, address = time.monotonic() + 2, 0
while time.monotonic() < end:
    address = (address + 1) % 3000
    for family, one in ((2, f"10.9.{address >> 8}.{address & 255}"), (10, f"fd00:77::{address:x}")):
        with socket.socket(family, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
            sock.sendto(b"x", (one, 9))
print("done")
"""


def test_many_neighbours_leave_the_machine_room_for_its_own(box: Inside) -> None:
    """The kernel has one table of them for all namespaces."""
    before = times_full()
    assert box.python(NEIGHBOURS)["stdout"] == "done\n"
    assert times_full() == before


def times_full() -> int:
    """How often there was no room for a neighbour."""
    found = 0
    for name in ("arp_cache", "ndisc_cache"):
        head, *processors = Path("/proc/net/stat", name).read_text().splitlines()
        column = head.split().index("table_fulls")
        found += sum(int(line.split()[column], 16) for line in processors)
    return found


# --- over HTTP ------------------------------------------------------------------------------------

QUICK_S = 15.0  # a worker that does nothing else for 60 s is killed, with all that it serves
MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"command":"true","args":[' + b"1," * (7 * MIB) + b"1]}", 413),
        (b'{"command":"true","args":[' + b'"",' * (5 * MIB) + b'""]}', 413),
        (b'{"command":"true","x":[' + b"{}," * (5 * MIB) + b"{}]}", 413),
        (b'{"command":"true","stdin":"' + b'\\"' * (7 * MIB), 400),  # a string without an end
        (b'{"command":"true"' + b" " * (15 * MIB) + b"}", 200),
        (b'{"command":"true","stdin":"' + b"{[]}," * (3 * MIB) + b'"}', 200),
        (b'{"command":"true","args":[' + b"1," * 300_000 + b"1]}", 422),
    ],
    ids=["numbers", "texts", "objects", "open text", "spaces", "brackets in a text", "wrong ones"],
)
def test_a_large_body_is_dealt_with_in_seconds(
    http: Session, sandbox: Callable[..., dict[str, Any]], body: bytes, status: int
) -> None:
    ref = sandbox()["id"]
    answer = http.post(
        f"/sandboxes/{ref}/execute",
        data=body,
        headers={"Content-Type": "application/json"},
        timeout=QUICK_S,
    )
    assert answer.status_code == status, answer.text[:500]
    assert len(answer.content) < 10_000


def test_a_create_with_very_many_unknown_fields_is_dealt_with_in_seconds(http: Session) -> None:
    asked = {f"u{number}": 1 for number in range(80_000)}
    answer = http.post("/sandboxes", json=asked, timeout=QUICK_S)
    assert answer.status_code == 201
    assert len(answer.json()["warnings"]) == len(asked)
    assert http.delete(f"/sandboxes/{answer.json()['id']}").status_code == 204


def test_complaints_about_a_list_are_few(http: Session) -> None:
    answer = http.post("/sandboxes", json={"setup_hooks": [1] * 10_000})
    assert answer.status_code == 422
    assert len(answer.json()["errors"]) == 20


def test_pulls_leave_the_processor_to_requests(own: Server) -> None:
    """Fifty at once held up everybody for seconds."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        body = {"image": f"127.0.0.1:{silent.getsockname()[1]}/some/name"}
        pull = threading.Thread(target=lambda: own.http().post("/images/pull", json=body))
        pull.start()
        wait_until(lambda: [os.getpriority(os.PRIO_PROCESS, one) for one in pulling(own)] == [15],
                   "it is pulled, behind all else")  # fmt: skip
    pull.join()
    assert pulling(own) == []


def pulling(server: Server) -> list[int]:
    """The processes that bring in images."""
    workers = server.worker_pids()
    found = [pid for pid in all_pids() if b"heyvm/oci.py" in command_line(pid)]
    return [pid for pid in found if parent_of(pid) in workers]


# --- other users of the machine -------------------------------------------------------------------


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    """A server that the test may look at from outside while it is left alone."""
    with Server() as running:
        yield running


def entitled(title: str) -> subprocess.Popen[bytes]:
    """A process of Bob's that calls itself something."""
    arguments: dict[str, Any] = {"user": BOB, "group": BOB, "extra_groups": []}
    return subprocess.Popen([title, "60"], executable="/usr/bin/sleep", **arguments)


@ROOT
@pytest.mark.parametrize("name", ["../../precious", "sb-00000000"])
def test_a_process_that_calls_itself_a_sandbox_is_none(own: Server, name: str) -> None:
    """The keeper removes what no row knows: here a directory that the title leads to."""
    precious = own.home / "precious"
    precious.mkdir(exist_ok=True)
    with entitled(f"heyvm:{own.mark}:{name}") as bobs:
        swept(own)
        assert precious.is_dir()
        assert bobs.poll() is None
        bobs.kill()


def swept(server: Server) -> None:
    """Wait until the keeper has removed a stray that was put there, and so has looked."""
    stray = server.data_dir / "sandboxes" / "sb-ffffffff"
    for _ in range(2):
        stray.mkdir()
        wait_until(lambda: not stray.exists(), "the keeper has swept")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that a sandbox may be shown."""
    top = Path(tempfile.mkdtemp(prefix="hv-attacks-"))
    if os.geteuid() == 0:
        os.chown(top, ANN, ANN)
    yield top
    shutil.rmtree(top)


def test_a_sockets_name_cannot_pass_for_another_socket(
    http: Session, sandbox: Callable[..., dict[str, Any]], shared: Path
) -> None:
    """The kernel's table of sockets has their names as they are, line breaks included."""
    for forged in (
        "\0x\nno number at all: a b zz d e f g h",
        f"\0x\n00000001: 00000002 00000000 00010000 0001 01 7 {shared}",
    ):
        with socket.socket(socket.AF_UNIX) as bobs:
            bobs.bind(forged)
            sandbox(mounts=[{"host_path": str(shared), "sandbox_path": "/data"}])


def test_a_line_break_hides_no_listening_socket(http: Session, shared: Path) -> None:
    (shared / "a\nb").mkdir()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(shared / "a\nb" / "door"))
        door.listen()
        mount = {"host_path": str(shared / "a\nb"), "sandbox_path": "/data", "read_only": True}
        answer = http.post("/sandboxes", json={"mounts": [mount]})
    assert answer.status_code == 422
    assert "door" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/passwd/below", "/proc/1/cwd"])
def test_a_working_directory_that_cannot_be_is_a_422_that_leaves_nothing(
    path: str, server: Server
) -> None:
    with server.http() as http:
        before = {one["id"] for one in http.get("/sandboxes?status=all").json()}
        answer = http.post("/sandboxes", json={"working_directory": path, "network": "none"})
        assert answer.status_code == 422, answer.text
        assert list(answer.json()["errors"]) == ["working_directory"]
        for left in http.get("/sandboxes?status=all").json():
            if left["id"] not in before:
                assert left["status"] == "failed"
                http.delete(f"/sandboxes/{left['id']}")


@pytest.mark.skipif(os.geteuid() != 0, reason="of a root server's networks")
def test_a_sandboxs_network_does_not_grow_with_the_number_of_others(server: Server) -> None:
    """The 168th sandbox could not be started: each knew of the ends of all others' interfaces."""
    with server.http() as http:
        made = [http.post("/sandboxes", json={"network": "egress"}).json()["id"] for _ in range(3)]
        count = {"command": "wc -l < /proc/net/route; wc -l < /proc/net/ipv6_route"}
        seen = {http.post(f"/sandboxes/{ref}/execute", json=count).json()["stdout"] for ref in made}
        for ref in made:
            http.delete(f"/sandboxes/{ref}")
    assert len(seen) == 1, seen


@pytest.mark.skipif(os.geteuid() != 0, reason="asks to remove interfaces")
def test_any_number_of_netlink_messages_is_answered() -> None:
    nobody = struct.pack("BxHiII", 0, 0, 0, 0, 0) + netns.attribute(3, "hv-nobody")
    netlink = netns.Netlink()
    try:
        answers = netlink.tell(*[(17, 0, nobody)] * 3000)
    finally:
        netlink.close()
    assert answers == [errno.ENODEV] * 3000
