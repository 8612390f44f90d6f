"""What changes a sandbox: create, start, stop, restart, force-stop, update, delete, expiry, visits.

Whoever changes one holds its lock, moves its row to a passing state, acts, and settles the row.
Knows no HTTP and no SQL.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from heyvm import guest, journal, locks, metrics, slugs
from heyvm.backends.base import Backend
from heyvm.directories import demand_safe, make_private
from heyvm.errors import (
    Conflict,
    HeyvmError,
    HookFailed,
    ImageMissing,
    Invalid,
    NotFound,
    StorageFull,
    Unavailable,
    not_running,
)
from heyvm.locks import SandboxLock
from heyvm.models import (
    UP,
    CreateSpec,
    ExecResult,
    Image,
    ImageConfig,
    Limits,
    Page,
    Sandbox,
    Status,
)
from heyvm.registry import (
    DELETED,
    HOST_IMAGE,
    BaseTaken,
    Entry,
    IdempotencyKey,
    IdTaken,
    ImageGone,
    Registry,
)
from heyvm.settings import Settings
from heyvm.sockets import Sockets

Connect = Callable[[], socket.socket]

DEFAULT_DIRECTORY = "/workspace"
STOP_GRACE_S = 10.0
TURN_PATIENCE_S = 30.0
LAST_TURN_PATIENCE_S = 20.0  # after what was under way has been cut short
FIRST_LOOK_S = 0.01
LONGEST_LOOK_S = 0.1
LONGEST_TTL_S = 100 * 366 * 86_400  # beyond it, expires_at would leave the years that RFC 3339 has
DRAWS = 100
HOOK_OUTPUT_BYTES = 4 * 1024 * 1024
HOOK_TAIL_LINES = 20
MESSAGE_CHARS = 4096
GIB = 1 << 30
# Cores and bytes; what heyvm's clients call them. `xlarge` is ours: theirs is not published.
SIZE_CLASSES: Mapping[str, tuple[float, int]] = {
    "micro": (0.25, GIB // 2),
    "mini": (0.5, GIB),
    "small": (1, 2 * GIB),
    "medium": (2, 4 * GIB),
    "large": (4, 8 * GIB),
    "xlarge": (8, 16 * GIB),
}
IMAGE_TRIES = 5
SETTLED = frozenset({Status.RUNNING, Status.STOPPED, Status.FAILED, Status.PAUSED})
# Refusals to begin at all: a create that ends so, before there is a box, leaves no row.
REFUSALS = (Invalid, Unavailable)
REBOOTED = "the machine was restarted"
LEFT_STARTING = (
    "the server was restarted, or failed, while the sandbox was being started: start it again"
)

log = logging.getLogger(__name__)


class Images(Protocol):
    """What is asked of the image store; see images.py."""

    def find(self, name: str) -> Image | None: ...

    def known(self, name: str) -> bool: ...

    def ensure(self, name: str, tell: Callable[[str], None]) -> Image: ...


class Lifecycle:
    """The lifecycle of every sandbox in `registry`. Safe from any number of threads, greenlets and
    processes; holds nothing that another process would need. `sync_ports` has the keeper open and
    close the local ports of a sandbox now; without it, the keeper does so when it sees the rows."""

    def __init__(
        self,
        registry: Registry,
        backends: Mapping[str, Backend],
        settings: Settings,
        images: Images | None = None,
        sync_ports: Callable[[str], None] | None = None,
    ) -> None:
        self.registry = registry
        self.backends = backends
        self.settings = settings
        self.sockets = Sockets(settings, registry, self.backend_of)
        self._images = images
        self._sync_ports = sync_ports
        self._locks = settings.run_dir / "locks"
        self._admission = threading.Lock()

    # -- looking ---------------------------------------------------------------------------------

    def get(self, ref: str) -> Sandbox:
        """The sandbox of this id or slug; `NotFound` says when and why one went."""
        sandbox = self.registry.get(ref)
        journal.about(sandbox.id, sandbox.slug)
        return sandbox

    def counts(self) -> Mapping[Status, int]:
        """How many sandboxes there are in each state."""
        return self.registry.counts()

    def list(
        self,
        statuses: frozenset[Status],
        name: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Page:
        """See `Registry.page`."""
        return self.registry.page(statuses, name=name, limit=limit, cursor=cursor)

    def wait(self, ref: str, status: str, timeout: float) -> Sandbox:
        """The record once it has this status, has failed, or `timeout` seconds are over."""
        if status not in set(Status):
            raise Invalid(f"{status!r} is not a status", errors={"wait": [_one_of(Status)]})
        deadline = time.monotonic() + timeout
        pause = FIRST_LOOK_S
        sandbox = self.get(ref)
        while sandbox.status not in (status, Status.FAILED) and time.monotonic() < deadline:
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(pause * 1.5, LONGEST_LOOK_S)
            sandbox = self.get(sandbox.id)
        return sandbox

    def uptime(self, sandbox: Sandbox) -> float:
        """Seconds since it began to run; 0 while it does not."""
        if sandbox.status not in UP or sandbox.started_at is None:
            return 0.0
        return max(0.0, self.registry.clock.wall() - sandbox.started_at)

    def backend_of(self, sandbox: Sandbox) -> Backend:
        """The backend that it was made with, or `Unavailable`."""
        backend = self.backends.get(sandbox.backend_type)
        if backend is None:
            raise Unavailable(
                f"sandbox {sandbox.slug!r} was made with backend {sandbox.backend_type!r},"
                " which this server does not have",
                sandbox_id=sandbox.id,
            )
        return backend

    def open(self) -> None:
        """Open the registry now. `Misconfigured` where this server may not use it, or what it
        would write could be somebody else's."""
        make_private(self.settings.data_dir)
        self.registry.open()
        self.registry.agree(self.settings.run_dir)
        make_private(self.settings.run_dir)
        demand_safe(self.settings.run_dir)
        self.sockets.open_directories()

    # -- create ----------------------------------------------------------------------------------

    def create(
        self,
        spec: CreateSpec,
        *,
        idempotency_key: str | None = None,
        body_hash: str = "",
        wait: bool = True,
    ) -> tuple[Sandbox, bool]:
        """Make a sandbox; running once this returns, or provisioning where `wait` is False.

        True, and the sandbox of before, where the key was used already (whatever became of it; one
        that is still being made is waited for). Where a start or a hook failed the row stays, and
        the error carries its id.
        """
        key = IdempotencyKey(idempotency_key, body_hash) if idempotency_key is not None else None
        earlier = self.registry.replay(key) if key is not None else None
        if earlier is not None:
            return self._settled(earlier, wait), True
        sandbox, held = self._admit(spec, key)
        if held is None:
            return self._settled(sandbox.id, wait), True
        log.debug("create %s (%s)", sandbox.id, sandbox.slug)
        journal.about(sandbox.id, sandbox.slug)
        _say("created", sandbox)
        or_host = spec.backend_type is None and not self.settings.strict_images
        if wait:
            return self._provision(sandbox, held, or_host), False
        work = journal.carried(partial(self._provision_unseen, sandbox, held, or_host))
        threading.Thread(target=work, daemon=True).start()
        return sandbox, False

    def _settled(self, sandbox_id: str, wait: bool) -> Sandbox:
        """What a first request with the same key has made, or is making."""
        pause = FIRST_LOOK_S
        sandbox = self.get(sandbox_id)
        while wait and sandbox.status is Status.PROVISIONING:
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_LOOK_S)
            sandbox = self.get(sandbox_id)
        return sandbox

    def _draft(self, spec: CreateSpec) -> Sandbox:
        """The sandbox as asked for, all but its id; or `Invalid`."""
        backend = self._choose_backend(spec.backend_type)
        limits = limits_of(spec, self.settings)
        image = self._image_here(self._image_name(spec.image, spec.sandbox_type))
        for mount in spec.mounts:
            backend.check_mount(mount)
        offer = backend.check_spec(replace(spec, **vars(limits)))
        config, complaints = _config(image, offer.ids)
        now = self.registry.clock.wall()
        return Sandbox(
            id="",
            name=_name(spec.name),
            slug=_given_slug(spec.slug),
            status=Status.PROVISIONING,
            status_changed_at=now,
            created_at=now,
            backend_type=backend.name,
            image_resolved=image.digest if image else "",
            image_config=config,
            sandbox_type=spec.sandbox_type,
            image=spec.image,
            ttl_seconds=_ttl(spec.ttl_seconds),
            start_command=spec.start_command or None,
            working_directory=_directory(spec.working_directory, image),
            open_ports=spec.open_ports,
            env_vars=spec.env_vars,
            setup_hooks=spec.setup_hooks,
            mounts=spec.mounts,
            warnings=(*offer.warnings, *complaints, *_warnings(spec)),
            metadata=spec.metadata,
            network=offer.network,
            limits=limits,
            size_class=spec.size_class,
            ids=offer.ids,
        )

    def _choose_backend(self, name: str | None) -> Backend:
        if name is None:
            return next(iter(self.backends.values()))
        backend = self.backends.get(name)
        if backend is None:
            raise self._no_such_backend(f"there is no backend {name!r} on this server")
        try:
            backend.check()
        except Unavailable as missing:
            detail = f"backend {name!r} is not available: {missing.detail}"
            raise self._no_such_backend(detail) from missing
        return backend

    def _no_such_backend(self, detail: str) -> Invalid:
        there = [name for name, backend in self.backends.items() if _is_available(backend)]
        complaint = f"{detail}; available: {', '.join(there) or 'none'}"
        return Invalid(complaint, errors={"backend_type": [complaint]})

    # -- images ----------------------------------------------------------------------------------

    def _image_name(self, image: str | None, sandbox_type: str) -> str:
        return image or self.settings.images.get(sandbox_type, HOST_IMAGE)

    def _image_here(self, name: str) -> Image | None:
        """The image of this name if this server has it; `Invalid` where it cannot be a name."""
        if name == HOST_IMAGE:
            return Image(HOST_IMAGE, (HOST_IMAGE,), 0, 0.0)
        if self._images is not None:
            return self._images.find(name)
        complaint = f"image {name!r} is not on this server; available: {HOST_IMAGE}"
        raise Invalid(complaint, errors={"image": [complaint]})

    def _with_image(self, sandbox: Sandbox, or_host: bool) -> Sandbox:
        """The sandbox with its image, which is fetched where it is not here yet.

        `or_host`: one that this server never had, and that cannot be had, gives way to `host`.
        """
        assert self._images is not None
        name = self._image_name(sandbox.image, sandbox.sandbox_type)
        tell = partial(self._tell, sandbox)
        for _ in range(IMAGE_TRIES):
            try:
                image = self._images.ensure(name, tell)
            except ImageMissing as missing:
                if not or_host or self._images.known(name):
                    raise
                warning = f"it runs on 'host', as image {name!r} cannot be had: {missing.detail}"
                return self.registry.resolve(sandbox.id, partial(_on_host, warning=warning))
            with suppress(ImageGone):
                return self.registry.resolve(sandbox.id, partial(_on_image, image=image))
        raise Unavailable(f"image {name!r} is removed as often as it is fetched: try again")

    def _tell(self, sandbox: Sandbox, text: str) -> None:
        if not self.registry.detail(sandbox.id, text):
            raise self._interrupted(sandbox)

    def _admit(
        self, spec: CreateSpec, key: IdempotencyKey | None
    ) -> tuple[Sandbox, SandboxLock | None]:
        """Write the row. Its lock comes with it, unless `key` was used meanwhile."""
        draft = self._draft(spec)
        for _ in range(DRAWS):
            sandbox_id = f"sb-{secrets.token_hex(4)}"
            # Held before the row can be seen: the keeper settles each passing row that nobody
            # holds.
            held = self._try_lock(sandbox_id)
            if held is None:
                continue
            try:
                sandbox, replayed = self._add(draft, sandbox_id, key)
            except IdTaken:
                held.release()
                continue
            except BaseTaken:
                held.discard()  # no sandbox has this id
                continue
            except ImageGone:
                held.discard()
                draft = self._draft(spec)
                continue
            except HeyvmError:
                held.discard()
                raise
            if not replayed:
                return sandbox, held
            held.discard()
            return sandbox, None
        raise Unavailable("no free id was found: try again")

    def _add(
        self, draft: Sandbox, sandbox_id: str, key: IdempotencyKey | None
    ) -> tuple[Sandbox, bool]:
        backend = self.backends[draft.backend_type]
        # One at a time, or all that come at once would be given the same range.
        with self._admission:
            sandbox = replace(
                draft,
                id=sandbox_id,
                name=draft.name or sandbox_id,
                id_base=backend.allocate(self.registry.id_bases()),
            )
            return self.registry.add(sandbox, limit=self.settings.max_sandboxes, key=key)

    def _provision(
        self, sandbox: Sandbox, held: SandboxLock, or_host: bool, *, seen: bool = True
    ) -> Sandbox:
        """`seen`: somebody waits for the answer, and need not find a row to learn of a refusal."""
        note = _Note(partial(self.registry.record, sandbox.id))
        with held, metrics.here().timed("create"):
            try:
                return self._bring_up(sandbox, note, hooks=sandbox.setup_hooks, or_host=or_host)
            except HeyvmError as error:
                if seen and isinstance(error, REFUSALS) and not note.written:
                    self._unmake(sandbox, held)
                else:
                    self._break(sandbox, error)
                raise

    def _provision_unseen(self, sandbox: Sandbox, held: SandboxLock, or_host: bool) -> None:
        try:
            self._provision(sandbox, held, or_host, seen=False)
        except HeyvmError as error:
            log.debug("create %s failed: %s", sandbox.id, error.detail)

    def _unmake(self, sandbox: Sandbox, held: SandboxLock) -> None:
        self.backend_of(sandbox).destroy(sandbox)
        self.registry.remove(sandbox.id)
        held.discard()
        _say("refused", sandbox)

    # -- start and stop --------------------------------------------------------------------------

    def start(self, ref: str) -> Sandbox:
        """Running once this returns; a running one stays as it is, a paused one goes on."""
        with self.turn(ref) as sandbox:
            if not self._is_up(sandbox):
                return self._start(sandbox)
            return self._resume(sandbox) if sandbox.status is Status.PAUSED else sandbox

    def pause(self, ref: str) -> Sandbox:
        """Halt every process of it where it stands. Its time to live goes on."""
        with self.turn(ref) as sandbox:
            if sandbox.status is Status.PAUSED:
                return sandbox
            if sandbox.status is not Status.RUNNING:
                raise not_running(sandbox.slug, sandbox.status)
            # The row first: of the two things that a death in between can leave, a sandbox that is
            # said to be paused and runs is mended by resume; one that hangs explains nothing.
            paused = self._settled_paused(sandbox, True)
            try:
                self.sockets.hide(sandbox)
                self.backend_of(sandbox).pause(sandbox)
            except HeyvmError:
                self.sockets.show(sandbox)
                self._settled_paused(sandbox, False)
                raise
            _say("paused", sandbox)
            return paused

    def resume(self, ref: str) -> Sandbox:
        """Let a paused one go on; a running one stays as it is."""
        with self.turn(ref) as sandbox:
            if sandbox.status is Status.RUNNING:
                return sandbox
            if sandbox.status is not Status.PAUSED:
                raise Conflict(f"sandbox {sandbox.slug!r} is {sandbox.status}: it is not paused")
            return self._resume(sandbox)

    def _resume(self, sandbox: Sandbox) -> Sandbox:
        self.backend_of(sandbox).resume(sandbox)
        self.sockets.show(sandbox)
        resumed = self._settled_paused(sandbox, False)
        _say("resumed", sandbox)
        return resumed

    def _settled_paused(self, sandbox: Sandbox, paused: bool) -> Sandbox:
        settled = self.registry.settle_paused(sandbox.id, paused)
        if settled is None:
            raise self._interrupted(sandbox)
        return settled

    def stop(self, ref: str) -> Sandbox:
        """Ask its processes to end, kill what is left after 10 s. Files stay."""
        with self.turn(ref) as sandbox:
            return self._stop(sandbox, STOP_GRACE_S)

    def restart(self, ref: str) -> Sandbox:
        """Stop, then start, with nobody in between."""
        with self.turn(ref) as sandbox:
            return self._start(self._stop(sandbox, STOP_GRACE_S))

    def force_stop(self, ref: str) -> Sandbox:
        """Kill its processes now, and cut short whatever is being done with it."""
        entry = self.registry.entry(self.get(ref).id)
        if entry.sandbox.status is Status.STOPPED and entry.wanted is None:
            self._end_visit(entry)
            return entry.sandbox
        log.debug("force-stop %s", entry.sandbox.id)
        wanted = partial(self.registry.want, entry.sandbox.id, "stopped")
        with self._last_turn(entry.sandbox, wanted) as held:
            entry = self._entry(entry.sandbox.id, held)
            if entry.wanted is None and entry.sandbox.status is Status.STOPPED:
                return entry.sandbox
            # Once more: somebody may have finished this stop, and somebody else started it since.
            entry = wanted()
            self._end_visit(entry)
            return self._end(entry.sandbox, grace=0)

    def _start(self, sandbox: Sandbox) -> Sandbox:
        log.debug("start %s", sandbox.id)
        backend = self.backend_of(sandbox)
        claimed = self._claimed(sandbox, Status.PROVISIONING)
        note = _Note(partial(self.registry.record, sandbox.id))
        try:
            if sandbox.status is not Status.STOPPED:
                backend.stop(sandbox, grace=0)
            if any(mount.pending for mount in claimed.mounts):
                claimed = self.registry.amend(sandbox.id, _with_mounts_in_effect)
            # One that never had its image never came as far as its hooks.
            hooks = () if claimed.image_resolved else claimed.setup_hooks
            return self._bring_up(claimed, note, hooks)
        except HeyvmError as error:
            self._break(sandbox, error)
            raise

    def _stop(self, sandbox: Sandbox, grace: float) -> Sandbox:
        if sandbox.status is Status.STOPPED:
            return sandbox
        log.debug("stop %s", sandbox.id)
        claimed = self._claimed(sandbox, Status.STOPPING)
        if sandbox.status is Status.PAUSED:
            self.backend_of(sandbox).resume(sandbox)
        return self._end(claimed, grace=grace)

    def _stop_box(self, sandbox: Sandbox, *, grace: float) -> None:
        """Nothing of it runs when this returns, and nothing leads to it."""
        self.backend_of(sandbox).stop(sandbox, grace=grace)
        self.sockets.remove_all(sandbox.id)

    def _end(self, sandbox: Sandbox, *, grace: float) -> Sandbox:
        self._stop_box(sandbox, grace=grace)
        settled = self.registry.settle_stopped(sandbox.id)
        if settled is None:
            raise self._interrupted(sandbox)
        _say("stopped", settled)
        return settled

    def _bring_up(
        self, sandbox: Sandbox, note: _Note, hooks: Sequence[str] = (), *, or_host: bool = False
    ) -> Sandbox:
        backend = self.backend_of(sandbox)
        if not sandbox.image_resolved:
            sandbox = self._with_image(sandbox, or_host)
        environment = guest.base_environment(sandbox)
        with backend.start(sandbox, note) as first:
            guest.go(first, environment, sandbox.working_directory, visit=False)
        up = replace(sandbox, state=note.state)
        self.sockets.open_all(up)
        for number, hook in enumerate(hooks, start=1):
            self._run_hook(up, number, hook)
        self._run_start_command(up)
        without_port = len(sandbox.open_ports) > len(sandbox.port_mappings)
        if without_port:
            self._sync(sandbox.id)
        settled = self.registry.settle_running(sandbox.id)
        if settled is None:
            raise self._interrupted(sandbox)
        _say("started", settled)
        return settled

    def _sync(self, sandbox_id: str) -> None:
        """Have its local ports opened and closed now. Without a keeper the next one does it, and
        the record says which ports there are."""
        if self._sync_ports is not None:
            with suppress(Unavailable):
                self._sync_ports(sandbox_id)

    def _run_start_command(self, sandbox: Sandbox) -> None:
        if sandbox.start_command or sandbox.image_config.command:
            self._tell_start_command(sandbox)

    def _tell_start_command(self, sandbox: Sandbox) -> None:
        """Its own, or its image's where it has none."""
        command = sandbox.start_command or ""
        with self.backend_of(sandbox).connect(sandbox) as connection:
            guest.start_command(
                connection,
                command,
                sandbox.working_directory,
                guest.base_environment(sandbox),
                argv=() if command else sandbox.image_config.command,
                user=sandbox.image_config.user,
            )

    def _run_hook(self, sandbox: Sandbox, number: int, hook: str) -> None:
        log.debug("setup hook %d of %s", number, sandbox.id)
        self._tell(sandbox, f"setup hook {number} of {len(sandbox.setup_hooks)}")
        with self.backend_of(sandbox).connect(sandbox) as connection:
            result = guest.execute(
                connection,
                argv=["/bin/sh", "-c", hook],
                env=guest.base_environment(sandbox),
                cwd=sandbox.working_directory,
                max_output_bytes=HOOK_OUTPUT_BYTES,
                log="hook",
            )
        if result.exit_code != 0:
            raise HookFailed(
                f"setup hook {number} of {len(sandbox.setup_hooks)} ended with exit code"
                f" {result.exit_code}{_tail(result)}",
                errors={"setup_hooks": [f"hook {number}: exit code {result.exit_code}"]},
                sandbox_id=sandbox.id,
            )

    def _is_up(self, sandbox: Sandbox) -> bool:
        return sandbox.status in UP and self.backend_of(sandbox).poll(sandbox) is None

    def _claimed(self, sandbox: Sandbox, become: Status) -> Sandbox:
        # Who holds the lock may take it from any state: a force-stop may just have moved it on.
        claimed = self.registry.claim(sandbox.id, expect=frozenset(Status), become=become)
        if claimed is None:
            raise self._interrupted(sandbox)
        return claimed

    def _break(self, sandbox: Sandbox, error: HeyvmError) -> None:
        """A start failed: leave nothing of it running, and say why in the row."""
        last = self.registry.entry(sandbox.id).sandbox
        # What it refuses to say now, the keeper asks again: the row still says what it is.
        with suppress(HeyvmError):
            self.backend_of(last).stop(last, grace=0)
        self.sockets.remove_all(last.id)
        if self.registry.settle_failed(sandbox.id, error.detail[:MESSAGE_CHARS]) is None:
            raise self._interrupted(sandbox) from error
        if isinstance(error, HookFailed):
            self.registry.amend(sandbox.id, _with_hooks_undone)
        # Its class alone: a hook's last words stand in the detail.
        _say("failed", sandbox, why=type(error).__name__)
        error.sandbox_id = sandbox.id

    def _interrupted(self, sandbox: Sandbox) -> HeyvmError:
        try:
            wanted = self.registry.entry(sandbox.id).wanted
        except NotFound as gone:
            return gone
        what = "stopped" if wanted in (None, "stopped") else "deleted"
        return Conflict(f"sandbox {sandbox.slug!r} was {what} meanwhile", sandbox_id=sandbox.id)

    # -- update ----------------------------------------------------------------------------------

    def update(self, ref: str, changes: Mapping[str, object]) -> Sandbox:
        """Replace each field in `changes`; a new start command replaces the running one now."""
        sandbox = self.get(ref)
        change = _amender(changes)
        renew = "ttl_seconds" in changes
        if "start_command" not in changes:
            # Without the lock: a time to live is renewed while a hook or an upload takes its hours.
            amended = self.registry.amend(sandbox.id, change, renew=renew)
        else:
            with self.turn(sandbox.id):
                amended = self.registry.amend(sandbox.id, change, renew=renew)
                if amended.status is Status.RUNNING:
                    self._tell_start_command(amended)
        if "open_ports" not in changes:
            return amended
        self._sync(sandbox.id)
        return self.get(sandbox.id)

    # -- delete ----------------------------------------------------------------------------------

    def delete(self, ref: str, reason: str = DELETED) -> None:
        """Remove it with its files, from every state, cutting short whatever is being done."""
        sandbox = self.get(ref)
        log.debug("delete %s", sandbox.id)

        def wanted() -> Entry:
            try:
                return self.registry.want(sandbox.id, "deleted", reason=reason)
            except StorageFull:
                # Not a byte can be written: what frees the disk comes first.
                return self.registry.entry(sandbox.id)

        with self._last_turn(sandbox, wanted) as held:
            try:
                self._bury(wanted(), held)
            except NotFound:
                # The keeper, or another who deletes it, was quicker.
                held.discard()

    def _bury(self, entry: Entry, held: SandboxLock) -> None:
        self._end_visit(entry)
        endpoints = self.registry.endpoints(entry.sandbox.id)
        self.backend_of(entry.sandbox).destroy(entry.sandbox)
        self.sockets.remove_all(entry.sandbox.id)
        self.registry.bury(entry.sandbox.id)
        held.discard()
        _say("expired" if entry.wanted == "expired" else "deleted", entry.sandbox)
        if endpoints:
            self._sync(entry.sandbox.id)

    # -- visits ----------------------------------------------------------------------------------

    @contextmanager
    def visit(self, ref: str) -> Iterator[Connect]:
        """Connections to an agent that sees its files, whether it runs or not.

        One that does not run is given a box for as long as the context lasts, and stays as it is.
        """
        sandbox = self.get(ref)
        if sandbox.status is not Status.RUNNING:
            with self.turn(sandbox.id) as sandbox:
                if sandbox.status is not Status.RUNNING:
                    _demand_visitable(sandbox)
                    with self._box_for_visit(sandbox) as visited:
                        yield partial(self.backend_of(visited).connect, visited)
                    return
        yield partial(self.backend_of(sandbox).connect, sandbox)

    @contextmanager
    def _box_for_visit(self, sandbox: Sandbox) -> Iterator[Sandbox]:
        backend = self.backend_of(sandbox)
        note = _Note(partial(self.registry.record_visit, sandbox.id))
        environment = guest.base_environment(sandbox)
        try:
            with backend.start(sandbox, note, visit=True) as first:
                guest.go(first, environment, sandbox.working_directory, visit=True)
                yield replace(sandbox, state=note.state)
        finally:
            if note.written:
                backend.stop(replace(sandbox, state=note.state), grace=0)
                self.registry.record_visit(sandbox.id, None)

    def _end_visit(self, entry: Entry) -> None:
        if entry.visit is not None:
            box = replace(entry.sandbox, state=entry.visit)
            self.backend_of(box).stop(box, grace=0)

    # -- the keeper's part -----------------------------------------------------------------------

    def expire_due(self) -> Sequence[str]:
        """Mark the sandboxes whose time is over: nobody can renew them any more. Their ids."""
        return self.registry.expire_due()

    def attend(self, sandbox_id: str) -> bool:
        """Finish what a holder that died, or an expiry, left to do; False while somebody acts.

        Whoever acts on one whose end is wanted finds its box killed.
        """
        held = self._try_lock(sandbox_id)
        if held is None:
            self._hurry(sandbox_id)
            return False
        with held:
            try:
                entry = self.registry.entry(sandbox_id)
            except NotFound:
                held.discard()
                return True
            if entry.wanted in ("deleted", "expired"):
                self._cut_short(entry)
                self._bury(entry, held)
            else:
                self._settle_left(entry)
            return True

    @contextmanager
    def hold(self, sandbox_id: str) -> Iterator[Sandbox | None]:
        """A sandbox that nobody acts on, locked meanwhile; None where somebody does, or it went."""
        held = self._try_lock(sandbox_id)
        if held is None:
            yield None
            return
        with held:
            sandbox = self.registry.find(sandbox_id)
            if sandbox is None:
                held.discard()
            yield sandbox

    def _hurry(self, sandbox_id: str) -> None:
        with suppress(NotFound):
            entry = self.registry.entry(sandbox_id)
            if entry.wanted is not None:
                self._cut_short(entry)

    def is_left_still(self, entry: Entry) -> bool:
        """Whether it is halted though its row says that it runs."""
        sandbox = entry.sandbox
        return sandbox.status is Status.RUNNING and self.backend_of(sandbox).is_paused(sandbox)

    def wake(self, sandbox_id: str) -> bool:
        """Let one go on that is halted though its row says that it runs: whoever halted it, for a
        backup or on the way to `paused`, held its lock, and has died. False while somebody acts."""
        held = self._try_lock(sandbox_id)
        if held is None:
            return False
        with held:
            entry = self.registry.entry(sandbox_id)
            if entry.wanted is None and self.is_left_still(entry):
                self.backend_of(entry.sandbox).resume(entry.sandbox)
            return True

    def ending_of(self, entry: Entry) -> str | None:
        """None while a running sandbox runs, else the reason why it does not."""
        if entry.boot_id != self.registry.clock.boot_id:
            return REBOOTED
        return self.backend_of(entry.sandbox).poll(entry.sandbox)

    def _settle_left(self, entry: Entry) -> None:
        """Make the row say what is, where its last holder could not."""
        sandbox = entry.sandbox
        if entry.visit is not None:
            self._end_visit(entry)
            self.registry.record_visit(sandbox.id, None)
        if entry.wanted == "stopped":
            self._end(sandbox, grace=0)
        elif sandbox.status is Status.STOPPING:
            self._end(sandbox, grace=STOP_GRACE_S)
        elif sandbox.status is Status.PROVISIONING:
            self._stop_box(sandbox, grace=0)
            self.registry.settle_failed(sandbox.id, LEFT_STARTING)
            _say("failed", sandbox, why="left starting")
        elif sandbox.status in UP:
            self._settle_ended(entry)

    def _settle_ended(self, entry: Entry) -> None:
        sandbox = entry.sandbox
        reason = self.ending_of(entry)
        if reason is None:
            return
        self._stop_box(sandbox, grace=0)
        if reason == REBOOTED:
            self.registry.settle_stopped(sandbox.id, message=REBOOTED)
            _say("stopped", sandbox, why="rebooted")
        else:
            self.registry.settle_failed(sandbox.id, reason[:MESSAGE_CHARS])
            _say("failed", sandbox, why=reason[:MESSAGE_CHARS])

    # -- turns -----------------------------------------------------------------------------------

    @contextmanager
    def turn(self, ref: str) -> Iterator[Sandbox]:
        """The sandbox's lock, and its row as it is now: in a settled state, no end wanted."""
        held, sandbox = self._take_turn(ref)
        with held:
            yield sandbox

    def _take_turn(self, ref: str) -> tuple[SandboxLock, Sandbox]:
        sandbox = self.get(ref)
        deadline = time.monotonic() + TURN_PATIENCE_S
        while True:
            held = self._lock(sandbox, patience=deadline - time.monotonic())
            try:
                ready = self._ready(sandbox.id, held)
            except BaseException:
                held.release()
                raise
            if ready is not None:
                return held, ready
            # A force-stop is about to take the lock: let it.
            held.release()
            if time.monotonic() >= deadline:
                raise Unavailable(self._busy(sandbox), retry_after=2, sandbox_id=sandbox.id)
            time.sleep(locks.LONGEST_PAUSE_S)

    def _ready(self, sandbox_id: str, held: SandboxLock) -> Sandbox | None:
        entry = self._entry(sandbox_id, held)
        if entry.wanted == "stopped":
            return None
        if entry.wanted is not None:
            raise Conflict(f"sandbox {entry.sandbox.slug!r} is being deleted")
        if entry.sandbox.status in SETTLED and entry.visit is None:
            return entry.sandbox
        self._settle_left(entry)
        return self._entry(sandbox_id, held).sandbox

    def _entry(self, sandbox_id: str, held: SandboxLock) -> Entry:
        """Its row. Where it is gone, so is the lock's file, which would stay for ever."""
        try:
            return self.registry.entry(sandbox_id)
        except NotFound:
            held.discard()
            raise

    def _last_turn(self, sandbox: Sandbox, wanted: Callable[[], Entry]) -> SandboxLock:
        """The lock for what ends it. Whoever has it is told by `wanted`, and cut short. Where
        nobody has, nobody is told: the keeper could finish it first, in nobody's name."""
        held = self._try_lock(sandbox.id)
        if held is None:
            self._cut_short(wanted())
            held = self._lock(sandbox, patience=LAST_TURN_PATIENCE_S)
        return held

    def _try_lock(self, sandbox_id: str) -> SandboxLock | None:
        self.registry.agree(self.settings.run_dir)
        return locks.try_lock(self._locks, sandbox_id)

    def _lock(self, sandbox: Sandbox, *, patience: float) -> SandboxLock:
        self.registry.agree(self.settings.run_dir)
        busy = partial(self._busy, sandbox)
        return locks.lock(self._locks, sandbox.id, patience=patience, busy=busy)

    def _busy(self, sandbox: Sandbox) -> str:
        now = self.get(sandbox.id).status
        return f"sandbox {sandbox.slug!r} is busy ({now}): try again"

    def _cut_short(self, entry: Entry) -> None:
        # It is said again under the lock, and what fails there is reported.
        with suppress(HeyvmError):
            self._end_visit(entry)
            self.backend_of(entry.sandbox).stop(entry.sandbox, grace=0)


