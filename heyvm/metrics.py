"""What the server counts, for Prometheus: written by each process into files of its own, summed up
by whoever is asked.

A process counts nothing until it says `begin`. What has died is summed up into files that stay, so
that counters never go back while the server lives and its many short processes leave no files.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heyvm import lives
from heyvm.errors import BackendFailed, HeyvmError, HookFailed, StorageFull

if TYPE_CHECKING:
    from prometheus_client import Metric

DIRECTORY = "metrics"
MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
PULSE_NAME = "keeper"
PULSE = struct.Struct("dd")  # time.monotonic of the last tick, seconds that it was late
PAST = "past"
KINDS = ("counter", "histogram")
# Room for some 150 routes, methods and classes of status: reserved, as whoever writes to a mapped
# file that finds no room on the disk is killed (SIGBUS, mmap(2)).
SIZES = {"counter": 1 << 16, "histogram": 1 << 19}
# In the file of what died before: which files are in it, so that a death between its renaming and
# their removal counts nothing twice.
FOLDED = "heyvm_folded"
REQUEST_S = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 600.0)
EXECUTE_S = (0.005, 0.01, 0.025, 0.1, 0.5, 2.0, 10.0, 60.0, 600.0, 3600.0)
CREATE_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 15.0, 60.0, 600.0)
WAIT_S = (0.002, 0.01, 0.05, 0.2, 1.0, 5.0)
FAILURES = (BackendFailed, HookFailed, StorageFull)
KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Timing:
    """One thing that is being timed; `outcome` may be set to a word that says more than `ok`."""

    def __init__(self) -> None:
        self.outcome = "ok"


class Meter:
    """Counts nothing: what a process has that has not said `begin`."""

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request was answered. `route` is its template, never its path."""

    def agent_failed(self, kind: str) -> None:
        """An agent broke off, fell silent or talked nonsense."""

    def retried(self) -> None:
        """The registry was busy, and is asked again."""

    def waited(self, seconds: float) -> None:
        """So long the registry's lock was waited for."""

    def ticked(self, late: float) -> None:
        """The keeper has looked once, so many seconds later than it should."""

    def observe(self, name: str, outcome: str, seconds: float) -> None:
        """`name` is `create`, `execute` or `image_pull`."""

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[Timing]:
        """Time what is done within. What it raises is `refused` or `failed`."""
        timing = Timing()
        began = time.perf_counter()
        try:
            yield timing
        except BaseException as error:
            timing.outcome = outcome_of(error)
            raise
        finally:
            self.observe(name, timing.outcome, time.perf_counter() - began)


def outcome_of(error: BaseException) -> str:
    """`refused` for what whoever asked could have asked otherwise, or later; else `failed`."""
    return "refused" if isinstance(error, HeyvmError) and not isinstance(error, FAILURES) else (
        "failed"
    )  # fmt: skip


class Prometheus(Meter):
    """Counts in files of this process. Made by `begin` alone, once in a process."""

    def __init__(self, directory: Path) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram, values

        # Chosen when a metric is made (values.py of prometheus_client): by name, not by pid, which
        # may come again while the files of the one before are still there.
        values.ValueClass = values.MultiProcessValue(lives.own)
        nowhere = CollectorRegistry()

        def histogram(name: str, text: str, labels: tuple[str, ...], bounds: Any) -> Histogram:
            return Histogram(name, text, labels, buckets=bounds, registry=nowhere)

        self._requests = histogram(
            "heyvm_http_request_seconds",
            "Seconds from a request's head to the last byte of its answer",
            ("route", "method", "status"),
            REQUEST_S,
        )
        self._timed = {
            name: histogram(f"heyvm_{name}_seconds", text, ("outcome",), bounds)
            for name, text, bounds in TIMED
        }
        self._waits = histogram(
            "heyvm_registry_wait_seconds",
            "Seconds that an operation waited for the registry's lock; those that need not wait"
            " are not in it",
            (),
            WAIT_S,
        )
        self._retries = Counter(
            "heyvm_registry_busy_retries",
            "How often the registry was found busy and asked again",
            registry=nowhere,
        )
        self._agents = Counter(
            "heyvm_agent_errors",
            "Conversations with agents that failed",
            ("kind",),
            registry=nowhere,
        )
        self._pulse = directory / PULSE_NAME
        self._pulse_file: int | None = None
        self._label: dict[tuple[str, str, int], Any] = {}

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        method = method if method in KNOWN_METHODS else "other"
        key = route, method, status // 100
        # Kept: looking labels up costs more than counting.
        child = self._label.get(key)
        if child is None:
            child = self._label[key] = self._requests.labels(route, method, f"{status // 100}xx")
        child.observe(seconds)

    def agent_failed(self, kind: str) -> None:
        self._agents.labels(kind).inc()

    def retried(self) -> None:
        self._retries.inc()

    def waited(self, seconds: float) -> None:
        self._waits.observe(seconds)

    def ticked(self, late: float) -> None:
        if self._pulse_file is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._pulse_file = os.open(self._pulse, flags, 0o600)
        os.pwrite(self._pulse_file, PULSE.pack(time.monotonic(), late), 0)

    def observe(self, name: str, outcome: str, seconds: float) -> None:
        self._timed[name].labels(outcome).observe(seconds)


