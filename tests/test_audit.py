"""The trail of what changes something: one record for each call, whatever happens to the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests

from heyvm.audit import Ending, Entry, Trail, Wanted
from heyvm.errors import Invalid, StorageFull
from heyvm.tokens import make_token
from tests.server import REPOSITORY, Server, Session, create, run, wait_until

SECRET = "the-secret-of-these-tests"
MARCH = 1_772_366_400.0  # 2026-03-01T12:00:00Z


class Clock:
    def __init__(self) -> None:
        self.now = MARCH

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def trail(tmp_path: Path, clock: Clock) -> Trail:
    return Trail(tmp_path / "audit", clock)


def entry(number: int = 0, **more: Any) -> Entry:
    known = {"time": MARCH + number, "method": "POST", "path": f"/sandboxes/box-{number}/stop"}
    given: dict[str, Any] = {"action": "stopSandbox", "client": "127.0.0.1", **known, **more}
    return Entry(request_id=f"r{number}", **given)


def done(trail: Trail, number: int = 0, **more: Any) -> None:
    assert trail.end(trail.begin(entry(number, **more)), Ending(200, 1.5, f"sb-{number:08x}", "s"))


def ids(records: Any) -> list[str]:
    return [record["request_id"] for record in records]


def pages(trail: Trail, **wanted: Any) -> Iterator[Any]:
    cursor = None
    while True:
        page = trail.page(Wanted(cursor=cursor, **wanted))
        yield page.records
        cursor = page.cursor
        if cursor is None:
            return


# -- the file --------------------------------------------------------------------------------------


def test_a_call_is_two_lines_and_one_record(trail: Trail, tmp_path: Path) -> None:
    done(trail, subject="alice")

    path = tmp_path / "audit" / "2026-03.jsonl"
    assert [json.loads(line)["audit"] for line in path.read_text().splitlines()] == ["begin", "end"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    (record,) = trail.page(Wanted(10)).records
    assert (record["subject"], record["status"], record["outcome"]) == ("alice", 200, "answered")


def test_pages_hold_each_record_once_over_months_and_calls_under_way(
    trail: Trail, clock: Clock
) -> None:
    begun = {}
    for number in range(60):
        clock.now = MARCH + number * 86_400
        begun[number] = trail.begin(entry(number))
        if number >= 7:  # eight at once, so that every page ends amid some
            trail.end(begun.pop(number - 7), Ending(200, 1.0))

    found = [name for records in pages(trail, limit=9) for name in ids(records)]

    assert sorted(found) == sorted(f"r{number}" for number in range(60))
    states = [one["outcome"] for records in pages(trail, limit=9) for one in records]
    assert states.count("in progress") == 7


def test_it_is_read_by_sandbox_subject_and_time(trail: Trail) -> None:
    for number in range(20):
        done(trail, number, subject="alice" if number % 2 else None, ref=f"box-{number}")

    assert ids(trail.page(Wanted(100, sandbox="sb-00000003")).records) == ["r3"]
    assert len(trail.page(Wanted(100, subject="alice")).records) == 10
    span = Wanted(100, since=MARCH + 3, until=MARCH + 5)
    assert ids(trail.page(span).records) == ["r5", "r4", "r3"]


def test_a_line_that_was_cut_short_spoils_no_other(trail: Trail, tmp_path: Path) -> None:
    done(trail, 1)
    path = tmp_path / "audit" / "2026-03.jsonl"
    with path.open("ab") as file:
        file.write(b'{"audit":"begin","id":"00000')  # killed there
    done(trail, 2)
    with path.open("ab") as file:
        file.write(b"x" * 300_000 + b"\n\xff\n[]\n" + b'{"audit":"end"}\n')
    done(trail, 3)

    assert ids(trail.page(Wanted(100)).records) == ["r3", "r2", "r1"]
    assert ids(sum(pages(trail, limit=1), [])) == ["r3", "r2", "r1"]


def test_lines_are_short_and_plain_whatever_is_in_them(trail: Trail, tmp_path: Path) -> None:
    awkward = "\n\x1b[31m\u2028" + "😀" * 5000
    done(trail, 1, path="/" + awkward, subject=awkward, client=awkward, ref=awkward)
    done(trail, 2, path="/" + 'x"\\' * 5000)

    raw = (tmp_path / "audit" / "2026-03.jsonl").read_bytes()
    assert all(len(line) < 4096 for line in raw.splitlines())
    assert all(byte == 10 or 32 <= byte < 127 for byte in raw)
    assert ids(trail.page(Wanted(10)).records) == ["r2", "r1"]


def test_a_foreign_cursor_is_refused(trail: Trail) -> None:
    done(trail)
    for cursor in ("", "x", "2026-03.5", "../../etc.5.", "2026-03.-1.", "2026-03.5.zz"):
        with pytest.raises(Invalid):
            trail.page(Wanted(10, cursor=cursor))
    assert trail.page(Wanted(10, cursor="2026-03.99999999999999.")).records


def test_reading_is_bounded_and_goes_on_where_it_stopped(trail: Trail) -> None:
    for number in range(9000):
        done(trail, number)

    first = trail.page(Wanted(10, subject="nobody"))

    assert (list(first.records), first.cursor is not None) == ([], True)
    assert sum(1 for _ in pages(trail, limit=10, subject="nobody")) == 2


def test_several_processes_write_at_once(trail: Trail, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from tests.test_audit import *\n"
        "trail = Trail(Path(sys.argv[1]), Clock())\n"
        "for number in range(300): done(trail, number)"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", script, tmp_path / "audit"], cwd=REPOSITORY)
        for _ in range(3)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]

    assert sum(len(records) for records in pages(trail, limit=1000)) == 900


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
def test_a_full_disk_refuses_before_anything_is_done(tmp_path: Path, clock: Clock) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small], check=True)
    try:
        trail = Trail(small / "audit", clock)
        done(trail, 1)
        begun = trail.begin(entry(2))
        with (small / "hog").open("wb", buffering=0) as hog, pytest.raises(OSError):
            while True:
                hog.write(bytes(65536))
        done(trail, 3)  # of what is kept in reserve
        with pytest.raises(StorageFull):
            for number in range(4, 9000):  # the last one's end may have to wait
                trail.end(trail.begin(entry(number)), Ending(200, 1.0))
        assert not trail.end(begun, Ending(200, 1.0))

        (small / "hog").unlink()
        done(trail, 9000)

        found = [one for records in pages(trail, limit=1000) for one in records]
        assert {"r1", "r2", "r3", "r9000"} <= set(ids(found))
        assert len(set(ids(found))) == len(found)
        (late,) = [one for one in found if one["request_id"] == "r2"]
        assert late["outcome"] == "answered"
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)


# -- the server ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    with Server(JWT_SECRET=SECRET) as server:
        yield server


@pytest.fixture
def alice(own: Server) -> Iterator[Session]:
    with own.http() as session:
        session.headers["Authorization"] = f"Bearer {make_token(SECRET, subject='alice')}"
        yield session


def records(http: Session, **wanted: Any) -> list[dict[str, Any]]:
    answer = http.get("/audit", params={"limit": 1000, **wanted})
    assert answer.status_code == 200, answer.text
    return list(answer.json()["records"])


def test_every_call_that_changes_something_is_recorded_once(own: Server, alice: Session) -> None:
    made = create(alice, slug="box")
    run(alice, "box", "true")
    calls: list[tuple[str, str, dict[str, Any], int, str | None]] = [
        (
            "POST",
            "/sandboxes",
            {"json": {"nonsense": [], "ttl_seconds": "x"}},
            422,
            "createSandbox",
        ),
        ("PATCH", "/sandboxes/box", {"json": {"name": "b"}}, 200, "updateSandbox"),
        ("POST", "/sandboxes/none/stop", {}, 404, "stopSandbox"),
        ("POST", "/nowhere", {}, 404, None),
        ("PUT", "/sandboxes/box", {}, 405, None),
        ("POST", "/sandboxes/box/execute?token=hush", {"data": "{"}, 415, "executeCommand"),
        ("DELETE", "/sandboxes/box/files/none?mount_path=/workspace", {}, 404, "deleteFile"),
        (
            "POST",
            "/sandboxes/box/stop",
            {"headers": {"Authorization": "Bearer x"}},
            401,
            "stopSandbox",
        ),
        ("POST", "/sandboxes/box/stop", {"headers": {"Host": "evil.example"}}, 403, "stopSandbox"),
        ("DELETE", "/sandboxes/box", {}, 204, "deleteSandbox"),
    ]
    for method, path, options, status, _ in calls:
        assert alice.request(method, path, **options).status_code == status

    found = records(alice)[: len(calls) + 2]

    told = [(one["method"], one["status"], one["action"]) for one in reversed(found)]
    assert told[0] == ("POST", 201, "createSandbox")
    assert told[1] == ("POST", 200, "executeCommand")
    for said, (method, _, _, status, action) in zip(told[2:], calls, strict=True):
        assert said[:2] == (method, status)
        assert action is None or said[2] == action
    subjects = {one["status"]: one["subject"] for one in found}
    assert (subjects[200], subjects[401], subjects[403]) == ("alice", None, None)
    assert {one["sandbox_id"] for one in found if one["status"] in (201, 200, 204)} == {made["id"]}
    assert {one["client"] for one in found} == {"127.0.0.1"}
    assert not any("?" in one["path"] for one in found)
    assert len(records(alice, sandbox="box", subject="alice")) >= 5


def test_it_needs_a_token_and_no_route_changes_it(own: Server, alice: Session) -> None:
    with own.http() as stranger:
        assert stranger.get("/audit").status_code == 401
    create(alice, slug="first")
    before = (own.data_dir / "audit").stat().st_ino
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        assert alice.request(method, "/audit").status_code == 405
    assert (own.data_dir / "audit").stat().st_ino == before
    assert alice.get("/audit?cursor=x").status_code == 422
    assert alice.get("/audit?since=yesterday").status_code == 422
    assert alice.get("/audit?since=2026-01-01T00:00:00Z&limit=1").status_code == 200


def test_a_client_that_hangs_up_leaves_one_record(own: Server, alice: Session) -> None:
    create(alice, slug="left")
    with pytest.raises(OSError):
        alice.post("/sandboxes/left/execute", json={"command": "sleep 999"}, timeout=0.5)

    def ended() -> bool:
        (one,) = [
            one for one in records(alice, sandbox="left") if one["action"] == "executeCommand"
        ]
        return bool(one["status"] == 499)

    wait_until(ended, "it is recorded that nobody waited")


def test_a_long_answer_is_recorded_too(alice: Session) -> None:
    create(alice, slug="loud")
    run(alice, "loud", "head -c 2000000 /dev/zero | tr '\\0' x")

    wait_until(
        lambda: records(alice, sandbox="loud")[0]["status"] == 200, "it is recorded at its end"
    )


def test_what_a_kill_has_cut_off_is_interrupted_and_recorded_once(
    own: Server, alice: Session
) -> None:
    create(alice, slug="cut")
    gone = threading.Event()

    def execute() -> None:
        try:
            alice.post("/sandboxes/cut/execute", json={"command": "sleep 999"})
        except OSError:
            gone.set()

    threading.Thread(target=execute, daemon=True).start()
    with own.http() as http:
        http.headers.update(alice.headers)
        wait_until(lambda: records(http, sandbox="cut")[0]["outcome"] == "in progress", "it runs")

        for pid in own.worker_pids():
            os.kill(pid, signal.SIGKILL)

        assert gone.wait(15)

    def executed() -> list[dict[str, Any]]:
        with own.http() as http, suppress(requests.ConnectionError):  # of a worker that was killed
            http.headers.update(alice.headers)
            found = records(http, sandbox="cut")
            return [one for one in found if one["action"] == "executeCommand"]
        return []

    wait_until(executed, "the trail is read")
    (one,) = executed()
    assert (one["outcome"], one["status"]) == ("interrupted", None)


def test_secrets_are_not_in_it(own: Server, alice: Session) -> None:
    create(alice, slug="quiet", env_vars={"KEY": "hush-env"}, start_command="echo hush-start")
    run(alice, "quiet", "echo hush-command", env={"K": "hush-execute"}, stdin="hush-stdin")
    alice.post("/sandboxes/quiet/stop?token=hush-query", headers={"Cookie": "a=hush-cookie"})
    alice.post("/auth/reset/hush-link")

    written = b"".join(path.read_bytes() for path in (own.data_dir / "audit").iterdir())

    assert b"hush" not in written
    assert SECRET.encode() not in written
    assert time.strftime("%Y-%m-", time.gmtime()).encode() in written
    # Nor does a server that was not asked for it say each call.
    assert "quiet" not in own.log
