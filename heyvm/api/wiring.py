"""What every request passes on its way to a view and back: its id, the guard, the headers."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import urllib3
from flask import Flask, Response, g, request
from flask.json.provider import JSONProvider

from heyvm import audit, journal
from heyvm.api import (
    auth,
    files,
    forward,
    images,
    logs,
    mounts,
    openapi,
    operations,
    problems,
    proxy,
    sandboxes,
    shells,
    stream,
    system,
    usage,
)
from heyvm.api.parts import EXTENSION, GATEWAY, USAGES, Services
from heyvm.api.paths import ByteRequest, ImageName, Rest
from heyvm.gateway import Gateway
from heyvm.usage import Usages

log = logging.getLogger("heyvm.api")

BLUEPRINTS = (
    *(system.blp, usage.blp, sandboxes.blp, files.blp, mounts.blp, proxy.blp, logs.blp),
    *(shells.blp, images.blp, operations.blp, stream.blp),
)


class Api(Flask):
    """Flask with requests whose query keeps its bytes, and which are what their route says."""

    request_class = ByteRequest

    def create_url_adapter(self, request: Any) -> Any:
        """Werkzeug would have rules of their own for requests that ask for a WebSocket."""
        adapter = super().create_url_adapter(request)
        if adapter is not None:
            adapter.websocket = False
        return adapter


class Json(JSONProvider):
    """JSON as it is: keys in the order of the schema, letters as letters, no spaces."""

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        return json.dumps(obj, ensure_ascii=False, separators=(",", ":"), **kwargs)

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        return json.loads(s, **kwargs)

    def response(self, *args: Any, **kwargs: Any) -> Response:
        text = self.dumps(self._prepare_response_obj(args, kwargs))
        # `replace`: half a surrogate pair, should one ever get here, must not be a 500.
        return Response(text.encode("utf-8", "replace") + b"\n", mimetype="application/json")


def connect(app: Flask, services: Services) -> None:
    """Make `app` serve `services`."""
    app.extensions[EXTENSION] = services
    app.extensions[USAGES] = Usages(services.settings.run_dir)
    app.json = Json(app)
    app.url_map.converters["rest"] = Rest
    app.url_map.converters["image"] = ImageName
    # A redirect would lose a DELETE's meaning, and a mount path begins with a slash.
    app.url_map.merge_slashes = False
    app.url_map.strict_slashes = False
    watch(app, auth.Guard(services.settings))
    operations.watch(app, audit.Trail(services.settings.data_dir / audit.DIRECTORY))
    api = openapi.describe(app)
    for blp in BLUEPRINTS:
        api.register_blueprint(blp)
    app.extensions[forward.POOL] = urllib3.PoolManager(num_pools=1, maxsize=16)
    app.register_blueprint(forward.blp)
    problems.register(app)

    def link_key() -> bytes:
        return services.lifecycle.registry.link_key()

    gateway = Gateway(services.settings, services.proxies, link_key)
    app.extensions[GATEWAY] = gateway
    app.wsgi_app = gateway.wrap(app.wsgi_app)  # type: ignore[assignment,method-assign]


def watch(app: Flask, guard: auth.Guard) -> None:
    """Look at each request before its view, and at each answer after it."""

    @app.before_request
    def receive() -> None:
        g.began = time.monotonic()
        g.request_id = journal.request_id_of(request.headers.get("X-Request-Id"))
        operations.receive(g.request_id)
        guard.check(
            request.environ,
            bearer=needs_token(request.endpoint),
            in_query=request.endpoint == stream.ENDPOINT,
        )

    @app.after_request
    def answer(response: Response) -> Response:
        headers = response.headers
        headers["X-Request-Id"] = problems.request_id()
        headers["X-Content-Type-Options"] = "nosniff"
        headers.setdefault("Cache-Control", "no-store")
        if log.isEnabledFor(logging.DEBUG):
            tell(response)
        return response


def needs_token(endpoint: str | None) -> bool:
    """All but the health check, and the routes on which one gets a token."""
    return endpoint not in OPEN_ENDPOINTS


OPEN_ENDPOINTS = frozenset({"system.Healthy", "auth_forward.auth"})


def tell(response: Response) -> None:
    """One line for `--debug`. The query is left out: it may hold what is secret."""
    took = (time.monotonic() - g.began) * 1000
    log.debug(
        "%s %s %s %d %.1f ms",
        problems.request_id(),
        request.method,
        ascii(g.seen.path),
        response.status_code,
        took,
    )
