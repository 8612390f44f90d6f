"""The API's description of itself: OpenAPI 3.1 at /openapi.json, and a page to browse it at /docs.

The page's script and style are files of ours: it works without the Internet, and its policy lets
it load nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flask import Blueprint as FlaskBlueprint
from flask import Flask, Response, current_app, json, send_from_directory
from flask_smorest import Api

from heyvm import __version__
from heyvm.api.paths import ImageName, Rest
from heyvm.api.schemas import ProblemInfo
from heyvm.problems import BY_STATUS, MEDIA_TYPE, TYPE_PREFIX, Kind

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
        "info": {"description": DESCRIPTION},
        "servers": [{"url": "/"}],
        # Optional: a server without JWT_SECRET asks for none.
        "security": [{}, {"bearer": []}],
        "externalDocs": {"description": "A page to browse this", "url": "/docs"},
    },
}

blp = FlaskBlueprint("openapi", __name__)


class Document(Api):  # type: ignore[misc]  # flask-smorest has no types
    """flask-smorest's, without the answers and headers that it would offer by itself."""

    def _nothing(self) -> None:
        """Its errors are not ours, and neither are its pages and tags."""

    _register_responses = _register_etag_headers = _register_pagination_header = _nothing


def describe(app: Flask) -> Api:
    """Make the document; blueprints that are registered with the result stand in it."""
    app.config.update(CONFIG)
    api = Document(app)
    for converter in (Rest, ImageName):
        api.register_converter(converter, lambda _converter: {"type": "string"})
    components = api.spec.components
    components.security_scheme(
        "bearer", {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
    )
    components.schema("Problem", schema=ProblemInfo)
    for status, kind in BY_STATUS.items():
        components.response(f"Problem{status}", problem_response(kind))
    app.register_blueprint(blp)
    app.extensions["heyvm_openapi"] = api
    return api


def problem_response(kind: Kind) -> dict[str, Any]:
    example = {
        "type": TYPE_PREFIX + kind.slug,
        "title": kind.title,
        "status": kind.status,
        "detail": "what is wrong, and what to do",
        "request_id": "10561cd49342af41",
        "error": "what is wrong, and what to do",
        "message": "what is wrong, and what to do",
    }
    schema = {"$ref": "#/components/schemas/Problem"}
    response = {
        "description": kind.title,
        "content": {MEDIA_TYPE: {"schema": schema, "example": example}},
    }
    headers = PROBLEM_HEADERS.get(kind.status, {})
    told = {
        name: {"description": text, "schema": {"type": "string"}} for name, text in headers.items()
    }
    return {**response, "headers": told} if told else response


PROBLEM_HEADERS = {
    401: {"WWW-Authenticate": "`Bearer`, with what is wrong."},
    416: {"Content-Range": "`bytes */<size>`."},
    426: {"Upgrade": "`websocket`.", "Sec-WebSocket-Version": "`13`."},
    429: {"Retry-After": "Seconds to wait."},
    503: {"Retry-After": "Seconds to wait."},
}


def document(app: Flask) -> dict[str, Any]:
    """The whole document, with an example of every body, made of its fields' own."""
    api: Api = app.extensions["heyvm_openapi"]
    described: dict[str, Any] = api.spec.to_dict()
    schemas = described["components"]["schemas"]
    for content in contents(described["paths"]):
        content.setdefault("example", example_of(content["schema"], schemas))
    return described


def contents(paths: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every JSON body and form of a request or an answer."""
    for operation in (one for path in paths.values() for one in path.values()):
        if isinstance(operation, dict):
            for message in (operation.get("requestBody", {}), *operation["responses"].values()):
                yield from (
                    content
                    for media, content in message.get("content", {}).items()
                    if media in ("application/json", "multipart/form-data")
                )


def example_of(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Any:
    """What the schema's fields give as examples, put together."""
    if "$ref" in schema:
        return example_of(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    if "examples" in schema:
        return schema["examples"][0]
    if "properties" in schema:
        return {name: example_of(one, schemas) for name, one in schema["properties"].items()}
    if "items" in schema:
        return [example_of(schema["items"], schemas)]
    return False if schema.get("type") == "boolean" else None


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
