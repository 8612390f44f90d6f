"""A real heyvm server of its own for tests: its own port, data and run directories.

`Server` starts what a user starts (`heyvm --api`), and when it is closed, looks for anything on
the machine that it left behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests

from heyvm.backends import cgroups, network, ranges, trees
from heyvm.settings import mark_of

REPOSITORY = Path(__file__).resolve().parent.parent
# How many times longer than usual to wait for anything, on an emulated processor (tests/vm).
PATIENCE = float(os.environ.get("HEYVM_TEST_PATIENCE", "1"))
START_TIMEOUT_S = 60.0 * PATIENCE
STOP_TIMEOUT_S = 30.0 * PATIENCE
# What the machine running the tests may have set, and no test server should see.
OWN_SETTINGS = ("HEYVM_", "JWT_", "S3_", "MSB_", "API_HOSTNAME", "AUTH_SERVER_URL", "GUNICORN_")


PARTS = "HEYVM_TEST_PARTS"  # the directory of what servers share, for the time of a test run
ORDINARY = 23450  # an ordinary user, of whom /etc/passwd need not know


class Session(requests.Session):
    """`requests`, with paths instead of addresses."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.base = base
        self.trust_env = False

    def request(self, method: str, url: str, *args: Any, **options: Any) -> requests.Response:  # type: ignore[override]
        options.setdefault("timeout", 120 * PATIENCE)
        address = self.base + url if url.startswith("/") else url
        return super().request(method, address, *args, **options)


