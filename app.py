"""Puts the parts of a server together. Importing it has no effect."""

from __future__ import annotations

from flask import Flask

from heyvm import backends
from heyvm.api.parts import Services
from heyvm.api.wiring import Api, connect
from heyvm.files import Files
from heyvm.images import Images
from heyvm.lifecycle import Lifecycle
from heyvm.logs import Logs
from heyvm.mounts import Mounts
from heyvm.processes import Processes
from heyvm.registry import Registry
from heyvm.settings import Settings


def create_app(settings: Settings, services: Services | None = None) -> Flask:
    """A WSGI application that serves `settings`. Opens nothing: that is left to the first request,
    after gunicorn has forked."""
    app = Api("heyvm", static_folder=None)
    connect(app, services or build(settings))
    return app


def build(settings: Settings) -> Services:
    """The domain objects of one server."""
    table = backends.build(settings)
    registry = Registry(settings.data_dir / "registry.db")
    images = Images(registry, settings)
    lifecycle = Lifecycle(registry, table, settings, images)
    return Services(
        settings=settings,
        lifecycle=lifecycle,
        processes=Processes(lifecycle),
        files=Files(lifecycle),
        logs=Logs(lifecycle),
        mounts=Mounts(lifecycle),
        images=images,
        backends=table,
    )
