"""The keeper: in a thread on a fake backend, and as the process that it is."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heyvm import control, keeper
from heyvm.errors import NotFound
from heyvm.keeper import Keeper
from heyvm.lifecycle import Lifecycle
from heyvm.models import Sandbox, Status
from heyvm.registry import Clock
from heyvm.settings import Settings
from tests.fake_backend import FileBackend, WillNotDie, wait_for
from tests.test_lifecycle import Background, build, create, only

ROOT = Path(__file__).resolve().parent.parent


class Kept:
    """A keeper that ticks in a thread, until the context ends."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self.said: list[str] = []
        self._over = threading.Event()
        self._keeper = Keeper(lifecycle, say=self.said.append)
        self._thread = threading.Thread(target=self._keeper.run, args=(self._over,), daemon=True)

    def __enter__(self) -> Kept:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def made(tmp_path: Path) -> tuple[Lifecycle, FileBackend]:
    return build(tmp_path)


@pytest.fixture
def lifecycle(made: tuple[Lifecycle, FileBackend]) -> Lifecycle:
    return made[0]


@pytest.fixture
def backend(made: tuple[Lifecycle, FileBackend]) -> FileBackend:
    return made[1]


def is_gone(lifecycle: Lifecycle, sandbox: Sandbox) -> bool:
    try:
        lifecycle.get(sandbox.id)
    except NotFound:
        return True
    return False


def has_settled(lifecycle: Lifecycle, sandbox: Sandbox, status: Status) -> bool:
    return wait_for(lambda: lifecycle.get(sandbox.id).status is status, 10)


# -- expiry ----------------------------------------------------------------------------------------


def test_a_sandbox_goes_within_two_seconds_of_its_time_and_says_so(
    lifecycle: Lifecycle, backend: FileBackend
) -> None:
    lasting = create(lifecycle, ttl_seconds=3600)
    sandbox = create(lifecycle, name="brief", ttl_seconds=1)

    with Kept(lifecycle):
        assert wait_for(lambda: is_gone(lifecycle, sandbox))
        gone_at = time.time()

    assert sandbox.expires_at is not None and 0 <= gone_at - sandbox.expires_at < 2
    with pytest.raises(NotFound, match="'brief' expired at .*: its ttl_seconds was 1"):
        lifecycle.get("brief")
    assert backend.inventory() == {lasting.id}


class OneSlowDelete(FileBackend):
    """Deleting the sandbox `slow` takes as long as a huge tree."""

    def destroy(self, sandbox: Sandbox) -> None:
        if sandbox.slug == "slow":
            time.sleep(4)
        super().destroy(sandbox)


def test_one_slow_delete_does_not_hold_up_the_others(tmp_path: Path) -> None:
    lifecycle, _ = build(tmp_path, OneSlowDelete)
    slow = create(lifecycle, name="slow", ttl_seconds=1)
    others = [create(lifecycle, ttl_seconds=1) for _ in range(5)]

    with Kept(lifecycle):
        assert wait_for(lambda: all(is_gone(lifecycle, one) for one in others))
        assert not is_gone(lifecycle, slow)
        assert all(one.expires_at is not None for one in others)
        assert time.time() - max(one.expires_at or 0 for one in others) < 2


def test_an_expiry_cuts_short_what_holds_the_lock(
    lifecycle: Lifecycle, backend: FileBackend
) -> None:
    """A holder that is stuck on the running box: its box is killed, and it ends."""
    sandbox = create(lifecycle, ttl_seconds=1)

    def hold() -> None:
        with lifecycle.turn(sandbox.id):
            assert wait_for(lambda: not backend.is_up(sandbox.id))

    holder = Background(hold)
    with Kept(lifecycle):
        assert wait_for(lambda: is_gone(lifecycle, sandbox))
    assert holder.join().error is None


# -- what died -------------------------------------------------------------------------------------


def test_an_agent_that_died_is_noticed_and_the_reason_said(
    lifecycle: Lifecycle, backend: FileBackend
) -> None:
    sandbox, other = create(lifecycle), create(lifecycle)

    with Kept(lifecycle):
        backend.kill_from_outside(sandbox.id)
        assert has_settled(lifecycle, sandbox, Status.FAILED)

    assert lifecycle.get(sandbox.id).error_message == "its agent is gone"
    assert lifecycle.get(other.id).status is Status.RUNNING
    assert lifecycle.start(sandbox.id).status is Status.RUNNING


