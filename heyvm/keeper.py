"""The process that makes what is match what the registry says: `python -m heyvm.keeper`.

One per data directory, whatever the number of servers. It owns nothing that it could not find
again, so it may be killed at any time; the workers' `watch` starts the next one, or a spare
(`heyvm keeper`) takes its place. Listens on local ports (localports.py) and answers the workers
(control.py).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from heyvm import backends, control, journal, lives, metrics
from heyvm.errors import BadRequest, HeyvmError
from heyvm.images import Images
from heyvm.lifecycle import Lifecycle
from heyvm.models import Endpoint
from heyvm.registry import Entry, Registry
from heyvm.settings import Settings, from_env
from heyvm.usage import SAMPLE_S, Sampler, tell_of_kills, uncounted_kills

TICK_S = 0.25
POLL_S = 0.5  # one look costs 25 µs for each sandbox that runs
WATCH_S = 0.5
FAILED_REST_S = 10.0
OOM_S = 1.0
WAKE_S = 1.0  # so long may a sandbox stand still whose backup was killed
SWEEP_S = 2.0  # what a killed worker leaves is gone within 5 s
MEND_S = 2.0
CUT_AGAIN_S = 600.0  # so long may the server be down after a removal was cut short
SPARE_S = 0.5
TAKE_S = 0.05
ENDING_S = 2.0  # what a keeper may take to follow its server
UPKEEP_S = 1.0  # so long may rules be gone that somebody has flushed
CHORES_S = 10.0
EXPIRY_S = 1.0
TUNNELS_S = 14.0  # it has to start first; less than workers wait (app.py)
BEAT_S = 10.0
LONGEST_REST_S = 30.0
AT_ONCE = 32
FOLLOW_S = 5.0
CANNOT_START = 2
LOCK_NAME = "keeper.lock"
# struct flock of 64-bit Linux: type, whence, start, length, pid (fcntl(2)).
FLOCK = struct.Struct("hhqqi4x")
# The keeper asks who comes to the local ports of private endpoints. With API_HOSTNAME there are
# none, and it has no use for them.
FOR_PRIVATE_PORTS = ("JWT_SECRET", "JWT_AUDIENCE")


class Ports(Protocol):
    """What is asked of localports.py, which only a process that gevent has patched can have."""

    def sync(self, sandbox_id: str | None = None) -> None: ...


class Tunnelling(Protocol):
    """What is asked of tunnelproc.py."""

    def ask(self, request: Mapping[str, Any], timeout: float) -> Mapping[str, Any]: ...

    def is_needed_again(self) -> bool: ...

    def is_running(self) -> bool: ...

    def end_unless(self, is_needed: Callable[[], bool]) -> None: ...


class NoPorts:
    """Of a keeper that has none."""

    def sync(self, sandbox_id: str | None = None) -> None:
        """Nothing to do."""


class Keeper:
    """Looks again and again, and repairs what differs. A failure in one sandbox stays with it."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        *,
        say: Callable[[str], None],
        ports: Ports | None = None,
        tunnels: Tunnelling | None = None,
    ) -> None:
        self._lifecycle = lifecycle
        self._registry = lifecycle.registry
        self._images = Images(lifecycle.registry, lifecycle.settings)
        self._say = _Seldom(say)
        self._works = _Works(say)
        self._ports = ports or NoPorts()
        self._tunnels = tunnels
        self._tunnelled: int | None = None
        self._changes: int | None = None
        self._synced: int | None = None
        self._running: Sequence[Entry] = ()
        self._cut: set[str] = set()  # subdomains
        self._sampler = Sampler(lifecycle.settings.run_dir, lifecycle.backend_of)
        self._rounds: tuple[_Round, ...] = (
            _Round(0.0, self._expire),
            _Round(0.0, self._attend_unsettled),
            _Round(POLL_S, self._attend_dead),
            _Round(OOM_S, self._look_for_oom),
            _Round(WAKE_S, self._wake),
            _Round(SAMPLE_S, self._sample),
            _Round(0.0, self._look_at_ports),
            _Round(EXPIRY_S, self._expire_tunnels),
            _Round(0.0, self._look_at_tunnels),
            _Round(BEAT_S, self._feel_tunnels),
            _Round(MEND_S, self._mend_sockets),
            _Round(MEND_S, self._remove_unmade),
            _Round(MEND_S, self._cut_removed),
            _Round(SWEEP_S, self._sweep),
            _Round(UPKEEP_S, self._upkeep),
            _Round(CHORES_S, self._tidy_registry),
        )

    def answer_at(self, server: control.Server) -> None:
        """Have this server listen for as long as this keeper runs."""
        self._rounds = (_Round(MEND_S, partial(self._listen, server)), *self._rounds)

    def _listen(self, server: control.Server) -> None:
        try:
            server.listen()
        except OSError as error:
            self._say(f"workers cannot reach it: {error}")

    def run(self, over: threading.Event) -> None:
        """Tick until `over` is set."""
        due = time.monotonic()
        while not over.is_set():
            metrics.here().ticked(max(0.0, time.monotonic() - due))
            self.tick()
            due = time.monotonic() + TICK_S
            over.wait(TICK_S)

    def tick(self) -> None:
        """Look once. What takes long goes on in threads of its own."""
        now = time.monotonic()
        for round_ in self._rounds:
            if now >= round_.due:
                round_.due = now + round_.period
                self._try(round_.look)

    def _try(self, look: Callable[[], None]) -> None:
        try:
            look()
        except HeyvmError as error:
            self._say(error.detail)
        # The loop must outlive every fault: the other sandboxes need it.
        except Exception:  # noqa: BLE001
            self._say(traceback.format_exc())

    def _expire(self) -> None:
        for sandbox_id in self._lifecycle.expire_due():
            self._attend(sandbox_id)

    def _attend_unsettled(self) -> None:
        for sandbox_id in self._registry.unsettled():
            self._attend(sandbox_id)

    def _attend_dead(self) -> None:
        changes = self._registry.changes()
        if changes != self._changes:
            self._running = self._registry.running()
            self._changes = changes
        for entry in self._running:
            self._try(partial(self._attend_if_dead, entry))

    def _attend_if_dead(self, entry: Entry) -> None:
        if self._lifecycle.ending_of(entry) is not None:
            self._works.begin(entry.sandbox.id, partial(self._attend_ended, entry.sandbox.id))

    def _attend_ended(self, sandbox_id: str) -> None:
        # Now: its group, which counts them, goes with it.
        with suppress(HeyvmError):
            self._count_oom(sandbox_id)
        self._lifecycle.attend(sandbox_id)

    def _wake(self) -> None:
        for entry in self._running:
            if self._lifecycle.is_left_still(entry):
                sandbox_id = entry.sandbox.id
                self._works.begin(f"wake {sandbox_id}", partial(self._lifecycle.wake, sandbox_id))

    def _look_for_oom(self) -> None:
        for entry in self._running:
            sandbox = entry.sandbox
            if uncounted_kills(sandbox, self._lifecycle.backend_of(sandbox)) > 0:
                self._works.begin(f"oom {sandbox.id}", partial(self._count_oom, sandbox.id))

    def _count_oom(self, sandbox_id: str) -> None:
        sandbox = self._registry.entry(sandbox_id).sandbox  # another keeper may have counted them
        backend = self._lifecycle.backend_of(sandbox)
        kills = uncounted_kills(sandbox, backend)
        if kills > 0:
            self._registry.count_oom(sandbox_id, kills)
            journal.event("sandbox.out-of-memory", sandbox.id, sandbox.slug, kills=kills)
            tell_of_kills(sandbox, backend, kills)

    def _sample(self) -> None:
        self._sampler.sample([entry.sandbox for entry in self._running])

    def _attend(self, sandbox_id: str) -> None:
        self._works.begin(sandbox_id, lambda: self._lifecycle.attend(sandbox_id))

    def answers(self) -> Mapping[str, control.Operation]:
        """What workers may ask for; see control.py."""
        answers: dict[str, control.Operation] = {"ports": self._answer_ports}
        if self._tunnels is not None:
            answers["tunnel"] = partial(self._tunnels.ask, timeout=TUNNELS_S)
            answers["tunnels"] = self._answer_tunnels
        return answers

    def _answer_ports(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        sandbox_id = request.get("sandbox_id")
        if not isinstance(sandbox_id, str):
            raise BadRequest("sandbox_id is not a text")
        self._ports.sync(sandbox_id)
        return {"ok": True}

    def _answer_tunnels(self, _request: Mapping[str, Any]) -> Mapping[str, Any]:
        self._sync_tunnels(self._registry.changes())
        return {"ok": True}

    def _expire_tunnels(self) -> None:
        # What this process writes does not count as a change.
        if self._registry.remove_expired_tunnels():
            self._tunnelled = None

    def _look_at_tunnels(self) -> None:
        if self._tunnels is None:
            return
        changes = self._registry.changes()
        if changes != self._tunnelled or self._tunnels.is_needed_again():
            self._works.begin("tunnels", partial(self._sync_tunnels, changes))

    def _feel_tunnels(self) -> None:
        """A process that hangs is found by asking it alone, and is killed then."""
        if self._tunnels is not None and self._tunnels.is_running():
            self._works.begin("tunnels", partial(self._sync_tunnels, self._registry.changes()))

    def _sync_tunnels(self, changes: int) -> None:
        assert self._tunnels is not None
        self._tunnelled = changes  # now: what expires meanwhile is another change
        try:
            if self._registry.tunnels():
                self._tunnels.ask({"op": "sync"}, TUNNELS_S)
            else:
                self._tunnels.end_unless(lambda: bool(self._registry.tunnels()))
        except BaseException:
            self._tunnelled = None
            raise

    def _look_at_ports(self) -> None:
        changes = self._registry.changes()
        if changes != self._synced:
            self._works.begin("ports", partial(self._sync_ports, changes))

    def _sync_ports(self, changes: int) -> None:
        self._ports.sync()
        self._synced = changes

    def _mend_sockets(self) -> None:
        running = [one.sandbox for one in self._running]
        self._works.begin("mend sockets", partial(self._lifecycle.sockets.mend, running))

    def _remove_unmade(self) -> None:
        for sandbox_id in {one.sandbox_id for one in self._registry.unready_endpoints()}:
            work = partial(self._remove_unmade_of, sandbox_id)
            self._works.begin(f"endpoints of {sandbox_id}", work)

    def _remove_unmade_of(self, sandbox_id: str) -> None:
        """Endpoints whose maker, who holds the sandbox's lock meanwhile, died."""
        with self._lifecycle.hold(sandbox_id) as sandbox:
            if sandbox is None:
                return
            for endpoint in self._registry.unready_endpoints():
                if endpoint.sandbox_id == sandbox_id:
                    self._registry.remove_endpoint(endpoint.subdomain)
                    self._lifecycle.sockets.close(sandbox, endpoint)
        self._ports.sync(sandbox_id)

    def _cut_removed(self) -> None:
        """Who is still in by an endpoint that is gone: whoever removed it may have died before it
        cut them. It may be doing so just now as well; twice is fine."""
        since = self._registry.clock.wall() - CUT_AGAIN_S
        removed = {one.subdomain: one for one in self._registry.removed_endpoints(since)}
        self._cut.intersection_update(removed)
        new = [one for name, one in removed.items() if name not in self._cut]
        for sandbox_id in {one.sandbox_id for one in new}:
            those = [one for one in new if one.sandbox_id == sandbox_id]
            self._works.begin(f"cut {sandbox_id}", partial(self._cut_all, sandbox_id, those))

    def _cut_all(self, sandbox_id: str, endpoints: Sequence[Endpoint]) -> None:
        sandbox = self._registry.find(sandbox_id)
        for endpoint in endpoints:
            if sandbox is not None:
                self._lifecycle.sockets.close(sandbox, endpoint)
            self._cut.add(endpoint.subdomain)

    def _sweep(self) -> None:
        for name in self._lifecycle.backends:
            self._works.begin(f"sweep {name}", partial(self._sweep_now, name))
        self._works.begin("sweep images", self._images.sweep)

    def _sweep_now(self, name: str) -> None:
        strays = self._strays(name)
        self._lifecycle.backends[name].sweep(strays)
        if strays:
            journal.event("keeper.removed-left-overs", sandboxes=sorted(strays))
            self._say(f"removed left-overs of {', '.join(sorted(strays))}")

    def _upkeep(self) -> None:
        for name, backend in self._lifecycle.backends.items():
            running = [one.sandbox for one in self._running if one.sandbox.backend_type == name]
            self._works.begin(f"upkeep {name}", partial(backend.upkeep, running))

    def _strays(self, name: str) -> frozenset[str]:
        there = self._lifecycle.backends[name].inventory()
        # Only now: a row is written before there is anything of its sandbox, so what was there a
        # moment ago and has no row is nobody's.
        return there - self._registry.known_ids()

    def _tidy_registry(self) -> None:
        self._registry.purge()
        self._registry.checkpoint()
        self._registry.keep_ballast()
        metrics.tidy(self._lifecycle.settings.run_dir)


class _Seldom:
    """Says each thing once in a while: what fails at every tick would fill the log."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: dict[str, float] = {}

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        self._said = {old: at for old, at in self._said.items() if now - at < LONGEST_REST_S}
        if text not in self._said:
            self._said[text] = now
            self._say(text)


@dataclass
class _Round:
    """One kind of look, and when it is due next (time.monotonic)."""

    period: float
    look: Callable[[], None]
    due: float = 0.0


class _Works:
    """What goes on beside the loop: one work at a time for each name, and a longer rest after each
    failure, so that a sandbox that cannot be repaired does not fill the log."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._busy: set[str] = set()
        self._rests: dict[str, tuple[float, float]] = {}
        self._slots = threading.BoundedSemaphore(AT_ONCE)

    def begin(self, name: str, work: Callable[[], object]) -> None:
        until, _ = self._rests.get(name, (0.0, 0.0))
        if name in self._busy or time.monotonic() < until:
            return
        self._busy.add(name)
        threading.Thread(target=self._run, args=(name, work), daemon=True).start()

    def _run(self, name: str, work: Callable[[], object]) -> None:
        try:
            with self._slots:
                work()
            self._rests.pop(name, None)
        except HeyvmError as error:
            self._rest(name, error.detail)
        # As in the loop: a fault in one sandbox is told, and tried again later.
        except Exception:  # noqa: BLE001
            self._rest(name, traceback.format_exc())
        finally:
            self._busy.discard(name)

    def _rest(self, name: str, why: str) -> None:
        _, last = self._rests.get(name, (0.0, 0.0))
        rest = min(max(2 * last, TICK_S), LONGEST_REST_S)
        self._rests[name] = (time.monotonic() + rest, rest)
        self._say(f"{name}: {why}")


def watch(settings: Settings) -> None:
    """For ever: see twice a second that there is a keeper, and start one where there is none.

    For a thread or greenlet of each worker. Of several that are started at once, one stays.
    """
    child: int | None = None
    say = _Seldom(_say)
    while True:
        try:
            if child is None and is_missing(settings.data_dir):
                child = spawn(settings)
        except OSError as error:
            say(f"cannot be started: {error}")
        time.sleep(WATCH_S)
        child, failed = _reaped(child)
        if failed:
            time.sleep(FAILED_REST_S)


def is_missing(data_dir: Path) -> bool:
    """Whether no process holds the keeper's lock. Asks without taking it, or a keeper that starts
    just then would think that there is one."""
    question = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    descriptor = _open_lock(data_dir)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, question)
    finally:
        os.close(descriptor)
    return bool(FLOCK.unpack(answer)[0] == fcntl.F_UNLCK)