class Server:
    """Starts at once. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        *flags: str,
        user: int | None = None,
        cwd: Path = Path("/"),
        with_gunicorn: bool = False,
        own_parts: bool = False,
        **environ: str,
    ) -> None:
        # Short: a unix socket's path has at most 107 bytes.
        self.home = Path(tempfile.mkdtemp(prefix="hv-"))
        self.data_dir, self.run_dir = self.home / "data", self.home / "run"
        self.user, self.cwd, self.with_gunicorn = user, cwd, with_gunicorn
        self.flags, self.environ = flags, environ
        self.log_path = self.home / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.own_parts = own_parts
        if user is not None:
            os.chown(self.home, user, user)
        self.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    @property
    def mark(self) -> str:
        """How the server marks what it makes outside its directories."""
        return mark_of(self.data_dir)

    def http(self) -> Session:
        """A session with this server; each has its own connections."""
        return Session(self.url)

    def start(self) -> None:
        """Start it (again, on the same directories) and wait until it answers."""
        if PARTS in os.environ and not self.own_parts and not self.data_dir.exists():
            self._share_parts(Path(os.environ[PARTS]))
        for attempt in range(5):
            if not self.port or attempt:
                self.port = free_port()
            self.process = self._spawn()
            try:
                self._wait_until_it_answers()
                return
            except PortTaken:
                continue
        raise AssertionError("no free port in five tries")

    def _share_parts(self, shared: Path) -> None:
        """What a server copies of its host before its first sandbox, and never changes after that,
        is made once for all servers of the tests that belong to the same user."""
        home = self.home.stat()
        self.data_dir.mkdir(mode=0o700)
        os.chown(self.data_dir, home.st_uid, home.st_gid)
        for name in ("bundle", "host"):
            place = shared / str(home.st_uid) / name
            place.mkdir(parents=True, exist_ok=True)
            os.chown(place, home.st_uid, home.st_gid)
            (self.data_dir / name).symlink_to(place)

    def stop(self, sign: int = signal.SIGTERM) -> float:
        """Ask it to end, and see that it does. The seconds that it took."""
        assert self.process is not None
        launchers = self.launcher_pids()
        began = time.monotonic()
        self.process.send_signal(sign)
        self.process.wait(STOP_TIMEOUT_S)
        self._wait_until_gone(launchers)
        return time.monotonic() - began

    def kill(self) -> None:
        """SIGKILL to all of its processes at once: arbiter, workers, keeper, launchers."""
        assert self.process is not None
        launchers = self.launcher_pids()
        for pid in {*self.server_pids(), *launchers}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(STOP_TIMEOUT_S)
        self._wait_until_gone(launchers)

    def _wait_until_gone(self, launchers: list[int]) -> None:
        wait_until(
            lambda: not self.server_pids() and not any(map(is_launcher, launchers)),
            "the server's processes are gone",
        )

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def worker_pids(self) -> list[int]:
        """The processes that answer requests."""
        children = [pid for pid in self.server_pids() if parent_of(pid) == self.pid]
        return [pid for pid in children if b"wsgi:app" in command_line(pid)]

    def keeper_pids(self) -> list[int]:
        return [pid for pid in self.server_pids() if b"heyvm.keeper" in command_line(pid)]

    def launcher_pids(self) -> list[int]:
        """The processes that start sandboxes; their environment is empty, their parent is ours."""
        ours = set(self.server_pids())
        return [pid for pid in all_pids() if is_launcher(pid) and parent_of(pid) in ours]

    def server_pids(self) -> list[int]:
        """Processes that carry the data directory in their environment or command line."""
        needle = os.fsencode(self.home)
        return [
            pid
            for pid in all_pids()
            if pid != os.getpid() and needle in environment(pid) + command_line(pid)
        ]

    def sandbox_pids(self) -> list[int]:
        """Processes that see a file system made of something in the data directory."""
        # Not by its whole path: what is mounted from a tmpfs is named from there on.
        needle, seen = os.fsencode(f"/{self.home.name}/data"), dict[str, bool]()
        own = namespace(os.getpid())
        found = []
        for pid in all_pids():
            space = namespace(pid)
            if not space or space == own:
                continue
            if space not in seen:
                seen[space] = needle in read_bytes(f"/proc/{pid}/mountinfo")
            if seen[space]:
                found.append(pid)
        return found

    def delete_all(self) -> None:
        """Delete every sandbox, whatever its state, and wait until each is gone."""
        with self.http() as http:
            http.headers.update(self.authorization())
            for sandbox in http.get("/sandboxes?status=all").json():
                answer = http.delete(f"/sandboxes/{sandbox['id']}")
                assert answer.status_code in (204, 404), answer.text

    def close(self) -> None:
        """Delete what it has, stop it, and fail if anything of it is left on this machine."""
        try:
            if not self.is_running():
                self.start()
            self.delete_all()
            self.stop()
            left = self.left_overs()
        finally:
            self._wipe()
        assert not left, "\n".join(left)

    def left_overs(self) -> list[str]:
        """What is still there of a server that has stopped and has no sandboxes."""
        wait_until(
            lambda: not self.sandbox_pids(), "the sandboxes' processes are gone", check=False
        )
        wait_until(lambda: not self.cgroups(), "the cgroups are gone", timeout=5, check=False)
        found = [f"process {pid}: {command_line(pid)!r}" for pid in self.sandbox_pids()]
        found += [f"process {pid}: {command_line(pid)!r}" for pid in self.server_pids()]
        found += [f"mount: {line}" for line in lines_with("/proc/self/mountinfo", str(self.home))]
        found += [f"cgroup: {path}" for path in self.cgroups()]
        found += self.network_left_overs()
        sandboxes = self.data_dir / "sandboxes"
        found += [f"directory: {path}" for path in entries(sandboxes)]
        found += [f"trash: {path}" for path in entries(self.data_dir / "trash")]
        found += [f"socket: {path}" for path in entries(self.run_dir / "agents")]
        found += [f"socket: {path}" for path in entries(self.run_dir / "visits")]
        return found

    def cgroups(self) -> list[str]:
        """Its groups, wherever somebody may have let it make some; the upper ones first."""
        roots = [line.split(" ")[4] for line in lines_with("/proc/self/mountinfo", " - cgroup")]
        ours = f"/heyvm-{self.mark}"
        return [path for root in roots for path, _, _ in os.walk(root) if ours in path]

    def network_left_overs(self) -> list[str]:
        """Interfaces, which the kernel takes a moment to reap, single sandboxes' rules, pastas."""
        wait_until(lambda: not self.interfaces(), "interfaces are reaped", check=False)
        found = [f"interface: {name}" for name in self.interfaces()]
        title = f"heyvm-pasta:{self.mark}".encode()
        found += [f"pasta: {pid}" for pid in all_pids() if title in command_line(pid)]
        with contextlib.suppress(OSError):  # no root, no table
            found += [f"rules: {name}" for name in self.table().own()]
        return found

    def interfaces(self) -> list[str]:
        return [name for _, name in socket.if_nameindex() if name.startswith(f"h{self.mark}")]

    def table(self) -> network.Table:
        return network.Table(self.mark, "198.18.0.0/15", self.run_dir)

    def authorization(self) -> dict[str, str]:
        secret = self.environ.get("JWT_SECRET")
        if not secret:
            return {}
        import jwt

        audience = self.environ.get("JWT_AUDIENCE")
        token = jwt.encode({"aud": audience} if audience else {}, secret, algorithm="HS256")
        return {"Authorization": f"Bearer {token}"}

    def _spawn(self) -> subprocess.Popen[bytes]:
        environ = {
            name: value for name, value in os.environ.items() if not name.startswith(OWN_SETTINGS)
        }
        environ |= {
            "HEYVM_DATA_DIR": str(self.data_dir),
            "HEYVM_RUN_DIR": str(self.run_dir),
            "PYTHONPATH": str(REPOSITORY),
        }
        if self.user is not None:
            environ |= {"HOME": str(self.home), "XDG_RUNTIME_DIR": ""}
        environ |= self.environ
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                [*self._command(), *self.flags],
                env=environ,
                cwd=REPOSITORY if self.with_gunicorn else self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=self.user,
                group=self.user,
                extra_groups=None if self.user is None else [],
            )

    def _command(self) -> list[str]:
        if self.with_gunicorn:
            gunicorn = [sys.executable, "-m", "gunicorn", "-c", "deploy/gunicorn.conf.py"]
            return [*gunicorn, "-b", f"127.0.0.1:{self.port}", "wsgi:app"]
        heyvm = [sys.executable, "-m", "heyvm.cli", "--api", "--port", str(self.port)]
        return [*heyvm, "--host", "127.0.0.1"]

    def _wait_until_it_answers(self) -> None:
        assert self.process is not None
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end:
            if self.process.poll() is not None:
                if "something else does" in self.log[-2000:]:
                    raise PortTaken
                raise AssertionError(f"the server ended ({self.process.returncode}):\n{self.log}")
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/health", timeout=5 * PATIENCE).ok:
                    return
            time.sleep(0.05)
        raise AssertionError(f"the server does not answer:\n{self.log}")

    def _wipe(self) -> None:
        """The last resort of a test that failed, so that the next begins on a clean machine."""
        for pid in {*self.server_pids(), *self.sandbox_pids()}:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.sandbox_pids(), "killed", check=False)
        for path in reversed(self.cgroups()):
            with contextlib.suppress(OSError):
                os.rmdir(path)
        if os.geteuid() == 0:
            with contextlib.suppress(Exception):
                self.table().remove()
                ranges.release(self.mark)
                cgroups.remove_tree(self.mark)
        trees.remove(str(self.home))