class _Note:
    """What a backend's `start` calls with the state of the box that it made."""

    def __init__(self, write: Callable[[Mapping[str, Any]], bool]) -> None:
        self._write = write
        self.state: Mapping[str, Any] = {}
        self.written = False

    def __call__(self, state: Mapping[str, Any]) -> None:
        if not self._write(state):
            raise Conflict("its end is wanted")
        self.state = state
        self.written = True


def _say(what: str, sandbox: Sandbox, **more: str) -> None:
    journal.event(f"sandbox.{what}", sandbox.id, sandbox.slug, **more)


def limits_of(spec: CreateSpec, settings: Settings) -> Limits:
    """What is asked for, else its size class's, else the server's default; `Invalid` for more than
    the server gives."""
    cpus, memory = SIZE_CLASSES.get(spec.size_class or "", (None, None))
    asked = Limits(
        cpus=spec.cpus or cpus,
        memory=spec.memory or memory,
        pids=spec.pids,
        disk_size_gb=spec.disk_size_gb,
    )
    default, most = vars(settings.default_limits), vars(settings.max_limits)
    errors: dict[str, list[str]] = {}
    chosen: dict[str, Any] = {}
    for name, value in vars(asked).items():
        if value is None:
            given = [one for one in (default[name], most[name]) if one is not None]
            chosen[name] = min(given) if given and name != "disk_size_gb" else default[name]
        else:
            chosen[name] = value
            if most[name] is not None and value > most[name]:
                field = name if getattr(spec, name) else "size_class"
                errors[field] = [f"{name} is at most {most[name]} on this server, not {value}"]
    if errors:
        raise Invalid("; ".join(one[0] for one in errors.values()), errors=errors)
    return Limits(**chosen)


