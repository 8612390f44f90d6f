"""The API's description of itself: OpenAPI 3.1 at /openapi.json, and a page to browse it at /docs.

The page's script and style are files of ours: it works without the Internet, and its policy lets
it load nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flask import Blueprint as FlaskBlueprint
from flask import Flask, Response, current_app, json, send_from_directory
from flask_smorest import Api

from heyvm import __version__
from heyvm.api.paths import Rest
from heyvm.api.problems import BY_STATUS, MEDIA_TYPE
from heyvm.api.schemas import ProblemInfo

STATIC = Path(__file__).parent / "static"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DESCRIPTION = """\
Sandboxes over HTTP, on one machine. A path takes a sandbox's id or its slug.

Errors are problems (RFC 9457). Every answer carries `X-Request-Id`, yours if you send one.

With `JWT_SECRET` set, every route but /health needs a bearer token; without it, the server answers
only the machine that it runs on, unless it was started with `HEYVM_ALLOW_OPEN=1`.
"""
CONFIG = {
    "API_TITLE": "heyvm",
    "API_VERSION": __version__,
    "OPENAPI_VERSION": "3.1.0",
    "API_SPEC_OPTIONS": {
        "info": {"description": DESCRIPTION, "license": {"name": "See the project"}},
        "servers": [{"url": "/"}],
        # Optional: a server without JWT_SECRET asks for none.
        "security": [{}, {"bearer": []}],
        "externalDocs": {"description": "A page to browse this", "url": "/docs"},
    },
}

blp = FlaskBlueprint("openapi", __name__)


def describe(app: Flask) -> Api:
    """Make the document; blueprints that are registered with the result stand in it."""
    app.config.update(CONFIG)
    api = Api(app)
    api.register_converter(Rest, lambda _converter: {"type": "string"})
    components = api.spec.components
    components.security_scheme(
        "bearer", {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
    )
    components.schema("Problem", schema=ProblemInfo)
    for status, kind in BY_STATUS.items():
        components.response(f"Problem{status}", problem_response(status, kind.title))
    app.register_blueprint(blp)
    app.extensions["heyvm_openapi"] = api
    return api


def problem_response(status: int, title: str) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": title,
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    if headers := PROBLEM_HEADERS.get(status):
        response["headers"] = {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in headers.items()
        }
    return response


PROBLEM_HEADERS = {
    401: {"WWW-Authenticate": "`Bearer`, with what is wrong."},
    416: {"Content-Range": "`bytes */<size>`."},
    429: {"Retry-After": "Seconds to wait."},
    503: {"Retry-After": "Seconds to wait."},
}


def document(app: Flask) -> dict[str, Any]:
    api: Api = app.extensions["heyvm_openapi"]
    described: dict[str, Any] = api.spec.to_dict()
    return described


@blp.route("/openapi.json")
def openapi_json() -> Response:
    """The document"""
    return Response(json.dumps(document(current_app), indent=1), mimetype="application/json")


@blp.route("/docs")
def docs() -> Response:
    """The page"""
    return page_file("docs.html")


@blp.route("/docs/<name>")
def docs_file(name: str) -> Response:
    """What the page is made of"""
    return page_file(name)


def page_file(name: str) -> Response:
    response = send_from_directory(STATIC, name)
    response.headers["Content-Security-Policy"] = PAGE_POLICY
    response.headers["Referrer-Policy"] = "no-referrer"
    return response
