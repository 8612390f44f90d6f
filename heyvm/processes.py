"""Commands in sandboxes: what is executed, with which environment, and what becomes of it."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from heyvm import guest, metrics
from heyvm.backends.base import Backend
from heyvm.errors import BackendFailed, Conflict, Invalid, not_running
from heyvm.guest import ClientGone, base_environment
from heyvm.models import ExecRequest, ExecResult, Sandbox, Status

__all__ = ["ClientGone", "Processes", "argv_of", "base_environment"]

PLAIN = re.compile(r"[A-Za-z0-9_./+-]+")
# execve(2): a string has at most 32 pages, all of them and their pointers a quarter of the stack.
MAX_STRING_BYTES = 128 * 1024
MAX_TOTAL_BYTES = 2 * 1024 * 1024
POINTER_BYTES = 8


class Sandboxes(Protocol):
    """What is asked of the lifecycle."""

    def get(self, ref: str) -> Sandbox: ...

    def backend_of(self, sandbox: Sandbox) -> Backend: ...


def argv_of(request: ExecRequest) -> tuple[str, ...]:
    """With `args` the command is a program's name; without, a shell reads whatever is more than
    such a name."""
    if request.args:
        return (request.command, *request.args)
    if PLAIN.fullmatch(request.command):
        return (request.command,)
    return ("/bin/sh", "-c", request.command)


@dataclass(frozen=True)
class Processes:
    """Executes commands. Any number at once, in one sandbox or in many."""

    lifecycle: Sandboxes

    def execute(
        self, ref: str, request: ExecRequest, client: socket.socket | None = None
    ) -> ExecResult:
        """Run it to its end. `client`: the socket of whoever asked; when they hang up, the command
        is ended and `ClientGone` raised."""
        sandbox = self.lifecycle.get(ref)
        demand_running(sandbox)
        argv = argv_of(request)
        environment = base_environment(sandbox) | dict(request.env)
        demand_fits(argv, environment)
        backend = self.lifecycle.backend_of(sandbox)
        try:
            with metrics.here().timed("execute") as timing, backend.connect(sandbox) as sock:
                result = guest.execute(
                    sock,
                    argv=argv,
                    env=environment,
                    cwd=request.cwd or sandbox.working_directory,
                    user=request.user or sandbox.image_config.user,
                    stdin=request.stdin,
                    timeout_seconds=request.timeout_seconds,
                    max_output_bytes=request.max_output_bytes,
                    client=client,
                    on_wait=lambda: demand_alive(backend, sandbox),
                )
                timing.outcome = "timed-out" if result.timed_out else "ok"
                return result
        except BackendFailed as failed:
            raise self._explained(sandbox, failed) from failed

    def _explained(self, sandbox: Sandbox, failed: BackendFailed) -> Conflict | BackendFailed:
        """An agent that broke off may have been stopped, or have died: then say that instead."""
        now = self.lifecycle.get(sandbox.id)
        if now.status is not Status.RUNNING:
            return Conflict(f"sandbox {now.slug!r} is {now.status} now: the command ended with it")
        if now.state != sandbox.state:
            return Conflict(f"sandbox {now.slug!r} was restarted: the command ended with it")
        reason = self.lifecycle.backend_of(now).poll(now)
        if reason is None:
            return failed
        return BackendFailed(f"sandbox {now.slug!r} is gone: {reason}; start it again")


def demand_running(sandbox: Sandbox) -> None:
    if sandbox.status is not Status.RUNNING:
        raise not_running(sandbox.slug, sandbox.status)


def demand_alive(backend: Backend, sandbox: Sandbox) -> None:
    """A command may be silent for hours, its agent may not: it answers to others meanwhile."""
    with contextlib.closing(backend.connect(sandbox)) as sock:
        guest.ping(sock)


def demand_fits(argv: tuple[str, ...], environment: Mapping[str, str]) -> None:
    """Raise `Invalid` for what no kernel would take."""
    strings = {"args": list(argv), "env": [f"{key}={value}" for key, value in environment.items()]}
    total = 0
    for field, values in strings.items():
        for value in values:
            size = len(value.encode("utf-8", "surrogatepass")) + 1
            total += size + POINTER_BYTES
            if "\0" in value:
                raise refused(field, "a NUL byte cannot be part of it")
            if size > MAX_STRING_BYTES:
                raise refused(field, "arguments too long: one has more than 128 KiB")
    if total > MAX_TOTAL_BYTES:
        raise refused("args", "arguments too long: with the environment more than 2 MiB")
    for key in environment:
        if not key or "=" in key:
            raise refused("env", f"{key!r} cannot be a variable's name")


def refused(field: str, complaint: str) -> Invalid:
    return Invalid(f"{field}: {complaint}", errors={field: [complaint]})