TIMED = (
    ("create", "Seconds to make a sandbox, its image and setup hooks included", CREATE_S),
    ("execute", "Seconds that a command took, the way to it included", EXECUTE_S),
    ("image_pull", "Seconds to fetch and unpack an image", CREATE_S),
)


class _Here:
    """The meter of this process. As with logging, there is one, and whoever counts asks for it."""

    meter = Meter()


def here() -> Meter:
    """What this process counts with."""
    return _Here.meter


def begin(run_dir: Path) -> None:
    """Count from now on, in `run_dir`. Not to be said before a fork. A directory that cannot be
    written counts nothing: it must not keep the server from serving."""
    directory = run_dir / DIRECTORY
    with contextlib.suppress(OSError):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for kind, size in SIZES.items():
            _reserve(directory / f"{kind}_{lives.own()}.db", size)
        # prometheus_client looks at it when it is imported, and whenever it makes a file.
        os.environ[MULTIPROCESS] = str(directory)
        _Here.meter = Prometheus(directory)


def tidy(run_dir: Path) -> None:
    """Sum up what dead processes left; where no process is left, begin at nought."""
    with contextlib.suppress(OSError):
        with _locked(run_dir / DIRECTORY):
            _fold(run_dir / DIRECTORY)


def clear(run_dir: Path) -> None:
    """A server begins: remove what there is, unless another one that is here counts on."""
    directory = run_dir / DIRECTORY
    with contextlib.suppress(OSError):
        with _locked(directory):
            if not any(lives.is_alive(_process_of(path)) for path in directory.glob("*.db")):
                for path in directory.glob("*.db"):
                    path.unlink()
                (directory / PULSE_NAME).unlink(missing_ok=True)


def families(run_dir: Path) -> Iterator[Metric]:
    """What all processes have counted together, and what is known of them now."""
    directory = run_dir / DIRECTORY
    try:
        with _locked(directory):
            _fold(directory)
            names = sorted(directory.glob("*.db"))
            totals = _totals(names)
    except OSError:
        return
    yield from _counted(totals)
    yield from _keeper(directory)
    yield from _processes({_process_of(path) for path in names} - {PAST})


def text_of(found: Iterable[Metric]) -> bytes:
    """In Prometheus's own text format, version 0.0.4."""
    from prometheus_client import generate_latest

    class Found:
        def collect(self) -> Iterable[Metric]:
            return found

    return generate_latest(Found())


def gauge(name: str, text: str, values: Mapping[str, float], label: str) -> Metric:
    """One family of numbers that go up and down."""
    from prometheus_client.metrics_core import GaugeMetricFamily

    family = GaugeMetricFamily(name, text, labels=[label])
    for word, value in values.items():
        family.add_metric([word], value)
    return family


# -- files -----------------------------------------------------------------------------------------


def _reserve(path: Path, size: int) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One sums up at a time, and nobody reads meanwhile. The directory is there within."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _try_flock(descriptor):
            time.sleep(0.005)
        yield
    finally:
        os.close(descriptor)


def _try_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _process_of(path: Path) -> str:
    """`counter_<process>.db`"""
    return path.stem.partition("_")[2]


def _fold(directory: Path) -> None:
    dead = [path for path in directory.glob("*.db") if not _is_counting(path)]
    for kind in KINDS:
        goners = [path for path in dead if path.name.startswith(f"{kind}_")]
        if goners:
            past = directory / f"{kind}_{PAST}.db"
            _write_past(past, _totals([past, *goners]), goners)
            for path in goners:
                path.unlink(missing_ok=True)


def _is_counting(path: Path) -> bool:
    process = _process_of(path)
    return process == PAST or lives.is_alive(process)


