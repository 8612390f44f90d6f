"""`make bench`: what heyvm costs, next to what it is made of, in one run on one machine.

Starts a server of its own on loopback, takes each measure in turn with its yardstick (so that a
noisy moment hits both), prints a table, and ends within five minutes whatever happens.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.images import debian
from tests.netlab import Lab, LabServer
from tests.server import ORDINARY, Server, all_pids, command_line

ECHO = ["/bin/echo", "hello"]
BWRAP = [shutil.which("bwrap") or "bwrap", "--ro-bind", "/", "/", "--unshare-all", "true"]
ROUNDS = 300
LIFE_ROUNDS = 60
PART_S = 45.0  # no part may take longer, whatever its rounds
CROWD = 300
IMAGE = "debian:bench"
AT_ONCE = 50
CROWD_AT_ONCE = 100
ORDINARY_CROWD = 5
NEIGHBOUR_S = 6.0
ABUSES = {
    "a fork bomb": ("bomb() { bomb | bomb & }; bomb", {"pids": 256, "cpus": 1}),
    "a memory hog": (
        "while :; do tail -c 1G /dev/zero | sort >/dev/null; done",
        {"memory": 128 << 20, "cpus": 1},
    ),
    "a disk filler": (
        "while :; do head -c 2G /dev/zero > /workspace/big; rm /workspace/big; done",
        {"disk_size_gb": 1, "cpus": 1},
    ),
    "a CPU spinner": ("for n in 1 2 3 4; do while :; do :; done & done; wait", {"cpus": 0.5}),
}
HEALTH_PAUSE_S = 0.02
MIB = 1024 * 1024


@dataclass
class Series:
    """Durations of one thing, in seconds."""

    name: str
    values: list[float] = field(default_factory=list)
    worst_at: float = 0.0

    def take(self, act: Callable[[], object]) -> None:
        began = time.perf_counter()
        act()
        self.values.append(time.perf_counter() - began)

    def at(self, percent: int) -> float:
        ordered = sorted(self.values)
        return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


@dataclass(frozen=True)
class Verdict:
    """A target: what was measured, in what unit, and the most that it may be."""

    name: str
    value: float
    most: float
    unit: str

    def __str__(self) -> str:
        word = "met   " if self.value <= self.most else "MISSED"
        return f"{word} {self.name}: {self.value:.2f} {self.unit}, target {self.most:g}"


class Connection:
    """A kept-alive HTTP connection with as little of a client around it as there can be."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reader = self.sock.makefile("rb")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()
        self.sock.close()

    def ask(self, method: str, path: str, document: object = None) -> tuple[int, bytes]:
        body = b"" if document is None else json.dumps(document).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        self.sock.sendall(head.encode() + body)
        status = int(self.reader.readline().split()[1])
        length = 0
        while (line := self.reader.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return status, self.reader.read(length)

    def document(self, method: str, path: str, document: object = None) -> dict[str, object]:
        status, body = self.ask(method, path, document)
        assert status < 300, body
        return dict(json.loads(body))

    def create(self, **fields: object) -> str:
        """A new sandbox's path."""
        return f"/sandboxes/{self.document('POST', '/sandboxes', fields)['id']}"

    def execute(self, path: str, *argv: str) -> dict[str, object]:
        request = {"command": argv[0], "args": argv[1:]}
        return self.document("POST", f"{path}/execute", request)


class Yardstick:
    """Runs a command bare, in a process that holds nothing else: a fork copies what its parent
    has mapped, so that one of this (large) process would take five times as long."""

    PROGRAM = """
import os, sys, time
def collect(pid, reading):
    while os.read(reading, 65536):
        pass
    os.close(reading)
    os.waitpid(pid, 0)
def fork_exec(argv):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writing, 1)
        os.execv(argv[0], argv)
    os.close(writing)
    collect(pid, reading)
def posix_spawn(argv):
    reading, writing = os.pipe()
    pid = os.posix_spawn(argv[0], argv, {}, file_actions=[(os.POSIX_SPAWN_DUP2, writing, 1)])
    os.close(writing)
    collect(pid, reading)
run = {"fork": fork_exec, "spawn": posix_spawn}[sys.argv[1]]
while os.read(0, 1):
    began = time.perf_counter()
    run(sys.argv[2:])
    os.write(1, b"%f\\n" % (time.perf_counter() - began))
"""

    def __init__(self, name: str, way: str, argv: list[str]) -> None:
        self.series = Series(name)
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", self.PROGRAM, way, *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def __enter__(self) -> Yardstick:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def take(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(b".")
        self.series.values.append(float(self.process.stdout.readline()))


def rounds(count: int) -> Iterator[int]:
    """Up to `count` rounds, as many as fit into a part's time."""
    end = time.monotonic() + PART_S
    for number in range(count):
        if time.monotonic() > end:
            return
        yield number


def measure_execute(server: Server) -> list[Series]:
    """execute `echo` over HTTP, and the two bare ways."""
    executed = Series("execute echo over HTTP")
    request = {"command": "echo", "args": ["hello"]}
    with (
        Yardstick("fork+exec echo", "fork", ECHO) as bare,
        Yardstick("posix_spawn echo", "spawn", ECHO) as spawned,
        Connection(server.port) as connection,
        a_sandbox(connection) as path,
    ):
        for _ in range(20):
            connection.document("POST", f"{path}/execute", request)
        for _ in rounds(ROUNDS):
            bare.take()
            spawned.take()
            executed.take(lambda: connection.document("POST", f"{path}/execute", request))
    return [bare.series, spawned.series, executed]


def measure_life(server: Server) -> list[Series]:
    """The direct bwrap; create to first execute, of `host` and of an image, without egress and with
    it; delete."""
    kinds = {
        f"create to execute, {image}, {network}": {
            "image": "host" if image == "host" else IMAGE,
            "network": network,
        }
        for image in ("host", "image")
        for network in ("none", "egress")
    }
    series = {name: Series(name) for name in kinds}
    deleted = Series("delete")
    with (
        Yardstick("bwrap --unshare-all true", "fork", BWRAP) as direct,
        Connection(server.port) as connection,
    ):
        path = ""

        def create_and_execute(fields: dict[str, str]) -> None:
            nonlocal path
            path = connection.create(**fields)
            connection.execute(path, "echo", "hi")

        for _ in rounds(LIFE_ROUNDS):
            for name, fields in kinds.items():
                direct.take()
                series[name].take(lambda fields=fields: create_and_execute(fields))
                deleted.take(lambda: connection.ask("DELETE", path))
    return [direct.series, *series.values(), deleted]


def measure_crowd(server: Server) -> tuple[int, float, int]:
    """How many of `CROWD` sandboxes are alive at once, the PSS of one in MiB, and how many of the
    deletes did not answer 204."""
    local = threading.local()

    def ask(method: str, path: str, document: object = None) -> tuple[int, bytes]:
        if not hasattr(local, "connection"):
            local.connection = Connection(server.port)
        answer: tuple[int, bytes] = local.connection.ask(method, path, document)
        return answer

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: ask("POST", "/sandboxes", {}), rounds(CROWD)))
        ids = [json.loads(body)["id"] for status, body in made if status == 201]
        executed = pool.map(
            lambda ref: ask("POST", f"/sandboxes/{ref}/execute", {"command": "true"}), ids
        )
        alive = sum(json.loads(body).get("exit_code") == 0 for _, body in executed)
        memory = sum(map(pss_bytes, box_pids(server)))
        deleted = pool.map(lambda ref: ask("DELETE", f"/sandboxes/{ref}"), ids)
        wrong = [body for status, body in deleted if status != 204]
    if wrong:
        print(f"a delete answered {wrong[0]!r}")
    return alive, memory / MIB / max(alive, 1), len(wrong)


