"""Ways in from outside to the ports of a sandbox: proxy endpoints, local ports, internal URLs."""

from __future__ import annotations

import secrets
import socket
import string
from collections.abc import Callable, Sequence
from contextlib import suppress

from heyvm import guest, journal
from heyvm.errors import HeyvmError, NotFound, Unavailable, not_running
from heyvm.lifecycle import Lifecycle
from heyvm.models import UP, Endpoint, Sandbox, Status
from heyvm.registry import IdTaken

ALPHABET = string.ascii_lowercase + string.digits
SUBDOMAIN_CHARS = 16
DRAWS = 10
MAX_ENDPOINTS = 256  # of one sandbox, its open ports included


class Proxies:
    """`sync` has the keeper open and close the local ports of a sandbox; it returns when that is
    done, or raises `Unavailable`."""

    def __init__(self, lifecycle: Lifecycle, sync: Callable[[str], None]) -> None:
        self.lifecycle = lifecycle
        self.registry = lifecycle.registry
        self.sockets = lifecycle.sockets
        self._sync = sync

    def list(self, ref: str) -> Sequence[Endpoint]:
        """The proxy endpoints of a sandbox, oldest first."""
        sandbox = self.lifecycle.get(ref)
        return [one for one in self.registry.endpoints(sandbox.id) if one.kind == "proxy"]

    def create(self, ref: str, port: int, *, is_public: bool = True) -> Endpoint:
        """A new endpoint, which works when this returns (and as soon as the sandbox runs).

        `Conflict` while the sandbox is paused, `QuotaExceeded` beyond `MAX_ENDPOINTS`.
        """
        with self.lifecycle.turn(ref) as sandbox:
            if sandbox.status is Status.PAUSED:
                raise not_running(sandbox.slug, sandbox.status)
            endpoint = self._add(sandbox, port, is_public)
            try:
                if sandbox.status is Status.RUNNING:
                    self.sockets.open(sandbox, endpoint)
                self._sync_proxies(sandbox)
                settled = self.registry.settle_endpoint(endpoint.subdomain)
                _say("made", sandbox, settled)
                return settled
            except BaseException:
                with suppress(HeyvmError):
                    self._remove(sandbox, endpoint)
                raise

    def _add(self, sandbox: Sandbox, port: int, is_public: bool) -> Endpoint:
        for _ in range(DRAWS):
            name = "".join(secrets.choice(ALPHABET) for _ in range(SUBDOMAIN_CHARS))
            now = self.registry.clock.wall()
            endpoint = Endpoint(name, sandbox.id, port, now, is_public=is_public)
            with suppress(IdTaken):
                self.registry.add_endpoint(endpoint, limit=MAX_ENDPOINTS)
                return endpoint
        raise Unavailable("no free subdomain was found: try again")

    def delete(self, ref: str, subdomain: str) -> None:
        """It refuses when this returns, and what was open through it is cut."""
        sandbox, endpoint = self._of(ref, subdomain)
        self._remove(sandbox, endpoint)

    def _remove(self, sandbox: Sandbox, endpoint: Endpoint) -> None:
        # The row first: whoever finds the rest without it takes it away.
        self.registry.remove_endpoint(endpoint.subdomain)
        _say("removed", sandbox, endpoint)
        self.sockets.close(sandbox, endpoint)
        # A keeper that does not answer has no ports open.
        with suppress(Unavailable):
            self._sync_proxies(sandbox)

    def _sync_proxies(self, sandbox: Sandbox) -> None:
        if self.lifecycle.settings.api_hostname is None:  # else they have no local ports
            self._sync(sandbox.id)

    def change(self, ref: str, subdomain: str, *, is_public: bool) -> Endpoint:
        """Open it to everybody, or close it to all but those who may call the API. What is open
        through it is cut."""
        sandbox, endpoint = self._of(ref, subdomain)
        if endpoint.is_public is not is_public:
            endpoint = self.registry.set_public(subdomain, is_public)
            self.sockets.change(sandbox, endpoint)
            self._sync_proxies(sandbox)
        return endpoint

    def get(self, ref: str, subdomain: str) -> Endpoint:
        """The endpoint of this sandbox with this subdomain, or `NotFound`."""
        return self._of(ref, subdomain)[1]

    def _of(self, ref: str, subdomain: str) -> tuple[Sandbox, Endpoint]:
        sandbox = self.lifecycle.get(ref)
        endpoint = self.registry.endpoint(subdomain)
        if endpoint is None or endpoint.sandbox_id != sandbox.id:
            raise NotFound(f"sandbox {sandbox.slug!r} has no endpoint {subdomain!r}")
        return sandbox, endpoint

    def internal(self, ref: str, port: int) -> Endpoint:
        """An endpoint with a local port that leads to this port, made where there is none."""
        sandbox = self.lifecycle.get(ref)
        if sandbox.status not in UP:
            raise not_running(sandbox.slug, sandbox.status)
        found = self._local(sandbox, port)
        if found is None:
            now = self.registry.clock.wall()
            new = Endpoint(secrets.token_hex(8), sandbox.id, port, now, kind="internal")
            self.registry.add_endpoint(new, limit=MAX_ENDPOINTS, ready=True)
        if found is None or found.local_port is None:
            self._sync(sandbox.id)
            found = self._local(sandbox, port)
        if found is None or found.local_port is None:
            raise Unavailable("no local port could be opened: try again", sandbox_id=sandbox.id)
        return found

    def _local(self, sandbox: Sandbox, port: int) -> Endpoint | None:
        there = self.registry.endpoints(sandbox.id)
        return next((one for one in there if one.port == port and one.kind != "proxy"), None)

    # -- the way in ------------------------------------------------------------------------------

    def find(self, subdomain: str) -> Endpoint:
        """The proxy endpoint of this name, or `NotFound`."""
        endpoint = self.registry.endpoint(subdomain)
        if endpoint is None:
            raise NotFound(f"there is no endpoint {subdomain[:100]!r} (any more)")
        return endpoint

    def connect(self, endpoint: Endpoint) -> socket.socket:
        """A stream to the port inside. `NotFound` where the sandbox is gone, `Unavailable` while it
        does not run, `PortClosed` where nobody listens."""
        sandbox = self.registry.find(endpoint.sandbox_id)
        if sandbox is None:
            raise NotFound("the sandbox of this endpoint is gone")
        if sandbox.status is not Status.RUNNING:
            # No id: whoever meets a public endpoint may read this.
            raise Unavailable(f"the sandbox of this endpoint is {sandbox.status}")
        stream = self.lifecycle.backend_of(sandbox).connect(sandbox)
        try:
            guest.connect_port(stream, endpoint.port, endpoint.subdomain)
        except BaseException:
            stream.close()
            raise
        return stream


def _say(what: str, sandbox: Sandbox, endpoint: Endpoint) -> None:
    about = {"subdomain": endpoint.subdomain, "port": endpoint.port}
    journal.event(f"endpoint.{what}", sandbox.id, sandbox.slug, **about)