def _directory(asked: str | None, image: Image | None) -> str:
    return asked or (image and image.config.working_directory) or DEFAULT_DIRECTORY


def _config(image: Image | None, ids: str) -> tuple[ImageConfig, tuple[str, ...]]:
    """What of the image's wishes can be met, and what is said of the rest."""
    if image is None:
        return ImageConfig(), ()
    user = image.config.user
    if ids != "single" or user.split(":")[0] in ("", "0", "root"):
        return image.config, ()
    warning = (
        f"commands run as root: the image's user {user!r} needs a server with more than one id"
    )
    return replace(image.config, user=""), (warning,)


def _on_image(sandbox: Sandbox, image: Image) -> Sandbox:
    config, complaints = _config(image, sandbox.ids)
    # Its own, or the default that stood in for the image's until that was known.
    asked = sandbox.working_directory
    directory = None if asked == DEFAULT_DIRECTORY else asked
    return replace(
        sandbox,
        image_resolved=image.digest,
        image_config=config,
        warnings=(*sandbox.warnings, *complaints),
        working_directory=_directory(directory, image),
    )


def _on_host(sandbox: Sandbox, warning: str) -> Sandbox:
    return replace(sandbox, image_resolved=HOST_IMAGE, warnings=(*sandbox.warnings, warning))


