"""The lifecycle on a fake backend: real SQLite, real flock, real threads and processes."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heyvm import locks
from heyvm.errors import (
    BackendFailed,
    Conflict,
    HeyvmError,
    HookFailed,
    Invalid,
    Misconfigured,
    NotFound,
    QuotaExceeded,
    Unavailable,
)
from heyvm.keeper import Keeper
from heyvm.lifecycle import Lifecycle
from heyvm.models import INACTIVE, LIVE, CreateSpec, ExecRequest, Mount, Sandbox, Status
from heyvm.processes import Processes
from heyvm.registry import Clock, IdempotencyKey, Registry
from heyvm.settings import Settings
from tests.fake_backend import (
    FailsToStart,
    FileBackend,
    HeldUp,
    NeverComesUp,
    NotInstalled,
    RefusesMounts,
    SlowToDie,
    SlowToStart,
    WillNotDie,
    wait_for,
)

ROOT = Path(__file__).resolve().parent.parent
Make = Callable[..., Lifecycle]


def build(
    where: Path, backend: type[FileBackend] = FileBackend, **settings: Any
) -> tuple[Lifecycle, FileBackend]:
    """A server's lifecycle: one of its own for each process that calls this."""
    made = backend(where / "boxes")
    chosen = Settings(data_dir=where / "data", run_dir=where / "run", **settings)
    table = {made.name: made, NotInstalled.name: NotInstalled(where / "absent")}
    return Lifecycle(Registry(chosen.data_dir / "registry.db"), table, chosen), made


@pytest.fixture
def made(tmp_path: Path) -> tuple[Lifecycle, FileBackend]:
    return build(tmp_path)


@pytest.fixture
def lifecycle(made: tuple[Lifecycle, FileBackend]) -> Lifecycle:
    return made[0]


@pytest.fixture
def backend(made: tuple[Lifecycle, FileBackend]) -> FileBackend:
    return made[1]


def create(lifecycle: Lifecycle, **spec: Any) -> Sandbox:
    return lifecycle.create(CreateSpec(**spec))[0]


class Background:
    """A call in a thread of its own, and what became of it."""

    def __init__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call, args, kwargs), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[..., Any], args: Any, kwargs: Any) -> None:
        try:
            self.result = call(*args, **kwargs)
        except BaseException as error:
            self.error = error

    def join(self, seconds: float = 20.0) -> Background:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "it did not come back"
        return self

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()


def only(lifecycle: Lifecycle) -> Sandbox:
    (sandbox,) = lifecycle.list(LIVE | INACTIVE).sandboxes
    return sandbox


# -- create ----------------------------------------------------------------------------------------


def test_a_sandbox_runs_once_create_returns(lifecycle: Lifecycle, backend: FileBackend) -> None:
    sandbox = create(lifecycle, name="api-demo", ttl_seconds=60, start_command="serve")

    assert sandbox.status is Status.RUNNING
    assert sandbox == lifecycle.get("api-demo") == lifecycle.get(sandbox.id)
    assert sandbox.expires_at is not None and 55 < sandbox.expires_at - time.time() <= 60
    assert 0 <= lifecycle.uptime(sandbox) < 5
    assert backend.is_up(sandbox.id)
    assert [order["op"] for order in backend.said] == ["go", "start"]


def test_without_a_name_the_id_is_the_name(lifecycle: Lifecycle) -> None:
    for name in (None, "", "  "):
        sandbox = create(lifecycle, name=name)
        assert sandbox.name == sandbox.slug == sandbox.id


def test_hooks_run_in_order_and_before_the_start_command(
    lifecycle: Lifecycle, backend: FileBackend
) -> None:
    sandbox = create(
        lifecycle, setup_hooks=("print a", "print b"), start_command="serve", env_vars={"A": "b"}
    )
    lifecycle.restart(sandbox.id)

    words = [(order.get("argv") or [b""])[-1].decode() or order["op"] for order in backend.said]
    assert words == ["go", "print a", "print b", "start", "go", "start"]
    assert all(order["env"]["A"] == b"b" for order in backend.said)


