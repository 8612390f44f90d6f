"""SIGKILL to any process of the server, at any point: within 5 s of the restart all is in order."""

import contextlib
import os
import re
import signal
import threading
import time

import pytest
import requests

from tests.server import Server, read_bytes, wait_until

DELAYS_S = [step * 0.013 for step in range(7)]
MENDED_WITHIN_S = 5.0
ID = re.compile(r"sb-[0-9a-f]{8}")


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


def boxes(server):
    """The ids of the sandboxes that have a process."""
    found = set()
    for pid in server.sandbox_pids():
        found |= set(ID.findall(read_bytes(f"/proc/{pid}/mountinfo").decode()))
    return found


def names_in(directory):
    return {found.group() for name in os.listdir(directory) if (found := ID.match(name))}


def disorder(server):
    """What does not fit together; empty when all does."""
    with server.http() as http:
        rows = {row["id"]: row["status"] for row in http.get("/sandboxes?status=all").json()}
    running = {ref for ref, status in rows.items() if status == "running"}
    wrong = [f"{ref} is {status}" for ref, status in rows.items() if status not in SETTLED]
    wrong += [f"{ref} runs without a row" for ref in boxes(server) - running]
    wrong += [f"{ref} is running and has no process" for ref in running - boxes(server)]
    for place in (
        server.data_dir / "sandboxes",
        server.run_dir / "agents",
        server.run_dir / "visits",
    ):
        wrong += [f"{place}/{ref} without a row" for ref in names_in(place) - set(rows)]
    # One whose create was cut short before it had a directory is failed; a start makes it.
    made = {ref for ref, status in rows.items() if status != "failed"}
    wrong += [f"{ref} has no directory" for ref in made - names_in(server.data_dir / "sandboxes")]
    wrong += [f"trash: {name}" for name in os.listdir(server.data_dir / "trash")]
    return wrong


SETTLED = ("running", "stopped", "failed")


class Load(threading.Thread):
    """Makes, uses, stops and deletes sandboxes until told to stop; errors are expected."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.server, self.over = server, threading.Event()
        self.start()

    def run(self):
        with self.server.http() as http:
            while not self.over.is_set():
                with contextlib.suppress(requests.RequestException):
                    self.once(http)

    def once(self, http):
        made = http.post("/sandboxes", json={"start_command": "sleep 900"}, timeout=15)
        if made.status_code != 201:
            return
        path = f"/sandboxes/{made.json()['id']}"
        http.post(f"{path}/execute", json={"command": "sleep 0.02; echo x > file"}, timeout=15)
        http.post(f"{path}/force-stop", timeout=15)
        http.get(f"{path}/files", timeout=15)
        http.post(f"{path}/start", timeout=15)
        http.delete(path, timeout=15)


def kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_everything(server):
    server.kill()
    server.start()


VICTIMS = {
    "a worker": lambda server: kill(server.worker_pids()[:1]),
    "all workers": lambda server: kill(server.worker_pids()),
    "the keeper": lambda server: kill(server.keeper_pids()),
    "the launchers": lambda server: kill(server.launcher_pids()),
    "keeper and launchers": lambda server: kill(server.keeper_pids() + server.launcher_pids()),
    "everything": kill_everything,
}


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.timeout(240)
def test_a_kill_at_any_point_is_mended(server, victim):
    for delay in DELAYS_S:
        load = [Load(server) for _ in range(3)]
        time.sleep(0.05 + delay)  # what is killed is killed at another point each time
        VICTIMS[victim](server)
        for one in load:
            one.over.set()
        for one in load:
            one.join(60)
            assert not one.is_alive()
        wait_until(
            lambda: not disorder(server), "all is in order", timeout=MENDED_WITHIN_S, check=False
        )
        assert disorder(server) == []
        server.delete_all()


def test_a_running_sandbox_notices_nothing_of_a_restart(server):
    with server.http() as http:
        path = (
            "/sandboxes/"
            + http.post(
                "/sandboxes", json={"start_command": "while sleep 0.01; do echo x >> beat; done"}
            ).json()["id"]
        )
        http.post(f"{path}/execute", json={"command": "sleep 700 & echo $! > pid"})
        before = http.get(path).json()
        kill_everything(server)
        server.stop(signal.SIGINT)
        server.start()
    with server.http() as http:
        after = http.get(path).json()
        line = "kill -0 $(cat pid) && a=$(wc -c < beat); sleep 0.2; [ $(wc -c < beat) -gt $a ]"
        assert http.post(f"{path}/execute", json={"command": line}).json()["exit_code"] == 0
    for name in ("status", "created_at", "status_changed_at"):
        assert after[name] == before[name]


def test_a_command_in_flight_ends_with_its_worker(server):
    with server.http() as http:
        path = "/sandboxes/" + http.post("/sandboxes", json={}).json()["id"]

        def forever():
            with contextlib.suppress(requests.RequestException), server.http() as own:
                own.post(f"{path}/execute", json={"command": "sleep 4321 & sleep 4321"})

        thread = threading.Thread(target=forever, daemon=True)
        thread.start()

        def sleepers():
            with server.http() as own:
                command = {"command": "pgrep -c -x sleep"}
                return int(own.post(f"{path}/execute", json=command).json()["stdout"])

        wait_until(lambda: sleepers() == 2, "the command runs")
        kill(server.worker_pids())
        wait_until(lambda: answers(server), "the server answers")
        wait_until(lambda: sleepers() == 0, "the command ended")
        thread.join(10)


def answers(server):
    with contextlib.suppress(requests.RequestException), server.http() as http:
        return http.get("/health", timeout=2).ok


def test_a_client_that_leaves_takes_its_command_with_it(server):
    with server.http() as http:
        path = "/sandboxes/" + http.post("/sandboxes", json={}).json()["id"]
        with contextlib.suppress(requests.ReadTimeout):
            http.post(f"{path}/execute", json={"command": "sleep 5432 & sleep 5432"}, timeout=0.5)
        count = {"command": "pgrep -c -x sleep"}
        wait_until(
            lambda: http.post(f"{path}/execute", json=count).json()["stdout"] == "0\n",
            "the command is gone",
        )
