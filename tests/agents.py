"""A real agent for tests: an ordinary child process, with a socket and a log of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from heyvm import guest
from heyvm.models import ExecResult

REPOSITORY = Path(__file__).resolve().parent.parent
PR_SET_CHILD_SUBREAPER = 36
START = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from heyvm.agent import main; main()"


class AgentProcess:
    """`connect()` gives a fresh connection; after `ready()` it takes operations."""

    def __init__(self, directory: Path, spare: int = -1, box: Sequence[str] = ()) -> None:
        self.directory, self.box = directory, box
        self.logs = directory / "log"
        self.logs.mkdir()
        self.workspace = directory / "workspace"
        self.workspace.mkdir()
        self.path = str(directory / "agent.sock")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.path)
            listener.listen(64)
            self.process = self._spawn(listener.fileno(), spare)
        self.first = self.connect()

    def _spawn(self, fd: int, spare: int) -> subprocess.Popen[bytes]:
        python = getattr(sys, "_base_executable", sys.executable)
        return subprocess.Popen(
            [*self.box, python, "-I", "-S", "-B", "-c", START, str(fd), str(self.logs), str(spare)],
            pass_fds=[fd],
            env={},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=adopt_orphans,
        )

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path)
        return sock

    def ready(self) -> AgentProcess:
        guest.greet(self.first, 10)
        guest.go(self.first, {}, str(self.workspace))
        return self

    def run(self, *argv: str, **options: Any) -> ExecResult:
        """Execute with sane defaults."""
        options.setdefault("env", {"PATH": guest.PATH})
        with self.connect() as sock:
            return guest.execute(sock, argv=argv, **options)

    def sh(self, script: str, **options: Any) -> ExecResult:
        return self.run("sh", "-c", script, **options)

    def log(self) -> str:
        file = self.logs / "log"
        return file.read_text(errors="surrogateescape") if file.exists() else ""

    def end(self) -> None:
        """Kill it and everything below it."""
        self.first.close()
        for pid in [*descendants(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        assert self.process.stdout
        self.process.stdout.close()


def own_box(*options: str) -> list[str]:
    """bubblewrap around this machine's own files: a process table with the agent as its pid 1."""
    user = [] if os.geteuid() == 0 else ["--unshare-user"]
    inside = ["--unshare-pid", "--as-pid-1", "--die-with-parent", "--dev-bind", "/", "/"]
    return ["bwrap", *user, *inside, "--proc", "/proc", *options, "--"]


def adopt_orphans() -> None:
    """As pid 1 of a sandbox does."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    found, todo = [], [pid]
    while todo:
        for child in children(todo.pop()):
            found.append(child)
            todo.append(child)
    return found


def children(pid: int) -> list[int]:
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(word) for word in words]


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(condition: Callable[[], Any], timeout: float = 10.0) -> Any:
    """What the condition gives once it is true."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.005)
    return found


@contextlib.contextmanager
def running_agent(
    directory: Path, spare: int = -1, box: Sequence[str] = ()
) -> Iterator[AgentProcess]:
    """`box`: the words before its command that make it pid 1 of something."""
    agent = AgentProcess(directory, spare, box)
    try:
        yield agent
    finally:
        agent.end()