def test_a_failed_hook_keeps_the_sandbox_and_says_how_it_ended(
    lifecycle: Lifecycle, backend: FileBackend
) -> None:
    with pytest.raises(HookFailed) as caught:
        create(lifecycle, setup_hooks=("print fine", "exit 7", "print never"))

    sandbox = only(lifecycle)
    assert caught.value.sandbox_id == sandbox.id
    assert sandbox.status is Status.FAILED
    assert sandbox.error_message == "setup hook 2 of 3 ended with exit code 7"
    assert not backend.is_up(sandbox.id)
    assert lifecycle.start(sandbox.id).status is Status.RUNNING
    assert lifecycle.get(sandbox.id).error_message is None


def test_a_failed_start_is_recorded_and_can_be_retried(tmp_path: Path) -> None:
    lifecycle, backend = build(tmp_path, FailsToStart)

    with pytest.raises(BackendFailed) as caught:
        create(lifecycle, name="one")

    sandbox = lifecycle.get("one")
    assert caught.value.sandbox_id == sandbox.id
    assert (sandbox.status, sandbox.error_message) == (Status.FAILED, "the image has no init")
    assert lifecycle.start("one").status is Status.RUNNING
    assert backend.is_up(sandbox.id)


def test_a_create_that_is_refused_leaves_no_trace(tmp_path: Path) -> None:
    lifecycle, backend = build(tmp_path, RefusesMounts)

    with pytest.raises(Invalid):
        lifecycle.create(CreateSpec(name="one"), idempotency_key="k", body_hash="h")

    assert lifecycle.list(LIVE | INACTIVE).sandboxes == []
    assert backend.inventory() == frozenset()
    assert list((tmp_path / "run" / "locks").iterdir()) == []
    assert lifecycle.registry.replay(IdempotencyKey("k", "h")) is None


@pytest.mark.parametrize("name", ["docker", "absent"])
def test_a_backend_that_is_not_here_is_refused_naming_those_that_are(
    lifecycle: Lifecycle, name: str
) -> None:
    with pytest.raises(Invalid, match="available: file$") as caught:
        create(lifecycle, backend_type=name)

    assert list(caught.value.errors) == ["backend_type"]


@pytest.mark.parametrize(
    "slug", ["Api", "-a", "a-", "a_b", "a" * 64, "", " ", "é", "sb-0badcafe", "a/b", "a\n"]
)
def test_a_slug_of_a_wrong_form_is_refused(lifecycle: Lifecycle, slug: str) -> None:
    with pytest.raises(Invalid) as caught:
        create(lifecycle, slug=slug)

    assert list(caught.value.errors) == ["slug"]


def test_a_taken_slug_and_a_route_word_are_conflicts(lifecycle: Lifecycle) -> None:
    create(lifecycle, slug="one")

    for slug in ("one", "inactive"):
        with pytest.raises(Conflict):
            create(lifecycle, slug=slug)
    assert create(lifecycle, name="one").slug == "one-2"


@pytest.mark.parametrize("ttl", [-1, 2**63, True, 1.5])
def test_a_time_to_live_that_cannot_be_is_refused(lifecycle: Lifecycle, ttl: Any) -> None:
    with pytest.raises(Invalid) as caught:
        create(lifecycle, ttl_seconds=ttl)

    assert list(caught.value.errors) == ["ttl_seconds"]


@pytest.mark.parametrize("ttl", [None, 0])
def test_no_time_to_live_is_no_end(lifecycle: Lifecycle, ttl: int | None) -> None:
    sandbox = create(lifecycle, ttl_seconds=ttl)

    assert (sandbox.ttl_seconds, sandbox.expires_at) == (None, None)


def test_two_hundred_creates_at_once_with_a_limit_of_five_give_five(tmp_path: Path) -> None:
    lifecycle, _ = build(tmp_path, max_sandboxes=5)

    calls = [Background(create, lifecycle, name="x") for _ in range(200)]
    outcomes = [call.join(60) for call in calls]

    assert sum(call.error is None for call in outcomes) == 5
    refusals = [call.error for call in outcomes if call.error is not None]
    assert {type(error) for error in refusals} == {QuotaExceeded}
    assert "HEYVM_MAX_SANDBOXES is 5" in str(refusals[0])
    assert len(lifecycle.list(LIVE | INACTIVE).sandboxes) == 5
    assert len(list((tmp_path / "run" / "locks").iterdir())) == 5


