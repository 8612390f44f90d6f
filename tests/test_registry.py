"""The registry: real SQLite, real processes, no mocks."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import greenlet
import pytest

from heyvm import registry as module
from heyvm.errors import (
    BadRequest,
    Conflict,
    Misconfigured,
    NotFound,
    QuotaExceeded,
    StorageFull,
    Unavailable,
)
from heyvm.models import INACTIVE, LIVE, Endpoint, Mount, PortMapping, Sandbox, Status
from heyvm.registry import BaseTaken, Clock, IdempotencyKey, IdTaken, Registry
from tests.fake_backend import wait_for

ROOT = Path(__file__).resolve().parent.parent
EVERY = LIVE | INACTIVE


@dataclass
class SetClock:
    """A clock that stands still until it is moved."""

    wall_now: float = 1_700_000_000.0
    boot_now: float = 1000.0
    boot_id: str = "this-boot"

    def clock(self) -> Clock:
        return Clock(lambda: self.wall_now, lambda: self.boot_now, self.boot_id)

    def pass_(self, seconds: float) -> None:
        self.wall_now += seconds
        self.boot_now += seconds


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "registry.db"


@pytest.fixture
def time_() -> SetClock:
    return SetClock()


@pytest.fixture
def registry(path: Path, time_: SetClock) -> Iterator[Registry]:
    opened = Registry(path, clock=time_.clock())
    yield opened
    opened.close()


def draft(number: int = 1, **fields: Any) -> Sandbox:
    return Sandbox(
        **{
            "id": f"sb-{number:08x}",
            "name": f"box {number}",
            "slug": "",
            "status": Status.PROVISIONING,
            "status_changed_at": 1.0,
            "created_at": float(number),
            "backend_type": "file",
            "image_resolved": "host",
            **fields,
        }
    )


def running(registry: Registry, number: int = 1, **fields: Any) -> Sandbox:
    sandbox, _ = registry.add(draft(number, **fields))
    settled = registry.settle_running(sandbox.id)
    assert settled is not None
    return settled


def run_python(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


# -- rows ------------------------------------------------------------------------------------------


def test_a_sandbox_comes_back_as_it_was_written(registry: Registry) -> None:
    written = draft(
        name="Größe 😀",
        slug="big",
        sandbox_type="python",
        image="ubuntu:24.04",
        ttl_seconds=60,
        start_command="serve",
        working_directory="/srv",
        open_ports=(80, 8080),
        env_vars={"A": "b"},
        setup_hooks=("one", "two"),
        mounts=(Mount("/srv/x", "/x", read_only=True, pending=True),),
        warnings=("careful",),
        metadata={"deep": [1, {"x": None}]},
        id_base=65536,
    )

    registry.add(written)

    assert registry.get("big") == written
    assert registry.get(written.id) == written


def test_a_sandbox_is_found_by_exact_ref_alone(registry: Registry) -> None:
    registry.add(draft(name="api-demo"))

    for ref in ("API-DEMO", "api-dem", "api-demo ", "аpi-demo", "sb-0000000", "%", "\0", "\ud800"):
        with pytest.raises(NotFound):
            registry.get(ref)


def test_nothing_that_was_deleted_is_found_and_it_says_when(
    registry: Registry, time_: SetClock
) -> None:
    sandbox = running(registry, name="gone", env_vars={"TOKEN": "secret"})
    registry.bury(sandbox.id)

    for ref in (sandbox.id, "gone"):
        with pytest.raises(NotFound) as caught:
            registry.get(ref)
        assert caught.value.detail == f"sandbox '{ref}' was deleted at 2023-11-14T22:13:20Z"
    rows = sqlite3.connect(registry.path).execute("SELECT * FROM sandboxes").fetchall()
    assert "secret" not in str(rows)


def test_an_unknown_ref_is_named(registry: Registry) -> None:
    with pytest.raises(NotFound, match="Sandbox not found: nobody"):
        registry.get("nobody")


def test_a_derived_slug_counts_up_and_a_given_one_that_is_taken_is_refused(
    registry: Registry,
) -> None:
    made = [registry.add(draft(number, name="Api  Demo!"))[0].slug for number in (1, 2, 3)]

    assert made == ["api-demo", "api-demo-2", "api-demo-3"]
    with pytest.raises(Conflict, match="'api-demo-2' is taken"):
        registry.add(draft(4, slug="api-demo-2"))


def test_a_slug_is_free_again_after_its_sandbox_went(registry: Registry) -> None:
    first, _ = registry.add(draft(1, slug="one"))
    registry.bury(first.id)

    second, _ = registry.add(draft(2, slug="one"))

    assert registry.get("one").id == second.id


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("inactive", "inactive-2"),
        ("日本", "sb-00000001"),
        ("--- !", "sb-00000001"),
        ("sb-0badcafe", "sb-0badcafe-2"),
        ("Café Ünïcode", "cafe-unicode"),
        ("x" * 80, "x" * 63),
        ("42", "42"),
    ],
)
def test_what_slug_a_name_gives(registry: Registry, name: str, slug: str) -> None:
    assert registry.add(draft(name=name))[0].slug == slug


def test_long_names_that_are_the_same_still_get_slugs_of_63(registry: Registry) -> None:
    made = [registry.add(draft(number, name="y" * 80))[0].slug for number in range(1, 12)]

    assert made[1] == "y" * 61 + "-2"
    assert made[-1] == "y" * 60 + "-11"
    assert len(set(made)) == len(made)


def test_ids_and_ranges_are_handed_out_once(registry: Registry) -> None:
    registry.add(draft(1, id_base=65536))

    with pytest.raises(IdTaken):
        registry.add(draft(1))
    with pytest.raises(BaseTaken):
        registry.add(draft(2, id_base=65536))
    registry.bury("sb-00000001")
    with pytest.raises(IdTaken):
        registry.add(draft(1))
    registry.add(draft(2, id_base=65536))


def test_there_are_never_more_than_the_limit(path: Path) -> None:
    registry = Registry(path)
    refused: list[QuotaExceeded] = []

    def create(number: int) -> None:
        try:
            registry.add(draft(number), limit=5)
        except QuotaExceeded as error:
            refused.append(error)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(1, 201)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(registry.known_ids()) == 5
    assert len(refused) == 195
    assert refused[0].detail.startswith("there are 5 sandboxes and HEYVM_MAX_SANDBOXES is 5")


# -- idempotency -----------------------------------------------------------------------------------


def test_a_key_gives_the_same_sandbox_for_a_day(registry: Registry, time_: SetClock) -> None:
    key = IdempotencyKey("k", "hash")
    first, _ = registry.add(draft(1), key=key)

    again, replayed = registry.add(draft(2), key=key, limit=1)
    assert (again.id, replayed) == (first.id, True)
    with pytest.raises(Conflict, match="another body"):
        registry.add(draft(3), key=IdempotencyKey("k", "other"))
    time_.pass_(86_401)
    assert registry.add(draft(4), key=key)[1] is False


def test_a_key_whose_sandbox_is_gone_is_refused(registry: Registry) -> None:
    key = IdempotencyKey("k", "hash")
    first, _ = registry.add(draft(1), key=key)
    registry.bury(first.id)

    with pytest.raises(Conflict, match="which is gone"):
        registry.replay(key)
    with pytest.raises(Conflict, match="which is gone"):
        registry.add(draft(2), key=key)


def test_a_key_whose_create_was_refused_may_be_used_again(registry: Registry) -> None:
    key = IdempotencyKey("k", "hash")
    registry.add(draft(1), key=key)

    registry.remove("sb-00000001")

    assert registry.add(draft(2), key=key)[1] is False


# -- pages -----------------------------------------------------------------------------------------


def test_pages_show_each_that_stays_once_while_others_come_and_go(registry: Registry) -> None:
    for number in range(1, 21):
        registry.add(draft(number, created_at=float(number // 3)))
    stay = {f"sb-{number:08x}" for number in range(1, 21)} - {"sb-00000005", "sb-0000000a"}

    page = registry.page(EVERY, limit=7)
    seen = [sandbox.id for sandbox in page.sandboxes]
    registry.bury("sb-00000005")  # the page's own, before the cursor
    registry.bury("sb-0000000a")
    registry.add(draft(100, created_at=50.0))
    while page.cursor:
        page = registry.page(EVERY, limit=7, cursor=page.cursor)
        seen += [sandbox.id for sandbox in page.sandboxes]

    assert len(seen) == len(set(seen))
    assert stay <= set(seen)


def test_a_list_without_a_limit_is_complete_and_has_no_cursor(registry: Registry) -> None:
    for number in range(1, 31):
        registry.add(draft(number))

    page = registry.page(EVERY)

    assert (len(page.sandboxes), page.cursor) == (30, None)
    assert registry.page(EVERY, limit=30).cursor is None


def test_lists_are_by_status_and_name(registry: Registry) -> None:
    running(registry, 1, name="one")
    registry.add(draft(2, name="two"))
    registry.settle_stopped(running(registry, 3, name="one").id)

    def ids(statuses: frozenset[Status], name: str | None = None) -> list[str]:
        return [sandbox.id[-1] for sandbox in registry.page(statuses, name=name).sandboxes]

    assert ids(LIVE) == ["1", "2"]
    assert ids(INACTIVE) == ["3"]
    assert ids(EVERY, "one") == ["1", "3"]
    assert ids(frozenset()) == []
    assert ids(EVERY, "\ud800") == []


def test_a_cursor_that_was_tampered_with_is_refused(registry: Registry) -> None:
    for number in (1, 2, 3):
        registry.add(draft(number))
    cursor = registry.page(EVERY, limit=1).cursor
    assert cursor is not None
    middle = len(cursor) // 2
    flipped = cursor[:middle] + ("A" if cursor[middle] != "A" else "B") + cursor[middle + 1 :]

    for bad in (flipped, cursor[:-4], cursor + "AAAA", "", "é", "a", "=" * 9, "\0", "-" * 9999):
        with pytest.raises(BadRequest):
            registry.page(EVERY, limit=1, cursor=bad)


# -- status, wishes and time -----------------------------------------------------------------------


def test_nobody_can_record_or_settle_what_is_to_be_deleted(registry: Registry) -> None:
    sandbox, _ = registry.add(draft())
    assert registry.record(sandbox.id, {"pid": 1})

    entry = registry.want(sandbox.id, "deleted")

    assert entry.sandbox.state == {"pid": 1}
    assert entry.sandbox.status is Status.STOPPING
    assert registry.record(sandbox.id, {"pid": 2}) is False
    assert registry.record_visit(sandbox.id, {"pid": 3}) is False
    assert registry.settle_running(sandbox.id) is None
    assert registry.settle_failed(sandbox.id, "no") is None
    assert registry.settle_stopped(sandbox.id) is None
    assert registry.claim(sandbox.id, expect=frozenset(Status), become=Status.STOPPING) is None
    assert registry.want(sandbox.id, "stopped").wanted == "deleted"


def test_a_claim_is_given_to_one(registry: Registry) -> None:
    sandbox = running(registry)
    expect = frozenset({Status.RUNNING})

    assert registry.claim(sandbox.id, expect=expect, become=Status.STOPPING) is not None
    assert registry.claim(sandbox.id, expect=expect, become=Status.STOPPING) is None


def test_the_time_to_live_stands_still_while_stopped(registry: Registry, time_: SetClock) -> None:
    sandbox = running(registry, ttl_seconds=60)
    assert sandbox.expires_at == time_.wall_now + 60
    time_.pass_(20)

    stopped = registry.settle_stopped(sandbox.id)
    assert stopped is not None and stopped.expires_at is None
    time_.pass_(10_000)
    assert registry.expire_due() == []
    registry.claim(sandbox.id, expect=frozenset({Status.STOPPED}), become=Status.PROVISIONING)
    again = registry.settle_running(sandbox.id)

    assert again is not None and again.expires_at == time_.wall_now + 40
    time_.pass_(39.9)
    assert registry.expire_due() == []
    time_.pass_(0.2)
    assert registry.expire_due() == [sandbox.id]


def test_a_clock_that_is_set_moves_no_expiry_but_what_is_read(
    registry: Registry, time_: SetClock
) -> None:
    sandbox = running(registry, ttl_seconds=60)

    for jump in (3600.0, -7200.0, 315_360_000.0, -315_360_000.0):
        time_.wall_now += jump
        assert registry.expire_due() == []
        assert registry.get(sandbox.id).expires_at == pytest.approx(time_.wall_now + 60)
    time_.boot_now += 61
    assert registry.expire_due() == [sandbox.id]


def test_expires_at_does_not_flicker(registry: Registry, time_: SetClock) -> None:
    sandbox = running(registry, ttl_seconds=60)

    time_.wall_now += 5.0001
    time_.boot_now += 5

    assert registry.get(sandbox.id).expires_at == sandbox.expires_at


def test_a_renewal_that_came_first_wins_and_one_after_is_told_when(
    registry: Registry, time_: SetClock
) -> None:
    sandbox = running(registry, ttl_seconds=60)
    time_.pass_(61)

    renewed = registry.amend(sandbox.id, lambda one: replace(one, ttl_seconds=60), renew=True)
    assert renewed.expires_at == time_.wall_now + 60
    assert registry.expire_due() == []
    time_.pass_(61)
    assert registry.expire_due() == [sandbox.id]
    with pytest.raises(NotFound, match=f"'{sandbox.id}' expired at .*: its ttl_seconds was 60"):
        registry.amend(sandbox.id, lambda one: replace(one, ttl_seconds=60), renew=True)
    registry.bury(sandbox.id)
    with pytest.raises(NotFound, match="expired at .*: its ttl_seconds was 60"):
        registry.get(sandbox.slug)


def test_an_amendment_without_renewal_keeps_the_expiry(registry: Registry, time_: SetClock) -> None:
    sandbox = running(registry, ttl_seconds=60)
    time_.pass_(30)

    amended = registry.amend(sandbox.id, lambda one: replace(one, name="new"))

    assert (amended.name, amended.slug) == ("new", sandbox.slug)
    assert amended.expires_at == sandbox.expires_at


def test_renewals_and_expiry_at_once_end_in_one_of_two_ways(path: Path) -> None:
    boot = 1000.0
    registry = Registry(path, clock=Clock(lambda: 0.0, lambda: boot, "b"))
    for number in range(1, 31):
        running(registry, number, ttl_seconds=5)
    boot = 1010.0
    renewed: set[str] = set()

    def renew(sandbox_id: str) -> None:
        try:
            registry.amend(sandbox_id, lambda one: replace(one, ttl_seconds=5), renew=True)
            renewed.add(sandbox_id)
        except NotFound:
            pass

    threads = [
        threading.Thread(target=renew, args=(f"sb-{number:08x}",)) for number in range(1, 31)
    ]
    for thread in threads[:15]:
        thread.start()
    expired = set(registry.expire_due())
    for thread in threads[15:]:
        thread.start()
    for thread in threads:
        thread.join()

    assert expired | renewed == registry.known_ids()
    assert not expired & renewed
    assert expired


def test_after_a_reboot_nothing_expires_and_the_time_to_live_starts_anew(
    path: Path, time_: SetClock
) -> None:
    before = Registry(path, clock=time_.clock())
    sandbox = running(before, ttl_seconds=60)
    before.close()
    rebooted = SetClock(time_.wall_now + 1000, 5000.0, "another-boot")
    registry = Registry(path, clock=rebooted.clock())

    assert registry.expire_due() == []
    registry.settle_stopped(sandbox.id)
    registry.claim(sandbox.id, expect=frozenset({Status.STOPPED}), become=Status.PROVISIONING)
    again = registry.settle_running(sandbox.id)

    assert again is not None and again.expires_at == rebooted.wall_now + 60


def test_purge_forgets_old_tombstones_and_keys_alone(registry: Registry, time_: SetClock) -> None:
    registry.add(draft(1), key=IdempotencyKey("k", "h"))
    registry.add(draft(2))
    registry.bury("sb-00000001")
    time_.pass_(6 * 86_400)
    registry.purge()
    with pytest.raises(NotFound, match="was deleted at"):
        registry.get("sb-00000001")
    time_.pass_(2 * 86_400)

    registry.purge()

    with pytest.raises(NotFound, match="Sandbox not found"):
        registry.get("sb-00000001")
    assert registry.known_ids() == {"sb-00000002"}
    counts = sqlite3.connect(registry.path).execute("SELECT count(*) FROM idempotency").fetchall()
    assert counts == [(0,)]


# -- the file --------------------------------------------------------------------------------------


def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    content = b"#!/bin/sh\necho precious\n" * 100
    path.write_bytes(content)

    with pytest.raises(Misconfigured, match="is not a registry of heyvm"):
        Registry(path).open()

    assert path.read_bytes() == content


def test_another_programs_database_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE bookmarks (url)")
    other.commit()
    other.close()
    content = path.read_bytes()

    with pytest.raises(Misconfigured, match="another program's database"):
        Registry(path).open()

    assert path.read_bytes() == content


def test_a_registry_of_a_newer_version_is_refused_and_left_alone(path: Path) -> None:
    registry = Registry(path)
    registry.open()
    registry.close()
    newer = sqlite3.connect(path)
    newer.execute(f"PRAGMA user_version = {len(module.MIGRATIONS) + 1}")
    newer.close()
    content = path.read_bytes()

    with pytest.raises(Misconfigured, match="written by a newer heyvm"):
        Registry(path).open()

    assert path.read_bytes() == content


def test_the_files_are_for_their_owner_alone(path: Path) -> None:
    old = os.umask(0)
    try:
        registry = Registry(path)
        running(registry)
    finally:
        os.umask(old)

    names = [path, path.with_name("registry.db-wal"), path.with_name("registry.db-shm")]
    assert [oct(name.stat().st_mode & 0o777) for name in names] == ["0o600"] * 3
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_migration_that_is_killed_half_way_is_done_by_the_next(path: Path) -> None:
    script = """
