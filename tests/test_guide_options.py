"""The guide's "Create options", for real: a Debian image from a registry, apt-get, nginx, a mount,
and its page fetched from inside. And what else people install: pip's and npm's packages."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.images import ImageRegistry, debian
from tests.server import ORDINARY, Session, wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="apt-get inside needs a root server")

Create = Callable[..., dict[str, Any]]
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
FETCH = "exec 3<>/dev/tcp/127.0.0.1/{port}; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    with ImageRegistry() as registry:
        yield registry.push(debian(), "debian:12")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory that an ordinary user owns, as the guide's /home/user/project."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == 0 and str(directory) not in ("/", "/tmp"):
            directory.chmod(directory.stat().st_mode | 0o055)
    found = tmp_path / "project"
    found.mkdir()
    os.chown(found, ORDINARY, ORDINARY)
    return found


def run(http: Session, ref: str, script: str, **more: Any) -> dict[str, Any]:
    body = {"command": "bash", "args": ["-c", script], "timeout_seconds": 550, **more}
    answer = http.post(f"/sandboxes/{ref}/execute", json=body, timeout=600)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_the_guides_create_options(
    http: Session, sandbox: Create, image: str, project: Path
) -> None:
    made = sandbox(
        name="my-sandbox",
        sandbox_type="shell",
        image=image,
        ttl_seconds=3600,
        start_command="nginx -g 'daemon off;'",
        working_directory="/workspace",
        open_ports=[80, 8080],
        env_vars={"NODE_ENV": "production"},
        setup_hooks=["apt-get update && apt-get install -y --no-install-recommends nginx"],
        mounts=[
            {"host_path": str(project), "sandbox_path": "/workspace", "read_only": False},
        ],
    )
    assert made["status"] == "running"
    assert made["image_resolved"].startswith("sha256:")
    assert made["network"] == "egress"

    wait_until(
        lambda: "200 OK" in run(http, made["id"], FETCH.format(port=80))["stdout"], "nginx answers"
    )
    assert "Welcome to nginx" in run(http, made["id"], FETCH.format(port=80))["stdout"]
    assert run(http, made["id"], "pwd; echo $NODE_ENV")["stdout"] == "/workspace\nproduction\n"
    assert run(http, made["id"], "echo made inside > file")["exit_code"] == 0
    assert (project / "file").stat().st_uid == ORDINARY

    assert http.post(f"/sandboxes/{made['id']}/restart").status_code == 200
    wait_until(
        lambda: "Welcome" in run(http, made["id"], FETCH.format(port=80))["stdout"],
        "nginx answers after a restart: what was installed is still there",
    )


def test_packages_of_all_kinds_install(http: Session, sandbox: Create, image: str) -> None:
    ref = sandbox(image=image)["id"]
    install = "apt-get update -q && apt-get install -y -q --no-install-recommends"
    done = run(http, ref, f"{install} python3-pip sudo openssh-client")
    assert done["exit_code"] == 0, done["output"][-3000:]
    # Set-id programs came with them, as the sandbox has no writable mount.
    assert run(http, ref, "stat -c %A /usr/bin/sudo")["stdout"].startswith("-rws")
    # A machine whose way out has a certificate of its own has told its pip so.
    given = {"stdin": AUTHORITIES.read_text(), "env": {"PIP_CERT": "/etc/authorities"}}
    pip = "pip install --break-system-packages six && python3 -c 'import six'"
    done = run(http, ref, f"cat > /etc/authorities && {pip}", **given)
    assert done["exit_code"] == 0, done["output"][-3000:]


def test_npm_installs_on_the_host_image(http: Session, sandbox: Create) -> None:
    if not Path("/usr/bin/npm").exists():
        pytest.skip("npm is not among this machine's own programs")
    ref = sandbox()["id"]
    done = run(http, ref, "npm install --no-audit is-number && ls node_modules")
    assert (done["exit_code"], done["stdout"].split()[-1]) == (0, "is-number"), done["output"]


def test_a_second_create_needs_no_registry(http: Session, sandbox: Create) -> None:
    with ImageRegistry() as registry:
        name = registry.push(debian(), "once:1")
        sandbox(image=name)
    began = time.monotonic()
    assert sandbox(image=name)["image_resolved"].startswith("sha256:")
    assert time.monotonic() - began < 10


def test_the_record_tells_which_setup_hook_runs(http: Session) -> None:
    made = http.post(
        "/sandboxes",
        json={"setup_hooks": ["true", "sleep 600"]},
        headers={"Prefer": "respond-async"},
    ).json()
    place = f"/sandboxes/{made['id']}"
    try:
        wait_until(
            lambda: http.get(place).json()["status_detail"] == "setup hook 2 of 2", "it is told"
        )
        assert http.post(f"{place}/force-stop").json()["status_detail"] is None
    finally:
        http.delete(place)
