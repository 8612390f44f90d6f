"""What sandboxes and the machine use: sampled by the keeper into one file, which the API reads.

The file is written whole and renamed, so that a reader sees one sample or the next.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heyvm import guest
from heyvm.backends.base import Backend, Reading
from heyvm.backends.cgroups import reserve
from heyvm.errors import HeyvmError
from heyvm.models import UP, Sandbox, Usage

SAMPLE_S = 5.0
STALE_S = 60.0  # the keeper is gone, or was when the machine slept
FILE_NAME = "usage.json"
YIELD_EVERY = 32
KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Counted:
    """What was read of a box, and when (time.monotonic): two of these make a percentage."""

    box: object
    at: float
    cpu_s: float


@dataclass(frozen=True)
class HostTimes:
    """Clock ticks of all processors together since boot (proc_stat(5))."""

    busy: int
    total: int


class Sampler:
    """The keeper's side. What it remembers is only for percentages."""

    def __init__(self, run_dir: Path, backend_of: Callable[[Sandbox], Backend]) -> None:
        self._path = run_dir / FILE_NAME
        self._backend_of = backend_of
        self._counted: dict[str, Counted] = {}
        self._host = HostTimes(0, 0)

    def sample(self, running: Sequence[Sandbox]) -> None:
        """Look at each once, and replace the file."""
        self._counted = {
            one.id: self._counted[one.id] for one in running if one.id in self._counted
        }
        entries = []
        for number, sandbox in enumerate(running):
            if number % YIELD_EVERY == YIELD_EVERY - 1:
                time.sleep(0)  # the keeper has other rounds
            entries.append(self._entry(sandbox))
        whole = {
            "sampledAtMs": int(time.time() * 1000),
            "host": self._sample_host(),
            "sandboxes": entries,
        }
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(whole, separators=(",", ":")))
        new.rename(self._path)

    def _entry(self, sandbox: Sandbox) -> dict[str, Any]:
        reading = self._backend_of(sandbox).usage(sandbox)
        return {
            "sandboxId": sandbox.id,
            "name": sandbox.name,
            "cpuPercent": self._percent(sandbox, reading),
            "memoryBytes": reading.memory_bytes,
            "pids": reading.pids,
        }

    def _percent(self, sandbox: Sandbox, reading: Reading) -> float | None:
        """Of one core, since the last look; the first time, since it was started."""
        if reading.cpu_s is None:
            return None
        now = Counted((sandbox.state.get("pid"), sandbox.state.get("start")), time.monotonic(),
                      reading.cpu_s)  # fmt: skip
        before = self._counted.get(sandbox.id)
        self._counted[sandbox.id] = now
        if before is not None and before.box == now.box:
            return percent(now.cpu_s - before.cpu_s, now.at - before.at)
        return percent(now.cpu_s, time.time() - (sandbox.started_at or 0.0))

    def _sample_host(self) -> dict[str, Any]:
        memory, now = host_memory(), host_times()
        before, self._host = self._host, now
        total = memory["MemTotal"]
        available = memory.get("MemAvailable", memory["MemFree"])
        return {
            "cpuPercent": min(100.0, percent(now.busy - before.busy, now.total - before.total)),
            "cpuCount": os.cpu_count() or 1,
            "memoryTotalBytes": total,
            "memoryUsedBytes": total - available,
            "memoryAvailableBytes": available,
            "memoryReserveBytes": reserve(total),
        }


def uncounted_kills(sandbox: Sandbox, backend: Backend) -> int:
    """How many of its processes the memory limit has ended of which its row does not know.

    The row counts them over all its boxes, the group those of this one; what the row said when this
    one came up stands in its state. So a keeper that dies at any moment counts none twice.
    """
    if sandbox.status not in UP or "oom_kills" not in sandbox.state:
        return 0
    kills = backend.oom_kills(sandbox) or 0
    return max(0, kills - (sandbox.oom_kills - int(sandbox.state["oom_kills"])))


def tell_of_kills(sandbox: Sandbox, backend: Backend, kills: int) -> None:
    """A line in its log, where its agent still listens."""
    what = "a process was" if kills == 1 else f"{kills} processes were"
    limit = sandbox.limits.memory
    by = f"its limit of {in_words(limit)}" if limit else "the limit of all sandboxes together"
    with suppress(HeyvmError, OSError), backend.connect(sandbox) as connection:
        guest.note(connection, f"error: out of memory: {what} ended by {by}")


def in_words(size: int) -> str:
    """Bytes, as people write them."""
    return f"{size} bytes" if size % MIB else f"{size // MIB} MiB"


class Usages:
    """The API's side: the latest sample, read again only when there is another."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE_NAME
        self._seen: tuple[int, int] | None = None
        self._snapshot: dict[str, Any] | None = None
        self._by_id: Mapping[str, Usage] = {}

    def snapshot(self) -> dict[str, Any] | None:
        """The latest sample, None until there is one. Costs one stat where it is no other."""
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        if abs(time.time() - found.st_mtime) > STALE_S:
            return None
        mark = (found.st_ino, found.st_mtime_ns)
        if mark != self._seen:
            snapshot = json.loads(self._path.read_text())
            self._by_id = {one["sandboxId"]: usage_of(one) for one in snapshot["sandboxes"]}
            self._seen, self._snapshot = mark, snapshot
        return self._snapshot

    def of(self, sandbox_id: str) -> Usage:
        """What a sandbox used when last looked at; nothing known for one that does not run."""
        return self._by_id.get(sandbox_id, Usage()) if self.snapshot() is not None else Usage()


def usage_of(entry: Mapping[str, Any]) -> Usage:
    return Usage(entry["cpuPercent"], entry["memoryBytes"], entry["pids"])


def percent(part: float, whole: float) -> float:
    """Never negative: a clock that was set makes nonsense of a difference."""
    return round(max(0.0, 100 * part / whole), 2) if whole > 0 else 0.0


def host_times() -> HostTimes:
    with open("/proc/stat") as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
    total = sum(ticks)
    return HostTimes(busy=total - ticks[3] - ticks[4], total=total)  # without idle and iowait


def host_memory() -> dict[str, int]:
    """Bytes, by the names of /proc/meminfo."""
    with open("/proc/meminfo") as file:
        lines = (line.split() for line in file)
        return {words[0].rstrip(":"): int(words[1]) * KIB for words in lines}
