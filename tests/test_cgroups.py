"""Groups of real processes, in each kind of hierarchy that this machine has."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from heyvm.backends import cgroups
from heyvm.backends.base import Reading
from heyvm.backends.cgroups import Groups
from heyvm.errors import BackendFailed, Unsupported
from heyvm.models import Limits
from tests.server import wait_until

MIB = 1 << 20
NAME = "sb-0000aaaa"
COUNTER = "n=0; while :; do n=$((n+1)); echo $n > $1; done"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes groups at the top")


def found(version: int | None) -> tuple[cgroups.Hierarchy, ...]:
    return tuple(one for one in cgroups.hierarchies() if version in (None, one.version))


@pytest.fixture(params=["as found", "v1", "v2"])
def groups(request: pytest.FixtureRequest) -> Iterator[Groups]:
    """Of a mark of their own, in all hierarchies or in those of one kind."""
    version = {"as found": None, "v1": 1, "v2": 2}[request.param]
    made = Groups(f"test{secrets.token_hex(4)}", found(version))
    if not made.places:
        pytest.skip(f"this machine has no {request.param} hierarchy that may be written")
    yield made
    for name in made.names():
        assert made.kill(name, 5) and made.remove(name)
    for place in cgroups.hierarchies():
        for leaf in ("launcher", ""):
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(place.under(made.parent, leaf))


@pytest.fixture
def member(groups: Groups) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """`member("sleep", "5")` runs in the group, which is made with the limits that are given."""
    running: list[subprocess.Popen[bytes]] = []

    def begin(*argv: str, limits: Limits | None = None) -> subprocess.Popen[bytes]:
        if not groups.exists(NAME):
            make(groups, NAME, limits or Limits())
        joined = " ".join(place.under(groups.parent, NAME) for place in groups.places)
        line = f'for d in {joined}; do echo $$ > $d/cgroup.procs; done; exec "$@"'
        running.append(subprocess.Popen(["sh", "-c", line, "sh", *argv], stderr=subprocess.DEVNULL))
        return running[-1]

    yield begin
    groups.kill(NAME, 5)
    for process in running:
        process.kill()
        process.wait(10)


def make(groups: Groups, name: str, limits: Limits) -> None:
    """What the launcher does, by hand."""
    spec = groups.specification(name, limits)
    for path, files in spec["parents"]:
        os.makedirs(path, exist_ok=True)
        for file, text in files:
            with open(f"{path}/{file}", "w") as out:
                out.write(text)
    for path, files in spec["groups"]:
        os.mkdir(path)
        for file, text, must in files:
            if must or os.path.exists(f"{path}/{file}"):
                with open(f"{path}/{file}", "w") as out:
                    out.write(text)


def need(groups: Groups, *controllers: str) -> None:
    if not groups.controllers.issuperset(controllers):
        pytest.skip(f"no controller for {', '.join(controllers)} in this hierarchy")


def inside(groups: Groups, count: int) -> None:
    wait_until(lambda: len(groups.pids(NAME)) >= count, f"{count} processes are in the group")


# -- halting ---------------------------------------------------------------------------------------


def test_what_is_frozen_stands_still_and_goes_on(groups, member, tmp_path):
    counted = tmp_path / "n"
    member("sh", "-c", COUNTER, "sh", str(counted))
    wait_until(lambda: counted.exists() and counted.read_text(), "it counts")

    groups.freeze(NAME)
    before = counted.read_bytes()
    time.sleep(0.2)

    assert counted.read_bytes() == before
    assert groups.is_frozen(NAME)
    groups.thaw(NAME)
    wait_until(lambda: counted.read_bytes() not in (b"", before), "it goes on")
    assert not groups.is_frozen(NAME)


def test_freezing_and_thawing_twice_changes_nothing(groups, member):
    member("sleep", "30")
    inside(groups, 1)

    groups.freeze(NAME)
    groups.freeze(NAME)
    assert groups.is_frozen(NAME)
    groups.thaw(NAME)
    groups.thaw(NAME)
    assert not groups.is_frozen(NAME)


def test_a_group_that_is_not_there_cannot_be_frozen_and_is_thawed_in_silence(groups):
    with pytest.raises(BackendFailed, match="start it anew"):
        groups.freeze("sb-ffffffff")
    groups.thaw("sb-ffffffff")
    assert not groups.is_frozen("sb-ffffffff")


def test_without_a_freezer_a_pause_is_refused_with_the_reason():
    with pytest.raises(Unsupported, match="doctor"):
        Groups("none", ()).freeze(NAME)
    Groups("none", ()).thaw(NAME)


# -- killing and removing --------------------------------------------------------------------------


def test_everything_in_it_is_killed_whatever_session_it_is_in(groups, member):
    first = member("sh", "-c", "for i in 1 2 3 4 5; do setsid sleep 60 & done; wait")
    inside(groups, 6)

    assert groups.kill(NAME, 5)

    assert groups.pids(NAME) == frozenset()
    assert first.wait(5) == -signal.SIGKILL
    assert groups.remove(NAME) and not groups.exists(NAME)


def test_what_is_frozen_is_killed_too(groups, member):
    process = member("sleep", "60")
    inside(groups, 1)
    groups.freeze(NAME)

    assert groups.kill(NAME, 5)

    assert process.wait(5) == -signal.SIGKILL


def test_what_multiplies_while_it_is_killed_is_killed(groups, member):
    need(groups, "pids")
    bomb = "import os,time\nwhile 1:\n try: os.fork()\n except OSError: time.sleep(.01)\n"
    member("python3", "-c", bomb, limits=Limits(pids=40))
    inside(groups, 30)

    assert groups.kill(NAME, 10)
    assert groups.remove(NAME)


def test_killing_one_group_leaves_its_neighbours_alone(groups, member):
    neighbour = member("sleep", "60")
    inside(groups, 1)
    make(groups, "sb-0000bbbb", Limits())

    assert groups.kill("sb-0000bbbb", 1) and groups.kill("sb-cccccccc", 1)

    assert neighbour.poll() is None
    assert groups.names() == {NAME, "sb-0000bbbb"}
    assert groups.remove("sb-0000bbbb") and groups.names() == {NAME}


def test_a_group_in_use_is_not_removed(groups, member, monkeypatch):
    monkeypatch.setattr(cgroups, "REMOVE_TIMEOUT_S", 0.05)
    process = member("sleep", "60")
    inside(groups, 1)

    assert not groups.remove(NAME)

    assert process.poll() is None and groups.exists(NAME)


def test_a_killed_spares_groups_are_swept_and_a_living_ones_are_not(groups):
    make(groups, "spare-4194305", Limits())  # above every pid_max
    make(groups, f"spare-{os.getpid()}", Limits())

    groups.sweep()

    assert groups.names() == {f"spare-{os.getpid()}"}


# -- limits and counters ---------------------------------------------------------------------------


def test_pids_are_limited_together(groups, member):
    need(groups, "pids")
    process = member("sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 30 & done; wait",
                     limits=Limits(pids=5))  # fmt: skip

    process.wait(10)

    assert len(groups.pids(NAME)) == 4  # and one for the shell that gave up


def test_memory_is_limited_and_kills_are_counted(groups, member):
    need(groups, "memory")
    hog = member("python3", "-c", "x = bytearray(64 << 20)", limits=Limits(memory=24 * MIB))

    assert hog.wait(20) == -signal.SIGKILL
    assert groups.oom_kills(NAME) == 1
    assert groups.usage(NAME).oom_kills == 1


def test_cpu_is_limited(groups, member):
    need(groups, "cpu")
    member("sh", "-c", "while :; do :; done", limits=Limits(cpus=0.2))
    inside(groups, 1)
    time.sleep(0.3)

    began, before = time.monotonic(), groups.usage(NAME).cpu_s
    time.sleep(1.5)
    used, took = groups.usage(NAME).cpu_s - before, time.monotonic() - began

    assert 0 < used < 0.35 * took


def test_usage_is_what_the_group_has(groups, member):
    member("python3", "-c", "import time; x = b'1' * (50 << 20); time.sleep(60)")
    inside(groups, 1)
    wait_until(lambda: (groups.usage(NAME).cpu_s or 0) > 0.005, "it has used a processor")

    if "memory" in groups.controllers:
        wait_until(lambda: 50 * MIB < (groups.usage(NAME).memory_bytes or 0) < 80 * MIB, "50 MiB")
    if "pids" in groups.controllers:
        assert groups.usage(NAME).pids == 1


def test_nothing_is_known_of_a_group_that_is_not_there(groups):
    assert groups.usage("sb-ffffffff") == Reading()
    assert groups.pids("sb-ffffffff") == frozenset()
    assert groups.remove("sb-ffffffff")


def test_all_together_leave_the_machine_its_reserve(groups):
    need(groups, "memory")
    make(groups, NAME, Limits())
    place = next(one for one in groups.places if "memory" in one.controllers)
    file = "memory.max" if place.version == 2 else "memory.limit_in_bytes"

    with open(place.under(groups.parent, file)) as bound:
        most = int(bound.read())

    total = cgroups.machine_memory()
    assert total - cgroups.reserve(total) - 4096 < most <= total - cgroups.reserve(total)


# -- what can be had -------------------------------------------------------------------------------


def test_what_cannot_be_limited_is_told():
    told = Groups("none", ()).offer(Limits(cpus=1, memory=MIB, pids=5))

    assert [line.split()[0] for line in told] == ["cpus", "memory", "pids"]
    assert Groups("none", ()).offer(Limits()) == ()
    assert Groups("none", ()).rlimits(Limits(1, MIB, 5)) == {"NPROC": 5, "DATA": MIB}


def test_what_can_be_limited_needs_no_words():
    full = Groups("none")
    need(full, *cgroups.LIMITED)

    assert full.offer(Limits(cpus=1, memory=MIB, pids=5)) == ()
    assert full.rlimits(Limits(1, MIB, 5)) == {}


def test_old_and_new_hierarchies_are_never_used_together():
    for version in (None, 1, 2):
        assert len({place.version for place in Groups("none", found(version)).places}) <= 1


def test_the_new_tree_is_used_where_it_has_controllers_and_the_old_where_only_they_have():
    new = cgroups.Hierarchy("/new", 2, frozenset())
    old = cgroups.Hierarchy("/old", 1, frozenset({"memory"}))

    assert Groups("x", (old, new)).places == (old,)
    assert Groups("x", (old, replace(new, controllers=frozenset({"pids"})))).places[0].version == 2
    assert Groups("x", (new,)).places == (new,)
    assert Groups("x", (new,)).can_freeze and not Groups("x", (old,)).can_freeze


@pytest.mark.parametrize("total", [128 * MIB, 512 * MIB, 2048 * MIB, 64 << 30, 4 << 40])
def test_the_reserve_is_some_and_never_most(total):
    assert 0 < cgroups.reserve(total) <= total // 2
    assert cgroups.reserve(total) <= 2048 * MIB
