"""Ways to the kernel, to the host's processes and to other sandboxes' ones, tried from inside every
kind of sandbox: with a shell and busybox alone, and with system calls made by hand."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import kinds
from tests.server import Server, Session, all_pids, command_line, read_bytes, wait_until
from tests.test_seccomp import (
    ATTACKS,
    REFUSED,
    REFUSED_BY_ARGUMENT,
    SLIPS,
    every_form,
    needs_headers,
    numbers,
)

Call = tuple[str, str, Sequence[object]]  # form, name, arguments
SET_ID = {"chmod", "fchmod", "fchmodat", "fchmodat2", "creat", "open", "openat", "mknod", "mknodat"}
DOCKERS_WITHOUT_RAW_AND_MKNOD = {0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 29, 31}


@dataclass
class Box:
    """A running sandbox without a network."""

    server: Server
    http: Session
    record: dict[str, Any]
    kind: str
    root: str

    @property
    def path(self) -> str:
        return f"/sandboxes/{self.record['id']}"

    def run(self, line: str, **options: Any) -> dict[str, Any]:
        body = {"command": "sh", "args": ["-c", line], **options}
        answer = self.http.post(f"{self.path}/execute", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def output(self, line: str, **options: Any) -> str:
        return str(self.run(line, **options)["stdout"])

    def calls(self, asked: list[Call], before: str = "") -> list[int]:
        """What the kernel answers to each."""
        lines = []
        for form, name, arguments in asked:
            words = [str(word) for word in [*arguments, 1, 1, 1, 1, 1, 1][:6]]
            lines.append(" ".join([form, str(numbers(form)[name]), *words]))
        done = self.run(f"{before} exec /root/calls", stdin="\n".join(lines) + "\n")
        assert done["exit_code"] == 0, done
        return [int(line) for line in done["stdout"].split()]


@pytest.fixture(scope="module", params=kinds.SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with kinds.user(request.param) as uid, Server(user=uid) as running:
        with running.http() as http:
            kinds.bring(http)
        running.environ = {**running.environ, "KIND": request.param}
        yield running


@pytest.fixture(scope="module")
def made(server: Server) -> Iterator[dict[Any, Box]]:
    """What there is of this server's: kept, as far as tests share it."""
    boxes: dict[Any, Box] = {}
    yield boxes
    for one in boxes.values():
        assert one.http.delete(one.path).status_code == 204


@pytest.fixture(params=kinds.ROOTS)
def make(
    request: pytest.FixtureRequest, server: Server, made: dict[Any, Box]
) -> Callable[..., Box]:
    """Makes one more sandbox of this kind."""
    http = server.http()

    def create(**fields: Any) -> Box:
        asked = {"network": "none", **kinds.wanted(request.param), **fields}
        answer = http.post("/sandboxes", json=asked)
        assert answer.status_code == 201, answer.text
        one = Box(server, http, answer.json(), server.environ["KIND"], request.param)
        assert one.record["ids"] == {"root": "range"}.get(one.kind, one.kind)
        made[one.record["id"]] = one
        return one

    return create


@pytest.fixture
def box(request: pytest.FixtureRequest, make: Callable[..., Box], made: dict[Any, Box]) -> Box:
    """The one that all tests of this kind share."""
    root = request.node.callspec.params["make"]
    if root not in made:
        one = make()
        made[root] = made.pop(one.record["id"])
    return made[root]


