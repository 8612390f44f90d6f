"""Clients generated from the document, in Python and in TypeScript, against a real server."""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.server import ORDINARY, Server

CLIENTS = Path(__file__).parent / "clients"
TEXT = b"Hello world!"
# The guide's quick reference, all but proxy and shell-session, which are not built yet; and by
# what names generated clients know each row: to change one breaks programs.
GUIDE = """
    GET    /health                               getHealth
    GET    /sandboxes                            listSandboxes
    POST   /sandboxes                            createSandbox
    GET    /sandboxes/{ref}                      getSandbox
    PATCH  /sandboxes/{ref}                      updateSandbox
    DELETE /sandboxes/{ref}                      deleteSandbox
    POST   /sandboxes/{ref}/start                startSandbox
    POST   /sandboxes/{ref}/stop                 stopSandbox
    POST   /sandboxes/{ref}/restart              restartSandbox
    POST   /sandboxes/{ref}/execute              executeCommand
    GET    /sandboxes/{ref}/files                listFiles
    POST   /sandboxes/{ref}/files                uploadFile
    POST   /sandboxes/{ref}/files/upload         uploadFileJson
    GET    /sandboxes/{ref}/files/{path}         downloadFile
    DELETE /sandboxes/{ref}/files/{path}         deleteFile
    GET    /sandboxes/{ref}/logs                 getLogs
    GET    /sandboxes/{ref}/mounts               listMounts
    POST   /sandboxes/{ref}/mounts               addMount
    DELETE /sandboxes/{ref}/mounts/{sandbox_path} removeMount
"""
ROWS = [line.split() for line in GUIDE.strip().splitlines()]


@pytest.fixture(scope="module")
def document(server: Server) -> bytes:
    with server.http() as http:
        return http.get("/openapi.json").content


@pytest.fixture
def project() -> Iterator[Path]:
    """A directory of the host that a sandbox may write to: an ordinary user's."""
    with tempfile.TemporaryDirectory(prefix="heyvm-project-") as path:
        if os.geteuid() == 0:
            os.chown(path, ORDINARY, ORDINARY)
        yield Path(path)


@pytest.mark.parametrize(("verb", "path", "name"), ROWS)
def test_a_row_of_the_guide_keeps_its_name(
    verb: str, path: str, name: str, document: bytes
) -> None:
    assert json.loads(document)["paths"][path][verb.lower()]["operationId"] == name


# --- Python ---------------------------------------------------------------------------------------


class Client:
    """The generated package: `client.sandboxes.get_sandbox("box")` for every operation, as what a
    200, 201 or 204 gives."""

    def __init__(self, package: ModuleType, url: str) -> None:
        self.package = package
        self.models: Any = importlib.import_module(f"{package.__name__}.models")
        self.types: Any = importlib.import_module(f"{package.__name__}.types")
        self.http = package.Client(base_url=url, raise_on_unexpected_status=True)

    def operation(self, tag: str, name: str, /) -> Callable[..., Any]:
        return importlib.import_module(f"{self.package.__name__}.api.{tag}.{name}").sync_detailed

    def call(self, tag: str, name: str, /, *path: str, **options: Any) -> Any:
        answer = self.operation(tag, name)(*path, client=self.http, **options)
        assert answer.status_code in (200, 201, 204), answer.content
        return answer.parsed


