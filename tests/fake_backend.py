"""A backend whose boxes are files: up while `<root>/<id>/box` exists, whichever process looks.

Its agent is a thread of the process that connects, and speaks the real frames. The subclasses are
named after how they misbehave. Scripts that the agent knows: `exit N`, `print TEXT`, `hang`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from heyvm import frames, guest
from heyvm.backends.base import Backend, State
from heyvm.errors import BackendFailed, Invalid, Unavailable
from heyvm.models import Mount, Sandbox

LOOK_S = 0.005


class FileBackend(Backend):
    """Behaves. `said` is every order that its agents were given, oldest first."""

    name = "file"
    start_s = 0.0
    dying_s = 0.0  # what a process takes to die after SIGTERM

    def __init__(self, root: Path) -> None:
        self.root = root
        self.said: list[dict[str, Any]] = []

    def check(self) -> None:
        pass

    def allocate(self, taken: frozenset[int]) -> int | None:
        return next(base for base in range(0x10000, 1 << 32, 0x10000) if base not in taken)

    def start(
        self, sandbox: Sandbox, record: Callable[[State], None], *, visit: bool = False
    ) -> socket.socket:
        box = self._box(sandbox.id, visit)
        box.parent.mkdir(parents=True, exist_ok=True)
        token = secrets.token_hex(4)
        try:
            with open(box, "x") as file:
                file.write(token)
        except FileExistsError:
            (self.root / "violations").write_text(f"{sandbox.id} was started twice")
            raise
        try:
            self._come_up(sandbox, box)
            record({"token": token, "box": str(box)})
        except BaseException:
            box.unlink(missing_ok=True)
            raise
        ours, theirs = socket.socketpair()
        threading.Thread(target=self._first, args=(theirs, box, token), daemon=True).start()
        guest.greet(ours, 5.0)
        return ours

    def _come_up(self, sandbox: Sandbox, box: Path) -> None:
        wait_for(lambda: not box.exists(), self.start_s)
        if not box.exists():
            raise BackendFailed("killed while it came up")

    def stop(self, sandbox: Sandbox, *, grace: float) -> None:
        wait_for(lambda: not self.is_up(sandbox.id), min(grace, self.dying_s))
        for visit in (False, True):
            self._box(sandbox.id, visit).unlink(missing_ok=True)

    def destroy(self, sandbox: Sandbox) -> None:
        self.stop(sandbox, grace=0)
        shutil.rmtree(self.root / sandbox.id, ignore_errors=True)

    def poll(self, sandbox: Sandbox) -> str | None:
        token = sandbox.state.get("token")
        return None if token and token == self._token(sandbox.state) else "its agent is gone"

    def connect(self, sandbox: Sandbox, timeout: float = 5.0) -> socket.socket:
        if self.poll(sandbox) is not None:
            raise BackendFailed("nobody answers")
        ours, theirs = socket.socketpair()
        box = Path(sandbox.state["box"])
        threading.Thread(target=self._later, args=(theirs, box), daemon=True).start()
        return ours

    def open_log(self, sandbox: Sandbox) -> int | None:
        return os.open(self.root / sandbox.id, os.O_PATH | os.O_DIRECTORY)

    def check_mount(self, mount: Mount) -> None:
        pass

    def inventory(self) -> frozenset[str]:
        if not self.root.is_dir():
            return frozenset()
        return frozenset(name for name in os.listdir(self.root) if name.startswith("sb-"))

    def sweep(self, strays: frozenset[str]) -> None:
        for name in strays:
            shutil.rmtree(self.root / name)

    def is_up(self, sandbox_id: str) -> bool:
        return self._box(sandbox_id, False).exists()

    def is_visited(self, sandbox_id: str) -> bool:
        return self._box(sandbox_id, True).exists()

    def kill_from_outside(self, sandbox_id: str) -> None:
        """What the OOM killer might do."""
        self._box(sandbox_id, False).unlink()

    def orders(self, operation: str) -> list[dict[str, Any]]:
        return [order for order in self.said if order["op"] == operation]

    def _box(self, sandbox_id: str, visit: bool) -> Path:
        return self.root / sandbox_id / ("visit" if visit else "box")

    def _token(self, state: Mapping[str, Any]) -> str | None:
        try:
            return Path(state["box"]).read_text()
        except OSError:
            return None

    # --- the agent ------------------------------------------------------------------------------

    def _first(self, sock: socket.socket, box: Path, token: str) -> None:
        with sock:
            sock.sendall(frames.header({"hello": 1}))
            order = self._hear(sock)
            if order is None or not box.exists():
                return
            sock.sendall(frames.header({"ok": 1}))
            if order.get("visit") == 1:
                sock.recv(1)
                if box.exists() and box.read_text() == token:
                    box.unlink(missing_ok=True)

    def _later(self, sock: socket.socket, box: Path) -> None:
        with sock:
            order = self._hear(sock)
            if order is None:
                return
            script = order["argv"][-1].decode() if order["op"] == "exec" else ""
            if script == "hang":
                wait_for(lambda: not box.exists(), 60)
                return
            if script.startswith("print "):
                sock.sendall(frames.frame(frames.STDOUT, script[6:].encode()))
            code = int(script[5:]) if script.startswith("exit ") else 0
            done: dict[str, Any] = {"ok": 1}
            if order["op"] == "exec":
                done |= {"exit_code": code, "duration_ms": 1, "timed_out": 0, "truncated": 0}
            sock.sendall(frames.header(done))
            sock.recv(1)

    def _hear(self, sock: socket.socket) -> dict[str, Any] | None:
        splitter = frames.Splitter()
        while (found := splitter.next()) is None:
            received = sock.recv(65536)
            if not received:
                return None
            splitter.feed(received)
        order: dict[str, Any] = dict(frames.decode_header(found[1]))
        order["op"] = order["op"].decode()
        self.said.append(order)
        return order


class SlowToStart(FileBackend):
    start_s = 0.3


class NeverComesUp(FileBackend):
    """Its start lasts until somebody kills the box."""

    start_s = 60.0


class HeldUp(FileBackend):
    """Its start comes to nothing, not even a box that could be killed, until it is let go on."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.entered, self.go_on = threading.Event(), threading.Event()

    def start(
        self, sandbox: Sandbox, record: Callable[[State], None], *, visit: bool = False
    ) -> socket.socket:
        self.entered.set()
        assert self.go_on.wait(10)
        return super().start(sandbox, record, visit=visit)


class SlowToDie(FileBackend):
    dying_s = 1.0


class FailsToStart(FileBackend):
    """As often as `failures` says; then it works."""

    failures = 1

    def _come_up(self, sandbox: Sandbox, box: Path) -> None:
        if self.failures:
            self.failures -= 1
            raise BackendFailed("the image has no init")


class RefusesMounts(FileBackend):
    """Finds out at the start that the host's directory may not be shown."""

    def _come_up(self, sandbox: Sandbox, box: Path) -> None:
        raise Invalid("the mount is a link", errors={"mounts": ["it is a link"]})


class NotInstalled(FileBackend):
    name = "absent"

    def check(self) -> None:
        raise Unavailable("absent is not installed; apt install absent")


class WillNotDie(FileBackend):
    """Its processes are in state D: every kill fails, after a while."""

    def stop(self, sandbox: Sandbox, *, grace: float) -> None:
        time.sleep(0.5)
        raise BackendFailed("processes 4711 will not die")

    def destroy(self, sandbox: Sandbox) -> None:
        self.stop(sandbox, grace=0)


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> bool:
    """Whether `condition` came true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOOK_S)
    return True