import os, sqlite3, sys, pathlib
from heyvm import registry
half = registry.MIGRATIONS[0][:3]
registry.MIGRATIONS = ((*half, "SELECT die()"),)
connect = sqlite3.connect
def connect_with_death(*args, **kwargs):
    connection = connect(*args, **kwargs)
    connection.create_function("die", 0, lambda: os.kill(os.getpid(), 9))
    return connection
sqlite3.connect = connect_with_death
registry.Registry(pathlib.Path(sys.argv[1])).open()
"""
    killed = run_python(script, path)
    assert killed.wait() == -signal.SIGKILL, killed.communicate()[1]

    registry = Registry(path)

    assert running(registry).status is Status.RUNNING


def test_many_processes_may_start_with_no_registry_at_once(path: Path) -> None:
    script = """
import sys, pathlib
from heyvm.registry import Registry
Registry(pathlib.Path(sys.argv[1])).open()
"""
    started = [run_python(script, path) for _ in range(8)]

    for process in started:
        _, complaint = process.communicate()
        assert process.returncode == 0, complaint.decode()


def test_a_process_killed_in_a_transaction_leaves_nothing_of_it(path: Path) -> None:
    registry = Registry(path)
    sandbox = running(registry)
    script = """
import os, sys, pathlib
from heyvm.registry import Registry
def die(sandbox):
    os.kill(os.getpid(), 9)