def measure_all_at_once(server: Server) -> tuple[int, int, float]:
    """How many of `CROWD_AT_ONCE` creates, then deletes, at the very same time succeed; seconds."""

    def ask(method: str, path: str, document: object, wanted: int) -> str | None:
        with Connection(server.port) as connection:
            status, body = connection.ask(method, path, document)
        if status != wanted:
            print(f"{method} {path}: {status} {body[:300]!r}")
            return None
        return f"/sandboxes/{json.loads(body)['id']}" if body else path

    began = time.perf_counter()
    with ThreadPoolExecutor(CROWD_AT_ONCE) as pool:
        jobs = [
            pool.submit(ask, "POST", "/sandboxes", {"image": IMAGE}, 201)
            for _ in range(CROWD_AT_ONCE)
        ]
        made = [path for job in jobs if (path := job.result())]
        jobs = [pool.submit(ask, "DELETE", path, None, 204) for path in made]
        gone = [path for job in jobs if (path := job.result())]
    return len(made), len(gone), time.perf_counter() - began


def measure_second(server: Server) -> float:
    """MiB of disk that a second sandbox of an image costs."""

    def used() -> int:
        os.sync()
        space = os.statvfs(server.data_dir)
        return (space.f_blocks - space.f_bfree) * space.f_frsize

    with Connection(server.port) as connection:
        first = connection.create(image=IMAGE)
        before = used()
        second = connection.create(image=IMAGE)
        connection.execute(second, "echo", "hi")
        cost = used() - before
        for path in (first, second):
            connection.ask("DELETE", path)
    return cost / MIB


