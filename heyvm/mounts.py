"""Directories of the host in a sandbox. Which may be shown is the backend's to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from heyvm.errors import Conflict, HeyvmError, NotFound
from heyvm.lifecycle import Lifecycle
from heyvm.models import UP, Mount, Sandbox


class Mounts:
    """Changes queue with the sandbox's lifecycle calls, and hold for a running one at once."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self.lifecycle = lifecycle

    def list(self, ref: str) -> tuple[Mount, ...]:
        """In the order in which they were asked for."""
        return self.lifecycle.get(ref).mounts

    def add(self, ref: str, mount: Mount) -> Mount:
        """Show it; `pending` where only the next start can. `Conflict` if the path is taken."""
        with self.lifecycle.turn(ref) as sandbox:
            self.lifecycle.backend_of(sandbox).check_mount(mount)
            # First as pending: a server that dies now leaves one that the next start makes true.
            self._amend(sandbox, adding(replace(mount, pending=True)))
            try:
                shown = replace(mount, pending=not self._change(sandbox, mount, None))
            except HeyvmError:
                self._amend(sandbox, without(mount.sandbox_path))
                raise
            self._amend(sandbox, putting(shown))
            return shown

    def remove(self, ref: str, sandbox_path: str) -> None:
        """Take it out; who stands in it keeps it until they leave. `NotFound` if there is none."""
        with self.lifecycle.turn(ref) as sandbox:
            mount = find(sandbox, sandbox_path)
            if not mount.pending and not self._change(sandbox, None, sandbox_path):
                raise Conflict(
                    f"mount {sandbox_path} could not be taken out of sandbox {sandbox.slug!r} while"
                    " it runs: stop it first"
                )
            self._amend(sandbox, without(sandbox_path))

    def _change(self, sandbox: Sandbox, add: Mount | None, remove: str | None) -> bool:
        """True where it holds already, or there is nothing running that it would have to."""
        if sandbox.status not in UP:
            return True
        return self.lifecycle.backend_of(sandbox).change_mounts(sandbox, add, remove)

    def _amend(self, sandbox: Sandbox, change: Callable[[Sandbox], Sandbox]) -> None:
        self.lifecycle.registry.amend(sandbox.id, change)


def find(sandbox: Sandbox, sandbox_path: str) -> Mount:
    """The mount at this path inside."""
    for mount in sandbox.mounts:
        if mount.sandbox_path == sandbox_path:
            return mount
    there = [mount.sandbox_path for mount in sandbox.mounts]
    raise NotFound(f"Mount not found: {sandbox_path} (available mounts: {there})")


def adding(mount: Mount) -> Callable[[Sandbox], Sandbox]:
    """A change that appends it, or `Conflict`."""

    def change(sandbox: Sandbox) -> Sandbox:
        if any(one.sandbox_path == mount.sandbox_path for one in sandbox.mounts):
            raise Conflict(
                f"sandbox {sandbox.slug!r} has a mount at {mount.sandbox_path}: remove it first"
            )
        return replace(sandbox, mounts=(*sandbox.mounts, mount))

    return change


def putting(mount: Mount) -> Callable[[Sandbox], Sandbox]:
    """A change that puts it in the place of the one at the same path."""

    def change(sandbox: Sandbox) -> Sandbox:
        mounts = (
            mount if one.sandbox_path == mount.sandbox_path else one for one in sandbox.mounts
        )
        return replace(sandbox, mounts=tuple(mounts))

    return change


def without(sandbox_path: str) -> Callable[[Sandbox], Sandbox]:
    """A change that leaves out the one at this path."""

    def change(sandbox: Sandbox) -> Sandbox:
        left = (one for one in sandbox.mounts if one.sandbox_path != sandbox_path)
        return replace(sandbox, mounts=tuple(left))

    return change
