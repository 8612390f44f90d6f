"""The processes of tests/test_gateway.py: a server inside, gateways before it, and raw requests."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.gatewayapp import BASE, PUBLIC
from tests.server import REPOSITORY, all_pids, free_port, parent_of, read_bytes

# As heyvm/serving.py has it.
GUNICORN = (
    "gunicorn --worker-class=heyvm.worker.Worker --no-control-socket --keep-alive=20"
    " --limit-request-line=8190 --limit-request-fields=64 --limit-request-field_size=8190"
    " --header-map=refuse --forwarder-headers= --log-level=warning tests.gatewayapp:app --bind"
).split()


@dataclass
class Front:
    """A gateway in a process of its own, and what that writes."""

    port: int
    process: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def ask(self, sent: bytes) -> Answered:
        """What comes back until the end of the connection."""
        with self.connect() as sock:
            with suppress(ConnectionError):
                sock.sendall(sent)
            return Answered(all_of(sock))

    def get(self, path: str, *headers: str, host: str = PUBLIC, method: str = "GET") -> Answered:
        return self.ask(request(path, "Connection: close", *headers, host=host, method=method))

    def most_memory(self) -> int:
        """The most bytes that one of its processes has had."""
        own = self.process.pid
        pids = [pid for pid in all_pids() if own in (pid, parent_of(pid))]
        found = [
            re.search(rb"VmHWM:\s+(\d+) kB", read_bytes(f"/proc/{pid}/status")) for pid in pids
        ]
        return max(int(one[1]) for one in found if one) * 1024


@dataclass(frozen=True)
class Answered:
    """An answer in bytes, taken apart as far as the tests need it."""

    raw: bytes

    @property
    def status(self) -> int:
        found = re.match(rb"HTTP/1\.1 (\d{3}) ", self.raw)
        assert found, self.raw[:200]
        return int(found[1])

    @property
    def statuses(self) -> list[int]:
        return [int(one) for one in re.findall(rb"HTTP/1\.1 (\d{3}) ", self.raw)]

    @property
    def head(self) -> str:
        return self.raw.partition(b"\r\n\r\n")[0].decode("latin-1")

    @property
    def body(self) -> bytes:
        return self.raw.partition(b"\r\n\r\n")[2]

    def header(self, name: str) -> list[str]:
        return re.findall(rf"(?im)^{name}: (.*?)\r?$", self.head)


def request(
    path: str, *headers: str, host: str = PUBLIC, method: str = "GET", body: bytes = b""
) -> bytes:
    """One request; `host` is a subdomain, or a whole Host where it has a dot or is empty."""
    name = host if "." in host or not host else f"{host}.{BASE}"
    lines = [f"{method} {path} HTTP/1.1", *([f"Host: {name}"] if name else []), *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def all_of(sock: socket.socket) -> bytes:
    found = bytearray()
    with suppress(ConnectionError):
        while piece := sock.recv(1 << 20):
            found += piece
    return bytes(found)


def until(sock: socket.socket, mark: bytes) -> bytes:
    """What comes up to this mark, and with it."""
    found = b""
    while mark not in found:
        piece = sock.recv(65536)
        assert piece, f"the end came before {mark!r}: {found!r}"
        found += piece
    return found


@contextmanager
def started(command: list[str], port: int, log_path: Path, **environ: str) -> Iterator[Front]:
    """A process that listens on this port when this begins, and is gone when it ends."""
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=REPOSITORY,
            env={**os.environ, **environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=log,
            stderr=log,
        )
    front = Front(port, process, log_path)
    try:
        wait_until_it_listens(front)
        yield front
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def wait_until_it_listens(front: Front) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with suppress(ConnectionError), front.connect():
            return
        assert front.process.poll() is None, front.log
        time.sleep(0.02)
    raise AssertionError(front.log)


@contextmanager
def webapp(home: Path) -> Iterator[Front]:
    """tests/webapp.py, here rather than in a sandbox."""
    port = free_port()
    with started(["tests/webapp.py", str(port)], port, home / "webapp.log") as front:
        yield front


@contextmanager
def gateway(kind: str, inside: int, home: Path) -> Iterator[Front]:
    """`gunicorn`: as in a worker. `localhttp`: as in the keeper."""
    port = free_port()
    gunicorn = ["-m", *GUNICORN, f"127.0.0.1:{port}"]
    command = gunicorn if kind == "gunicorn" else ["-m", "tests.gatewayapp", str(port)]
    with started(command, port, home / f"{kind}.log", INSIDE=str(inside)) as front:
        yield front