def test_a_hundred_creates_of_one_name_get_slugs_and_ranges_of_their_own(
    lifecycle: Lifecycle,
) -> None:
    calls = [Background(create, lifecycle, name="x").join for _ in range(40)]
    sandboxes = [join(60).result for join in calls]

    assert len({sandbox.slug for sandbox in sandboxes}) == 40
    assert len({sandbox.id_base for sandbox in sandboxes}) == 40


def test_create_need_not_be_waited_for(tmp_path: Path) -> None:
    lifecycle, _ = build(tmp_path, SlowToStart)

    sandbox, replayed = lifecycle.create(CreateSpec(name="slow"), wait=False)

    assert (sandbox.status, replayed) == (Status.PROVISIONING, False)
    assert lifecycle.wait("slow", "running", 10).status is Status.RUNNING


def test_a_create_that_is_not_waited_for_says_in_the_row_why_it_failed(tmp_path: Path) -> None:
    lifecycle, _ = build(tmp_path, FailsToStart)

    lifecycle.create(CreateSpec(name="bad"), wait=False)
    sandbox = lifecycle.wait("bad", "running", 10)

    assert (sandbox.status, sandbox.error_message) == (Status.FAILED, "the image has no init")


def test_wait_gives_the_record_when_time_is_over(tmp_path: Path) -> None:
    lifecycle, _ = build(tmp_path, NeverComesUp)
    sandbox, _ = lifecycle.create(CreateSpec(), wait=False)

    assert lifecycle.wait(sandbox.id, "running", 0.05).status is Status.PROVISIONING
    with pytest.raises(Invalid):
        lifecycle.wait(sandbox.id, "asleep", 1)
    lifecycle.delete(sandbox.id)


# -- idempotency -----------------------------------------------------------------------------------


def test_one_key_eight_times_at_once_makes_one_sandbox(tmp_path: Path) -> None:
    def ask(number: int) -> tuple[Sandbox, bool]:
        server, _ = build(tmp_path, SlowToStart)  # a process each, as far as they know
        return server.create(CreateSpec(name="once"), idempotency_key="k", body_hash="h")

    calls = [Background(ask, number) for number in range(8)]
    answers = [call.join().result for call in calls]

    assert len({sandbox.id for sandbox, _ in answers}) == 1
    assert {sandbox.status for sandbox, _ in answers} == {Status.RUNNING}
    assert sorted(replayed for _, replayed in answers) == [False] + [True] * 7
    assert len(build(tmp_path)[0].list(LIVE | INACTIVE).sandboxes) == 1


def test_a_key_is_known_after_a_restart_and_bound_to_its_body(tmp_path: Path) -> None:
    first, _ = build(tmp_path)
    sandbox, _ = first.create(CreateSpec(), idempotency_key="k", body_hash="h")
    second, _ = build(tmp_path)

    again, replayed = second.create(CreateSpec(), idempotency_key="k", body_hash="h")
    assert (again.id, replayed) == (sandbox.id, True)
    with pytest.raises(Conflict, match="another body"):
        second.create(CreateSpec(), idempotency_key="k", body_hash="other")
    second.delete(sandbox.id)
    with pytest.raises(Conflict, match="is gone"):
        second.create(CreateSpec(), idempotency_key="k", body_hash="h")


# -- start and stop --------------------------------------------------------------------------------


def test_start_and_stop_may_be_said_twice(lifecycle: Lifecycle, backend: FileBackend) -> None:
    sandbox = create(lifecycle)

    for act, status in (
        (lifecycle.start, Status.RUNNING),
        (lifecycle.stop, Status.STOPPED),
        (lifecycle.force_stop, Status.STOPPED),
        (lifecycle.start, Status.RUNNING),
        (lifecycle.restart, Status.RUNNING),
        (lifecycle.force_stop, Status.STOPPED),
        (lifecycle.restart, Status.RUNNING),
    ):
        first = act(sandbox.id)
        second = act(sandbox.slug)
        assert first.status is second.status is status
        assert lifecycle.get(sandbox.id).status is status
        assert backend.is_up(sandbox.id) is (status is Status.RUNNING)
    assert lifecycle.uptime(lifecycle.stop(sandbox.id)) == 0


