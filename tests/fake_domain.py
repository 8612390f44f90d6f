"""A domain in memory, for tests of the HTTP layer alone: sandboxes are rows of a dict, mounts are
directories of the host, and commands run on it. No isolation at all."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import pytest
from flask import Flask
from flask.testing import FlaskClient

from heyvm.api.parts import Services
from heyvm.api.wiring import Api, connect
from heyvm.errors import Conflict, HookFailed, NotFound, Unavailable
from heyvm.images import Images
from heyvm.models import (
    CreateSpec,
    Download,
    Endpoint,
    ExecRequest,
    ExecResult,
    FileInfo,
    LogEntry,
    LogPage,
    Mount,
    Page,
    Sandbox,
    Status,
    Tunnel,
)
from heyvm.registry import Registry
from heyvm.settings import Settings
from heyvm.shells import Way

PIECE = 64 * 1024


@dataclass
class FakeBackend:
    """Always there, or never."""

    name: str = "bubblewrap"
    missing: bool = False

    def check(self) -> None:
        if self.missing:
            raise Unavailable("bwrap is not installed; apt install bubblewrap")


@dataclass
class FakeLifecycle:
    """Every change happens at once. `fail_next` is raised by the next call."""

    rows: dict[str, Sandbox] = field(default_factory=dict)
    keys: dict[str, tuple[str, str]] = field(default_factory=dict)
    fail_next: BaseException | None = None

    def create(
        self,
        spec: CreateSpec,
        *,
        idempotency_key: str | None = None,
        body_hash: str = "",
        wait: bool = True,
    ) -> tuple[Sandbox, bool]:
        self._fail()
        if idempotency_key in self.keys:
            sandbox_id, earlier = self.keys[idempotency_key]
            if earlier != body_hash:
                raise Conflict("this Idempotency-Key was used with another body")
            return self.get(sandbox_id), True
        sandbox = self._row(spec, Status.RUNNING if wait else Status.PROVISIONING)
        self.rows[sandbox.id] = sandbox
        if "false" in spec.setup_hooks:
            self._become(sandbox, Status.FAILED)
            raise HookFailed("setup hook 1 ended with 1", sandbox_id=sandbox.id)
        if idempotency_key is not None:
            self.keys[idempotency_key] = sandbox.id, body_hash
        return sandbox, False

    def _row(self, spec: CreateSpec, status: Status) -> Sandbox:
        now = time.time()
        name = spec.name or ""
        return Sandbox(
            id=f"sb-{secrets.token_hex(4)}",
            name=name,
            slug=spec.slug or name,
            status=status,
            status_changed_at=now,
            created_at=now,
            started_at=now,
            backend_type=spec.backend_type or "bubblewrap",
            image_resolved="host",
            sandbox_type=spec.sandbox_type,
            image=spec.image,
            ttl_seconds=spec.ttl_seconds,
            expires_at=now + spec.ttl_seconds if spec.ttl_seconds else None,
            start_command=spec.start_command,
            working_directory=spec.working_directory or "/workspace",
            open_ports=spec.open_ports,
            env_vars=spec.env_vars,
            setup_hooks=spec.setup_hooks,
            mounts=spec.mounts,
            warnings=tuple(f"unknown field {name!r}" for name in spec.unknown_fields),
            metadata=spec.metadata,
        )

    def get(self, ref: str) -> Sandbox:
        self._fail()
        for row in self.rows.values():
            if ref in (row.id, row.slug):
                return row
        raise NotFound(f"there is no sandbox {ref!r}")

    def wait(self, ref: str, status: str, timeout: float) -> Sandbox:
        sandbox = self.get(ref)
        return self._become(sandbox, Status(status))

    def list(
        self, statuses: frozenset[Status], name: str | None, limit: int | None, cursor: str | None
    ) -> Page:
        rows = [row for row in self.rows.values() if row.status in statuses]
        rows = [row for row in rows if name in (None, row.name)]
        start = int(cursor or 0)
        stop = len(rows) if limit is None else start + limit
        return Page(tuple(rows[start:stop]), str(stop) if stop < len(rows) else None)

    def update(self, ref: str, changes: Mapping[str, Any]) -> Sandbox:
        sandbox = replace(self.get(ref), **changes)
        self.rows[sandbox.id] = sandbox
        return sandbox

    def start(self, ref: str) -> Sandbox:
        return self._become(self.get(ref), Status.RUNNING)

    restart = start

    def stop(self, ref: str) -> Sandbox:
        return self._become(self.get(ref), Status.STOPPED)

    force_stop = stop

    def delete(self, ref: str) -> None:
        del self.rows[self.get(ref).id]

    def uptime(self, sandbox: Sandbox) -> float:
        return 12.25 if sandbox.status is Status.RUNNING else 0.0

    def _become(self, sandbox: Sandbox, status: Status) -> Sandbox:
        changed = replace(sandbox, status=status)
        self.rows[sandbox.id] = changed
        return changed

    def counts(self) -> Mapping[Status, int]:
        return {
            status: sum(row.status is status for row in self.rows.values()) for status in Status
        }

    def _fail(self) -> None:
        error, self.fail_next = self.fail_next, None
        if error is not None:
            raise error


@dataclass
class FakeProcesses:
    """Runs the command on the host."""

    lifecycle: FakeLifecycle
    asked: list[ExecRequest] = field(default_factory=list)

    def execute(self, ref: str, request: ExecRequest, client: object = None) -> ExecResult:
        self.lifecycle.get(ref)
        self.asked.append(request)
        argv = [request.command, *(request.args or ())]
        done = subprocess.run(argv, input=request.stdin, capture_output=True, check=False)
        both = done.stdout + done.stderr
        return ExecResult(both, done.stdout, done.stderr, done.returncode, 2, False, False)


@dataclass
class FakeFiles:
    """Each mount is a directory below `root`. `shrink` sends less than it has announced."""

    lifecycle: FakeLifecycle
    root: Path
    shrink: bool = False
    left_open: int = 0

    def _path(self, ref: str, mount_path: str, path: str) -> Path:
        self.lifecycle.get(ref)
        return self.root / mount_path.strip("/") / path

    def _found(self, ref: str, mount_path: str, path: str) -> Path:
        found = self._path(ref, mount_path, path)
        if not found.exists():
            raise NotFound(f"there is no file {path!r} in {mount_path}")
        return found

    def _info(self, path: Path, base: Path) -> FileInfo:
        status = path.lstat()
        kind = "directory" if path.is_dir() else "file"
        relative = str(path.relative_to(base))
        return FileInfo(path.name, relative, kind, status.st_size, status.st_mode, status.st_mtime)

    def list(self, ref: str, mount_path: str, path: str, recursive: bool) -> list[FileInfo]:
        base = self._path(ref, mount_path, "")
        found = self._found(ref, mount_path, path)
        names = found.rglob("*") if recursive else found.iterdir()
        return [self._info(one, base) for one in sorted(names)]

    def stat(self, ref: str, mount_path: str, path: str) -> FileInfo:
        return self._info(self._found(ref, mount_path, path), self._path(ref, mount_path, ""))

    def open(
        self, ref: str, mount_path: str, path: str, offset: int = 0, length: int | None = None
    ) -> Download:
        found = self._found(ref, mount_path, path)
        if found.is_dir():
            raise Conflict(f"{path!r} is a directory: ask for ?format=tar")
        info = self.stat(ref, mount_path, path)
        content = found.read_bytes()[offset:]
        content = content if length is None else content[:length]
        sent = content[: len(content) // 2] if self.shrink else content
        return Download(info, info.size, f"{found.stat().st_mtime_ns:x}", self._pieces(sent))

    def _pieces(self, content: bytes) -> Iterator[bytes]:
        self.left_open += 1
        try:
            for start in range(0, len(content), PIECE):
                yield content[start : start + PIECE]
        finally:
            self.left_open -= 1

    def open_tar(self, ref: str, mount_path: str, path: str) -> Download:
        packed = BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(self._found(ref, mount_path, path), arcname=".")
        info = self.stat(ref, mount_path, path)
        return Download(info, None, None, self._pieces(packed.getvalue()))

    def upload(self, ref: str, mount_path: str, path: str, chunks: Iterator[bytes]) -> int:
        target = self._path(ref, mount_path, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(os.fspath(target) + ".part")
        try:
            with made.open("wb") as out:
                for chunk in chunks:
                    out.write(chunk)
            made.rename(target)
        finally:
            made.unlink(missing_ok=True)
        return target.stat().st_size

    def upload_tar(self, ref: str, mount_path: str, path: str, chunks: Iterator[bytes]) -> int:
        content = b"".join(chunks)
        with tarfile.open(fileobj=BytesIO(content)) as tar:
            tar.extractall(self._path(ref, mount_path, path))
        return len(content)

    def delete(self, ref: str, mount_path: str, path: str, recursive: bool) -> None:
        found = self._found(ref, mount_path, path)
        if not found.is_dir():
            found.unlink()
        elif recursive:
            shutil.rmtree(found)
        elif any(found.iterdir()):
            raise Conflict(f"{path!r} is a directory with something in it: ?recursive=true")
        else:
            found.rmdir()


@dataclass
class FakeMounts:
    lifecycle: FakeLifecycle

    def list(self, ref: str) -> tuple[Mount, ...]:
        return self.lifecycle.get(ref).mounts

    def add(self, ref: str, mount: Mount) -> Mount:
        there = self.list(ref)
        if any(one.sandbox_path == mount.sandbox_path for one in there):
            raise Conflict(f"{mount.sandbox_path} is a mount already")
        self.lifecycle.update(ref, {"mounts": (*there, mount)})
        return mount

    def remove(self, ref: str, sandbox_path: str) -> None:
        there = self.list(ref)
        left = tuple(one for one in there if one.sandbox_path != sandbox_path)
        if left == there:
            raise NotFound(f"there is no mount {sandbox_path}")
        self.lifecycle.update(ref, {"mounts": left})


@dataclass
class FakeProxies:
    lifecycle: FakeLifecycle
    rows: dict[str, Endpoint] = field(default_factory=dict)

    def list(self, ref: str) -> list[Endpoint]:
        sandbox = self.lifecycle.get(ref)
        return [one for one in self.rows.values() if one.sandbox_id == sandbox.id]

    def create(self, ref: str, port: int, *, is_public: bool = True) -> Endpoint:
        sandbox = self.lifecycle.get(ref)
        name = f"{len(self.rows):016d}"
        endpoint = Endpoint(name, sandbox.id, port, 1.0, is_public=is_public, local_port=40000)
        self.rows[name] = endpoint
        return endpoint

    def get(self, ref: str, subdomain: str) -> Endpoint:
        for one in self.list(ref):
            if one.subdomain == subdomain:
                return one
        raise NotFound(f"there is no endpoint {subdomain!r}")

    def delete(self, ref: str, subdomain: str) -> None:
        del self.rows[self.get(ref, subdomain).subdomain]

    def change(self, ref: str, subdomain: str, *, is_public: bool) -> Endpoint:
        self.rows[subdomain] = replace(self.get(ref, subdomain), is_public=is_public)
        return self.rows[subdomain]

    def internal(self, ref: str, port: int) -> Endpoint:
        return Endpoint("i", self.lifecycle.get(ref).id, port, 1.0, "internal", local_port=40001)


@dataclass
class FakeShells:
    lifecycle: FakeLifecycle
    rows: dict[str, Tunnel] = field(default_factory=dict)

    def list(self, ref: str, kind: str) -> list[Tunnel]:
        sandbox = self.lifecycle.get(ref)
        return [
            one for one in self.rows.values() if (one.sandbox_id, one.kind) == (sandbox.id, kind)
        ]

    def create(self, ref: str, ttl_seconds: int, ssh_public_keys: Sequence[str] = ()) -> Way:
        name = f"shell-{len(self.rows):016x}"
        sandbox = self.lifecycle.get(ref)
        keys = tuple(ssh_public_keys)
        self.rows[name] = Tunnel(
            name, sandbox.id, "shell", b"", 1.0, 1.0 + ttl_seconds, None, 1, keys
        )
        return Way(self.rows[name], "heyo://endpointaa", "ssh-ed25519 AAAA")

    def tunnel_to(self, ref: str, port: int) -> Way:
        name = f"tcp-{port:016x}"
        sandbox = self.lifecycle.get(ref)
        self.rows.setdefault(name, Tunnel(name, sandbox.id, "tcp", b"", 1.0, None, port, 1))
        return Way(self.rows[name], "heyo://endpointaa", "")

    def remove(self, ref: str, kind: str, tunnel_id: str) -> None:
        if tunnel_id not in {one.id for one in self.list(ref, kind)}:
            raise NotFound(f"there is no {tunnel_id!r}")
        del self.rows[tunnel_id]

    def inside(self, ref: str) -> Any:
        raise Conflict(f"sandbox {self.lifecycle.get(ref).slug!r} has no shell here")


@dataclass
class FakeLogs:
    lifecycle: FakeLifecycle
    entries: list[LogEntry] = field(default_factory=list)

    def read(
        self, ref: str, limit: int, offset: int, source: str | None, level: str | None
    ) -> LogPage:
        self.lifecycle.get(ref)
        found = [one for one in self.entries if source in (None, one.source)]
        found = [one for one in found if level in (None, one.level)]
        stop = max(0, len(found) - offset)
        return LogPage(found[max(0, stop - limit) : stop], len(found), limit, offset)


@dataclass
class Fake:
    """The domain and the application on it."""

    app: Flask
    lifecycle: FakeLifecycle
    processes: FakeProcesses
    files: FakeFiles
    mounts: FakeMounts
    logs: FakeLogs
    backend: FakeBackend


def fake_app(root: Path, **settings: Any) -> Fake:
    """An application on a fresh fake domain with one sandbox in it, called `box`."""
    lifecycle, backend = FakeLifecycle(), FakeBackend()
    files = FakeFiles(lifecycle, root / "mounts")
    (root / "mounts" / "workspace").mkdir(parents=True, exist_ok=True)
    (root / "data").mkdir(exist_ok=True)
    processes, logs = FakeProcesses(lifecycle), FakeLogs(lifecycle)
    mounts = FakeMounts(lifecycle)
    told = Settings(data_dir=root / "data", run_dir=root / "run", **settings)
    app = Api("heyvm", static_folder=None)
    parts: Any = Services(
        settings=told,
        lifecycle=cast(Any, lifecycle),
        processes=cast(Any, processes),
        files=cast(Any, files),
        logs=cast(Any, logs),
        mounts=cast(Any, mounts),
        proxies=cast(Any, FakeProxies(lifecycle)),
        shells=cast(Any, FakeShells(lifecycle)),
        images=Images(Registry(told.data_dir / "registry.db"), told),
        backends=cast(Any, {"bubblewrap": backend}),
    )
    connect(app, parts)
    lifecycle.create(CreateSpec(name="box"))
    return Fake(app, lifecycle, processes, files, mounts, logs, backend)


def problem(answer: Any, status: int, slug: str) -> dict[str, Any]:
    """The problem in an answer, after a look at its form."""
    assert answer.status_code == status, answer.get_data(as_text=True)
    assert answer.mimetype == "application/problem+json"
    body: dict[str, Any] = answer.json
    assert body["type"] == f"urn:heyvm:problem:{slug}"
    assert body["status"] == status
    assert body["detail"] == body["error"] == body["message"] != ""
    assert body["title"]
    assert body["request_id"] == answer.headers["X-Request-Id"]
    return body


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """A fake domain that holds one sandbox, `box`."""
    return fake_app(tmp_path)


@pytest.fixture
def api(fake: Fake) -> FlaskClient:
    """Talks to it in process, as a client on the same machine."""
    return fake.app.test_client()
