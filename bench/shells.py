"""What it costs to type into a sandbox: keystrokes that come back, much output, many sessions.

Each way is measured beside a bare pty of the host, in turns; part of `make bench`, or alone:
`python bench/shells.py [websocket|tunnel ...]`.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.server import REPOSITORY, Server, Session
from tests.ws import OUTPUT, Shell

ROUNDS = 3
KEYS = 500
PAUSE_S = 0.002  # between two keys: a person, not a flood
OUTPUT_BYTES = 100_000_000
TOGETHER = 100
TICKETS = 4
KEYS_EACH = 20
ECHO = "stty raw -echo; echo go; exec cat"
# Lines of nine digits: what is missing, comes twice or in the wrong place is seen.
LINE = b"%09d\n"
COUNT = f"stty raw -echo; echo go; head -c 1 >/dev/null; seq -f %09.0f {OUTPUT_BYTES // 10} | cat"
ACK_S = 0.1
PATIENCE_S = 60.0


class Line(Protocol):
    """A terminal with a program in it, from whoever types."""

    def type(self, keys: bytes) -> None: ...

    def read(self) -> bytes:
        """What has come; empty at the end."""

    def close(self) -> None: ...


@dataclass
class Way:
    """How a line is opened, what it may cost at most, and what it did."""

    name: str
    open: Callable[[str], Line]
    most_ms: float | None = None
    echo_ms: list[float] = field(default_factory=list)
    worst_ms: list[float] = field(default_factory=list)
    mb_s: list[float] = field(default_factory=list)

    def take(self) -> None:
        took = sorted(self._echoes())
        self.echo_ms.append(median(took) * 1000)
        self.worst_ms.append(took[len(took) * 99 // 100] * 1000)
        self.mb_s.append(self._output())

    def _echoes(self) -> list[float]:
        line = self.begin(ECHO)
        try:
            return [echo(line) for _ in range(KEYS)]
        finally:
            line.close()

    def _output(self) -> float:
        line = self.begin(COUNT)
        began = time.perf_counter()
        line.type(b"x")
        try:
            count(line, self.name)
        finally:
            line.close()
        return OUTPUT_BYTES / (time.perf_counter() - began) / 1e6

    def begin(self, command: str) -> Line:
        """A line whose program is about to begin."""
        line = self.open(command)
        seen = b""
        while b"go\n" not in seen.replace(b"\r", b""):
            some = line.read()
            if not some:
                raise SystemExit(f"{self.name}: it ended before it began: {seen!r}")
            seen += some
        return line


def echo(line: Line) -> float:
    """Seconds until a key comes back."""
    time.sleep(PAUSE_S)
    began = time.perf_counter()
    line.type(b"x")
    if line.read() != b"x":
        raise SystemExit("an echo of something else")
    return time.perf_counter() - began


def count(line: Line, name: str) -> None:
    """Read every line of the output, and see that it is the one that is due."""
    due, rest, seen = 1, b"", 0
    while seen < OUTPUT_BYTES:
        some = line.read()
        if not some:
            raise SystemExit(f"{name}: {seen} of {OUTPUT_BYTES} bytes came")
        seen += len(some)
        rest += some
        whole = len(rest) // 10
        if rest[: whole * 10] != b"".join(LINE % n for n in range(due, due + whole)):
            raise SystemExit(f"{name}: not what was printed, near line {due}")
        due, rest = due + whole, rest[whole * 10 :]


class Bare:
    """A pty of the host, with nothing between."""

    def __init__(self, command: str) -> None:
        self._begin(["/bin/sh", "-c", command], {})

    def _begin(self, argv: list[str], more: dict[str, str]) -> None:
        self._pid, self._fd = pty.fork()
        if not self._pid:
            os.execve(argv[0], argv, {**os.environ, **more})

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def read(self) -> bytes:
        if not select.select([self._fd], [], [], PATIENCE_S)[0]:
            return b""
        try:
            return os.read(self._fd, 65536)
        except OSError:  # EIO: its program has ended
            return b""

    def close(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.close(self._fd)
        os.waitpid(self._pid, 0)


class Connected(Bare):
    """`heyvm connect` in a pty of its own, as a user has it."""

    def __init__(self, url: str, command: str) -> None:
        argv = [sys.executable, "-m", "heyvm.cli", "connect", "--shell", "-t", "--", command]
        self._begin(argv, {"HEYVM_CONNECTION_URL": url, "PYTHONPATH": str(REPOSITORY)})


class Stream:
    """The WebSocket, with acknowledgements as the protocol advises."""

    def __init__(self, server: Server, ref: str, command: str) -> None:
        self._shell = Shell.open(server.port, ref, acks=False)
        self._acked_at = time.monotonic()
        self._shell.type(f"exec /bin/sh -c '{command}'\n")
        self._skip(b"'\r\n")

    def _skip(self, mark: bytes) -> None:
        """What the login shell makes of the line that is typed."""
        seen = b""
        while mark not in seen:
            seen += self.read()

    def type(self, keys: bytes) -> None:
        self._shell.type(keys)

    def read(self) -> bytes:
        while True:
            message = self._shell.client.receive(PATIENCE_S)
            if message is None:
                return b""
            if isinstance(message, bytes):
                return self._took(message)

    def _took(self, message: bytes) -> bytes:
        _, seq = OUTPUT.unpack_from(message)
        if seq != self._shell.last + 1:
            raise SystemExit(f"piece {seq} after {self._shell.last}")
        self._shell.last = seq
        if time.monotonic() - self._acked_at > ACK_S:
            self._acked_at = time.monotonic()
            self._shell.client.say(type="ack", seq=seq)
        return message[OUTPUT.size :]

    def close(self) -> None:
        self._shell.__exit__()


@contextmanager
def websocket(http: Session, server: Server) -> Iterator[Way]:
    ref = http.post("/sandboxes", json={"network": "none"}).json()["id"]
    yield Way("WebSocket", lambda command: Stream(server, ref, command), most_ms=3.0)


@contextmanager
def tunnel(http: Session, server: Server) -> Iterator[Way]:
    """A ticket takes fewer clients at once than there are sessions here: a few share them."""
    ref = http.post("/sandboxes", json={"network": "none"}).json()["id"]
    made = [http.post(f"/sandboxes/{ref}/shell-session").json() for _ in range(TICKETS)]
    urls = cycle([one["connection_url"] for one in made])
    yield Way("tunnel", lambda command: Connected(next(urls), command), most_ms=10.0)


WAYS = {"websocket": websocket, "tunnel": tunnel}


def together(way: Way) -> list[float]:
    """Medians of the echoes of many sessions that are open at once and type in turns."""
    lines = [way.begin(ECHO) for _ in range(TOGETHER)]
    took: list[float] = []

    def type_into(some: list[Line]) -> None:
        for _ in range(KEYS_EACH):
            took.extend(echo(line) for line in some)

    threads = [threading.Thread(target=type_into, args=(lines[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for line in lines:
        line.close()
    if len(took) != TOGETHER * KEYS_EACH:
        raise SystemExit(f"{way.name}: {len(took)} of {TOGETHER * KEYS_EACH} keys came back")
    return took


def main(names: list[str]) -> None:
    """Take every measure, print it, then say which targets are met."""
    with ExitStack() as stack:
        server = stack.enter_context(Server())
        http = stack.enter_context(server.http())
        ways = [stack.enter_context(WAYS[name](http, server)) for name in names]
        bare = Way("host's pty", Bare)
        for _ in range(ROUNDS):
            for way in (bare, *ways):
                way.take()
        crowds = {way.name: median(together(way)) * 1000 for way in ways}
    report(bare, ways, crowds)


def report(bare: Way, ways: list[Way], crowds: dict[str, float]) -> None:
    print(f"{'':16}{'echo p50 ms':>12}{'p99':>8}{'ratio':>8}{'MB/s':>8}{'ratio':>8}")
    for way in (bare, *ways):
        p50, worst, rate = median(way.echo_ms), median(way.worst_ms), median(way.mb_s)
        times, part = p50 / median(bare.echo_ms), rate / median(bare.mb_s)
        print(f"{way.name:16}{p50:12.2f}{worst:8.2f}{times:8.1f}{rate:8.1f}{part:8.2f}")
    for way in ways:
        p50 = median(way.echo_ms)
        most = way.most_ms or 0.0
        say(p50 <= most, f"{way.name}: a key comes back in {p50:.2f} ms (p50), target {most:g}")
        say(True, f"{way.name}: {ROUNDS} times 100 MB of output, each line once")
        print(f"       {way.name}: {TOGETHER} sessions at once, p50 {crowds[way.name]:.2f} ms")


def say(met: bool, text: str) -> None:
    print(f"{'met   ' if met else 'MISSED'} {text}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(WAYS))