def test_a_stopped_sandbox_does_not_age(lifecycle: Lifecycle) -> None:
    sandbox = create(lifecycle, ttl_seconds=100)

    assert lifecycle.stop(sandbox.id).expires_at is None
    again = lifecycle.start(sandbox.id)

    assert again.expires_at is not None and again.started_at is not None
    assert again.expires_at - again.started_at < 100


def test_start_brings_back_one_whose_agent_died_unnoticed(
    lifecycle: Lifecycle, backend: FileBackend
) -> None:
    sandbox = create(lifecycle)
    backend.kill_from_outside(sandbox.id)

    assert lifecycle.start(sandbox.id).status is Status.RUNNING
    assert backend.is_up(sandbox.id)


def test_pending_mounts_take_effect_at_the_start(lifecycle: Lifecycle) -> None:
    sandbox = create(lifecycle)
    lifecycle.stop(sandbox.id)
    mount = Mount("/srv/x", "/x", pending=True)
    lifecycle.registry.amend(sandbox.id, lambda one: replace(one, mounts=(mount,)))

    assert lifecycle.start(sandbox.id).mounts == (Mount("/srv/x", "/x"),)


def test_lifecycle_calls_queue(tmp_path: Path) -> None:
    lifecycle, backend = build(tmp_path, SlowToDie)
    sandbox = create(lifecycle)

    stop = Background(lifecycle.stop, sandbox.id)
    assert wait_for(lambda: lifecycle.get(sandbox.id).status is Status.STOPPING)
    start = Background(lifecycle.start, sandbox.id)

    assert stop.join().result.status is Status.STOPPED
    assert start.join().result.status is Status.RUNNING
    assert not (backend.root / "violations").exists()