Registry(pathlib.Path(sys.argv[1])).amend(sys.argv[2], die)
"""
    killed = run_python(script, path, sandbox.id)
    assert killed.wait() == -signal.SIGKILL

    assert registry.get(sandbox.id) == sandbox
    assert registry.amend(sandbox.id, lambda one: replace(one, name="alive")).name == "alive"


WRITER = """
import sys, pathlib, time, threading
from dataclasses import replace
from heyvm.registry import Registry
registry = Registry(pathlib.Path(sys.argv[1]))
worst = 0.0
def write(number):
    global worst
    for _ in range(int(sys.argv[4])):
        began = time.monotonic()
        registry.amend(sys.argv[2], lambda one: replace(
            one, metadata={**one.metadata, "n": one.metadata.get("n", 0) + 1}))
        worst = max(worst, time.monotonic() - began)
threads = [threading.Thread(target=write, args=(n,)) for n in range(int(sys.argv[3]))]
[t.start() for t in threads]
[t.join() for t in threads]
print(worst)
"""


def test_64_writers_and_a_long_reader_all_get_their_turn(path: Path) -> None:
    registry = Registry(path)
    sandbox = running(registry)
    long_reader = sqlite3.connect(path)
    long_reader.execute("BEGIN")
    long_reader.execute("SELECT count(*) FROM sandboxes").fetchall()

    processes = [run_python(WRITER, path, sandbox.id, 16, 10) for _ in range(4)]
    worst = []
    for process in processes:
        said, complaint = process.communicate()
        assert (process.returncode, complaint.decode()) == (0, "")
        worst.append(float(said))

    assert registry.get(sandbox.id).metadata == {"n": 640}
    assert max(worst) < 8.0
    long_reader.close()


def test_a_writer_that_never_ends_makes_the_others_give_up_in_time(path: Path) -> None:
    registry = Registry(path, patience=0.3)
    sandbox = running(registry)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    began = time.monotonic()

    with pytest.raises(Unavailable, match="busy"):
        registry.settle_stopped(sandbox.id)

    assert 0.3 <= time.monotonic() - began < 3
    assert registry.get(sandbox.id) == sandbox  # readers do not mind
    holder.execute("ROLLBACK")
    assert registry.settle_stopped(sandbox.id) is not None


def test_a_registry_may_be_used_on_both_sides_of_a_fork(path: Path) -> None:
    registry = Registry(path)
    sandbox = running(registry)
    inherited = {id(one) for one in registry._file._connections().values()}

    child = os.fork()
    if child == 0:
        fresh = not inherited & {id(one) for one in registry._file._connections().values()}
        done = registry.amend(sandbox.id, lambda one: replace(one, name="child")).name == "child"
        os._exit(0 if fresh and done else 1)
    _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 0
    assert registry.get(sandbox.id).name == "child"
    assert registry.amend(sandbox.id, lambda one: replace(one, name="parent")).name == "parent"


# -- disk full -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    where = tmp_path / "small"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", where], check=False)
    if mounted.returncode != 0:
        pytest.skip("only root may mount a small disk")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


def fill(directory: Path) -> Path:
    filler = directory / "filler"
    with open(filler, "ab", buffering=0) as file:
        for size in (65536, 4096, 512, 1):
            try:
                while file.write(b"x" * size) == size:
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return filler


def test_a_full_disk_is_said_harms_nothing_and_is_over_when_there_is_space(
    small_disk: Path,
) -> None:
    registry = Registry(small_disk / "registry.db")
    sandbox = running(registry)
    filler = fill(small_disk)

    with pytest.raises(StorageFull):
        for number in range(2, 2000):
            registry.add(draft(number, metadata={"big": "x" * 4096}))

    assert registry.get(sandbox.id) == sandbox
    there = registry.known_ids()
    filler.unlink()
    registry.add(draft(5000))
    assert registry.known_ids() == there | {"sb-00001388"}
    check = sqlite3.connect(registry.path).execute("PRAGMA integrity_check").fetchall()
    assert check == [("ok",)]


def test_a_delete_gets_the_ballast_when_the_disk_is_full(small_disk: Path) -> None:
    registry = Registry(small_disk / "registry.db")
    sandbox = running(registry)
    registry.keep_ballast()
    fill(small_disk)
    with pytest.raises(StorageFull):
        for number in range(2, 2000):
            registry.add(draft(number, metadata={"big": "x" * 4096}))

    registry.want(sandbox.id, "deleted")
    registry.bury(sandbox.id)

    assert sandbox.id not in registry.known_ids()


# -- greenlets -------------------------------------------------------------------------------------


@pytest.fixture
def no_switch_inside(registry: Registry) -> Iterator[list[str]]:
    """Notes every greenlet switch that happens inside a transaction of `registry`."""
    seen: list[str] = []

    def trace(event: str, _: object) -> None:
        writer = registry._file._open.get("writer")
        if event == "switch" and writer is not None and writer.in_transaction:
            seen.append(event)

    before = greenlet.settrace(trace)
    yield seen
    greenlet.settrace(before)


def test_no_greenlet_switch_happens_inside_a_transaction(
    registry: Registry, no_switch_inside: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main = greenlet.getcurrent()
    monkeypatch.setattr(time, "sleep", lambda _: main.switch())
    sandbox = running(registry, ttl_seconds=60)
    holder = sqlite3.connect(registry.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    waiting = greenlet.greenlet(lambda: registry.settle_stopped(sandbox.id))

    for _ in range(3):
        waiting.switch()  # it sleeps, outside of any transaction
    holder.execute("ROLLBACK")
    waiting.switch()

    assert waiting.dead
    assert registry.get(sandbox.id).status is Status.STOPPED
    assert no_switch_inside == []


def test_the_fixture_would_see_a_switch_inside_a_transaction(
    registry: Registry, no_switch_inside: list[str]
) -> None:
    main = greenlet.getcurrent()
    sandbox = running(registry)

    def careless(one: Sandbox) -> Sandbox:
        main.switch()
        return one

    bad = greenlet.greenlet(lambda: registry.amend(sandbox.id, careless))
    bad.switch()
    bad.switch()

    assert no_switch_inside


def test_a_worker_serves_others_while_the_registry_is_locked(path: Path) -> None:
    """In a gevent process: a busy registry delays who writes, and nobody else."""
    registry = Registry(path)
    sandbox = running(registry)
    script = """