@pytest.fixture(scope="module")
def program() -> Iterator[bytes]:
    """A static program that makes whatever system call it is told."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory, "calls")
        told = ["gcc", "-O1", "-static", "-no-pie", "-o", str(made), str(ATTACKS / "calls.c")]
        subprocess.run(told, check=True)
        yield made.read_bytes()


@pytest.fixture
def armed(box: Box, program: bytes) -> Box:
    """The same box, with that program in it."""
    if box.run("test -x /root/calls")["exit_code"]:
        whole = {"data": {"file_path": "calls"}, "files": {"file": program}}
        assert box.http.post(f"{box.path}/files", **whole).status_code == 201
        assert box.run("mv calls /root/calls; chmod 755 /root/calls")["exit_code"] == 0
    return box


# -- with a shell ----------------------------------------------------------------------------------

REFUSED_LINES = """
unshare -U true
unshare -m true
unshare -n true
unshare -p true
nsenter -t 1 -m true
nsenter -t 1 -n true
nsenter -t 1 -p true
mount -t tmpfs x /root
mount -t proc x /root
mount -t sysfs x /root
mount -t cgroup -o memory none /root
mount -t cgroup2 none /root
mount -t devpts x /root
mount -o bind /etc /root
mount -o remount,rw /
mount -o remount,rw /proc
mount -o remount,bind,rw /.heyvm
umount /proc
umount -l /dev
umount /proc/kcore
umount /.heyvm
pivot_root . .
chroot /proc/1/root true
mknod /root/disk b 8 0
mknod /root/kmem c 1 2
head -c 1 /dev/mem
head -c 1 /dev/kmsg
echo b > /proc/sysrq-trigger
echo x > /proc/sys/kernel/core_pattern
echo x > /proc/sys/kernel/hostname
echo x > /proc/sys/kernel/modprobe
echo 1 > /proc/sys/vm/drop_caches
echo 1 > /proc/sys/net/ipv4/ip_forward
echo 1 > /proc/sys/net/ipv4/ip_unprivileged_port_start
echo x > /sys/kernel/uevent_helper
ls /sys/kernel /sys/fs/cgroup/memory
dmesg
[ -n "$(head -c 4 /proc/kcore)" ]
[ -n "$(cat /proc/keys)" ]
[ -n "$(cat /proc/timer_list)" ]
hostname other
cat /proc/1/environ
head -c 1 /proc/1/mem
ls /proc/1/root/
ls /proc/1/cwd/
readlink /proc/1/fd/0
ls /proc/1/fd/3/
head -c 1 /proc/1/fd/3
readlink /proc/1/exe
echo 1000 > /proc/1/oom_score_adj
echo -1000 > /proc/self/oom_score_adj
echo x > /proc/1/exe
echo x > /.heyvm/python3
rm -f /.heyvm/python3
mv /.heyvm /heyvm
ls -d /oldroot /newroot
ls -d /root.work /run/root /run/root-lower /disk.img
find / -xdev -name cgroup.procs | grep .
""".split("\n")[1:-1]  # fmt: skip


def test_it_is_refused(box: Box) -> None:
    loop = 'while read -r line; do sh -c "$line" </dev/null >/dev/null 2>&1 && echo "$line"; done'
    shown = box.output(loop + "; true", stdin="\n".join([*REFUSED_LINES, "true"]) + "\n")

    assert shown.splitlines() == ["true"]
    assert box.output("echo fine") == "fine\n"


def test_it_has_no_more_rights_than_it_should(box: Box) -> None:
    status = box.output("cat /proc/self/status")
    words = {line.split(":")[0]: line.split(":")[1].strip() for line in status.splitlines()}
    held = {number for number in range(64) if int(words["CapEff"], 16) >> number & 1}

    assert held == (set() if box.kind == "single" else DOCKERS_WITHOUT_RAW_AND_MKNOD)
    assert int(words["CapBnd"], 16) | int(words["CapEff"], 16) == int(words["CapBnd"], 16)
    assert (words["NoNewPrivs"], words["Seccomp"]) == ("1", "2")
    # 1 byte is the value with which the kernel calls no handler of core files (core(5)).
    limits = box.output("grep 'Max core' /proc/self/limits").split()
    assert limits[4:6] == ["1", "1"]


def test_nothing_of_the_server_is_seen(box: Box) -> None:
    seen = box.output("cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline | tr '\\0' '\\n'")

    for needle in (str(box.server.home), "gunicorn", "HEYVM_", "JWT_", "bwrap", "heyvm:"):
        assert needle not in seen
    assert box.output("ls /proc/$$/fd; true").split() == ["0", "1", "2"]
    assert box.output("cat /proc/sys/kernel/hostname").strip() == box.record["slug"]
    assert box.run(f"ls {box.server.data_dir} {box.server.run_dir}")["exit_code"] != 0


@pytest.mark.parametrize(
    "cwd", ["/proc/self/fd/3", "/proc/self/fd/8", "/proc/1/fd/5", "/proc/1/cwd", "/proc/1/root"]
)
def test_no_directory_of_the_hosts_can_be_begun_in(box: Box, cwd: str) -> None:
    answer = box.http.post(f"{box.path}/execute", json={"command": "ls", "cwd": cwd})

    assert answer.status_code == 422, answer.text


# -- with system calls by hand ---------------------------------------------------------------------


@needs_headers
def test_dangerous_calls_are_refused_in_every_form(armed: Box) -> None:
    by_argument = [one for one in REFUSED_BY_ARGUMENT if one[0] not in SET_ID]
    slips = [("64", name, arguments) for name, arguments in SLIPS if name not in SET_ID]
    asked = [*every_form([*((name, []) for name in REFUSED), *by_argument]), *slips]

    got = armed.calls(asked)

    wrong = [(*what, one) for what, one in zip(asked, got, strict=True) if one != -errno.EPERM]
    assert wrong == []


@needs_headers
def test_no_socket_reaches_the_kernels_own_tables(armed: Box) -> None:
    """nf_tables, audit, packets, raw, vsock, and what is hardly ever looked at."""
    raw = [(16, 3, 12), (16, 3, 9), (17, 3, 0x300), (2, 3, 1), (10, 3, 58)]
    wanted = [*raw, (40, 1, 0), (38, 5, 0), (4, 2, 0), (15, 3, 2), (21, 5, 0), (30, 5, 0)]
    got = armed.calls([("64", "socket", list(one)) for one in wanted])

    assert all(one < 0 for one in got), dict(zip(wanted, got, strict=True))


@needs_headers
def test_namespaces_lead_nowhere_above(armed: Box) -> None:
    """CVE-2026-43391 and its kind: from a namespace's handle to the one above it."""
    opened = "exec 5</proc/self/ns/user 6</proc/self/ns/pid 7</proc/self/ns/net;"
    parent, owner = 0xB702, 0xB701
    asked: list[Call] = [("64", "ioctl", [number, parent]) for number in (5, 6)]
    asked += [("64", "setns", [number, 0]) for number in (5, 6, 7)]
    if armed.kind == "root":
        asked.append(("64", "ioctl", [7, owner]))  # the network namespace belongs to the host

    assert set(armed.calls(asked, opened)) == {-errno.EPERM}


