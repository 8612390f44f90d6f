"""The whole document against a real server: no 5xx, and nothing that does not stand in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heyvm.api import limits
from tests.server import ORDINARY, REPOSITORY, Server, Session

SEED = "20"
EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "7")  # per operation; more by hand
CONFIG = """
[generation]
database = "none"

[checks]
# What a schema cannot say (an image or a directory that is there, a cursor of this server, an open
# set of words) may be refused.
positive_data_acceptance.enabled = false
max_response_time = 20.0
# Its own list, and 413: a text may be too long for the whole body.
negative_data_rejection.expected-statuses = [
    400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 428, 429
]

# One path, two templates: what is allowed for {ref} and {path} is allowed there too.
[[operations]]
include-path = ["/sandboxes/inactive", "/sandboxes/{ref}/files/upload"]
checks.allow_header_conformance.enabled = false
"""


@pytest.mark.timeout(400)
def test_the_server_does_what_the_document_says(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    if os.geteuid() == 0:
        os.chown(project, ORDINARY, ORDINARY)  # root's own would only be mounted read-only
    with Server(HEYVM_MAX_SANDBOXES="40", HEYVM_MOUNT_ROOTS=str(project)) as server:
        run = schemathesis(server, project, tmp_path)
        assert "Traceback" not in server.log, server.log
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_longest_time_limit_does_no_harm(
    http: Session, sandbox: Callable[..., dict[str, Any]]
) -> None:
    """Found by schemathesis, whose time limits are shortened (schemathesis_hooks.py)."""
    ref = sandbox()["id"]
    body = {"command": "echo", "timeout_seconds": limits.MAX_TIMEOUT_S}
    assert http.post(f"/sandboxes/{ref}/execute", json=body).status_code == 200
    assert http.get(f"/sandboxes/{ref}").json()["status"] == "running"


def schemathesis(server: Server, project: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    config = cwd / "schemathesis.toml"
    config.write_text(CONFIG)
    command = [Path(sys.executable).with_name("schemathesis"), "--config-file", config, "run"]
    options = ["--continue-on-failure", "--max-examples", EXAMPLES]
    return subprocess.run(
        [*command, *options, "--seed", SEED, "--no-color", "--request-timeout", "60",
         f"{server.url}/openapi.json"],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "SCHEMATHESIS_HOOKS": "tests.schemathesis_hooks",
            "SERVER_URL": server.url,
            "PROJECT_DIR": str(project),
        },
        capture_output=True,
        text=True,
    )  # fmt: skip
