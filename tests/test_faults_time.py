"""Times to live, a machine that was restarted, odd surroundings, two servers on one directory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.server import (
    REPOSITORY,
    Server,
    Session,
    create,
    read_bytes,
    wait_until,
)

EXPIRED_WITHIN_S = 2.0
SLACK_S = 0.5  # of the poll, on a machine that runs other tests
ANOTHER_BOOT = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def own() -> Iterator[Server]:
    """A server that a test may harm."""
    with Server() as running:
        yield running


def path_of(record: dict[str, Any]) -> str:
    return f"/sandboxes/{record['id']}"


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def is_gone(http: Session, path: str) -> bool:
    return http.get(path).status_code == 404


def run(http: Session, path: str, command: str) -> str:
    answer = http.post(f"{path}/execute", json={"command": command})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["stdout"])


# -- time to live --------------------------------------------------------------------------------


def test_a_sandbox_goes_within_two_seconds_of_its_time_and_says_why(
    http: Session, server: Server
) -> None:
    made = create(http, ttl_seconds=2, slug="short-lived", start_command="sleep 1000")
    path, expires = path_of(made), moment(made["expires_at"])
    assert made["ttl_seconds"] == 2
    assert abs(expires - moment(made["status_changed_at"]) - 2) < 0.1

    gone_at = 0.0
    while time.time() < expires + EXPIRED_WITHIN_S + SLACK_S and not gone_at:
        if is_gone(http, path):
            gone_at = time.time()

    assert expires - 0.05 <= gone_at <= expires + EXPIRED_WITHIN_S + SLACK_S
    detail = http.get(path).json()["detail"]
    when = re.search(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", detail)
    assert "expired" in detail
    assert when and abs(moment(when[0]) - gone_at) < 3
    assert "expired" in http.get("/sandboxes/short-lived").json()["detail"]
    assert http.post(f"{path}/start").status_code == 404
    wait_until(
        lambda: not (server.data_dir / "sandboxes" / made["id"]).exists(), "its disk is free"
    )


def test_the_clock_stands_still_while_it_is_stopped(http: Session) -> None:
    made = create(http, ttl_seconds=3)
    path = path_of(made)
    stopped = http.post(f"{path}/force-stop").json()
    assert (stopped["expires_at"], stopped["ttl_seconds"]) == (None, 3)
    stopped_at = time.time()
    # Until long after it would have expired.
    wait_until(lambda: time.time() > moment(made["expires_at"]) + 3, "", timeout=20)
    assert http.get(path).json()["status"] == "stopped"

    started = http.post(f"{path}/start").json()

    left = moment(started["expires_at"]) - moment(started["status_changed_at"])
    used = stopped_at - moment(made["status_changed_at"])
    assert 3 - used - 0.3 <= left <= 3
    wait_until(lambda: is_gone(http, path), "expired", timeout=left + EXPIRED_WITHIN_S + SLACK_S)


def test_a_renewal_puts_it_off_and_none_lifts_it(http: Session) -> None:
    renewed, freed, zeroed = (create(http, ttl_seconds=2) for _ in range(3))
    after = http.patch(path_of(renewed), json={"ttl_seconds": 4}).json()
    assert 3 < moment(after["expires_at"]) - moment(renewed["status_changed_at"]) < 6
    for record, value in ((freed, None), (zeroed, 0)):
        lifted = http.patch(path_of(record), json={"ttl_seconds": value}).json()
        assert (lifted["ttl_seconds"], lifted["expires_at"]) == (None, None)

    seen = 0.0
    while not is_gone(http, path_of(renewed)):
        seen = time.time()
        assert seen < moment(after["expires_at"]) + EXPIRED_WITHIN_S + SLACK_S

    assert seen > moment(after["expires_at"]) - 0.2
    for record in (freed, zeroed):
        assert http.get(path_of(record)).json()["status"] == "running"
        assert http.delete(path_of(record)).status_code == 204


@pytest.mark.parametrize("ttl", [-1, 1.5, "60", True, 2**63, 10**400, [], {}])
def test_a_time_to_live_that_is_none_is_a_422(ttl: Any, http: Session) -> None:
    before = len(http.get("/sandboxes?status=all").json())

    answer = http.post(
        "/sandboxes",
        data=json.dumps({"ttl_seconds": ttl}),
        headers={"Content-Type": "application/json"},
    )

    # 10^400 is no number that JSON readers agree on.
    assert answer.status_code in ((400, 422) if ttl == 10**400 else (422,)), answer.text
    assert len(http.get("/sandboxes?status=all").json()) == before


@pytest.mark.parametrize("ttl", [None, 0])
def test_no_time_to_live_is_no_end(ttl: Any, http: Session) -> None:
    made = create(http, ttl_seconds=ttl)
    assert (made["ttl_seconds"], made["expires_at"]) == (None, None)
    assert http.delete(path_of(made)).status_code == 204


def test_renewals_and_expiry_end_in_one_of_two_ways(http: Session) -> None:
    """Each answer to a renewal is true: a 200 means that it lives on."""
    for _ in range(3):
        path = path_of(create(http, ttl_seconds=1))
        began = time.monotonic()
        statuses = []
        while time.monotonic() - began < 1.6:
            if time.monotonic() - began > 0.9:
                statuses.append(http.patch(path, json={"ttl_seconds": 60}).status_code)
        assert set(statuses) in ({200}, {404}, {404, 409}, {409}), statuses
        assert is_gone(http, path) == (200 not in statuses)
        http.delete(path)


def test_what_is_due_while_the_server_is_down_goes_when_it_is_back(own: Server) -> None:
    with own.http() as http:
        path = path_of(create(http, ttl_seconds=1))
        lasting = path_of(create(http, ttl_seconds=3600))
    own.kill()
    wait_until(lambda: own.sandbox_pids() != [], "it runs on")
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + 1.5, "its time is over")

    own.start()

    with own.http() as http:
        wait_until(lambda: is_gone(http, path), "it is gone", timeout=5)
        assert "expired" in http.get(path).json()["detail"]
        assert http.get(lasting).json()["status"] == "running"


# Makes every clock that a person can set lie, and no other (time_namespaces(7) moves only the
# ones that nobody can).
LYING_CLOCK = """
import os, time
_time = time.time
def lie():
    try:
        with open(os.environ["CLOCK_FILE"]) as file:
            return _time() + float(file.read() or 0)
    except (OSError, ValueError):
        return _time()
