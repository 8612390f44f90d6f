"""The cgroups of sandboxes: one for each, below one of this data directory's, beside the server's.

Never below the server's: systemd stops a unit by its cgroup, whatever sessions its processes made.
The launcher makes and joins what `Groups.specification` says; the rest is reading and writing here.
A sandbox's groups are in v1's hierarchies where those have the controllers, else in the v2 tree:
never in both, for a v1 group can be renamed and a process be born in a v2 one, but not the reverse.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from heyvm.backends.base import Reading
from heyvm.errors import BackendFailed, Unsupported
from heyvm.models import Limits
from heyvm.settings import machine_memory

PERIOD_US = 100_000
LEAST_QUOTA_US = 1000  # the kernel takes no less
LIMITED = ("cpu", "memory", "pids")
USED = frozenset({*LIMITED, "cpuacct", "freezer"})
LAUNCHER = "launcher"
FREEZE_TIMEOUT_S = 5.0
REMOVE_TIMEOUT_S = 2.0
PAUSE_S = 0.002
READ_BYTES = 65536
MIB = 1 << 20
# Of all sandboxes together, against 100 (v1: 1024) of whatever else runs beside them: the server
# keeps its pace, and what nobody else wants is theirs.
WEIGHT, SHARES = 25, 256
MOST_WEIGHT = 10_000


@dataclass(frozen=True)
class Hierarchy:
    """A directory in which groups may be made: `version` 1 or 2, and what can be limited there."""

    path: str
    version: int
    controllers: frozenset[str]
    named: bool = False  # systemd's own v1 tree
    foreign: bool = False  # only a process that is below it already may be moved there
    home: str = ""  # where a launcher goes that leaves; "": to the top

    def under(self, *names: str) -> str:
        return os.path.join(self.path, *names)


def hierarchies(euid: int | None = None) -> tuple[Hierarchy, ...]:
    """Where this user may make groups. Looks, and changes nothing."""
    root = (os.geteuid() if euid is None else euid) == 0
    found: dict[str, Hierarchy] = {}
    with open("/proc/self/mountinfo") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            kind, _, options = after.rstrip("\n").split(" ", 2)
            device, _, path = before.split(" ")[2:5]
            if kind in ("cgroup", "cgroup2") and device not in found:
                place = _hierarchy(_unescaped(path), kind, options, root)
                if place is not None:
                    found[device] = place
    return tuple(found.values())


def _hierarchy(path: str, kind: str, options: str, root: bool) -> Hierarchy | None:
    if kind == "cgroup2":
        return _unified(path) if root else _delegated(path)
    controllers = USED.intersection(options.split(","))
    named = "name=systemd" in options
    if not (controllers or named) or not os.access(path, os.W_OK):
        return None
    return Hierarchy(path, 1, controllers, named=named)


def _unified(path: str, *, foreign: bool = False, home: str = "") -> Hierarchy | None:
    if not os.access(path, os.W_OK):
        return None
    return Hierarchy(path, 2, _can_be_given(path), foreign=foreign, home=home)


def _can_be_given(path: str) -> frozenset[str]:
    """A group with processes of its own gives no controllers to those below it, unless it is the
    root of the tree (which alone has no `cgroup.type`)."""
    given = _words(f"{path}/cgroup.subtree_control")
    if not os.path.exists(f"{path}/cgroup.type") or not _words(f"{path}/cgroup.procs"):
        given |= _words(f"{path}/cgroup.controllers")
    return frozenset(given & set(LIMITED))


def _delegated(mount: str) -> Hierarchy | None:
    """The highest group above our own that is this user's; else that of the user's systemd, to
    which it moves the launcher when it is asked (`Groups.scope`)."""
    own = next((line for line in _lines("/proc/self/cgroup") if line.startswith("0::/")), "0::/")
    home = here = os.path.normpath(mount + own[3:])
    best = None
    while here.startswith(mount):
        if os.access(here, os.W_OK) and os.access(f"{here}/cgroup.procs", os.W_OK):
            best = here
        elif best is not None:
            break
        here = os.path.dirname(here)
    if best is not None:
        return _unified(best, home=home)
    uid = os.geteuid()
    users = f"{mount}/user.slice/user-{uid}.slice/user@{uid}.service"
    bus = os.path.exists(f"/run/user/{uid}/bus") and shutil.which("systemd-run") is not None
    # A group that gives controllers away takes no processes, and a scope goes when it is empty:
    # what is left is the group of the user's systemd itself.
    return _unified(users, foreign=True, home=f"{users}/init.scope") if bus else None


def reserve(total: int) -> int:
    """The bytes of memory that sandboxes leave to the machine, all of them together."""
    return min(max(total // 10, 256 * MIB), 2048 * MIB, total // 2)


def remove_tree(mark: str) -> None:
    """Remove the groups of a data directory, where nothing is left in them."""
    for place in hierarchies():
        for path in (place.under(f"heyvm-{mark}", LAUNCHER), place.under(f"heyvm-{mark}")):
            with contextlib.suppress(OSError):
                os.rmdir(path)


class Groups:
    """The groups of one data directory's sandboxes, named by their ids."""

    def __init__(self, mark: str, found: tuple[Hierarchy, ...] | None = None) -> None:
        places = hierarchies() if found is None else found
        self.parent = f"heyvm-{mark}"
        self._outside = tuple(one for one in places if one.named or one.version == 2)
        unified = tuple(one for one in places if one.version == 2)
        old = tuple(one for one in places if one.version == 1 and one.controllers)
        limited = any(one.controllers for one in unified) or not old
        self.places = unified[:1] if limited else old
        self._unified = self.places[0] if limited and self.places else None
        self._has = {name: one for one in reversed(self.places) for name in one.controllers}

    # --- what can be had ------------------------------------------------------------------------

    @property
    def controllers(self) -> frozenset[str]:
        """What can be limited, of cpu, memory and pids."""
        return frozenset(self._has) & frozenset(LIMITED)

    @property
    def can_freeze(self) -> bool:
        return self._unified is not None or "freezer" in self._has

    @property
    def scope(self) -> list[str]:
        """What to start the launcher with, where it gets there only as a scope of the user's
        systemd. Then its environment has to be emptied by it."""
        if self._unified is None or not self._unified.foreign:
            return []
        run = [shutil.which("systemd-run") or "", "--user", "--scope", "--quiet"]
        return [*run, "-p", "Delegate=yes", "--", "/usr/bin/env", "-i"]

    def give_up(self) -> None:
        """It was tried, and no group can be made: from here on as where there are none."""
        self.places, self._unified, self._has = (), None, {}
        self._outside = tuple(one for one in self._outside if not one.foreign)

    def offer(self, limits: Limits) -> tuple[str, ...]:
        """What of these limits cannot be had on this machine, in words."""
        why = "this server may write no cgroup that has it (`heyvm doctor`)"
        told = []
        if limits.cpus is not None and "cpu" not in self._has:
            told.append(f"cpus is not limited: it takes the cpu controller, and {why}")
        if limits.memory is not None and "memory" not in self._has:
            told.append(
                "memory is limited for each process, not for all together: that takes the memory"
                f" controller, and {why}"
            )
        if limits.pids is not None and "pids" not in self._has and os.geteuid() == 0:
            told.append(
                "pids is limited for each user inside, not for all together: that takes the pids"
                f" controller, and {why}"
            )
        return tuple(told)

    # --- for the launcher -----------------------------------------------------------------------

    @property
    def launcher(self) -> dict[str, list[Any]]:
        """`leaves`: the groups of the launchers, so that no sandbox is in the server's, and where
        to go in the end; `spares`: where the next sandbox's v1 groups may be made beforehand, and
        renamed."""
        old = [place for place in self.places if place.version == 1]
        return {
            "leaves": [
                [place.under(self.parent, LAUNCHER), place.home or place.path]
                for place in self._outside
            ],
            "spares": [place.under(self.parent) for place in old],
        }

    def specification(self, name: str, limits: Limits) -> dict[str, Any]:
        """`parents`: directories to have, with what is written there if it can be; `groups`: those
        to make anew, with what must be written there (or, marked 0, may), and to join."""
        parents: list[Any] = []
        for place in self.places:
            parents += self._parents(place)
        return {
            "parents": parents,
            "groups": [
                [place.under(self.parent, name), files_of(place, limits)] for place in self.places
            ],
        }

    def rlimits(self, limits: Limits) -> dict[str, int]:
        """The next best, for what no controller limits."""
        wanted = {"NPROC": ("pids", limits.pids), "DATA": ("memory", limits.memory)}
        return {
            name: value
            for name, (controller, value) in wanted.items()
            if value is not None and controller not in self._has
        }

    def _parents(self, place: Hierarchy) -> Iterator[Any]:
        given = [["cgroup.subtree_control", f"+{one}"] for one in sorted(place.controllers)]
        files = files_of_all(place)
        if place.version == 2:
            yield [place.path, given]
            files += given
        yield [place.under(self.parent), files]
        if place.version == 2 and "cpu" in place.controllers:
            # What makes a sandbox does not queue behind those that spin.
            yield [place.under(self.parent, LAUNCHER), [["cpu.weight", str(MOST_WEIGHT)]]]

    # --- looking --------------------------------------------------------------------------------

    def names(self) -> frozenset[str]:
        """Every group that there is, in whichever hierarchy."""
        found: set[str] = set()
        for place in self.places:
            with contextlib.suppress(OSError):
                found.update(
                    one.name for one in os.scandir(place.under(self.parent)) if one.is_dir()
                )
        return frozenset(found - {LAUNCHER})

    def exists(self, name: str) -> bool:
        return bool(self.places) and os.path.isdir(self._at(self.places[0], name))

    def paths(self, name: str) -> list[str]:
        """The directories of its groups that there are."""
        return [path for place in self.places if os.path.isdir(path := self._at(place, name))]

    def usage(self, name: str) -> Reading:
        """Its counters. Never raises: what there is none of is None."""
        return Reading(
            cpu_s=self._cpu_s(name),
            memory_bytes=self._memory(name),
            pids=self._counter(name, "pids", "pids.current"),
            oom_kills=self.oom_kills(name),
        )

    def oom_kills(self, name: str) -> int | None:
        """How many of its processes the memory limit has ended since the group was made."""
        place = self._has.get("memory")
        if place is None:
            return None
        file = "memory.events" if place.version == 2 else "memory.oom_control"
        return _field(f"{self._at(place, name)}/{file}", "oom_kill")

    def _cpu_s(self, name: str) -> float | None:
        if self._unified is not None:
            used = _field(f"{self._at(self._unified, name)}/cpu.stat", "usage_usec")
            return None if used is None else used / 1e6
        used = self._counter(name, "cpuacct", "cpuacct.usage")
        return None if used is None else used / 1e9

    def _memory(self, name: str) -> int | None:
        """What it is charged, without the file pages that the kernel would drop first."""
        place = self._has.get("memory")
        if place is None:
            return None
        file, field = (
            ("memory.current", "inactive_file")
            if place.version == 2
            else ("memory.usage_in_bytes", "total_inactive_file")
        )
        charged = self._counter(name, "memory", file)
        idle = _field(f"{self._at(place, name)}/memory.stat", field)
        return None if charged is None else max(0, charged - (idle or 0))

    def _counter(self, name: str, controller: str, file: str) -> int | None:
        place = self._has.get(controller)
        text = _text(f"{self._at(place, name)}/{file}") if place is not None else ""
        return int(text) if text.strip().isdigit() else None

    def pids(self, name: str) -> frozenset[int]:
        """Its processes."""
        found: set[int] = set()
        for place in self.places:
            found |= {int(word) for word in _words(f"{self._at(place, name)}/cgroup.procs")}
        return frozenset(found)

    # --- acting ---------------------------------------------------------------------------------

    def freeze(self, name: str) -> None:
        """Halt everything in it; on return it stands still. Undone before `BackendFailed`."""
        switch = self._switch(name)
        deadline = time.monotonic() + FREEZE_TIMEOUT_S
        while not switch.frozen():
            if not switch.turn(True):
                raise BackendFailed("it has no cgroup that could be frozen: start it anew")
            if time.monotonic() > deadline:
                switch.turn(False)
                raise BackendFailed(
                    f"its processes did not stand still within {FREEZE_TIMEOUT_S:.0f} s: they go on"
                )
            time.sleep(PAUSE_S)

    def thaw(self, name: str) -> None:
        """Let everything in it go on; nothing happens where nothing is frozen."""
        if self.can_freeze:
            self._switch(name).turn(False)

    def is_frozen(self, name: str) -> bool:
        return self.can_freeze and self._switch(name).frozen()

    def kill(self, name: str, timeout: float) -> bool:
        """SIGKILL to everything in it, frozen or not, until it is empty; False: not in time."""
        deadline = time.monotonic() + timeout
        while left := self.pids(name):
            if time.monotonic() > deadline:
                return False
            self._kill_once(name, left)
            self.thaw(name)
            time.sleep(PAUSE_S)
        return True

    def _kill_once(self, name: str, left: frozenset[int]) -> None:
        if self._unified is not None:
            path = f"{self._at(self._unified, name)}/cgroup.kill"  # since Linux 5.14
            if os.path.exists(path) and _write(path, "1"):
                left -= frozenset(map(int, _words(f"{os.path.dirname(path)}/cgroup.procs")))
        for pid in left:
            self._kill_member(pid, name)

    def _kill_member(self, pid: int, name: str) -> None:
        try:
            handle = os.pidfd_open(pid)
        except OSError:  # gone; EINVAL where its number still names a session
            return
        try:
            # Asked after the open: from here on the number cannot come to mean another process.
            if f"/{self.parent}/{name}\n" in _text(f"/proc/{pid}/cgroup"):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        except ProcessLookupError:
            pass
        finally:
            os.close(handle)

    def remove(self, name: str) -> bool:
        """Remove the empty group, waiting a moment for what is just ending; False: it is in use."""
        paths = [self._at(place, name) for place in self.places]
        deadline = time.monotonic() + REMOVE_TIMEOUT_S
        while paths := [path for path in paths if not _removed(path)]:
            if time.monotonic() > deadline:
                return False
            time.sleep(PAUSE_S)
        return True

    def sweep(self) -> None:
        """Remove what a launcher's spare (`spare-<pid>`) left that was killed."""
        for name in self.names():
            pid = name.removeprefix("spare-")
            if pid != name and not os.path.exists(f"/proc/{pid}"):
                for place in self.places:
                    _removed(self._at(place, name))

    def _at(self, place: Hierarchy, name: str) -> str:
        return place.under(self.parent, name)

    def _switch(self, name: str) -> _Freezer:
        if self._unified is not None:
            return _Freezer(self._at(self._unified, name), "cgroup.freeze", ("0", "1"))
        if "freezer" not in self._has:
            raise Unsupported(
                "a sandbox cannot be paused on this server: it may write no cgroup (`heyvm doctor`)"
            )
        return _Freezer(self._at(self._has["freezer"], name), "freezer.state", ("THAWED", "FROZEN"))