def _write_past(past: Path, totals: Mapping[str, float], goners: Iterable[Path]) -> None:
    from prometheus_client.mmap_dict import MmapedDict, mmap_key

    new = past.with_suffix(".new")
    new.unlink(missing_ok=True)
    file = MmapedDict(str(new))
    try:
        for path in goners:
            key = mmap_key(FOLDED, FOLDED, ["file"], [path.name], "")
            file.write_value(key, 1.0, 0.0)
        for key, value in totals.items():
            file.write_value(key, value, 0.0)
    finally:
        file.close()
    new.rename(past)


def _totals(paths: Iterable[Path]) -> dict[str, float]:
    """The sum of each key over the files; those that are summed up already are left out."""
    read = {path.name: _read(path) for path in paths}
    folded = {
        json.loads(key)[2]["file"]
        for values in read.values()
        for key in values
        if key.startswith(f'["{FOLDED}"')
    }
    totals: dict[str, float] = defaultdict(float)
    for name, values in read.items():
        for key, value in values.items():
            if name not in folded and not key.startswith(f'["{FOLDED}"'):
                totals[key] += value
    return totals


def _read(path: Path) -> dict[str, float]:
    """Key by key; nothing of a file that is gone, or that somebody has spoilt."""
    from prometheus_client.mmap_dict import MmapedDict

    found: dict[str, float] = {}
    try:
        for key, value, *_ in MmapedDict.read_all_values_from_file(str(path)):
            found[key] = value
    except (OSError, RuntimeError, ValueError, struct.error):
        return {}
    return found


# -- what they hold --------------------------------------------------------------------------------


def _counted(totals: Mapping[str, float]) -> Iterator[Metric]:
    from prometheus_client import Metric

    found: dict[str, Metric] = {}
    buckets: dict[str, dict[tuple[tuple[str, str], ...], dict[float, float]]] = {}
    for key, value in sorted(totals.items()):
        family, name, labels, text = json.loads(key)
        if "le" in labels:
            series = tuple(sorted((one, word) for one, word in labels.items() if one != "le"))
            bounds = buckets.setdefault(family, {}).setdefault(series, {})
            bounds[float(labels["le"])] = value
        kind = "counter" if name.endswith("_total") else "histogram"
        metric = found.setdefault(family, Metric(family, text, kind))
        if "le" not in labels:
            metric.add_sample(name, labels, value)
    for family, rows in buckets.items():
        for series, bounds in rows.items():
            _accumulate(found[family], dict(series), bounds)
    yield from found.values()


def _accumulate(metric: Metric, labels: dict[str, str], bounds: Mapping[float, float]) -> None:
    """Each process counts a bucket by itself; on the wire each holds those below it too."""
    from prometheus_client.utils import floatToGoString

    total = 0.0
    for bound, value in sorted(bounds.items()):
        total += value
        metric.add_sample(f"{metric.name}_bucket", {**labels, "le": floatToGoString(bound)}, total)
    metric.add_sample(f"{metric.name}_count", labels, total)


def _keeper(directory: Path) -> Iterator[Metric]:
    from prometheus_client.metrics_core import GaugeMetricFamily

    age, late = _last_tick(directory / PULSE_NAME)
    yield GaugeMetricFamily(
        "heyvm_keeper_last_tick_age_seconds",
        "Seconds since the keeper last looked; infinite where none ever did",
        age,
    )
    if late is not None:
        yield GaugeMetricFamily(
            "heyvm_keeper_lag_seconds", "Seconds that the keeper's last look was late", late
        )


def _last_tick(path: Path) -> tuple[float, float | None]:
    try:
        at, late = PULSE.unpack(path.read_bytes())
    except (OSError, struct.error):
        return float("inf"), None
    age = time.monotonic() - at
    # A run directory that outlived a reboot: its clock was another one.
    return (age, late) if age >= 0 else (float("inf"), None)


def _processes(names: Iterable[str]) -> Iterator[Metric]:
    """Each process that counts."""
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

    memory = GaugeMetricFamily(
        "heyvm_process_resident_memory_bytes", "Resident memory of a process", labels=["pid"]
    )
    files = GaugeMetricFamily(
        "heyvm_process_open_fds", "Open file descriptors of a process", labels=["pid"]
    )
    spent = CounterMetricFamily(
        "heyvm_process_cpu_seconds", "Processor time of a process", labels=["pid"]
    )
    for name in sorted(names):
        pid = lives.pid_of(name)
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            ticks = int(fields[11]) + int(fields[12])
            open_files = len(os.listdir(f"/proc/{pid}/fd"))
            memory.add_metric([str(pid)], int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))
            spent.add_metric([str(pid)], ticks / os.sysconf("SC_CLK_TCK"))
            files.add_metric([str(pid)], open_files)
    yield from (memory, spent, files)