def _demand_visitable(sandbox: Sandbox) -> None:
    if sandbox.status is Status.PAUSED:
        raise not_running(sandbox.slug, sandbox.status)
    if not sandbox.image_resolved:
        raise Conflict(f"sandbox {sandbox.slug!r} has no files: its image never came; start it")


def _name(name: str | None) -> str:
    """The name as asked for; empty where there is none."""
    if name is None or not name.strip():
        return ""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        complaint = "the name is not Unicode text (it holds a lone surrogate)"
        raise Invalid(complaint, errors={"name": [complaint]}) from error
    return name


def _given_slug(slug: str | None) -> str:
    if slug is None:
        return ""
    if not slugs.is_slug(slug) or slugs.is_id(slug):
        why = "that is the form of an id" if slugs.is_id(slug) else f"it must be {slugs.RULE}"
        complaint = f"slug {slug!r} cannot be: {why}"
        raise Invalid(complaint, errors={"slug": [complaint]})
    if slug in slugs.ROUTE_WORDS:
        raise Conflict(f"the slug {slug!r} is a word of the API's own: choose another")
    return slug


def _ttl(seconds: object) -> int | None:
    """None for no end; 0 means that too."""
    if seconds is None or seconds == 0:
        return None
    if not isinstance(seconds, int) or isinstance(seconds, bool) or seconds < 0:
        complaint = "ttl_seconds must be a whole number of seconds, or 0 or null for no end"
        raise Invalid(complaint, errors={"ttl_seconds": [complaint]})
    if seconds > LONGEST_TTL_S:
        complaint = f"ttl_seconds is at most {LONGEST_TTL_S}; 0 or null for no end"
        raise Invalid(complaint, errors={"ttl_seconds": [complaint]})
    return seconds


