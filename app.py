"""Puts the parts of a server together. Importing it has no effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flask import Flask

from heyvm import backends, control
from heyvm.api.parts import Services
from heyvm.api.wiring import Api, connect
from heyvm.files import Files
from heyvm.images import Images
from heyvm.lifecycle import Lifecycle
from heyvm.logs import Logs
from heyvm.mounts import Mounts
from heyvm.processes import Processes
from heyvm.proxies import Proxies
from heyvm.registry import Registry
from heyvm.settings import Settings
from heyvm.shells import Shells

# A keeper that was killed is replaced within a second or two.
SYNC_TIMEOUT_S = 15.0


def create_app(settings: Settings, services: Services | None = None) -> Flask:
    """A WSGI application that serves `settings`. Opens nothing: that is left to the first request,
    after gunicorn has forked."""
    app = Api("heyvm", static_folder=None)
    connect(app, services or build(settings))
    return app


def build(settings: Settings, *, with_keeper: bool = True) -> Services:
    """The domain objects of one server. `with_keeper`: False where the caller has its lock, so that
    there is nobody to open or close ports."""
    table = backends.build(settings)
    registry = Registry(settings.data_dir / "registry.db")
    images = Images(registry, settings)

    def sync_ports(sandbox_id: str) -> None:
        request = {"op": "ports", "sandbox_id": sandbox_id}
        if with_keeper:
            control.ask(settings.run_dir, request, SYNC_TIMEOUT_S)

    def ask_keeper(request: Mapping[str, Any]) -> Mapping[str, Any]:
        return control.ask(settings.run_dir, request, SYNC_TIMEOUT_S)

    lifecycle = Lifecycle(registry, table, settings, images, sync_ports)
    return Services(
        settings=settings,
        lifecycle=lifecycle,
        processes=Processes(lifecycle),
        files=Files(lifecycle),
        logs=Logs(lifecycle),
        mounts=Mounts(lifecycle),
        proxies=Proxies(lifecycle, sync_ports),
        shells=Shells(lifecycle, ask_keeper),
        images=images,
        backends=table,
    )
