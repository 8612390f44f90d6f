"""The unix sockets of proxy endpoints. A stand-in: helper A's module takes its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from heyvm.backends.base import Backend
from heyvm.models import Endpoint, Sandbox
from heyvm.registry import Registry
from heyvm.settings import Settings


class Sockets:
    """Nothing yet."""

    def __init__(
        self, settings: Settings, registry: Registry, backend_of: Callable[[Sandbox], Backend]
    ) -> None: ...

    def open_directories(self) -> None: ...

    def open(self, sandbox: Sandbox, endpoint: Endpoint) -> None: ...

    def open_all(self, sandbox: Sandbox) -> None: ...

    def close(self, sandbox: Sandbox, endpoint: Endpoint) -> None: ...

    def change(self, sandbox: Sandbox, endpoint: Endpoint) -> None: ...

    def hide(self, sandbox: Sandbox) -> None: ...

    def show(self, sandbox: Sandbox) -> None: ...

    def remove_all(self, sandbox_id: str) -> None: ...

    def mend(self, running: Sequence[Sandbox]) -> None: ...
