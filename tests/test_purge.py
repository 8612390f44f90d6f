"""`heyvm purge` leaves nothing of a server, and nothing else is its to remove."""

from __future__ import annotations

import os

import pytest

from tests.server import ORDINARY, Server
from tests.test_cli import heyvm


@pytest.mark.parametrize("user", [None, ORDINARY] if os.geteuid() == 0 else [None])
def test_purge_leaves_nothing(user: int | None) -> None:
    with Server(user=user, own_parts=True, API_HOSTNAME="sandbox.test") as server:
        environ = {
            "HEYVM_DATA_DIR": str(server.data_dir),
            "HEYVM_RUN_DIR": str(server.run_dir),
            "HOME": str(server.home),
        }
        created = server.http().post("/sandboxes", json={"start_command": "sleep 7654321"})
        assert created.status_code == 201, created.text
        path = f"/sandboxes/{created.json()['id']}/proxy"
        assert server.http().post(path, json={"port": 8000}).status_code == 201
        assert os.listdir(server.run_dir / "ports/public")
        mine = server.data_dir / "mine"
        mine.touch()

        busy = heyvm("purge", "--yes", user=user, **environ)
        assert (busy.returncode, "stop it first" in busy.stderr) == (1, True)
        server.stop()
        half_gone = server.data_dir / "trash" / "half"
        half_gone.mkdir()
        if user is not None:
            os.chown(half_gone, user, user)
        asked = heyvm("purge", user=user, **environ)
        assert (asked.returncode, "1 sandboxes" in asked.stderr) == (1, True)
        assert server.sandbox_pids()

        done = heyvm("purge", "--yes", user=user, **environ)

        assert done.returncode == 0, done.stderr
        assert os.listdir(server.data_dir) == ["mine"]
        assert not server.run_dir.exists()
        assert server.left_overs() == []
        if os.geteuid() == 0 and user is None:
            assert not server.table().is_there()
            for path in ("/etc/subuid", "/etc/subgid"):
                with open(path) as file:
                    assert server.mark not in file.read()
        again = heyvm("purge", "--yes", user=user, **environ)
        assert (again.returncode, "no server has used" in again.stderr) == (1, True)
        mine.unlink()