def test_after_a_reboot_the_running_are_stopped_and_start_again(
    tmp_path: Path, lifecycle: Lifecycle, backend: FileBackend
) -> None:
    before, _ = build(tmp_path)
    before.registry.clock = Clock(boot_id="an earlier boot")
    sandbox = create(before, ttl_seconds=60)
    backend.kill_from_outside(sandbox.id)

    with Kept(lifecycle):
        assert has_settled(lifecycle, sandbox, Status.STOPPED)
        assert lifecycle.get(sandbox.id).error_message == "the machine was restarted"
        again = lifecycle.start(sandbox.id)
        assert (again.status, again.error_message) == (Status.RUNNING, None)


SERVER = """
import os, sys, threading
from pathlib import Path
from heyvm.models import CreateSpec
from tests.fake_backend import *
from tests.test_lifecycle import build
lifecycle, backend = build(Path(sys.argv[1]))
def die(*_, **__):
    os.kill(os.getpid(), 9)
step, ref = sys.argv[2], sys.argv[3]
if step == "create before the box":
    backend.start = die
elif step == "create before it is recorded":
    lifecycle.registry.record = die
elif step == "create after it is recorded":
    lifecycle.registry.settle_running = die
elif step == "stop before the box is killed":
    backend.stop = die
elif step == "stop after the box is killed":
    lifecycle.registry.settle_stopped = die
elif step == "force-stop after it is wanted":
    lifecycle._end = die
elif step == "delete after it is wanted":
    lifecycle._bury = die
elif step == "delete before the box is killed":
    backend.destroy = die
elif step == "delete after the box is killed":
    lifecycle.registry.bury = die
elif step == "visit":
    with lifecycle.visit(ref):
        die()
act = step.split()[0].replace("-", "_")
if act == "create":
    lifecycle.create(CreateSpec(name=ref))
else:
    getattr(lifecycle, act)(ref)
"""