def test_a_queue_has_an_end(
    lifecycle: Lifecycle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = create(lifecycle, name="one")
    monkeypatch.setattr("heyvm.lifecycle.TURN_PATIENCE_S", 0.2)

    with locks.lock(tmp_path / "run" / "locks", sandbox.id, patience=1, busy=str):
        with pytest.raises(Unavailable) as caught:
            lifecycle.stop(sandbox.id)

    assert caught.value.detail == "sandbox 'one' is busy (running): try again"
    assert caught.value.retry_after > 0


def test_a_force_stop_that_nobody_finishes_keeps_no_caller_for_ever(
    lifecycle: Lifecycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = create(lifecycle)
    lifecycle.registry.want(sandbox.id, "stopped")
    monkeypatch.setattr("heyvm.lifecycle.TURN_PATIENCE_S", 0.2)

    with pytest.raises(Unavailable, match="busy"):
        lifecycle.start(sandbox.id)
    assert lifecycle.force_stop(sandbox.id).status is Status.STOPPED


def test_a_dead_holder_holds_nothing(lifecycle: Lifecycle, tmp_path: Path) -> None:
    sandbox = create(lifecycle)
    script = """
import pathlib, sys, time
from heyvm import locks
held = locks.try_lock(pathlib.Path(sys.argv[1]), sys.argv[2])
print("held", flush=True)
time.sleep(60)
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "run" / "locks", sandbox.id],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    stop = Background(lifecycle.stop, sandbox.id)
    assert not wait_for(lambda: stop.is_over, 0.2)

    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()

    assert stop.join(5).result.status is Status.STOPPED


def test_whoever_comes_after_a_dead_holder_settles_what_it_left(
    lifecycle: Lifecycle, backend: FileBackend
) -> None:
    sandbox = create(lifecycle)
    lifecycle.registry.claim(
        sandbox.id, expect=frozenset({Status.RUNNING}), become=Status.PROVISIONING
    )

    assert lifecycle.start(sandbox.id).status is Status.RUNNING
    assert not (backend.root / "violations").exists()


# -- two servers -----------------------------------------------------------------------------------


def test_a_server_that_would_not_see_the_others_locks_is_refused(tmp_path: Path) -> None:
    lifecycle, _ = build(tmp_path)
    sandbox = create(lifecycle, name="one")
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    settings = Settings(data_dir=data, run_dir=elsewhere)
    table = {"file": FileBackend(tmp_path / "boxes")}
    blind = Lifecycle(Registry(data / "registry.db"), table, settings)

    for act in (blind.open, lambda: blind.stop("one"), lambda: create(blind)):
        with pytest.raises(Misconfigured, match=f"set HEYVM_RUN_DIR={tmp_path}/run"):
            act()
    assert not elsewhere.exists()

    lifecycle.stop("one")  # nothing needs the old directory any more
    assert blind.start("one").status is Status.RUNNING
    with pytest.raises(Misconfigured, match=f"set HEYVM_RUN_DIR={elsewhere}"):
        lifecycle.stop(sandbox.id)


def test_what_was_alive_before_a_reboot_binds_nobody(tmp_path: Path) -> None:
    lifecycle, _ = build(tmp_path)
    lifecycle.registry.clock = Clock(boot_id="an earlier boot")
    create(lifecycle, name="one")
    data = tmp_path / "data"

    settings = Settings(data_dir=data, run_dir=tmp_path / "elsewhere")
    Lifecycle(Registry(data / "registry.db"), lifecycle.backends, settings).open()


# -- locks -----------------------------------------------------------------------------------------


def test_a_lock_whose_file_was_removed_meanwhile_is_not_one(tmp_path: Path) -> None:
    first = locks.try_lock(tmp_path, "sb-1")
    assert first is not None
    waiting = Background(locks.lock, tmp_path, "sb-1", patience=10, busy=str)
    assert not wait_for(lambda: waiting.is_over, 0.1)

    first.discard()
    second = waiting.join().result

    assert (tmp_path / "sb-1").exists()
    assert locks.try_lock(tmp_path, "sb-1") is None
    second.release()
    assert locks.try_lock(tmp_path, "sb-1") is not None


def test_a_lock_whose_file_goes_between_open_and_flock_is_not_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, path = fcntl.flock, tmp_path / "sb-1"

    def flock_too_late(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_too_late)
    held = locks.try_lock(tmp_path, "sb-1")

    assert held is not None
    assert locks.try_lock(tmp_path, "sb-1") is None


def test_only_one_ever_holds_a_lock_that_is_made_and_removed(tmp_path: Path) -> None:
    inside: list[int] = []
    overlaps: list[int] = []

    def take(number: int) -> None:
        for _ in range(40):
            held = locks.lock(tmp_path, "sb-1", patience=30, busy=str)
            inside.append(number)
            if len(inside) > 1:
                overlaps.append(number)
            inside.remove(number)
            held.discard() if number % 2 else held.release()

    for call in [Background(take, number) for number in range(8)]:
        assert call.join(60).error is None
    assert overlaps == []


# -- delete and force-stop -------------------------------------------------------------------------


def test_delete_works_from_every_state_and_says_so_later(
    lifecycle: Lifecycle, backend: FileBackend, tmp_path: Path
) -> None:
    up, stopped = create(lifecycle, name="up"), create(lifecycle, name="stopped")
    lifecycle.stop(stopped.id)
    with pytest.raises(HookFailed) as failed:
        create(lifecycle, setup_hooks=("exit 1",))
    assert failed.value.sandbox_id is not None

    for ref in (up.id, stopped.slug, failed.value.sandbox_id):
        lifecycle.delete(ref)
        with pytest.raises(NotFound, match="was deleted at"):
            lifecycle.get(ref)
        with pytest.raises(NotFound, match="was deleted at"):
            lifecycle.delete(ref)
    assert backend.inventory() == frozenset()
    assert list((tmp_path / "run" / "locks").iterdir()) == []


def test_deletes_at_once_all_end_well_whoever_was_quickest(
    lifecycle: Lifecycle, backend: FileBackend, tmp_path: Path
) -> None:
    sandbox = create(lifecycle)

    calls = [Background(lifecycle.delete, sandbox.id).join for _ in range(6)]
    errors = [join().error for join in calls]

    # Not found is for those who asked when it was gone already.
    assert None in errors
    assert {type(error) for error in errors} <= {type(None), NotFound}
    assert backend.inventory() == frozenset()
    assert list((tmp_path / "run" / "locks").iterdir()) == []


@pytest.mark.parametrize("kind", [NeverComesUp, SlowToDie])
def test_delete_cuts_short_what_is_under_way(tmp_path: Path, kind: type[FileBackend]) -> None:
    lifecycle, backend = build(tmp_path, kind)
    if kind is NeverComesUp:
        under_way = Background(create, lifecycle)
        assert wait_for(lambda: backend.inventory())
        sandbox = only(lifecycle)
    else:
        backend.dying_s = 60
        sandbox = create(lifecycle)
        under_way = Background(lifecycle.stop, sandbox.id)
        assert wait_for(lambda: lifecycle.get(sandbox.id).status is Status.STOPPING)
    began = time.monotonic()

    lifecycle.delete(sandbox.id)

    assert time.monotonic() - began < 5
    assert isinstance(under_way.join(5).error, Conflict | NotFound)
    assert backend.inventory() == frozenset()


@pytest.mark.parametrize("end", ["delete", "force_stop"])
def test_a_box_that_comes_up_after_its_end_was_wanted_runs_nothing(
    tmp_path: Path, end: str
) -> None:
    server, _ = build(tmp_path, HeldUp)
    backend = server.backends["file"]
    assert isinstance(backend, HeldUp)
    starting = Background(create, server)
    assert backend.entered.wait(10)
    sandbox = only(server)
    ending = Background(getattr(server, end), sandbox.id)
    assert wait_for(lambda: server.registry.entry(sandbox.id).wanted)

    backend.go_on.set()

    assert isinstance(starting.join().error, Conflict | NotFound)
    assert ending.join().error is None
    assert backend.said == []
    assert not backend.is_up(sandbox.id)


def test_a_hook_that_hangs_is_cut_short(lifecycle: Lifecycle, backend: FileBackend) -> None:
    hanging = Background(create, lifecycle, setup_hooks=("hang",))
    assert wait_for(lambda: backend.orders("exec"))
    sandbox = only(lifecycle)
    began = time.monotonic()

    stopped = lifecycle.force_stop(sandbox.id)

    assert time.monotonic() - began < 5
    assert stopped.status is Status.STOPPED
    error = hanging.join(5).error
    assert isinstance(error, Conflict) and error.sandbox_id == sandbox.id
    assert lifecycle.start(sandbox.id).status is Status.RUNNING


def test_delete_gives_up_in_time_and_can_be_tried_again(tmp_path: Path) -> None:
    lifecycle, _ = build(tmp_path)
    sandbox = create(lifecycle)
    stubborn, _ = build(tmp_path, WillNotDie)
    began = time.monotonic()

    with pytest.raises(BackendFailed):
        stubborn.delete(sandbox.id)

    assert time.monotonic() - began < 5
    assert lifecycle.get(sandbox.id).status is Status.STOPPING
    with pytest.raises(Conflict, match="is being deleted"):
        lifecycle.start(sandbox.id)
    lifecycle.delete(sandbox.id)


def test_a_sandbox_whose_id_is_guessed_wrong_leaves_no_lock(
    lifecycle: Lifecycle, tmp_path: Path
) -> None:
    for act in (lifecycle.start, lifecycle.stop, lifecycle.delete, lifecycle.force_stop):
        with pytest.raises(NotFound, match="Sandbox not found: sb-00000000"):
            act("sb-00000000")
    assert not (tmp_path / "run" / "locks").exists()


# -- update ----------------------------------------------------------------------------------------


def test_each_field_that_is_sent_is_replaced(lifecycle: Lifecycle, backend: FileBackend) -> None:
    sandbox = create(lifecycle, name="old", env_vars={"A": "1", "B": "2"}, metadata={"x": 1})

    changed = lifecycle.update(
        "old",
        {"name": "new", "env_vars": {"B": "3"}, "open_ports": [8080], "start_command": "serve"},
    )

    assert (changed.name, changed.slug) == ("new", "old")
    assert (changed.env_vars, changed.metadata) == ({"B": "3"}, {"x": 1})
    assert (changed.open_ports, changed.start_command) == ((8080,), "serve")
    assert changed == lifecycle.get(sandbox.id)
    (order,) = backend.orders("start")
    assert (order["command"], order["env"]["B"]) == (b"serve", b"3")
    cleared = lifecycle.update("old", {"open_ports": [], "start_command": None, "env_vars": None})
    assert (cleared.warnings, cleared.start_command, cleared.env_vars) == ((), None, {})
    assert backend.orders("start")[1]["command"] == b""


def test_a_start_command_of_a_stopped_sandbox_waits_for_the_start(
    lifecycle: Lifecycle, backend: FileBackend
) -> None:
    sandbox = create(lifecycle)
    lifecycle.stop(sandbox.id)

    lifecycle.update(sandbox.id, {"start_command": "serve"})
    assert backend.orders("start") == []
    lifecycle.start(sandbox.id)

    assert [order["command"] for order in backend.orders("start")] == [b"serve"]


def test_a_time_to_live_can_be_renewed_while_a_hook_runs(
    lifecycle: Lifecycle, backend: FileBackend
) -> None:
    hanging = Background(create, lifecycle, setup_hooks=("hang",))
    assert wait_for(lambda: backend.orders("exec"))
    sandbox = only(lifecycle)

    assert lifecycle.update(sandbox.id, {"ttl_seconds": 99}).ttl_seconds == 99
    lifecycle.delete(sandbox.id)
    hanging.join()


def test_an_empty_name_and_a_bad_time_to_live_change_nothing(lifecycle: Lifecycle) -> None:
    sandbox = create(lifecycle, name="one", ttl_seconds=60)

    for changes in ({"name": " ", "metadata": {"x": 1}}, {"ttl_seconds": -1}):
        with pytest.raises(Invalid):
            lifecycle.update(sandbox.id, changes)
    assert lifecycle.get(sandbox.id) == sandbox
    assert lifecycle.update(sandbox.id, {"ttl_seconds": None}).expires_at is None


# -- visits ----------------------------------------------------------------------------------------


def test_a_visit_to_a_running_sandbox_is_a_plain_connection(
    lifecycle: Lifecycle, backend: FileBackend
) -> None:
    sandbox = create(lifecycle)

    with lifecycle.visit(sandbox.id) as connect, connect():
        assert not backend.is_visited(sandbox.id)
        assert lifecycle.stop(sandbox.id).status is Status.STOPPED  # nobody holds the lock


def test_a_visit_to_a_stopped_sandbox_leaves_it_stopped(
    lifecycle: Lifecycle, backend: FileBackend
) -> None:
    sandbox = create(lifecycle)
    lifecycle.stop(sandbox.id)

    with lifecycle.visit(sandbox.id) as connect:
        assert backend.is_visited(sandbox.id)
        assert lifecycle.get(sandbox.id).status is Status.STOPPED
        with connect(), connect():
            start = Background(lifecycle.start, sandbox.id)
            assert not wait_for(lambda: start.is_over, 0.1)

    assert start.join().result.status is Status.RUNNING
    assert not backend.is_visited(sandbox.id)
    assert lifecycle.registry.entry(sandbox.id).visit is None


def test_a_visit_that_fails_is_over_all_the_same(
    lifecycle: Lifecycle, backend: FileBackend
) -> None:
    sandbox = create(lifecycle)
    lifecycle.stop(sandbox.id)

    with pytest.raises(ValueError, match="broken pipe"), lifecycle.visit(sandbox.id):
        raise ValueError("broken pipe")

    assert not backend.is_visited(sandbox.id)
    assert lifecycle.start(sandbox.id).status is Status.RUNNING


@pytest.mark.parametrize("end", ["delete", "force_stop"])
def test_a_visit_does_not_hold_up_delete_and_force_stop(
    lifecycle: Lifecycle, backend: FileBackend, end: str
) -> None:
    sandbox = create(lifecycle)
    lifecycle.stop(sandbox.id)
    entered = threading.Event()

    def upload() -> None:
        with lifecycle.visit(sandbox.id) as connect, connect() as connection:
            entered.set()
            connection.sendall(b"\0\0\0\1")
            assert wait_for(lambda: not backend.is_visited(sandbox.id), 10)

    visitor = Background(upload)
    assert entered.wait(5)
    began = time.monotonic()

    getattr(lifecycle, end)(sandbox.id)

    assert time.monotonic() - began < 5
    assert visitor.join().error is None
    assert not backend.is_visited(sandbox.id)


# -- everything at once ----------------------------------------------------------------------------

LEGAL = {
    Status.PROVISIONING: {Status.RUNNING, Status.FAILED, Status.STOPPING},
    Status.RUNNING: {Status.STOPPING, Status.PROVISIONING, Status.FAILED},
    Status.STOPPING: {Status.STOPPED},
    Status.STOPPED: {Status.PROVISIONING},
    Status.FAILED: {Status.PROVISIONING, Status.STOPPING},
}


def watch_statuses(lifecycle: Lifecycle) -> sqlite3.Connection:
    """Notes every change of a status, in a table of its own beside the registry's."""
    watching = sqlite3.connect(lifecycle.registry.path)
    watching.execute("CREATE TABLE seen (before TEXT, after TEXT)")
    watching.execute(
        "CREATE TRIGGER see AFTER UPDATE OF status ON sandboxes WHEN old.status <> new.status"
        " AND new.deleted_at IS NULL BEGIN"
        " INSERT INTO seen VALUES (old.status, new.status); END"
    )
    watching.commit()
    return watching


@pytest.mark.parametrize("seed", range(6))
def test_a_random_schedule_keeps_to_legal_states(tmp_path: Path, seed: int) -> None:
    lifecycle, backend = build(tmp_path)
    other, _ = build(tmp_path)
    sandbox = create(lifecycle, name="one")
    watching = watch_statuses(lifecycle)
    backend.dying_s = 0.02
    chance = random.Random(seed)
    expected = {
        "start": {Status.RUNNING},
        "restart": {Status.RUNNING},
        "stop": {Status.STOPPED},
        "force_stop": {Status.STOPPED},
        "get": set(Status),
    }
    problems: list[str] = []

    def visit(server: Lifecycle) -> None:
        with server.visit("one") as connect, connect():
            pass

    def execute(server: Lifecycle) -> None:
        said = Processes(server).execute("one", ExecRequest("sh", ("-c", "print hi")))
        if said.stdout != b"hi":
            problems.append(f"execute printed {said.stdout!r}")

    def live(number: int) -> None:
        mine = random.Random(f"{seed}-{number}")
        server = chance.choice((lifecycle, other))
        for _ in range(12):
            word = mine.choice([*expected, "visit", "update", "execute"])
            try:
                if word == "visit":
                    visit(server)
                elif word == "execute":
                    execute(server)
                elif word == "update":
                    server.update("one", {"start_command": f"serve {number}"})
                elif getattr(server, word)("one").status not in expected[word]:
                    problems.append(f"{word} gave another status")
            except (Conflict, BackendFailed) as error:
                if word in ("stop", "force_stop", "get"):
                    problems.append(f"{word}: {error.detail}")
            except HeyvmError as error:
                problems.append(f"{word}: {error!r}")

    over = threading.Event()
    kept = Background(Keeper(build(tmp_path)[0], say=problems.append).run, over)
    calls = [Background(live, number) for number in range(6)]
    for call in calls:
        assert call.join(60).error is None
    over.set()
    assert kept.join().error is None

    assert problems == []
    assert not (backend.root / "violations").exists()
    seen = watching.execute("SELECT * FROM seen").fetchall()
    assert len(seen) > 10
    assert {(one, two) for one, two in seen if Status(two) not in LEGAL[Status(one)]} == set()
    last = lifecycle.get("one")
    assert last.status in (Status.RUNNING, Status.STOPPED)
    assert backend.is_up(sandbox.id) is (last.status is Status.RUNNING)
    assert not backend.is_visited(sandbox.id)
    lifecycle.delete("one")
    assert backend.inventory() == frozenset()


@pytest.mark.parametrize("seed", range(6))
def test_delete_wins_whatever_else_is_called(tmp_path: Path, seed: int) -> None:
    lifecycle, backend = build(tmp_path)
    sandbox = create(lifecycle, name="one")
    mine = random.Random(seed)
    words = [mine.choice(["start", "stop", "restart", "force_stop", "get"]) for _ in range(12)]

    calls = [Background(getattr(lifecycle, word), sandbox.id) for word in words]
    lifecycle.delete(sandbox.id)

    for call in calls:
        error = call.join(20).error
        assert error is None or isinstance(error, Conflict | NotFound | BackendFailed), error
    assert backend.inventory() == frozenset()
    with pytest.raises(NotFound):
        lifecycle.get(sandbox.id)