@pytest.fixture(scope="module")
def python(
    server: Server, document: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    directory = tmp_path_factory.mktemp("python")
    generate_python(document, directory, "heyvm_client")
    sys.path.insert(0, str(directory))
    try:
        yield Client(importlib.import_module("heyvm_client"), server.url)
    finally:
        sys.path.remove(str(directory))
        for name in [name for name in sys.modules if name.split(".")[0] == "heyvm_client"]:
            del sys.modules[name]


def generate_python(document: bytes, directory: Path, package: str) -> None:
    (directory / "openapi.json").write_bytes(document)
    # The generator knows no media type but a few; a tar is bytes to it.
    (directory / "config.yml").write_text(
        "post_hooks: []\ncontent_type_overrides: {application/x-tar: application/octet-stream}\n"
    )
    generator = Path(sys.executable).with_name("openapi-python-client")
    done = run(
        [generator, "generate", "--path", "openapi.json", "--config", "config.yml",
         "--meta", "none", "--output-path", package, "--fail-on-warning"],
        cwd=directory,
    )  # fmt: skip
    assert "WARNING" not in done.stdout, done.stdout


@pytest.fixture
def box(python: Client, project: Path) -> Iterator[Any]:
    models = python.models
    request = models.CreateRequest(
        name="Python",
        ttl_seconds=3600,
        env_vars=models.CreateRequestEnvVarsType0.from_dict({"GREETING": "hello"}),
        mounts=[models.MountRequest(host_path=str(project), sandbox_path="/project")],
        setup_hooks=["echo made"],
    )
    made = python.call("sandboxes", "create_sandbox", body=request)
    yield made
    assert python.call("sandboxes", "delete_sandbox", made.id) is None


def test_python_creates_gets_and_lists(python: Client, box: Any) -> None:
    assert isinstance(box, python.models.SandboxInfo)
    assert (box.name, box.status, box.env_vars["GREETING"]) == ("Python", "running", "hello")
    assert isinstance(box.expires_at, datetime)
    assert box.expires_at > box.created_at
    found = python.call("sandboxes", "get_sandbox", box.slug)
    assert (found.id, found.created_at, found.mounts) == (box.id, box.created_at, box.mounts)
    listed = python.call("sandboxes", "list_sandboxes", name="Python", limit=1000)
    assert box.id in [one.id for one in listed]


def test_python_executes_and_reads_logs(python: Client, box: Any) -> None:
    models = python.models
    command = models.ExecuteRequest(
        command="sh", args=["-c", "echo $A; exit 3"], env=models.ExecuteRequestEnvType0()
    )
    command.env["A"] = "é"
    result = python.call("sandboxes", "execute_command", box.id, body=command)
    assert isinstance(result, models.ExecuteResult)
    assert (result.stdout, result.exit_code, result.timed_out) == ("é\n", 3, False)
    page = python.call("logs", "get_logs", box.id, source="stdout")
    assert isinstance(page, models.LogPageInfo)
    assert [entry.message for entry in page.logs] == ["made", "é"]
    assert page.total == 2


def test_python_moves_files(python: Client, box: Any) -> None:
    models, file = python.models, python.types.File(BytesIO(TEXT), "form.txt")
    form = models.UploadForm(file=file, mount_path="/workspace", file_path="a/form.txt")
    sent = python.call("files", "upload_file", box.id, body=form)
    assert (sent.path, sent.size) == ("a/form.txt", len(TEXT))
    body = models.UploadJson(file_path="a/json.txt", content="SGVsbG8gd29ybGQh")
    assert python.call("files", "upload_file_json", box.id, body=body).size == len(TEXT)

    listing = python.call("files", "list_files", box.id, path="a")
    assert isinstance(listing, models.FileListing)
    assert sorted(entry.name for entry in listing.files) == ["form.txt", "json.txt"]
    for entry in listing.files:
        assert python.call("files", "download_file", box.id, entry.path).payload.read() == TEXT
        assert python.call("files", "delete_file", box.id, entry.path) is None
    assert python.call("files", "list_files", box.id, path="a").files == []


def test_python_mounts(python: Client, box: Any, project: Path) -> None:
    body = python.models.MountRequest(host_path=str(project), sandbox_path="/more", read_only=True)
    added = python.call("mounts", "add_mount", box.id, body=body)
    assert (added.host_path, added.read_only) == (str(project), True)
    listed = python.call("mounts", "list_mounts", box.id)
    assert sorted(mount.sandbox_path for mount in listed) == ["/more", "/project"]
    assert python.call("mounts", "remove_mount", box.id, "/more") is None
    assert [mount.sandbox_path for mount in python.call("mounts", "list_mounts", box.id)] == [
        "/project"
    ]


def test_python_updates_stops_and_starts(python: Client, box: Any) -> None:
    changes = python.models.PatchRequest(open_ports=[8080], ttl_seconds=None)
    changed = python.call("sandboxes", "update_sandbox", box.id, body=changes)
    assert (changed.open_ports, changed.ttl_seconds, changed.expires_at) == ([8080], None, None)
    assert changed.env_vars["GREETING"] == "hello"
    verbs = ("stop_sandbox", "start_sandbox", "restart_sandbox", "force_stop_sandbox")
    states = [python.call("sandboxes", verb, box.id).status for verb in verbs]
    assert states == ["stopped", "running", "running", "stopped"]


def test_python_is_told_what_is_wrong(python: Client) -> None:
    lost = python.operation("sandboxes", "get_sandbox")("nobody", client=python.http)
    assert isinstance(lost.parsed, python.models.Problem)
    assert (lost.parsed.status, lost.parsed.type_) == (404, "urn:heyvm:problem:not-found")


# --- TypeScript -----------------------------------------------------------------------------------


@pytest.fixture
def modules() -> Path:
    """node_modules as tests/clients/package-lock.json has them; kept for later runs."""
    if not (shutil.which("node") and shutil.which("npm")):
        missing = "node and npm are not installed: `make test-packages` installs them for root"
        (pytest.fail if os.geteuid() == 0 else pytest.skip)(missing)
    lock = (CLIENTS / "package-lock.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = cache / "heyvm-tests" / hashlib.sha256(lock).hexdigest()[:16]
    kept.mkdir(parents=True, exist_ok=True)
    with locked(kept / "lock"):
        if not (kept / "installed").exists():
            for name in ("package.json", "package-lock.json"):
                shutil.copy(CLIENTS / name, kept)
            run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=kept)
            (kept / "installed").touch()
    return kept / "node_modules"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def test_typescript_does_all_of_it(
    server: Server, document: bytes, modules: Path, tmp_path: Path, project: Path
) -> None:
    (tmp_path / "openapi.json").write_bytes(document)
    (tmp_path / "node_modules").symlink_to(modules)
    for name in ("package.json", "tsconfig.json", "client.ts"):
        shutil.copy(CLIENTS / name, tmp_path)
    program = modules / ".bin"
    run([program / "openapi-typescript", "openapi.json", "-o", "schema.d.ts"], cwd=tmp_path)
    run([program / "tsc"], cwd=tmp_path)
    done = run(["node", "out/client.js", server.url, str(project)], cwd=tmp_path)
    assert done.stdout.endswith("all is well\n"), done.stdout


def run(command: list[Any], *, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done
