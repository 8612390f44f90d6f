"""Health, capabilities, and the API's description of itself."""

from __future__ import annotations

from typing import Any

from flask.views import MethodView

from heyvm import __version__
from heyvm.api.blueprint import Blueprint
from heyvm.api.limits import in_force
from heyvm.api.parts import services, settings
from heyvm.api.schemas import Capabilities, Health
from heyvm.errors import Unavailable

blp = Blueprint("system", description="The server itself.")


@blp.route("/health")
class Healthy(MethodView):
    @blp.operation("getHealth", security=[{}])
    @blp.response(200, Health)
    def get(self) -> dict[str, str]:
        """Health check

        Takes no locks and asks nobody: it says that the server answers.
        """
        return {"status": "ok"}


@blp.route("/capabilities")
class Capable(MethodView):
    @blp.operation("getCapabilities")
    @blp.response(200, Capabilities)
    def get(self) -> dict[str, Any]:
        """What this server can do, and every default and limit"""
        working = working_backends()
        return {
            "version": __version__,
            "target_os": "linux",
            "supported_drivers": working,
            "archive_supported_drivers": [],
            "default_driver": working[0] if working else None,
            "limits": in_force(settings()),
        }


def working_backends() -> list[str]:
    return [name for name, backend in services().backends.items() if works(backend)]


def works(backend: Any) -> bool:
    try:
        backend.check()
    except Unavailable:
        return False
    return True