def measure_abuse(server: Server) -> list[Series]:
    """A neighbour's execute: in quiet, then beside each abuser."""
    found = []
    with Connection(server.port) as connection, a_sandbox(connection) as neighbour:
        for name, (script, limits) in {"quiet": ("true", {}), **ABUSES}.items():
            series = Series(f"execute beside {name}")
            fields = {"start_command": script, "network": "none", **limits}
            status, body = connection.ask("POST", "/sandboxes", fields)
            if status != 201:
                print(f"{name}: {json.loads(body).get('detail')}")
                continue
            path = f"/sandboxes/{json.loads(body)['id']}"
            time.sleep(1)
            end = time.monotonic() + NEIGHBOUR_S
            while time.monotonic() < end:
                series.take(lambda: connection.execute(neighbour, "echo", "hi"))
                time.sleep(0.01)
            connection.ask("DELETE", path)
            found.append(series)
    return found


def measure_ordinary() -> float:
    """MiB of PSS of one of an ordinary user's sandboxes with egress, its pasta included; on a lab's
    host, as an ordinary user needs a resolver and a /dev/net/tun like a distribution's."""
    with Lab() as lab, lab.host(), LabServer(lab, ORDINARY) as server:
        with Connection(server.port) as connection:
            paths = [connection.create(network="egress") for _ in range(ORDINARY_CROWD)]
            title = f"heyvm-pasta:{server.mark}".encode()
            pastas = {pid for pid in all_pids() if title in command_line(pid)}
            assert len(pastas) == ORDINARY_CROWD, f"{len(pastas)} pastas"
            memory = sum(map(pss_bytes, box_pids(server) | pastas))
            for path in paths:
                connection.ask("DELETE", path)
    return memory / MIB / ORDINARY_CROWD


def box_pids(server: Server) -> set[int]:
    """Every process of every sandbox: pid 1, what it started, and bubblewrap outside."""
    title = f"heyvm:{server.mark}:".encode()
    outside = {pid for pid in all_pids() if command_line(pid).startswith(title)}
    inside = {pid for pid in server.sandbox_pids() if b"launcher.py" not in command_line(pid)}
    return outside | inside


def pss_bytes(pid: int) -> int:
    """The process's share of memory (proc_pid_smaps(5)); 0 where it just went."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def measure_at_once(server: Server) -> tuple[int, float]:
    """How many of `AT_ONCE` executes in one sandbox give their own answer, and the seconds."""
    barrier = threading.Barrier(AT_ONCE)

    def one(path: str, number: int) -> bool:
        with Connection(server.port) as connection:
            barrier.wait(30)
            request = {"command": f"sleep 0.2; echo {number}"}
            return (
                connection.document("POST", f"{path}/execute", request)["stdout"] == f"{number}\n"
            )

    with Connection(server.port) as connection, a_sandbox(connection) as path:
        began = time.perf_counter()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            right = sum(pool.map(lambda number: one(path, number), range(AT_ONCE)))
        return right, time.perf_counter() - began


@contextmanager
def a_sandbox(connection: Connection) -> Iterator[str]:
    """A sandbox's path; deleted afterwards."""
    path = connection.create()
    try:
        yield path
    finally:
        connection.ask("DELETE", path)