def spawn(settings: Settings) -> int:
    """Start a keeper in a session of its own; its pid, to be reaped by the caller."""
    alive = os.environ.get("HEYVM_ALIVE_FD")
    nothing = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    kept = int(alive) if alive else None
    return lives.spawn_module("heyvm.keeper", _environment(settings), nothing, kept)


def take_lock(data_dir: Path, patience: float = 0.0) -> int | None:
    """Become the keeper: the descriptor that holds the lock, or None while there is another, for
    so many seconds (one ends a moment after its server).

    A record lock: a child that was forked does not inherit it, so none can outlive its keeper.
    """
    end = time.monotonic() + patience
    while (lock := _try_lock(data_dir)) is None and time.monotonic() < end:
        time.sleep(TAKE_S)
    return lock


def _try_lock(data_dir: Path) -> int | None:
    descriptor = _open_lock(data_dir)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return None
        raise
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def main() -> int:
    """Be the keeper until the server is gone; 0 at once where there is one already, but a spare
    (`--spare`) waits until there is none."""
    settings = from_env(os.environ)
    lock = _wait_for_lock(settings) if "--spare" in sys.argv[1:] else take_lock(settings.data_dir)
    if lock is None:
        return 0
    from gevent import monkey, signal_handler

    monkey.patch_all()
    if settings.log_json:
        journal.begin_json("keeper")
        logging.getLogger("heyvm").setLevel(logging.DEBUG if settings.debug else logging.WARNING)
    elif settings.debug:
        logging.basicConfig(level=logging.DEBUG, format="heyvm keeper: %(message)s")
    over = threading.Event()
    signal_handler(signal.SIGTERM, over.set)
    threading.Thread(target=_follow, args=(settings.data_dir, lock, over), daemon=True).start()
    return _keep(settings, over)


def _wait_for_lock(settings: Settings) -> int:
    """The lock, however long another keeper lives. Ends the process at SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while (lock := take_lock(settings.data_dir)) is None:
        time.sleep(SPARE_S)
    return lock


def _keep(settings: Settings, over: threading.Event) -> int:
    from heyvm import localports
    from heyvm.gateway import Gateway
    from heyvm.proxies import Proxies
    from heyvm.tunnelproc import TunnelProcess

    def sync(sandbox_id: str) -> None:
        ports.sync(sandbox_id)

    localports.raise_file_limit()
    registry = Registry(settings.data_dir / "registry.db")
    lifecycle = Lifecycle(registry, backends.build(settings), settings, sync_ports=sync)
    proxies = Proxies(lifecycle, sync)
    gateway = Gateway(settings, proxies, registry.link_key)
    ports = localports.LocalPorts(registry, proxies, settings, gateway.for_port)
    try:
        lifecycle.open()
    except HeyvmError as error:
        _say(error.detail)
        return CANNOT_START
    # Before anything else: nobody else may take the ports meanwhile, and somebody waits for them.
    # What fails is tried again at every change.
    with suppress(HeyvmError):
        ports.sync()
    metrics.begin(settings.run_dir)
    journal.event("keeper.started")
    tunnels = TunnelProcess(_without_secrets(_environment(settings)))
    keeper = Keeper(lifecycle, say=_say, ports=ports, tunnels=tunnels)
    keeper.answer_at(control.Server(settings.run_dir, keeper.answers()))
    keeper.run(over)
    tunnels.close()
    journal.event("keeper.stopped")
    return 0


def _follow(data_dir: Path, lock: int, over: threading.Event) -> None:
    """Set `over` when the server is gone, if it told by which pipe that is seen, or the directory
    that is kept."""
    alive = os.environ.get("HEYVM_ALIVE_FD")
    pipe = [int(alive)] if alive else []
    while True:
        # Nobody writes to the pipe: what can be read is its end.
        ended, _, _ = select.select(pipe, [], [], FOLLOW_S)
        if ended or not _is_at(data_dir / LOCK_NAME, lock):
            over.set()
            return


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _environment(settings: Settings) -> Mapping[str, str]:
    withheld = FOR_PRIVATE_PORTS if settings.api_hostname else ()
    environment = {name: value for name, value in os.environ.items() if name not in withheld}
    environment["HEYVM_DATA_DIR"] = str(settings.data_dir)
    environment["HEYVM_RUN_DIR"] = str(settings.run_dir)
    environment["HEYVM_TUNNEL_HOST"] = settings.tunnel_host  # JWT_SECRET has a say in it
    # The package that this process runs, wherever it was found.
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return environment


def _without_secrets(environment: Mapping[str, str]) -> Mapping[str, str]:
    return {name: value for name, value in environment.items() if name not in FOR_PRIVATE_PORTS}


def _reaped(child: int | None) -> tuple[int | None, bool]:
    """The child if it still runs, and whether it gave up, saying why."""
    if child is None:
        return None, False
    try:
        ended, status = os.waitpid(child, os.WNOHANG)
    except ChildProcessError:
        return None, False
    if not ended:
        return child, False
    return None, os.waitstatus_to_exitcode(status) > 0


def _open_lock(data_dir: Path) -> int:
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.open(data_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _say(text: str) -> None:
    # Its stderr is the server's; where that is gone, there is nobody to tell.
    with suppress(OSError):
        print(f"heyvm keeper: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