def killed_at(where: Path, step: str, ref: str) -> None:
    """Have a process do what `step` begins with, and die of SIGKILL there."""
    process = subprocess.run(
        [sys.executable, "-c", SERVER, where, step, ref], cwd=ROOT, capture_output=True, check=False
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()


@pytest.mark.parametrize(
    "moment", ["before the box", "before it is recorded", "after it is recorded"]
)
def test_a_create_that_was_killed_is_failed_and_nothing_of_it_runs(
    tmp_path: Path, lifecycle: Lifecycle, backend: FileBackend, moment: str
) -> None:
    killed_at(tmp_path, f"create {moment}", "one")
    assert lifecycle.get("one").status is Status.PROVISIONING

    with Kept(lifecycle):
        assert has_settled(lifecycle, only(lifecycle), Status.FAILED)

    sandbox = lifecycle.get("one")
    assert "while the sandbox was being started" in (sandbox.error_message or "")
    assert not backend.is_up(sandbox.id)
    assert lifecycle.start("one").status is Status.RUNNING


@pytest.mark.parametrize(
    "step",
    [
        "stop before the box is killed",
        "stop after the box is killed",
        "force-stop after it is wanted",
    ],
)
def test_a_stop_that_was_killed_is_finished(
    tmp_path: Path, lifecycle: Lifecycle, backend: FileBackend, step: str
) -> None:
    sandbox = create(lifecycle, name="one")
    killed_at(tmp_path, step, "one")
    assert lifecycle.get("one").status is Status.STOPPING

    with Kept(lifecycle):
        assert has_settled(lifecycle, sandbox, Status.STOPPED)

    assert not backend.is_up(sandbox.id)
    assert lifecycle.start("one").status is Status.RUNNING


@pytest.mark.parametrize(
    "moment", ["after it is wanted", "before the box is killed", "after the box is killed"]
)
def test_a_delete_that_was_killed_is_finished(
    tmp_path: Path, lifecycle: Lifecycle, backend: FileBackend, moment: str
) -> None:
    sandbox = create(lifecycle, name="one")
    killed_at(tmp_path, f"delete {moment}", "one")
    assert not is_gone(lifecycle, sandbox)

    with Kept(lifecycle):
        assert wait_for(lambda: is_gone(lifecycle, sandbox))

    assert backend.inventory() == frozenset()
    assert list((tmp_path / "run" / "locks").iterdir()) == []


def test_a_visit_that_was_killed_is_over(
    tmp_path: Path, lifecycle: Lifecycle, backend: FileBackend
) -> None:
    sandbox = create(lifecycle, name="one")
    lifecycle.stop("one")
    killed_at(tmp_path, "visit", "one")
    assert backend.is_visited(sandbox.id)

    with Kept(lifecycle):
        assert wait_for(lambda: not backend.is_visited(sandbox.id))
        assert wait_for(lambda: lifecycle.registry.entry(sandbox.id).visit is None)
    assert lifecycle.get("one").status is Status.STOPPED


def test_what_somebody_is_doing_is_left_alone(tmp_path: Path, backend: FileBackend) -> None:
    """Two servers on one data directory: the keeper of one sees what the other is making."""
    mine, theirs = build(tmp_path)[0], build(tmp_path)
    under_way = Background(create, theirs[0], setup_hooks=("hang",))
    assert wait_for(lambda: theirs[1].orders("exec"))
    sandbox = only(mine)

    with Kept(mine) as kept:
        assert not wait_for(lambda: mine.get(sandbox.id).status is not Status.PROVISIONING, 1.5)
        assert backend.is_up(sandbox.id)
        assert kept.said == []
    mine.delete(sandbox.id)
    under_way.join()


def test_left_overs_are_removed_and_nothing_else(
    lifecycle: Lifecycle, backend: FileBackend
) -> None:
    up, stopped = create(lifecycle), create(lifecycle)
    lifecycle.stop(stopped.id)
    (backend.root / "sb-0badcafe" / "root").mkdir(parents=True)

    with Kept(lifecycle) as kept:
        assert wait_for(lambda: "sb-0badcafe" not in backend.inventory())
        (backend.root / "sb-1badcafe").mkdir()
        assert wait_for(lambda: "sb-1badcafe" not in backend.inventory(), 4)
        assert wait_for(lambda: len(kept.said) == 2)

    assert backend.inventory() == {up.id, stopped.id}
    assert kept.said == [
        "removed left-overs of sb-0badcafe",
        "removed left-overs of sb-1badcafe",
    ]


class FailsForOne(FileBackend):
    """Whatever is asked about the sandbox `cursed` fails, in ways that nobody thought of."""

    def poll(self, sandbox: Sandbox) -> str | None:
        if sandbox.slug == "cursed":
            raise ZeroDivisionError("cursed")
        return super().poll(sandbox)

    def inventory(self) -> frozenset[str]:
        raise PermissionError("inventory")


def test_a_fault_in_one_sandbox_stays_with_it(tmp_path: Path) -> None:
    lifecycle, backend = build(tmp_path, FailsForOne)
    create(lifecycle, name="cursed")
    other = create(lifecycle)

    with Kept(lifecycle) as kept:
        assert wait_for(lambda: any("cursed" in line for line in kept.said))
        backend.kill_from_outside(other.id)
        assert has_settled(lifecycle, other, Status.FAILED)


def test_what_cannot_be_repaired_is_told_ever_more_seldom(tmp_path: Path) -> None:
    lifecycle, _ = build(tmp_path)
    sandbox = create(lifecycle, name="stuck", ttl_seconds=1)
    stubborn, _ = build(tmp_path, WillNotDie)

    with Kept(stubborn) as kept:
        assert wait_for(lambda: len(kept.said) >= 2)
        before = len(kept.said)
        assert not wait_for(lambda: len(kept.said) > before + 2, 2.0)
    with Kept(lifecycle):
        assert wait_for(lambda: is_gone(lifecycle, sandbox))


# -- the process -----------------------------------------------------------------------------------

PROCESS = """
import sys
from pathlib import Path
from heyvm import backends, keeper
from tests.fake_backend import FileBackend
backends.build = lambda settings: {"file": FileBackend(Path(sys.argv[1]))}
sys.exit(keeper.main())
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", run_dir=tmp_path / "run")


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start_keeper(where: Path, settings: Settings, **more: Any) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "HEYVM_DATA_DIR": str(settings.data_dir),
        "HEYVM_RUN_DIR": str(settings.run_dir),
        **more.pop("env", {}),
    }
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, where / "boxes"], cwd=ROOT, env=environment, **more
    )


def holder(settings: Settings) -> int | None:
    """The pid of the process that is the keeper."""
    try:
        descriptor = os.open(settings.data_dir / "keeper.lock", os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        question = keeper.FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, *_, pid = keeper.FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, question))
    finally:
        os.close(descriptor)
    return None if kind == fcntl.F_UNLCK else pid


def test_of_many_keepers_one_stays(
    tmp_path: Path, settings: Settings, started: list[subprocess.Popen[bytes]]
) -> None:
    started += [start_keeper(tmp_path, settings, stderr=subprocess.PIPE) for _ in range(4)]

    assert wait_for(lambda: sum(one.poll() is not None for one in started) == 3, 20)
    assert sorted(one.poll() is None for one in started) == [False, False, False, True]
    gone = [one for one in started if one.poll() is not None]
    assert [(one.returncode, one.communicate()[1]) for one in gone] == [(0, b"")] * 3
    (staying,) = (one for one in started if one.poll() is None)
    assert holder(settings) == staying.pid


def test_a_spare_takes_over_answers_and_ends_when_asked(
    tmp_path: Path, settings: Settings, started: list[subprocess.Popen[bytes]]
) -> None:
    """`heyvm keeper`, as a service manager starts it: it follows no server."""
    started.append(start_keeper(tmp_path, settings))
    assert wait_for(lambda: holder(settings) == started[0].pid, 20)
    reading, writing = os.pipe()
    os.close(writing)
    environment = {
        **os.environ,
        "HEYVM_DATA_DIR": str(settings.data_dir),
        "HEYVM_RUN_DIR": str(settings.run_dir),
        "HEYVM_ALIVE_FD": str(reading),
    }
    command = [sys.executable, "-m", "heyvm.cli", "keeper"]
    spares = [
        subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=(reading,)) for _ in "12"
    ]
    started += spares
    os.close(reading)
    assert not wait_for(lambda: any(one.poll() is not None for one in started), 1.0)

    started[0].kill()

    assert wait_for(lambda: holder(settings) in {one.pid for one in spares}, 20)
    request = {"op": "ports", "sandbox_id": "sb-00000000"}
    assert control.ask(settings.run_dir, request, 20) == {"ok": True}
    for one in spares:
        one.terminate()
    assert [one.wait(10) for one in spares] == [0, 0]


def test_a_keeper_that_no_worker_can_reach_keeps_all_the_same(
    tmp_path: Path, settings: Settings, started: list[subprocess.Popen[bytes]]
) -> None:
    lifecycle, _ = build(tmp_path)
    brief = create(lifecycle, ttl_seconds=1)
    (settings.run_dir / f"{control.SOCKET_NAME}.new").mkdir()
    started.append(start_keeper(tmp_path, settings, stderr=subprocess.PIPE))

    assert wait_for(lambda: is_gone(lifecycle, brief), 20)
    started[0].terminate()
    assert started[0].wait(10) == 0
    assert started[0].stderr is not None
    assert b"workers cannot reach it" in started[0].stderr.read()


def test_the_process_does_what_the_thread_does(
    tmp_path: Path, settings: Settings, started: list[subprocess.Popen[bytes]]
) -> None:
    lifecycle, backend = build(tmp_path)
    brief, dying = create(lifecycle, ttl_seconds=1), create(lifecycle)
    started.append(start_keeper(tmp_path, settings))

    backend.kill_from_outside(dying.id)

    assert has_settled(lifecycle, dying, Status.FAILED)
    assert wait_for(lambda: is_gone(lifecycle, brief))


def test_a_keeper_ends_when_its_server_is_gone(
    tmp_path: Path, settings: Settings, started: list[subprocess.Popen[bytes]]
) -> None:
    reading, writing = os.pipe()
    started.append(
        start_keeper(tmp_path, settings, pass_fds=(reading,), env={"HEYVM_ALIVE_FD": str(reading)})
    )
    os.close(reading)
    assert wait_for(lambda: (settings.data_dir / "registry.db").exists(), 20)
    assert not wait_for(lambda: started[0].poll() is not None, 0.5)

    os.close(writing)

    assert started[0].wait(5) == 0


WATCHER = """
import os, socket
from heyvm import keeper
from heyvm.settings import from_env
reading, writing = os.pipe()
os.environ["HEYVM_ALIVE_FD"] = str(reading)
listener = socket.create_server(("127.0.0.1", 0))
listener.set_inheritable(True)
print(reading, os.fstat(reading).st_ino, os.fstat(listener.fileno()).st_ino, flush=True)
keeper.watch(from_env(os.environ))
"""


@pytest.fixture
def watched(settings: Settings) -> Iterator[tuple[int, int, int]]:
    """A process that watches as a worker does: its pipe's number and inode, its listener's."""
    environment = {
        **os.environ,
        "HEYVM_DATA_DIR": str(settings.data_dir),
        "HEYVM_RUN_DIR": str(settings.run_dir),
        "JWT_SECRET": "keep this",
    }
    worker = subprocess.Popen(
        [sys.executable, "-c", WATCHER], cwd=ROOT, env=environment, stdout=subprocess.PIPE
    )
    assert worker.stdout is not None
    pipe, pipe_inode, listener_inode = map(int, worker.stdout.readline().split())
    assert wait_for(lambda: holder(settings) is not None, 20)
    yield pipe, pipe_inode, listener_inode
    worker.kill()
    worker.wait()
    assert wait_for(lambda: holder(settings) is None, 10), "it must follow its server"


def test_a_dead_keeper_is_back_within_a_second(
    settings: Settings, watched: tuple[int, int, int]
) -> None:
    first = holder(settings)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    died = time.monotonic()

    assert wait_for(lambda: holder(settings) not in (None, first), 20)

    assert time.monotonic() - died < 1.0


def test_a_keeper_has_a_session_of_its_own_and_nothing_of_the_server_but_its_pipe(
    settings: Settings, watched: tuple[int, int, int]
) -> None:
    pid = holder(settings)
    assert pid is not None
    pipe, pipe_inode, listener_inode = watched

    assert os.getsid(pid) == pid
    open_there = {int(n): os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")}
    assert open_there[0] == "/dev/null" and open_there[1] == open_there[2]
    assert open_there[pipe] == f"pipe:[{pipe_inode}]"
    assert f"socket:[{listener_inode}]" not in open_there.values()
    assert list(open_there.values()).count(f"pipe:[{pipe_inode}]") == 1
    # It asks for tokens at the local ports of private endpoints.
    assert b"JWT_SECRET=keep this" in Path(f"/proc/{pid}/environ").read_bytes()


def test_a_keeper_without_local_ports_is_not_given_the_secret(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    monkeypatch.setenv("JWT_SECRET", "keep this")

    behind_nginx = replace(settings, api_hostname="example.com")

    assert "JWT_SECRET" in keeper._environment(settings)
    assert "JWT_SECRET" not in keeper._environment(behind_nginx)


def test_a_keeper_whose_data_directory_was_removed_ends(
    tmp_path: Path, settings: Settings, started: list[subprocess.Popen[bytes]]
) -> None:
    lifecycle, _ = build(tmp_path)
    sandbox = create(lifecycle, ttl_seconds=1)
    started.append(start_keeper(tmp_path, settings))
    assert wait_for(lambda: is_gone(lifecycle, sandbox), 20)

    shutil.rmtree(settings.data_dir)

    assert started[0].wait(15) == 0


def test_a_keeper_of_an_old_server_gives_way_to_the_next(
    tmp_path: Path, settings: Settings, started: list[subprocess.Popen[bytes]]
) -> None:
    """One that is killed never locks the next one out, and nothing of its work is lost."""
    lifecycle, _ = build(tmp_path)
    started.append(start_keeper(tmp_path, settings))
    assert wait_for(lambda: holder(settings) == started[0].pid, 20)
    sandbox = create(lifecycle, ttl_seconds=1)
    started[0].kill()
    started[0].wait()
    started.append(start_keeper(tmp_path, settings))

    assert wait_for(lambda: holder(settings) == started[1].pid, 20)
    assert wait_for(lambda: is_gone(lifecycle, sandbox))


def test_a_registry_that_is_refused_stops_the_keeper(
    tmp_path: Path, settings: Settings, started: list[subprocess.Popen[bytes]]
) -> None:
    settings.data_dir.mkdir()
    (settings.data_dir / "registry.db").write_bytes(b"precious" * 1000)

    started.append(start_keeper(tmp_path, settings, stderr=subprocess.PIPE))
    _, complaint = started[0].communicate(timeout=20)

    assert started[0].returncode == 2
    assert b"is not a registry of heyvm" in complaint and b"Traceback" not in complaint
