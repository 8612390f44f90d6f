"""Cgroups of an ordinary user: in a service of that user's systemd, in a scope that it makes, or
in a group that root gave away. On a machine with cgroup v2 alone (tests/vm) all of it is limited.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from heyvm.backends.cgroups import LIMITED, Groups, Hierarchy, hierarchies
from tests.netlab import Lab, LabServer
from tests.server import ORDINARY, Server, all_pids, command_line, wait_until

MIB = 1 << 20
BOMB = "import os,time\nwhile 1:\n try: os.fork()\n except OSError: time.sleep(.01)\n"
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="gives groups to another user")


class Delegated:
    """An ordinary user, and the group below which that user's server makes its own."""

    def __init__(self, place: str, user: int | None, leaf: str | None = None) -> None:
        self.place, self.user, self.leaf = place, user, leaf

    def groups(self, server: Server) -> Groups:
        return Groups(server.mark, (Hierarchy(self.place, 2, frozenset(LIMITED)),))

    def need_limits(self) -> None:
        given = Path(self.place, "cgroup.controllers").read_text().split()
        if not set(LIMITED) <= set(given):
            pytest.skip("this machine's new tree does not have all controllers")

    def command(self) -> list[str]:
        """What a server's command begins with that is to run as that user, in that group."""
        enter = f'echo $$ > {self.leaf}/cgroup.procs && exec "$@"'
        ids = [f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups"]
        return ["sh", "-c", enter, "sh", "setpriv", *ids]


class ServerInGroup(Server):
    def __init__(self, delegated: Delegated, **environ: str) -> None:
        self.delegated = delegated
        super().__init__(**environ)

    def start(self) -> None:
        os.chown(self.home, self.delegated.user, self.delegated.user)
        super().start()

    def _command(self) -> list[str]:
        own = ["env", f"HOME={self.home}", "XDG_RUNTIME_DIR="]
        return [*own, *self.delegated.command(), *super()._command()]


class LabServerInGroup(LabServer):
    def __init__(self, lab: Lab, delegated: Delegated) -> None:
        self.delegated = delegated
        super().__init__(lab, delegated.user)

    def _command(self) -> list[str]:
        own = ["env", f"HOME={self.home}", "XDG_RUNTIME_DIR=", *self.delegated.command()]
        return [*self.lab.on_host(), *own, *Server._command(self)]


@contextlib.contextmanager
def given_away() -> Iterator[Delegated]:
    """A group below the top that is an ordinary user's, with one for the server in it."""
    if os.geteuid() != 0:
        pytest.skip("root gives groups away")
    top = next((one for one in hierarchies() if one.version == 2), None)
    if top is None:
        pytest.skip("this machine has no cgroup v2")
    for name in top.controllers:
        Path(top.path, "cgroup.subtree_control").write_text(f"+{name}")
    place = Path(top.path, f"test-{secrets.token_hex(4)}")
    leaf = place / "server"
    leaf.mkdir(parents=True)
    for path in (place, leaf):
        for one in (path, *(path / name for name in ("cgroup.procs", "cgroup.subtree_control"))):
            os.chown(one, ORDINARY, ORDINARY)
    try:
        yield Delegated(str(place), ORDINARY, str(leaf))
    finally:
        for path in (leaf, place):
            wait_until(lambda path=path: _gone(path), f"{path} is empty", check=False)
        assert not place.exists()


def _gone(path: Path) -> bool:
    with contextlib.suppress(OSError):
        path.rmdir()
    return not path.exists()


def user_of_systemd() -> Delegated:
    """Somebody who has a systemd of their own, whose tree this process is not in."""
    for path in sorted(Path("/run/user").glob("*/bus")):
        uid = path.stat().st_uid
        place = f"/sys/fs/cgroup/user.slice/user-{uid}.slice/user@{uid}.service"
        if uid and os.geteuid() == 0 and os.path.isdir(place):
            return Delegated(place, uid)
    pytest.skip("nobody here has a systemd of their own (tests/vm)")


@pytest.fixture(scope="module", params=["given", "scope", "service"])
def delegated(request):
    if request.param == "given":
        with given_away() as found:
            yield found
    elif request.param == "scope":
        yield user_of_systemd()
    else:
        place = next((one for one in hierarchies() if one.version == 2), None)
        if os.geteuid() == 0 or place is None or place.foreign:
            pytest.skip("run by root, or by a user without a group")
        yield Delegated(place.path, None)


@pytest.fixture(scope="module")
def server(delegated):
    made = ServerInGroup(delegated) if delegated.leaf else Server(user=delegated.user)
    with made as running:
        yield running


@pytest.fixture
def groups(delegated, server):
    return delegated.groups(server)


@pytest.fixture
def run(http):
    def line(ref, command, *args):
        body = {"command": command, "args": list(args), "timeout_seconds": 100}
        answer = http.post(f"/sandboxes/{ref}/execute", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return line


def test_all_of_a_sandbox_is_in_its_group(groups, server, sandbox):
    ref = sandbox(network="none")["id"]

    assert groups.names() == {ref}
    inside = [pid for pid in server.sandbox_pids() if ref.encode() in command_line(pid)]
    assert inside and set(inside) <= groups.pids(ref)


def test_its_limits_are_the_kernels_and_nothing_is_warned_of(delegated, groups, sandbox):
    delegated.need_limits()
    record = sandbox(network="none", pids=50, memory=128 * MIB, cpus=0.5)

    assert record["warnings"] == []
    path = Path(groups.paths(record["id"])[0])
    said = [(path / name).read_text().strip() for name in ("pids.max", "memory.max", "cpu.max")]
    assert said == ["50", str(128 * MIB), "50000 100000"]


def test_a_fork_bomb_stays_inside(delegated, groups, http, sandbox, run):
    delegated.need_limits()
    ref, neighbour = (sandbox(network="none", pids=40)["id"] for _ in range(2))
    http.post(f"/sandboxes/{ref}/execute", json={
        "command": "python3", "args": ["-c", BOMB], "timeout_seconds": 3})  # fmt: skip

    assert Path(groups.paths(ref)[0], "pids.events").read_text() != "max 0\n"
    assert len(groups.pids(ref)) <= 40
    assert run(neighbour, "echo", "fine")["stdout"] == "fine\n"
    assert http.delete(f"/sandboxes/{ref}").status_code == 204


def test_a_memory_hog_is_ended_and_counted(delegated, groups, http, sandbox, run):
    delegated.need_limits()
    ref = sandbox(network="none", memory=96 * MIB)["id"]

    assert run(ref, "python3", "-c", "x = bytearray(512 << 20)")["exit_code"] == 137
    assert groups.oom_kills(ref) == 1
    assert run(ref, "echo", "alive")["stdout"] == "alive\n"
    wait_until(lambda: http.get(f"/sandboxes/{ref}").json()["oom_kills"] == 1, "it is counted")


def test_cpus_are_limited(delegated, groups, sandbox, run):
    delegated.need_limits()
    ref = sandbox(network="none", cpus=0.2)["id"]
    began, before = time.monotonic(), groups.usage(ref).cpu_s
    run(ref, "timeout", "5", "sh", "-c", "while :; do :; done")

    assert 0 < groups.usage(ref).cpu_s - before < 0.35 * (time.monotonic() - began)


def test_a_pause_halts_it_and_a_resume_lets_it_go_on(groups, http, sandbox, run):
    ref = sandbox(network="none")["id"]
    for _ in range(3):
        assert http.post(f"/sandboxes/{ref}/pause").status_code == 200
        assert groups.is_frozen(ref)
        assert http.post(f"/sandboxes/{ref}/execute", json={"command": "id"}).status_code == 409
        assert http.post(f"/sandboxes/{ref}/resume").status_code == 200
        assert run(ref, "echo", "back")["stdout"] == "back\n"


def test_its_group_goes_with_it(groups, http, sandbox):
    ref = sandbox(network="none")["id"]
    assert http.post(f"/sandboxes/{ref}/stop").status_code == 200
    assert not groups.exists(ref)
    assert http.post(f"/sandboxes/{ref}/start").status_code == 200
    assert groups.exists(ref)


@root_only
def test_where_systemd_run_fails_sandboxes_run_without_limits_and_say_so(tmp_path):
    found = user_of_systemd()
    broken = tmp_path / "systemd-run"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    for path in (tmp_path, *tmp_path.parents[:-2]):
        path.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    with Server(user=found.user, PATH=path) as server, server.http() as http:
        answer = http.post("/sandboxes", json={"network": "none", "cpus": 1, "pids": 50})
        assert answer.status_code == 201, answer.text
        assert "cpus is not limited" in " ".join(answer.json()["warnings"])
        assert found.groups(server).names() == frozenset()
        assert "sandboxes have no cgroups" in server.log


@root_only
def test_where_the_group_takes_nobody_sandboxes_run_without_limits_and_say_so():
    """A group that can be written, and in which no other can be made."""
    with given_away() as found:
        Path(found.place, "cgroup.max.descendants").write_text("1")
        with ServerInGroup(found) as server, server.http() as http:
            answer = http.post("/sandboxes", json={"network": "none", "memory": 256 * MIB})
            assert answer.status_code == 201, answer.text
            assert "memory is limited for each process" in " ".join(answer.json()["warnings"])


@root_only
def test_pasta_is_in_the_sandboxs_group_also_one_that_came_later():
    with given_away() as found, Lab() as lab, lab.host():
        with LabServerInGroup(lab, found) as server, server.http() as http:
            record = http.post("/sandboxes", json={}).json()
            assert "network" not in " ".join(record["warnings"]), record["warnings"]
            ref = record["id"]
            title = f"heyvm-pasta:{server.mark}:{ref}:".encode()

            def pastas():
                return {pid for pid in all_pids() if command_line(pid).startswith(title)}

            groups = found.groups(server)
            (first,) = pastas()
            assert first in groups.pids(ref)
            os.kill(first, signal.SIGKILL)
            wait_until(lambda: pastas() - {first}, "another is there", timeout=10)
            assert pastas() <= groups.pids(ref)
            assert http.delete(f"/sandboxes/{ref}").status_code == 204
            assert pastas() == set()
