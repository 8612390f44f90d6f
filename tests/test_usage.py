"""Samples: what the keeper writes and the API reads."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from heyvm.backends.base import Reading
from heyvm.backends.cgroups import Groups
from heyvm.models import Limits, Sandbox, Status, Usage
from heyvm.usage import FILE_NAME, STALE_S, Sampler, Usages, percent, uncounted_kills
from tests.server import Server, wait_until

MIB = 1 << 20


def row(number: int, **changes: object) -> Sandbox:
    now = time.time()
    made = Sandbox(
        id=f"sb-{number:08x}",
        name=f"n{number}",
        slug=f"n{number}",
        status=Status.RUNNING,
        status_changed_at=now,
        created_at=now,
        started_at=now - 10,
        backend_type="metered",
        image_resolved="host",
        state={"pid": number, "start": 1, "oom_kills": 0},
    )
    return replace(made, **changes)


class Metered:
    """A backend of which the readings are given."""

    def __init__(self, **readings: Reading) -> None:
        self.reading = Reading(cpu_s=1.0, memory_bytes=7 * MIB, pids=3, oom_kills=0)

    def usage(self, sandbox: Sandbox) -> Reading:
        return self.reading

    def oom_kills(self, sandbox: Sandbox) -> int | None:
        return self.reading.oom_kills


@pytest.fixture
def backend():
    return Metered()


@pytest.fixture
def sampler(tmp_path: Path, backend):
    return Sampler(tmp_path, lambda _: backend)


def entry(tmp_path: Path):
    (only,) = json.loads((tmp_path / FILE_NAME).read_text())["sandboxes"]
    return only


def test_there_is_no_snapshot_before_the_first_sample(tmp_path):
    assert Usages(tmp_path).snapshot() is None
    assert Usages(tmp_path).of("sb-00000001") == Usage()


def test_a_sample_has_the_machine_and_each_that_runs(tmp_path, sampler):
    sampler.sample([row(1), row(2)])

    found = Usages(tmp_path).snapshot()

    assert abs(found["sampledAtMs"] / 1000 - time.time()) < 5
    assert [one["sandboxId"] for one in found["sandboxes"]] == ["sb-00000001", "sb-00000002"]
    host = found["host"]
    assert host["cpuCount"] == os.cpu_count() and 0 <= host["cpuPercent"] <= 100
    assert host["memoryUsedBytes"] + host["memoryAvailableBytes"] == host["memoryTotalBytes"]
    assert 0 < host["memoryReserveBytes"] < host["memoryTotalBytes"]
    assert Usages(tmp_path).of("sb-00000002").memory_bytes == 7 * MIB
    assert Usages(tmp_path).of("sb-00000009") == Usage()


def test_the_first_percentage_is_since_the_start_and_the_next_since_the_last_look(
    tmp_path, sampler, backend
):
    sampler.sample([row(1)])
    assert 9 < entry(tmp_path)["cpuPercent"] < 11  # 1 s of 10

    backend.reading = replace(backend.reading, cpu_s=1.1)
    time.sleep(0.2)
    sampler.sample([row(1)])
    assert 20 < entry(tmp_path)["cpuPercent"] <= 50  # 0.1 s of 0.2


def test_a_box_that_was_started_anew_is_counted_anew(tmp_path, sampler, backend):
    sampler.sample([row(1)])
    backend.reading = replace(backend.reading, cpu_s=0.5)
    sampler.sample([row(1, state={"pid": 9, "start": 2})])

    assert 4 < entry(tmp_path)["cpuPercent"] < 6


def test_what_cannot_be_known_is_null(tmp_path, sampler, backend):
    backend.reading = Reading()
    sampler.sample([row(1)])

    found = entry(tmp_path)
    assert (found["cpuPercent"], found["memoryBytes"], found["pids"]) == (None, None, None)
    assert Usages(tmp_path).of("sb-00000001") == Usage()


def test_one_that_is_gone_is_in_no_later_sample(tmp_path, sampler):
    usages = Usages(tmp_path)
    sampler.sample([row(1)])
    assert usages.of("sb-00000001") != Usage()

    sampler.sample([])

    assert usages.of("sb-00000001") == Usage()


def test_an_old_sample_is_none(tmp_path, sampler):
    sampler.sample([row(1)])
    old = time.time() - STALE_S - 5
    os.utime(tmp_path / FILE_NAME, (old, old))

    assert Usages(tmp_path).snapshot() is None


def test_a_reader_never_meets_half_a_sample(tmp_path, sampler):
    many = [row(number) for number in range(500)]
    sampler.sample(many)
    with open(tmp_path / FILE_NAME) as before:
        sampler.sample(many[:1])
        assert len(json.load(before)["sandboxes"]) == 500
    assert len(Usages(tmp_path).snapshot()["sandboxes"]) == 1


def test_many_are_looked_up_for_one_reading(tmp_path, sampler, monkeypatch):
    sampler.sample([row(number) for number in range(300)])
    usages = Usages(tmp_path)
    usages.snapshot()

    monkeypatch.setattr(json, "loads", None)  # whoever reads the file again, fails

    assert all(usages.of(f"sb-{number:08x}").pids == 3 for number in range(300))


@pytest.mark.parametrize(("part", "whole", "is_"), [(1, 4, 25), (1, 0, 0), (-1, 4, 0), (4, 1, 400)])
def test_percentages_are_never_nonsense(part, whole, is_):
    assert percent(part, whole) == is_


# -- kills -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "in_row", "at_start", "uncounted"),
    [
        (0, 0, 0, 0),
        (2, 0, 0, 2),
        (2, 2, 0, 0),  # counted, and then the keeper died
        (2, 1, 0, 1),  # one of the two was
        (2, 7, 7, 2),  # of earlier boxes
        (0, 7, 7, 0),
        (0, 8, 7, 0),  # a group that is already the next box's
    ],
)
def test_a_kill_is_counted_once(backend, group, in_row, at_start, uncounted):
    backend.reading = Reading(oom_kills=group)
    found = row(1, oom_kills=in_row, state={"oom_kills": at_start})

    assert uncounted_kills(found, backend) == uncounted


def test_kills_of_what_does_not_run_or_said_nothing_at_its_start_are_not_counted(backend):
    backend.reading = Reading(oom_kills=3)

    assert uncounted_kills(row(1, state={}), backend) == 0
    assert uncounted_kills(row(1, status=Status.PROVISIONING), backend) == 0
    assert uncounted_kills(row(1, status=Status.PAUSED), backend) == 3


# -- over HTTP -------------------------------------------------------------------------------------


def snapshot(http):
    body = http.get("/system/usage").json()
    assert body["available"] is True
    return body["snapshot"]


def of(http, ref):
    found = snapshot(http)
    return next((one for one in found["sandboxes"] if one["sandboxId"] == ref), None)


def test_the_usage_of_a_running_sandbox_is_seen(http, server, sandbox):
    if "memory" not in Groups(server.mark).controllers:
        pytest.skip("no memory controller here")
    hold = "python3 -c \"import time; x = b'1' * (80 << 20); time.sleep(120)\""
    record = sandbox(name="user", start_command=hold, memory=256 * MIB, network="none")

    def settled():
        found = of(http, record["id"])
        return found and 80 * MIB < (found["memoryBytes"] or 0) < 256 * MIB

    wait_until(settled, "a sample has it", timeout=20)
    found = of(http, record["id"])
    assert found["name"] == "user"
    assert found["pids"] >= 3
    assert 0 <= found["cpuPercent"] <= 100 * (os.cpu_count() or 1)


def test_what_was_deleted_is_in_no_later_sample(http, sandbox):
    record = sandbox(network="none")
    wait_until(lambda: of(http, record["id"]), "a sample has it", timeout=20)

    assert http.delete(f"/sandboxes/{record['id']}").status_code == 204

    wait_until(lambda: of(http, record["id"]) is None, "a sample is without it", timeout=20)


def test_samples_go_on_after_the_keeper_was_killed():
    with Server() as server, server.http() as http:
        wait_until(lambda: snapshot(http), "the first sample")
        for pid in server.keeper_pids():
            os.kill(pid, signal.SIGKILL)
        before = snapshot(http)["sampledAtMs"]

        wait_until(lambda: snapshot(http)["sampledAtMs"] > before, "another sample", timeout=30)


def test_the_limit_of_a_sandbox_stands_in_its_line():
    from heyvm.usage import in_words

    assert in_words(64 * MIB) == "64 MiB"
    assert in_words(64 * MIB + 1) == "67108865 bytes"
    assert Limits().memory is None
