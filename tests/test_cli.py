"""The `heyvm` command, as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from heyvm import __version__
from tests.server import ORDINARY, OWN_SETTINGS, REPOSITORY

SECRET = "a secret of at least thirty-two bytes"


def heyvm(*arguments: str, cwd: Path = REPOSITORY, user: int | None = None, **environ: str) -> Any:
    """Run it to its end with these settings and no others."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OWN_SETTINGS)}
    return subprocess.run(
        [sys.executable, "-m", "heyvm.cli", *arguments],
        env={**kept, "PYTHONPATH": str(REPOSITORY), **environ},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )


def test_version() -> None:
    assert heyvm("--version").stdout == f"heyvm {__version__}\n"


def test_alone_it_prints_help() -> None:
    done = heyvm()

    assert done.returncode == 0
    assert done.stdout.startswith("usage: heyvm")
    assert "doctor" in done.stdout


@pytest.mark.parametrize("flag", ["--port=3001", "--host=::1", "--workers=3", "--debug", "--dev"])
def test_a_servers_flag_without_api_is_an_error_that_says_so(flag: str) -> None:
    done = heyvm(flag)

    assert done.returncode == 2
    assert "add --api" in done.stderr


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "3000.5", "٣"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    assert heyvm("--api", f"--port={port}").returncode == 2


def test_a_token_is_what_the_server_accepts() -> None:
    done = heyvm(
        *("token", "--subject", "ci", "--audience", "here", "--expires-in", "2h"), JWT_SECRET=SECRET
    )

    claims = jwt.decode(done.stdout.strip(), SECRET, algorithms=["HS256"], audience="here")
    assert claims["sub"] == "ci"
    assert claims["exp"] - claims["iat"] == 7200
    assert abs(claims["iat"] - time.time()) < 60
    assert done.stderr == ""


def test_a_token_takes_the_servers_audience_unless_told() -> None:
    done = heyvm("token", JWT_SECRET=SECRET, JWT_AUDIENCE="heyvm")

    claims = jwt.decode(done.stdout.strip(), SECRET, algorithms=["HS256"], audience="heyvm")
    assert claims["exp"] - claims["iat"] == 30 * 86400


def test_a_token_that_never_expires() -> None:
    done = heyvm("token", "--expires-in", "never", JWT_SECRET=SECRET)

    assert "exp" not in jwt.decode(done.stdout.strip(), SECRET, algorithms=["HS256"])


@pytest.mark.parametrize("given", [{}, {"JWT_SECRET": ""}, {"JWT_SECRET": "  "}])
def test_without_a_secret_there_is_no_token(given: dict[str, str]) -> None:
    done = heyvm("token", **given)

    assert done.returncode == 2
    assert done.stdout == ""
    assert "JWT_SECRET" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["0", "-1d", "1y", "soon", "1.5h"])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    done = heyvm("token", f"--expires-in={text}", JWT_SECRET=SECRET)

    assert done.returncode == 2
    assert "not a time" in done.stderr


@pytest.mark.parametrize("user", [None, ORDINARY] if os.geteuid() == 0 else [None])
def test_doctor_runs_a_sandbox_and_leaves_nothing(user: int | None) -> None:
    with tempfile.TemporaryDirectory() as home:
        if user is not None:
            os.chown(home, user, user)
        done = heyvm("doctor", user=user, HOME=home, HEYVM_DATA_DIR=home)

        assert done.returncode == 0, done.stdout + done.stderr
        levels = {
            line.split(":")[0].split(None, 1)[1]: line[:4].strip() for line in lines(done.stdout)
        }
        needed = {levels[name] for name in ("bubblewrap", "create", "execute", "delete")}
        assert needed == {"ok"}
        assert levels.keys() >= {"image tools", "ids", "cgroups", "network", "disk limits"}
        assert os.listdir(home) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="makes directories of another user's")
def test_doctor_tells_who_may_not_write_what(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o755)
        done = heyvm("doctor", user=ORDINARY, HOME=home, HEYVM_DATA_DIR=home)

        assert done.returncode == 1
        assert f"Permission denied: '{home}/" in done.stdout
        assert f"has to be able to write to {home}" in done.stdout
        assert "Traceback" not in done.stderr


def test_doctor_as_json(tmp_path: Path) -> None:
    checks = json.loads(heyvm("doctor", "--json", HEYVM_DATA_DIR=str(tmp_path)).stdout)

    assert {"level", "name", "what", "cure"} == set(checks[0])


def test_doctor_tells_of_a_data_directory_that_cannot_be() -> None:
    done = heyvm("doctor", HEYVM_DATA_DIR="/proc/1/nowhere")

    assert done.returncode == 1
    assert "FAIL" in done.stdout
    assert "Traceback" not in done.stderr


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line[:5].strip() in ("ok", "warn", "FAIL")]