@contextmanager
def watched_health(server: Server) -> Iterator[Series]:
    """`/health` every 20 ms over a new connection, asked by a process of its own."""
    series = Series("/health, all the while")
    watcher = subprocess.Popen(
        [sys.executable, __file__, "--watch-health", str(server.port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield series
    finally:
        output, _ = watcher.communicate(b"", timeout=30)
        asked = json.loads(output)
        series.values = [took for _, took in asked]
        series.worst_at = max(asked, key=lambda pair: pair[1])[0]


def watch_health(port: int) -> None:
    """Until standard input ends; prints the durations."""
    series = Series("health")
    done = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()

    def ask() -> None:
        with Connection(port) as connection:
            status, body = connection.ask("GET", "/health")
            assert status == 200, body

    began = []
    while not done.wait(HEALTH_PAUSE_S):
        began.append(time.monotonic())
        series.take(ask)
    print(json.dumps(list(zip(began, series.values))))


def report(series: list[Series]) -> None:
    """p50, p95 and p99 in ms, and the ratio of medians to the first of the list."""
    for one in series:
        if not one.values:
            continue
        numbers = "".join(f"{one.at(percent) * 1000:9.2f}" for percent in (50, 95, 99))
        ratio = one.at(50) / series[0].at(50)
        print(f"{one.name:34}{len(one.values):6}{numbers}{ratio:8.2f}", flush=True)


def main() -> None:
    """Take every measure, print it, then say which targets are met."""
    if sys.argv[1:2] == ["--watch-health"]:
        watch_health(int(sys.argv[2]))
        return
    print(f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}")
    print(f"{'':34}{'n':>6}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}{'ratio':>8}")
    parts = (
        judge_execute,
        judge_life,
        judge_at_once,
        judge_abuse,
        judge_all_at_once,
        judge_crowd,
    )
    verdicts: list[Verdict] = []
    begun: list[tuple[float, str]] = []
    with Server() as server:
        fetch_image(server)
        with watched_health(server) as health:
            for part in parts:
                begun.append((time.monotonic(), part.__name__.removeprefix("judge_")))
                verdicts += part(server)
        report([health])
        during = [name for began, name in begun if began <= health.worst_at][-1]
        name = f"/health, slowest (during {during})"
        verdicts.append(Verdict(name, max(health.values) * 1000, 100, "ms"))
    ordinary = measure_ordinary()
    print(f"a sandbox of an ordinary user with egress, pasta included: {ordinary:.1f} MiB PSS")
    print("\n".join(map(str, verdicts)))


def fetch_image(server: Server) -> None:
    """Give the server a Debian image."""
    with tempfile.TemporaryFile() as archive, server.http() as http:
        subprocess.run(["tar", "-C", debian(), "-c", "."], stdout=archive, check=True)
        archive.seek(0)
        http.put(f"/images/{IMAGE}", data=archive).raise_for_status()


def judge_execute(server: Server) -> list[Verdict]:
    bare, spawned, executed = measure_execute(server)
    report([bare, spawned, executed])
    return [Verdict("execute / fork+exec", executed.at(50) / bare.at(50), 3, "times")]


def judge_life(server: Server) -> list[Verdict]:
    direct, *created, deleted = measure_life(server)
    report([direct, *created, deleted])
    return [
        *(
            Verdict(f"{one.name} / bwrap", one.at(50) / direct.at(50), most, "times")
            for one, most in zip(created, (6, 10, 6, 10), strict=True)
        ),
        Verdict("delete / bwrap", deleted.at(50) / direct.at(50), 3, "times"),
    ]


def judge_at_once(server: Server) -> list[Verdict]:
    right, took = measure_at_once(server)
    print(f"{AT_ONCE} executes at once in one sandbox: {right} right, in {took:.2f} s")
    return [Verdict("executes at once, lost", AT_ONCE - right, 0, f"of {AT_ONCE}")]


def judge_abuse(server: Server) -> list[Verdict]:
    quiet, *beside = measure_abuse(server)
    report([quiet, *beside])
    return [
        Verdict(f"{one.name}, p50 / quiet", one.at(50) / quiet.at(50), 3, "times") for one in beside
    ]


def judge_all_at_once(server: Server) -> list[Verdict]:
    made, gone, took = measure_all_at_once(server)
    cost = measure_second(server)
    print(f"{CROWD_AT_ONCE} creates, then deletes, at once: {made} and {gone}, in {took:.1f} s")
    return [
        Verdict("creates at once, failed", CROWD_AT_ONCE - made, 0, f"of {CROWD_AT_ONCE}"),
        Verdict("deletes at once, failed", made - gone, 0, f"of {made}"),
        Verdict("disk of a second sandbox", cost, 1, "MiB"),
    ]


def judge_crowd(server: Server) -> list[Verdict]:
    alive, memory, wrong = measure_crowd(server)
    print(f"{CROWD} sandboxes at once: {alive} alive, {memory:.2f} MiB PSS each")
    return [
        Verdict("sandboxes at once, missing", CROWD - alive, 0, f"of {CROWD}"),
        Verdict("their deletes without a 204", wrong, 0, f"of {CROWD}"),
        Verdict("PSS of a sandbox", memory, 10, "MiB"),
    ]


if __name__ == "__main__":
    main()