time.time = lie
"""


def test_a_clock_that_is_set_ends_and_spares_nobody(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LYING_CLOCK)
    clock = tmp_path / "clock"
    clock.write_text("0")
    where = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "CLOCK_FILE": str(clock)}
    with Server(**where) as liar, liar.http() as http:
        lasting, short = create(http, ttl_seconds=3600), create(http, ttl_seconds=4)

        clock.write_text(str(10 * 365 * 86_400))
        ahead = create(http)
        assert moment(ahead["created_at"]) > time.time() + 9 * 365 * 86_400, "the clock tells truth"
        assert http.get(path_of(lasting)).json()["status"] == "running"
        clock.write_text(str(-3600))
        assert http.get(path_of(short)).json()["status"] == "running"

        wait_until(
            lambda: is_gone(http, path_of(short)), "its real time is over", timeout=7 + SLACK_S
        )
        for record in (lasting, ahead):
            assert http.get(path_of(record)).json()["status"] == "running"
        assert run(http, path_of(lasting), "echo fine") == "fine\n"


# -- a machine that was restarted ----------------------------------------------------------------


def pretend_reboot(server: Server) -> None:
    """What is there after a restart of the machine: files, and none of what ran or was mounted."""
    server.kill()
    for pid in server.sandbox_pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not server.sandbox_pids(), "nothing runs")
    subprocess.run(["rm", "-rf", server.run_dir], check=True)
    with contextlib.closing(sqlite3.connect(server.data_dir / "registry.db")) as registry:
        for ref, state in registry.execute("SELECT id, state FROM sandboxes").fetchall():
            note = json.loads(state)
            if "boot" in note:
                note["boot"] = ANOTHER_BOOT
            registry.execute(
                "UPDATE sandboxes SET state = ?, boot_id = ? WHERE id = ?",
                (json.dumps(note), ANOTHER_BOOT, ref),
            )
        registry.commit()


def test_after_a_restart_of_the_machine_all_are_stopped_and_start(own: Server) -> None:
    with own.http() as http:
        running = path_of(create(http, ttl_seconds=3600, start_command="echo begun >> begun"))
        stopped = path_of(create(http))
        run(http, running, "echo kept > kept; echo lost > /tmp/lost")
        run(http, stopped, "echo kept > kept")
        http.post(f"{stopped}/force-stop")
    pretend_reboot(own)

    own.start()

    with own.http() as http:
        wait_until(lambda: http.get(running).json()["status"] == "stopped", "stopped", timeout=5)
        record = http.get(running).json()
        assert "restarted" in record["error_message"]
        assert (record["expires_at"], record["uptime_secs"]) == (None, 0)
        answer = http.post(f"{running}/execute", json={"command": "true"})
        assert (answer.status_code, "start it first" in answer.text) == (409, True)
        assert http.get(f"{running}/files/kept").text == "kept\n"
        for path in (running, stopped):
            started = http.post(f"{path}/start").json()
            assert (started["status"], started["error_message"]) == ("running", None)
            assert run(http, path, "cat kept; cat /tmp/lost 2>/dev/null") == "kept\n"
        wait_until(lambda: run(http, running, "wc -l < begun").strip() == "2", "begun again")


def test_processes_that_died_while_the_server_was_down_are_told_as_failed(own: Server) -> None:
    with own.http() as http:
        dead, alive = path_of(create(http)), path_of(create(http))
    own.kill()
    place = f"sandboxes/{dead.rpartition('/')[2]}/".encode()
    for pid in own.sandbox_pids():
        if place in read_bytes(f"/proc/{pid}/mountinfo"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    own.start()

    with own.http() as http:
        wait_until(lambda: http.get(dead).json()["status"] == "failed", "failed", timeout=5)
        assert "pid 1" in http.get(dead).json()["error_message"]
        assert http.get(alive).json()["status"] == "running"
        assert http.post(f"{dead}/start").json()["status"] == "running"
        assert run(http, dead, "echo back") == "back\n"


def test_a_pid_that_is_somebody_elses_now_is_left_alone(own: Server) -> None:
    with own.http() as http:
        path = path_of(create(http))
    own.kill()
    for pid in own.sandbox_pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with subprocess.Popen(["sleep", "1000"]) as bystander:
        with contextlib.closing(sqlite3.connect(own.data_dir / "registry.db")) as registry:
            note = json.loads(registry.execute("SELECT state FROM sandboxes").fetchone()[0])
            assert isinstance(note["pid"], int)
            note["pid"] = bystander.pid
            note["outer"] = [bystander.pid, note["start"]]
            registry.execute("UPDATE sandboxes SET state = ?", (json.dumps(note),))
            registry.commit()

        own.start()

        with own.http() as http:
            wait_until(lambda: http.get(path).json()["status"] == "failed", "failed", timeout=5)
            assert http.delete(path).status_code == 204
        assert bystander.poll() is None
        bystander.kill()


# -- surroundings --------------------------------------------------------------------------------

ODD = {
    "far east": {"TZ": "Pacific/Kiritimati", "LANG": "tr_TR.UTF-8", "LC_ALL": "tr_TR.UTF-8"},
    "nonsense": {"TZ": ":/etc/passwd", "LANG": "\udcff", "LC_ALL": "no_SUCH", "TMPDIR": "/no/such"},
    "posix": {"TZ": "XXX+12:34:56", "LC_ALL": "C", "PYTHONUTF8": "0", "TMPDIR": "relative"},
    "nothing": {"PATH": "/usr/bin:/bin", "HOME": "", "TERM": "", "USER": "", "LANG": ""},
}


class Umasked(Server):
    """A server that is started with an odd umask."""

    mask = "0"

    def _command(self) -> list[str]:
        return ["/bin/sh", "-c", f'umask {self.mask}; exec "$@"', "sh", *super()._command()]


@pytest.mark.parametrize("odd", ODD.values(), ids=list(ODD))
def test_odd_surroundings_change_nothing(odd: dict[str, str]) -> None:
    with Server(**odd) as server, server.http() as http:
        assert_as_ever(server, http)


@pytest.mark.parametrize("mask", ["0", "077", "0777"])
def test_the_servers_umask_is_not_the_sandboxes(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Umasked, "mask", mask)
    with Umasked() as server, server.http() as http:
        assert_as_ever(server, http)
        for path in (server.data_dir, server.run_dir):
            assert path.stat().st_mode & 0o077 == 0
        for path in server.data_dir.glob("registry.db*"):
            assert path.stat().st_mode & 0o077 == 0


def assert_as_ever(server: Server, http: Session) -> None:
    before = time.time()
    made = create(http, name="Grüße ıİ", start_command="date +%Z; echo a log line")
    path = path_of(made)

    assert made["slug"].isascii()
    assert abs(moment(made["created_at"]) - before) < 30
    assert run(http, path, "echo grüße; umask; date +%Z; echo ${LANG}") == (
        "grüße\n0022\nUTC\nC.UTF-8\n"
    )
    assert run(http, path, "env | grep -c -E '^(TZ|TMPDIR|LC_ALL|TERM)='").strip() == "0"
    sent = {"file_path": "ü/new.txt", "content": "aGVsbG8="}
    answer = http.post(f"{path}/files/upload", json={"mount_path": "/workspace", **sent})
    assert answer.status_code == 201, answer.text
    assert run(http, path, "cat ü/new.txt; stat -c ' %a' ü/new.txt") == "hello 644\n"
    wait_until(lambda: http.get(f"{path}/logs").json()["total"] >= 2, "it is logged")
    for entry in http.get(f"{path}/logs").json()["logs"]:
        assert abs(entry["timestamp"] - before) < 60
    assert http.post(f"{path}/restart").json()["status"] == "running"
    assert http.delete(path).status_code == 204


# -- two servers ---------------------------------------------------------------------------------


def test_two_servers_on_one_directory_act_as_one(own: Server) -> None:
    shared = {"HEYVM_DATA_DIR": str(own.data_dir), "HEYVM_RUN_DIR": str(own.run_dir)}
    with Server(**shared) as second:
        with own.http() as here, second.http() as there:
            for _ in range(3):
                path = path_of(create(here, name="shared"))
                assert run(there, path, "echo there > file; cat file") == "there\n"
                assert there.post(f"{path}/stop").json()["status"] == "stopped"
                assert here.get(path).json()["status"] == "stopped"
                assert here.get(f"{path}/files/file").text == "there\n"
                assert here.post(f"{path}/start").json()["status"] == "running"
                assert there.delete(path).status_code == 204
                assert is_gone(here, path)
            names = [create(one, name="twin")["slug"] for one in (here, there) * 3]
            assert len(set(names)) == 6
            # One keeper for both: whoever has none sees the other's lock.
            wait_until(lambda: len(keepers(own)) == 1, "one keeper", timeout=10)
            os.killpg(second.pid, signal.SIGKILL)
            assert second.process is not None
            second.process.wait(10)
            assert len(here.get("/sandboxes").json()) == 6
            wait_until(lambda: len(keepers(own)) == 1, "one keeper again", timeout=10)
            assert all(one["status"] == "running" for one in here.get("/sandboxes").json())
        second.environ = {}


def keepers(server: Server) -> list[int]:
    """Which process holds the keeper's lock."""
    lock = server.data_dir / "keeper.lock"
    inode = f":{lock.stat().st_ino} "
    lines = Path("/proc/locks").read_text().splitlines()
    return [int(line.split()[4]) for line in lines if inode in line and "POSIX" in line]