def create(http: Session, **fields: Any) -> dict[str, Any]:
    """A new sandbox's record."""
    answer = http.post("/sandboxes", json=fields)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def run(http: Session, ref: str, command: str, **more: Any) -> dict[str, Any]:
    """What became of a command."""
    answer = http.post(f"/sandboxes/{ref}/execute", json={"command": command, **more})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


class PortTaken(Exception):
    """Somebody else took the port between the look and the bind."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(
    condition: Callable[[], object], what: str, *, timeout: float = 15.0, check: bool = True
) -> None:
    """Wait for a condition; with `check`, fail when it does not come true in time."""
    end = time.monotonic() + timeout * PATIENCE
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.02)
    if check:
        raise AssertionError(f"not within {timeout * PATIENCE:g} s: {what}")


def all_pids() -> Iterator[int]:
    """Every process but zombies, which have no command line and no namespace."""
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def command_line(pid: int) -> bytes:
    return read_bytes(f"/proc/{pid}/cmdline").replace(b"\0", b" ")


def is_launcher(pid: int) -> bool:
    return b"backends/launcher.py" in command_line(pid)


def environment(pid: int) -> bytes:
    return read_bytes(f"/proc/{pid}/environ")


def parent_of(pid: int) -> int | None:
    fields = read_bytes(f"/proc/{pid}/stat").rpartition(b") ")[2].split()
    return int(fields[1]) if len(fields) > 1 else None


def namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""


def lines_with(path: str, needle: str) -> list[str]:
    return [line for line in Path(path).read_text().splitlines() if needle in line]


def entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []
