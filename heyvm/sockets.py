"""The unix sockets through which nginx reaches proxy endpoints, with API_HOSTNAME.

`<ports>/public/<subdomain>.sock` or `private/`; in `paused/`, where nobody looks, that of a sandbox
that is halted. What bears its final name is listened on: it is made in `paused/`, as `.sock.new`,
handed to the agent, and only then renamed. Whoever makes one holds the lock of the sandbox.
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from heyvm import guest, locks
from heyvm.backends.base import Backend
from heyvm.directories import demand_safe
from heyvm.errors import BackendFailed, HeyvmError, Misconfigured, NotFound
from heyvm.models import UP, Endpoint, Sandbox, Status
from heyvm.registry import Registry
from heyvm.settings import Settings

PUBLIC, PRIVATE, PAUSED = "public", "private", "paused"
PLACES = (PUBLIC, PRIVATE, PAUSED)
SUFFIX, NEW = ".sock", ".sock.new"
MAX_PATH_BYTES = 107  # sun_path, unix(7)
SUBDOMAIN_BYTES = 16
NOWHERE: frozenset[tuple[str, str]] = frozenset()
CONNECT_TIMEOUT_S = 2.0
CUT_TIMEOUT_S = 3.0
FROZEN_TIMEOUT_S = 0.05
LOOKS = 3  # at a row that is changed while its socket is moved
AT_ONCE = 8
FIRST_REST_S, LONGEST_REST_S = 2.0, 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rest:
    """How long a sandbox that could not be mended is let be, and until when."""

    seconds: float
    until: float


class Sockets:
    """Holds nothing that matters. `backend_of` gives the backend of a sandbox."""

    def __init__(
        self, settings: Settings, registry: Registry, backend_of: Callable[[Sandbox], Backend]
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._backend_of = backend_of
        self._on = settings.api_hostname is not None
        self._locks = settings.run_dir / "locks"
        self._rests: dict[str, Rest] = {}

    # -- directories -----------------------------------------------------------------------------

    def open_directories(self) -> None:
        """Make them where missing. `Misconfigured` where nginx could not use them, or somebody else
        could put something else in their place."""
        if not self._on:
            return
        top = self._settings.ports
        longest = top / PRIVATE / ("x" * SUBDOMAIN_BYTES + NEW)
        if len(os.fsencode(longest)) > MAX_PATH_BYTES:
            raise Misconfigured(
                f"{top} is too long for sockets in it: set HEYVM_PORTS_DIR to a shorter path"
            )
        if self._settings.ports_group is not None and top.is_relative_to(self._settings.run_dir):
            raise Misconfigured(
                f"HEYVM_PORTS_GROUP cannot reach {top}, which lies in a directory of the server's"
                " alone: set HEYVM_PORTS_DIR to one outside (/run/heyvm-ports)"
            )
        for path in (top, *(top / place for place in PLACES)):
            self._make(path)

    def _make(self, path: Path) -> None:
        gid = self._settings.ports_group
        mode = 0o700 if gid is None else 0o750
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            demand_safe(path)
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise Misconfigured(f"{path} is not a directory of the server's own")
            if gid is not None and found.st_gid != gid:
                _give_group(path, gid)
            if stat.S_IMODE(found.st_mode) != mode:
                path.chmod(mode)
        except OSError as error:
            raise Misconfigured(
                f"{path} cannot be made: {error.strerror}; set HEYVM_PORTS_DIR to a place where it"
                " can"
            ) from None

    # -- one endpoint ----------------------------------------------------------------------------

    def open(self, sandbox: Sandbox, endpoint: Endpoint) -> None:
        """Have it work when this returns. Raises and leaves nothing where it cannot."""
        if not self._on or endpoint.kind != "proxy":
            return
        new = self._path(PAUSED, endpoint.subdomain, NEW)
        try:
            with self._backend_of(sandbox).listener(new, self._settings.ports_group) as listener:
                self._hand_over(sandbox, endpoint, listener.fileno())
            place = place_of(endpoint)
            os.rename(new, self._path(place, endpoint.subdomain))
            for other in PLACES:
                if other != place:
                    self._unlink(other, endpoint.subdomain)
            self._follow(endpoint)
        except OSError as error:
            self._clear(sandbox, endpoint)
            raise BackendFailed(f"no socket for {endpoint.subdomain!r}: {error}") from None
        except BaseException:
            self._clear(sandbox, endpoint)
            raise

    def _hand_over(self, sandbox: Sandbox, endpoint: Endpoint, listener: int) -> None:
        with self._backend_of(sandbox).connect(sandbox, CONNECT_TIMEOUT_S) as sock:
            guest.listen(sock, endpoint.port, endpoint.subdomain, listener)

    def _clear(self, sandbox: Sandbox, endpoint: Endpoint) -> None:
        self._unlink_all(endpoint.subdomain)
        self._cut(sandbox, endpoint)

    def open_all(self, sandbox: Sandbox) -> None:
        """Those of a sandbox that is about to be said to run."""
        for endpoint in self._endpoints(sandbox.id):
            self.open(sandbox, endpoint)

    def close(self, sandbox: Sandbox, endpoint: Endpoint) -> None:
        """For one whose row is gone: nobody comes in any more, and who is in is cut, by whichever
        way. An agent that does not do so is left with what it has."""
        self._unlink_all(endpoint.subdomain)
        self._cut(sandbox, endpoint)

    def change(self, sandbox: Sandbox, endpoint: Endpoint) -> None:
        """Its row has just become public, or private: so does its socket, and who came in before is
        cut. Between the two it is nowhere: should we die, it is made anew by `mend`."""
        hidden = self._on and self._move(endpoint.subdomain, PAUSED)
        self._cut(sandbox, endpoint, keep=True)
        if hidden:
            self._follow(endpoint)

    def _follow(self, endpoint: Endpoint, *, shown: bool = False) -> None:
        """Move its socket to where its row says, however often that changes meanwhile. `shown`: its
        sandbox goes on, whatever the row still says."""
        for _ in range(LOOKS):
            row = self._registry.endpoint(endpoint.subdomain)
            if row is None:
                self._unlink_all(endpoint.subdomain)
                raise NotFound(f"endpoint {endpoint.subdomain!r} was deleted")
            place = PAUSED if not shown and self._is_paused(row.sandbox_id) else place_of(row)
            if not self._move(row.subdomain, place):
                return

    def _is_paused(self, sandbox_id: str) -> bool:
        sandbox = self._registry.find(sandbox_id)
        return sandbox is not None and sandbox.status is Status.PAUSED

    def _cut(self, sandbox: Sandbox, endpoint: Endpoint, *, keep: bool = False) -> None:
        if sandbox.status not in UP and sandbox.status is not Status.PROVISIONING:
            return
        # A halted agent finds it waiting when it goes on.
        patience = FROZEN_TIMEOUT_S if sandbox.status is Status.PAUSED else CUT_TIMEOUT_S
        with suppress(HeyvmError, OSError):
            with self._backend_of(sandbox).connect(sandbox, CONNECT_TIMEOUT_S) as sock:
                guest.unlisten(sock, endpoint.subdomain, keep=keep, timeout=patience)

    # -- all of a sandbox ------------------------------------------------------------------------

    def hide(self, sandbox: Sandbox) -> None:
        """Before it is halted: who asks for its endpoints is told that nobody is there."""
        for endpoint in self._endpoints(sandbox.id):
            self._move(endpoint.subdomain, PAUSED)

    def show(self, sandbox: Sandbox) -> None:
        """It goes on."""
        for endpoint in self._endpoints(sandbox.id):
            with suppress(NotFound):
                self._follow(endpoint, shown=True)

    def remove_all(self, sandbox_id: str) -> None:
        """Of a sandbox that runs no longer."""
        if not self._on:
            return
        for endpoint in (*self._endpoints(sandbox_id), *self._registry.unready_endpoints()):
            if endpoint.sandbox_id == sandbox_id:
                self._unlink_all(endpoint.subdomain)

    def _endpoints(self, sandbox_id: str | None = None) -> list[Endpoint]:
        if not self._on:
            return []
        return [one for one in self._registry.endpoints(sandbox_id) if one.kind == "proxy"]

    # -- the keeper ------------------------------------------------------------------------------

    def mend(self, running: Sequence[Sandbox]) -> None:
        """Make what is there what the rows say: for the keeper, every few seconds. A sandbox that
        somebody acts on is left to them; one that cannot be mended rests, longer each time."""
        if not self._on:
            return
        # In this order: a row is written before there is anything of its endpoint, so that what
        # was there a moment ago and has no row is nobody's.
        there = self._look()
        rows = self._endpoints()
        known = {one.subdomain for one in (*rows, *self._registry.unready_endpoints())}
        for subdomain in there.keys() - known:
            self._unlink_all(subdomain)
        statuses = {one.id: one.status for one in running}
        wrong = {
            row.sandbox_id
            for row in rows
            if not is_right(row, statuses.get(row.sandbox_id), there.get(row.subdomain, NOWHERE))
        }
        due = [one for one in wrong if self._is_due(one)]
        if due:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(self._mend_patiently, due))

    def _look(self) -> Mapping[str, set[tuple[str, str]]]:
        """Where there is something of which subdomain: (place, suffix)."""
        found: dict[str, set[tuple[str, str]]] = {}
        for place in PLACES:
            try:
                names = os.listdir(self._settings.ports / place)
            except FileNotFoundError:
                self.open_directories()
                continue
            for name in names:
                subdomain, dot, rest = name.partition(".")
                found.setdefault(subdomain, set()).add((place, dot + rest))
        return found

    def _is_due(self, sandbox_id: str) -> bool:
        rest = self._rests.get(sandbox_id)
        return rest is None or time.monotonic() >= rest.until

    def _mend_patiently(self, sandbox_id: str) -> None:
        try:
            self._mend_sandbox(sandbox_id)
            self._rests.pop(sandbox_id, None)
        except (HeyvmError, OSError) as error:
            last = self._rests.get(sandbox_id)
            seconds = min(2 * last.seconds, LONGEST_REST_S) if last else FIRST_REST_S
            self._rests[sandbox_id] = Rest(seconds, time.monotonic() + seconds)
            logger.warning("the endpoints of %s are not as they should be: %s", sandbox_id, error)

    def _mend_sandbox(self, sandbox_id: str) -> None:
        held = locks.try_lock(self._locks, sandbox_id)
        if held is None:
            return
        with held:
            sandbox = self._registry.find(sandbox_id)
            if sandbox is None:
                held.discard()  # its rows went with it: what is left is nobody's
            elif sandbox.status not in UP:
                self.remove_all(sandbox_id)
            else:
                for endpoint in self._endpoints(sandbox_id):
                    self._mend_endpoint(sandbox, endpoint)

    def _mend_endpoint(self, sandbox: Sandbox, endpoint: Endpoint) -> None:
        there = self._look().get(endpoint.subdomain, NOWHERE)
        if is_right(endpoint, sandbox.status, there):
            return
        if sandbox.status is Status.PAUSED:
            self._unlink(PAUSED, endpoint.subdomain, NEW)
            self._move(endpoint.subdomain, PAUSED)
        elif (place_of(endpoint, other=True), SUFFIX) in there:
            self.change(sandbox, endpoint)
        else:
            # In `paused` it lies where a change has died: those who came in before it are still in.
            self._cut(sandbox, endpoint, keep=True)
            self.open(sandbox, endpoint)

    # -- files -----------------------------------------------------------------------------------

    def _path(self, place: str, subdomain: str, suffix: str = SUFFIX) -> Path:
        return self._settings.ports / place / (subdomain + suffix)

    def _move(self, subdomain: str, place: str) -> bool:
        """To this place from the others; whether it was in one of them."""
        moved = False
        for other in PLACES:
            if other != place:
                with suppress(FileNotFoundError):
                    os.rename(self._path(other, subdomain), self._path(place, subdomain))
                    moved = True
        return moved

    def _unlink(self, place: str, subdomain: str, suffix: str = SUFFIX) -> None:
        with suppress(FileNotFoundError):
            self._path(place, subdomain, suffix).unlink()

    def _unlink_all(self, subdomain: str) -> None:
        if self._on:
            for place in PLACES:
                self._unlink(place, subdomain)
            self._unlink(PAUSED, subdomain, NEW)


def place_of(endpoint: Endpoint, *, other: bool = False) -> str:
    """Where its socket lies while its sandbox runs, or must not lie."""
    return PUBLIC if endpoint.is_public is not other else PRIVATE


def is_right(
    endpoint: Endpoint, status: Status | None, there: AbstractSet[tuple[str, str]]
) -> bool:
    """Whether these are the places where something of it is to be found, its sandbox being so."""
    if status is Status.RUNNING:
        return there == {(place_of(endpoint), SUFFIX)}
    if status is Status.PAUSED:  # one that is missing cannot be made: its agent is halted
        return there <= {(PAUSED, SUFFIX)}
    return not there


def _give_group(path: Path, gid: int) -> None:
    try:
        os.chown(path, -1, gid)
    except OSError as error:
        raise Misconfigured(
            f"{path} cannot be given to the group {gid} of HEYVM_PORTS_GROUP: {error.strerror};"
            " name one that the server's user is in (usermod -aG), or run the server as root"
        ) from None