@needs_headers
def test_processes_of_others_are_out_of_reach(armed: Box, make: Callable[..., Box]) -> None:
    other = make(start_command="exec sleep 7531")
    wait_until(lambda: sleepers(other), "the other's sleeps")
    (sleeper,) = sleepers(other)
    strangers = (sleeper, os.getpid(), *armed.server.worker_pids())

    for pid in strangers:
        assert armed.run(f"kill -9 {pid}; ls /proc/{pid}")["exit_code"] != 0
        asked: list[Call] = [
            ("64", "kill", [pid, 0]),
            ("64", "pidfd_open", [pid, 0]),
            ("64", "ptrace", [16, pid, 0, 0]),
            ("64", "prlimit64", [pid, 7, 0, 0]),
        ]
        assert set(armed.calls(asked)) <= {-errno.ESRCH, -errno.EPERM}
    armed.run("kill -9 -1")
    assert "7531" not in armed.output("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    assert sleepers(other) == [sleeper]
    assert other.output("echo fine") == armed.output("echo fine") == "fine\n"


def sleepers(box: Box) -> list[int]:
    found = [pid for pid in all_pids() if command_line(pid) == b"sleep 7531 "]
    own = f"sandboxes/{box.record['id']}/".encode()
    return [pid for pid in found if own in read_bytes(f"/proc/{pid}/mountinfo")]


# -- its own processes -----------------------------------------------------------------------------


def test_at_the_time_limit_the_whole_tree_is_gone(box: Box) -> None:
    hidden = "(setsid env -i /bin/sh -c '(sleep 4712 & sleep 4712) & sleep 4712' &)"

    result = box.run(f"trap '' TERM; echo before; {hidden}; sleep 4712", timeout_seconds=1)

    assert (result["exit_code"], result["timed_out"], result["stdout"]) == (124, True, "before\n")
    assert 1000 <= result["duration_ms"] < 4000
    assert "4712" not in box.output("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")


def test_nothing_ends_pid_1_and_its_orphans_are_reaped(box: Box) -> None:
    box.run("for s in $(seq 1 64); do kill -$s 1; done; for i in $(seq 200); do (true &); done")

    def zombies() -> str:
        return box.output("cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z '").strip()

    wait_until(lambda: zombies() == "0", "the orphans are reaped")
    assert box.http.get(box.path).json()["status"] == "running"


# -- two of one kind -------------------------------------------------------------------------------


def test_two_sandboxes_are_not_one_another(box: Box, make: Callable[..., Box]) -> None:
    """What programs take for their machine's own, and what keys are made of."""
    other = make()
    for line in ("cat /etc/machine-id", "head -c 16 /dev/urandom | od -x", "cat /etc/hostname"):
        one, two = box.output(line), other.output(line)
        assert one.strip() and two.strip() and one != two, line
    machine = box.output("cat /etc/machine-id")
    assert len(machine) == 33 and machine.encode() != read_bytes("/etc/machine-id")
    assert box.http.post(f"{other.path}/restart").status_code == 200
    assert other.output("cat /etc/machine-id") not in ("", machine)


def test_what_one_changes_the_other_does_not_see(box: Box, make: Callable[..., Box]) -> None:
    other = make()
    box.run("echo mine > /etc/mine; echo mine > /tmp/mine; rm -f /etc/passwd")

    assert other.run("ls /etc/mine /tmp/mine")["stdout"] == ""
    assert other.output("grep -c ^root: /etc/passwd") == "1\n"
