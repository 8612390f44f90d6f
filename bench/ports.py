"""What it costs to reach a server through heyvm: one small HTTP server, reached in four ways.

On the host behind nginx, in a sandbox behind the same nginx, in a sandbox by its local port, and on
the host with nothing in between. wrk asks, in turns; part of `make bench`, or alone.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.nginx import HOSTNAME, USER, Nginx
from tests.server import Server, free_port, wait_until

PORT = 8080
ROUNDS = 3
SECONDS = 3
CONNECTIONS = 32
BIG_BYTES = 1 << 30
# What a development server is like: one process, keep-alive, a small answer or a large one.
SERVER = """
const piece = Buffer.alloc(256 * 1024);
require("http").createServer((request, response) => {
  if (request.url !== "/big") return response.end("hello\\n");
  let left = %d;
  response.setHeader("Content-Length", left);
  const more = () => {
    while (left > 0) {
      left -= piece.length;
      if (!response.write(piece)) return response.once("drain", more);
    }
    response.end();
  };
  more();
}).listen(process.argv[2]);
"""
MS = {"us": 0.001, "ms": 1.0, "s": 1000.0}


@dataclass
class Way:
    """A way to the server: what wrk and curl are told, and what they found."""

    name: str
    url: str
    host: str = "localhost"
    rates: list[float] = field(default_factory=list)
    crowded_ms: list[float] = field(default_factory=list)
    alone_ms: list[float] = field(default_factory=list)
    mb_s: list[float] = field(default_factory=list)

    def take(self) -> None:
        rate, p50 = self._wrk(CONNECTIONS)
        self.rates.append(rate)
        self.crowded_ms.append(p50)
        self.alone_ms.append(self._wrk(1)[1])
        self.mb_s.append(self._download())

    def _wrk(self, connections: int) -> tuple[float, float]:
        """Requests per second, and the median of a request in milliseconds."""
        command = ["wrk", "-t1", f"-c{connections}", f"-d{SECONDS}s", "--latency"]
        command += ["-H", f"Host: {self.host}", self.url]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if "Non-2xx" in text or "Socket errors" in text:
            raise SystemExit(f"{self.name}: {text}")
        rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
        p50 = re.search(r"50%\s+([\d.]+)(us|ms|s)", text)
        assert rate is not None and p50 is not None, text
        return float(rate[1]), float(p50[1]) * MS[p50[2]]

    def _download(self) -> float:
        command = ["curl", "-q", "-sSk", "--http1.1", "-o", "/dev/null", "-H", f"Host: {self.host}"]
        command += ["-w", "%{size_download} %{time_total}", "--noproxy", "*", f"{self.url}big"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        size, seconds = done.stdout.split()
        assert int(size) == BIG_BYTES, done.stdout
        return int(size) / float(seconds) / 1e6


class HostNginx(Nginx):
    """nginx with the same configuration, all but where it leads: to a port of the host."""

    def __init__(self, *, upstream: str, ports_dir: Path, port: int) -> None:
        self.port = port
        super().__init__(upstream=upstream, ports_dir=ports_dir)

    def _rendered(self) -> str:
        ports_dir = self.values["PORTS_DIR"]
        there = f"{ports_dir}/public/${{heyvm_subdomain}}.sock"
        whole = (
            super()._rendered().replace(f"http://unix:{there}:", f"http://127.0.0.1:{self.port}")
        )
        return whole.replace(f"!-x {there}", f"!-d {self.home}")


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def node(place: str) -> Iterator[None]:
    """The server on the host, at a port."""
    with subprocess.Popen(["node", "-e", SERVER % BIG_BYTES, "-", place]) as process:
        try:
            yield
        finally:
            process.kill()


def in_sandbox(server: Server) -> dict[str, object]:
    """The server in a sandbox; its endpoint."""
    script = SERVER % BIG_BYTES
    command = f"exec node -e '{script}' - {PORT}"
    with server.http() as http:
        fields = {"start_command": command, "network": "none"}
        made = http.post("/sandboxes", json=fields).json()
        path = f"/sandboxes/{made['id']}"
        endpoint: dict[str, object] = http.post(f"{path}/proxy", json={"port": PORT}).json()
        listens = {"command": f"grep -q ':{PORT:04X} ' /proc/net/tcp /proc/net/tcp6"}
        wait_until(
            lambda: http.post(f"{path}/execute", json=listens).json()["exit_code"] == 0,
            "the server listens",
        )
    return endpoint


def ways(stack: ExitStack) -> list[Way]:
    """Everything that is measured, running."""
    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hb-")))
    place.chmod(0o755)
    name = "host000000000000"
    bare = free_port()
    stack.enter_context(node(str(bare)))
    wait_until(lambda: answers(bare), "node listens")
    local = stack.enter_context(Server())
    named = stack.enter_context(
        Server(
            API_HOSTNAME=HOSTNAME,
            HEYVM_PORTS_DIR=str(place / "ports"),
            HEYVM_PORTS_GROUP=USER,
        )
    )
    upstream = f"127.0.0.1:{named.port}"
    before_host = HostNginx(upstream=upstream, ports_dir=place / "host", port=bare)
    stack.callback(before_host.close)
    before_sandbox = Nginx(upstream=upstream, ports_dir=place / "ports")
    stack.callback(before_sandbox.close)
    subdomain = in_sandbox(named)["subdomain"]
    return [
        Way("host, nginx", f"https://127.0.0.1:{before_host.https_port}/", f"{name}.{HOSTNAME}"),
        Way(
            "sandbox, nginx",
            f"https://127.0.0.1:{before_sandbox.https_port}/",
            f"{subdomain}.{HOSTNAME}",
        ),
        Way("sandbox, local port", f"{in_sandbox(local)['url']}/"),
        Way("host, nothing between", f"http://127.0.0.1:{bare}/"),
    ]


def main() -> None:
    """Take every measure, print it, then say which targets are met."""
    with ExitStack() as stack:
        found = ways(stack)
        time.sleep(1.0)
        for _ in range(ROUNDS):
            for way in found:
                way.take()
    print(f"{'':24}{'req/s':>9}{'p50 ms of 32':>14}{'p50 ms of 1':>13}{'MB/s':>8}")
    for way in found:
        numbers = (median(way.rates), median(way.crowded_ms), median(way.alone_ms))
        print(
            f"{way.name:24}{numbers[0]:9.0f}{numbers[1]:14.2f}{numbers[2]:13.2f}"
            f"{median(way.mb_s):8.0f}"
        )
    host = found[0]
    for way in found[1:3]:
        rate = median(way.rates) / median(host.rates)
        added = median(way.alone_ms) - median(host.alone_ms)
        say(rate >= 0.5, f"{way.name}: {rate:.2f} of the host's requests/s, target 0.5")
        say(added <= 1.0, f"{way.name}: {added:.2f} ms added to the p50 of one client, target 1")
        say(median(way.mb_s) >= 300, f"{way.name}: {median(way.mb_s):.0f} MB/s, target 300")


def say(met: bool, text: str) -> None:
    print(f"{'met   ' if met else 'MISSED'} {text}")


if __name__ == "__main__":
    main()