@dataclass(frozen=True)
class _Freezer:
    """How one group is halted: what to write where, and when it has come to stand still."""

    path: str
    file: str
    words: tuple[str, str]

    def turn(self, on: bool) -> bool:
        """False where there is no such group."""
        return _write(f"{self.path}/{self.file}", self.words[on])

    def frozen(self) -> bool:
        if self.file == "cgroup.freeze":
            return _field(f"{self.path}/cgroup.events", "frozen") == 1
        return _text(f"{self.path}/{self.file}").strip() == self.words[1]


def files_of(place: Hierarchy, limits: Limits) -> list[Any]:
    """A sandbox's limits, as (file, text, whether it must be)."""
    files: list[Any] = []
    if limits.cpus is not None and "cpu" in place.controllers:
        quota = max(LEAST_QUOTA_US, round(limits.cpus * PERIOD_US))
        one = ("cpu.cfs_quota_us", str(quota)), ("cpu.max", f"{quota} {PERIOD_US}")
        files.append([*one[place.version - 1], 1])
    if limits.memory is not None and "memory" in place.controllers:
        # No swap besides: it would only put off the end, and slow down the machine.
        if place.version == 2:
            files += [["memory.max", str(limits.memory), 1], ["memory.swap.max", "0", 0]]
        else:
            names = ("memory.limit_in_bytes", 1), ("memory.memsw.limit_in_bytes", 0)
            files += [[file, str(limits.memory), must] for file, must in names]
    if limits.pids is not None and "pids" in place.controllers:
        files.append(["pids.max", str(limits.pids), 1])
    return files


