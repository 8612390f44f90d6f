"""A hundred sandboxes that come and go, and nothing that stays of them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.server import Server, wait_until

ROUNDS = 100
AT_ONCE = 4
MIB = 1024 * 1024


@pytest.fixture
def own() -> Iterator[Server]:
    with Server() as running:
        yield running


def one_round(server: Server, number: int) -> None:
    with server.http() as http:
        answer = http.post("/sandboxes", json={"start_command": "sleep 1000", "name": "soak"})
        assert answer.status_code == 201, answer.text
        path = f"/sandboxes/{answer.json()['id']}"
        done = http.post(f"{path}/execute", json={"command": f"echo {number}; sleep 500 &"})
        assert done.json()["stdout"] == f"{number}\n"
        form = {"file_path": (None, "f"), "file": ("f", bytes(10_000))}
        assert http.post(f"{path}/files", files=form).status_code == 201
        if number % 10 == 0:
            assert http.post(f"{path}/force-stop").status_code == 200
            assert len(http.get(f"{path}/files/f").content) == 10_000
        assert http.delete(path).status_code == 204


def churn(server: Server, rounds: int) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda number: one_round(server, number), range(rounds)))


def processes(server: Server) -> list[int]:
    return [*server.server_pids(), *server.launcher_pids()]


def field(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return 0


def use(server: Server) -> dict[str, int]:
    """What the server holds of everything that could leak."""
    gc.collect()
    files = [path for path in server.home.rglob("*") if not path.is_relative_to(server.data_dir)]
    top = [path for path in server.data_dir.iterdir() if "registry" not in path.name]
    return {
        "processes": len(processes(server)),
        "descriptors": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in processes(server)),
        "threads": sum(field(pid, "Threads") for pid in processes(server)),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "cgroups": len(server.cgroups()),
        "sandboxes": len(list((server.data_dir / "sandboxes").iterdir())),
        "trash": len(list((server.data_dir / "trash").iterdir())),
        "run files": len(files),
        "data files": len(top),
        "sandbox processes": len(server.sandbox_pids()),
    }


def test_a_hundred_rounds_leave_nothing(own: Server) -> None:
    wait_until(lambda: len(own.launcher_pids()) == 2, "both workers are ready", timeout=60)
    churn(own, 20)
    before, memory = use(own), sum(field(pid, "VmRSS") for pid in processes(own))

    churn(own, ROUNDS)

    def more() -> dict[str, tuple[int, int]]:
        after = use(own)
        # Mounts are the whole machine's, which runs other tests; those of ours are looked for when
        # the server is closed. A connection or a keeper's work may come and go.
        slack = {"mounts": 1000, "descriptors": 6, "threads": 3}
        return {
            name: (before[name], after[name])
            for name in before
            if after[name] > before[name] + slack.get(name, 0)
        }

    wait_until(lambda: not more(), "all is as before", check=False)
    assert more() == {}
    grown = sum(field(pid, "VmRSS") for pid in processes(own)) - memory
    assert grown < 30 * 1024, f"{grown} KiB more memory"
    assert (own.data_dir / "registry.db-wal").stat().st_size < 20 * MIB
    assert (own.data_dir / "registry.db").stat().st_size < 5 * MIB