from gevent import monkey
monkey.patch_all()
import sys, pathlib, time, threading, gevent
from heyvm.registry import Registry
registry = Registry(pathlib.Path(sys.argv[1]))
registry.open()
print("ready", flush=True)
writer = threading.Thread(target=registry.settle_stopped, args=(sys.argv[2],))
writer.start()
worst = 0.0
while writer.is_alive():
    began = time.monotonic()
    gevent.sleep(0.005)
    worst = max(worst, time.monotonic() - began)
print(worst)
"""
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    worker = run_python(script, path, sandbox.id)
    assert worker.stdout is not None
    assert worker.stdout.readline() == b"ready\n"
    time.sleep(0.5)  # for how long it is locked; nothing is concluded from it
    holder.execute("ROLLBACK")
    said, complaint = worker.communicate()

    assert (worker.returncode, complaint) == (0, b"")
    assert float(said) < 0.25
    assert wait_for(lambda: registry.get(sandbox.id).status is Status.STOPPED)


# -- endpoints -------------------------------------------------------------------------------------


def endpoint(sandbox: Sandbox, name: str = "a" * 16, port: int = 80, **fields: Any) -> Endpoint:
    return Endpoint(name, sandbox.id, port, fields.pop("created_at", 1.0), **fields)


def test_an_endpoint_is_shown_when_it_is_settled(registry: Registry) -> None:
    one = endpoint(running(registry), is_public=False)
    registry.add_endpoint(one, limit=2)

    assert (registry.endpoints(), registry.unready_endpoints()) == ([], [one])
    assert registry.settle_endpoint(one.subdomain) == one
    assert (registry.endpoints(one.sandbox_id), registry.unready_endpoints()) == ([one], [])
    assert registry.endpoint(one.subdomain) == one


def test_a_subdomain_is_never_given_out_again(registry: Registry) -> None:
    one = endpoint(running(registry))
    registry.add_endpoint(one, limit=2, ready=True)
    registry.remove_endpoint(one.subdomain)
    assert (registry.endpoints(), registry.endpoint(one.subdomain)) == ([], None)

    with pytest.raises(IdTaken):
        registry.add_endpoint(one, limit=2)
    with pytest.raises(NotFound):
        registry.set_public(one.subdomain, False)


def test_endpoints_go_with_their_sandbox(registry: Registry) -> None:
    sandbox = running(registry, open_ports=(80,))
    registry.add_endpoint(endpoint(sandbox), limit=5, ready=True)
    other = endpoint(running(registry, 2), "b" * 16)
    registry.add_endpoint(other, limit=5, ready=True)

    registry.bury(sandbox.id)

    assert registry.endpoints() == [other]
    with pytest.raises(IdTaken):
        registry.add_endpoint(replace(other, subdomain="a" * 16), limit=5)


def test_there_are_no_more_endpoints_than_the_limit(registry: Registry) -> None:
    sandbox = running(registry, open_ports=(80, 81))
    with pytest.raises(QuotaExceeded):
        registry.add_endpoint(endpoint(sandbox), limit=2)


def test_no_endpoint_is_made_for_a_sandbox_that_is_about_to_go(registry: Registry) -> None:
    sandbox = running(registry)
    registry.want(sandbox.id, "deleted")
    with pytest.raises(NotFound):
        registry.add_endpoint(endpoint(sandbox), limit=2)


def test_open_ports_are_endpoints(registry: Registry) -> None:
    sandbox = running(registry, open_ports=(80, 8080))
    first, second = sorted(registry.endpoints(sandbox.id), key=lambda one: one.port)
    assert (first.kind, first.port, second.port) == ("open", 80, 8080)
    assert registry.endpoint(first.subdomain) is None

    registry.set_local_port(first.subdomain, 40001, "another than before")
    assert registry.get(sandbox.id).port_mappings == (PortMapping(40001, 80),)

    changed = registry.amend(sandbox.id, lambda one: replace(one, open_ports=(80, 90)))
    assert changed.port_mappings == (PortMapping(40001, 80),)
    assert sorted(one.port for one in registry.endpoints(sandbox.id)) == [80, 90]
    assert registry.amend(sandbox.id, lambda one: replace(one, open_ports=())).port_mappings == ()


def test_open_ports_of_a_version_that_forwarded_none_are_endpoints(path: Path) -> None:
    before = Registry(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIGRATIONS", module.MIGRATIONS[:2])
        before.open()
    before.close()
    old = sqlite3.connect(path)
    old.execute(
        "INSERT INTO sandboxes (id, name, slug, status, status_changed_at, created_at,"
        " backend_type, image_resolved, spec, state, warnings, metadata)"
        " VALUES ('sb-00000001', 'x', 'x', 'stopped', 1, 1, 'file', 'host',"
        """ '{"open_ports":[80,8080]}', '{}',"""
        """ '["one", "open_ports are recorded, but not forwarded yet"]', '{}')"""
    )
    old.commit()
    old.close()

    registry = Registry(path)

    assert sorted(one.port for one in registry.endpoints("sb-00000001")) == [80, 8080]
    assert registry.get("sb-00000001").warnings == ("one",)
    registry.close()


def test_every_server_signs_links_with_its_own_key(path: Path, tmp_path: Path) -> None:
    keys = []
    for place in (path, path, tmp_path / "other" / "registry.db"):
        registry = Registry(place)
        keys.append(registry.link_key())
        registry.close()

    assert keys[0] == keys[1] != keys[2]
    assert len(keys[0]) == 32