def files_of_all(place: Hierarchy) -> list[Any]:
    """The bounds of all sandboxes together."""
    most = machine_memory() - reserve(machine_memory())
    bounds = {
        "cpu": (("cpu.shares", SHARES), ("cpu.weight", WEIGHT)),
        "memory": (("memory.limit_in_bytes", most), ("memory.max", most)),
        "pids": (("pids.max", most_processes()), ("pids.max", most_processes())),
    }
    found = [bounds[name][place.version - 1] for name in LIMITED if name in place.controllers]
    return [[file, str(value)] for file, value in found]


def most_processes() -> int:
    """Three quarters of what the machine can have."""
    names = ("pid_max", "threads-max")
    numbers = [_text(f"/proc/sys/kernel/{name}").strip() for name in names]
    return min([int(one) for one in numbers if one.isdigit()], default=32768) * 3 // 4


def _removed(path: str) -> bool:
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _write(path: str, text: str) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(descriptor, text.encode())
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _text(path: str) -> str:
    """What a file of the kernel holds; nothing where it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        found = b""
        while part := os.read(descriptor, READ_BYTES):  # a file of a process may come in pieces
            found += part
        return found.decode("ascii", "replace")
    except OSError:
        return ""
    finally:
        os.close(descriptor)


def _lines(path: str) -> list[str]:
    return _text(path).splitlines()


def _words(path: str) -> set[str]:
    return set(_text(path).split())


def _field(path: str, name: str) -> int | None:
    """The number behind a name, in a file of such lines."""
    for line in _lines(path):
        word, _, value = line.partition(" ")
        if word == name and value.isdigit():
            return int(value)
    return None


def _unescaped(path: str) -> str:
    """A path as mountinfo has it (proc(5)): white space is written in octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)
