"""Shells in sandboxes, and the tickets by which they are reached from elsewhere.

Knows what a ticket leads to, and neither iroh nor SSH: those are the tunnels' process's
(tunnels.py, ssh.py), which the keeper starts where there is a ticket.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from heyvm import guest, journal, streams
from heyvm.calls import Calls
from heyvm.errors import HeyvmError, NotFound, Unavailable
from heyvm.lifecycle import Lifecycle
from heyvm.models import Sandbox, Tunnel
from heyvm.processes import demand_fits, demand_running

T = TypeVar("T")

MAX_TUNNELS = 128  # of one sandbox
SECRET_BYTES = 32
SESSION_BYTES = 16
KEEP_S = 60.0  # how long a terminal waits for its client to come back
TERM = "xterm-256color"
NAME = "shell"  # of connections that SSH forwards, for the agent


@dataclass(frozen=True)
class Way:
    """A tunnel, and what reaches it: `url` is a secret."""

    tunnel: Tunnel
    url: str
    host_key: str  # of the SSH server: "ssh-ed25519 AAAA..."


class Shells:
    """`ask` puts a question to the keeper (control.py): `{"op": "tunnel", "id": ...}` is answered
    with `{"url", "host_key"}` when the ticket works; `{"op": "tunnels"}` when none works that
    has no row."""

    def __init__(
        self, lifecycle: Lifecycle, ask: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    ) -> None:
        self.lifecycle = lifecycle
        self.registry = lifecycle.registry
        self._ask = ask

    # -- tickets ---------------------------------------------------------------------------------

    def create(self, ref: str, ttl_seconds: int, ssh_public_keys: Sequence[str] = ()) -> Way:
        """A new ticket for the sandbox's SSH server. `Conflict` where the sandbox does not run."""
        sandbox = self._running(ref)
        now = self.registry.clock.wall()
        tunnel = Tunnel(
            id=f"shell-{secrets.token_hex(8)}",
            sandbox_id=sandbox.id,
            kind="shell",
            secret=secrets.token_bytes(SECRET_BYTES),
            created_at=now,
            expires_at=now + ttl_seconds,
            ssh_public_keys=tuple(ssh_public_keys),
        )
        return self._open(sandbox, tunnel)

    def tunnel_to(self, ref: str, port: int) -> Way:
        """The ticket for a port inside: one for each port, until it is removed."""
        sandbox = self._running(ref)
        tunnel = Tunnel(
            id=f"tcp-{secrets.token_hex(8)}",
            sandbox_id=sandbox.id,
            kind="tcp",
            secret=secrets.token_bytes(SECRET_BYTES),
            created_at=self.registry.clock.wall(),
            port=port,
        )
        return self._open(sandbox, tunnel)

    def _open(self, sandbox: Sandbox, new: Tunnel) -> Way:
        tunnel = self.registry.add_tunnel(new, limit=MAX_TUNNELS)
        try:
            answer = self._ask({"op": "tunnel", "id": tunnel.id})
        except BaseException:
            if tunnel.id == new.id:
                with suppress(HeyvmError):
                    self.registry.remove_tunnel(tunnel.id)
            raise
        if tunnel.id == new.id:
            journal.event("tunnel.made", sandbox.id, sandbox.slug, tunnel=tunnel.id)
        return Way(tunnel, str(answer["url"]), str(answer["host_key"]))

    def list(self, ref: str, kind: str) -> Sequence[Tunnel]:
        """Those of a sandbox, oldest first."""
        sandbox = self.lifecycle.get(ref)
        return [one for one in self.registry.tunnels(sandbox.id) if one.kind == kind]

    def remove(self, ref: str, kind: str, tunnel_id: str) -> None:
        """Its ticket leads nowhere when this returns, and what was open through it is cut."""
        sandbox = self.lifecycle.get(ref)
        if tunnel_id not in {one.id for one in self.list(sandbox.id, kind)}:
            raise NotFound(f"sandbox {sandbox.slug!r} has no {kind} session {tunnel_id[:64]!r}")
        self.registry.remove_tunnel(tunnel_id)
        journal.event("tunnel.removed", sandbox.id, sandbox.slug, tunnel=tunnel_id)
        # A keeper that does not answer has no tunnels open.
        with suppress(Unavailable):
            self._ask({"op": "tunnels"})

    def _running(self, ref: str) -> Sandbox:
        sandbox = self.lifecycle.get(ref)
        demand_running(sandbox)
        return sandbox

    # -- inside ----------------------------------------------------------------------------------

    def inside(self, ref: str) -> Inside:
        """What can be opened in a sandbox now. `Conflict` where it does not run."""
        return Inside(self._running(ref), self.lifecycle)


@dataclass(frozen=True)
class Inside:
    """A running sandbox, as a shell's client sees it. Each call makes a connection to the agent,
    which what it returns owns."""

    sandbox: Sandbox
    lifecycle: Lifecycle

    def terminal(
        self,
        cols: int,
        rows: int,
        *,
        command: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        keep: float = 0.0,
    ) -> streams.Terminal:
        """A new terminal with a login shell, or with `command` for a shell to read. It outlives its
        connection by `keep` seconds, for `attach`. `Invalid` for a bad cwd or env."""
        environment = self._environment({"TERM": TERM, **(env or {})})
        argv = () if command is None else ("/bin/sh", "-c", command)
        demand_fits(argv, environment)
        return self._stream(
            lambda sock: streams.Terminal.open(
                sock,
                session=secrets.token_urlsafe(SESSION_BYTES),
                argv=argv,
                env=environment,
                cwd=cwd or self.sandbox.working_directory,
                user=self.sandbox.image_config.user,
                size=(cols, rows),
                keep=keep,
            )
        )

    def attach(self, session: str) -> streams.Terminal:
        """A terminal that is there, in place of who is attached to it. `NotFound` where it has
        ended, or nobody came back in time."""
        return self._stream(lambda sock: streams.Terminal.attach(sock, session))

    def end(self, session: str) -> None:
        """Hang up a terminal, attached or not. One that is not there is no error."""
        with self._connect() as sock:
            streams.end_terminal(sock, session)

    def command(self, line: str, env: Mapping[str, str] | None = None) -> streams.Command:
        """A command for a shell to read, without a terminal."""
        environment = self._environment(env or {})
        argv = ("/bin/sh", "-c", line)
        demand_fits(argv, environment)
        return self._stream(
            lambda sock: streams.Command.start(
                sock,
                argv=argv,
                env=environment,
                cwd=self.sandbox.working_directory,
                user=self.sandbox.image_config.user,
            )
        )

    def port(self, number: int) -> socket.socket:
        """A connection to a port inside, or `PortClosed`."""

        def begin(sock: socket.socket) -> socket.socket:
            guest.connect_port(sock, number, NAME)
            return sock

        return self._stream(begin)

    def calls(self) -> Calls:
        """Files, one system call at a time, as the user that commands run as."""
        return self._stream(
            lambda sock: Calls(
                sock,
                user=self.sandbox.image_config.user,
                cwd=self.sandbox.working_directory,
            )
        )

    def _environment(self, env: Mapping[str, str]) -> dict[str, str]:
        return guest.base_environment(self.sandbox) | dict(env)

    def _stream(self, begin: Callable[[socket.socket], T]) -> T:
        """What `begin` makes of a connection; it owns it, unless it fails."""
        sock = self._connect()
        try:
            return begin(sock)
        except BaseException:
            sock.close()
            raise

    def _connect(self) -> socket.socket:
        return self.lifecycle.backend_of(self.sandbox).connect(self.sandbox)