def _warnings(spec: CreateSpec) -> Iterator[str]:
    for name in spec.unknown_fields:
        yield f"unknown field {name!r} was ignored"


def _with_hooks_undone(sandbox: Sandbox) -> Sandbox:
    """Told for ever: a start does not run them again, and makes it look sound."""
    warning = "a setup hook failed at create: it and those after it are not run again by a start"
    return replace(sandbox, warnings=(*sandbox.warnings, warning))


def _with_mounts_in_effect(sandbox: Sandbox) -> Sandbox:
    return replace(sandbox, mounts=tuple(replace(one, pending=False) for one in sandbox.mounts))


def _amender(changes: Mapping[str, object]) -> Callable[[Sandbox], Sandbox]:
    """A function that puts `changes` into a sandbox; `Invalid` where they cannot be."""
    fields: dict[str, Any] = dict(changes)
    if "ttl_seconds" in fields:
        fields["ttl_seconds"] = _ttl(fields["ttl_seconds"])
    if "start_command" in fields:
        fields["start_command"] = fields["start_command"] or None
    if "open_ports" in fields:
        fields["open_ports"] = tuple(fields["open_ports"] or ())
    for name in ("env_vars", "metadata"):
        if name in fields:
            fields[name] = fields[name] or {}
    if "name" in fields and not _name(fields["name"]):
        raise Invalid("the name is empty", errors={"name": ["it may not be empty"]})

    def amend(sandbox: Sandbox) -> Sandbox:
        return replace(sandbox, **fields)

    return amend


def _tail(result: ExecResult) -> str:
    lines = result.output.decode(errors="replace").splitlines()[-HOOK_TAIL_LINES:]
    return ":\n" + "\n".join(lines)[-MESSAGE_CHARS // 2 :] if lines else ""


def _is_available(backend: Backend) -> bool:
    try:
        backend.check()
    except Unavailable:
        return False
    return True


def _one_of(words: type[Status]) -> str:
    return f"must be one of {', '.join(words)}"
