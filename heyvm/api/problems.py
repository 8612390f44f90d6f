"""Every failure as one kind of body: RFC 9457 `application/problem+json`.

`PROBLEMS` is the only place where a domain error meets an HTTP status.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from heyvm import errors
from heyvm.processes import ClientGone

log = logging.getLogger("heyvm.api")

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:heyvm:problem:"
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
INTERNAL_DETAIL = "the server failed in a way that it did not foresee; its log has more, under {}"


@dataclass(frozen=True)
class Kind:
    """What a class of errors is on the wire. `slug` ends the `type` of the problem."""

    status: int
    slug: str
    title: str


CLIENT_GONE = Kind(499, "client-gone", "Nobody waits for the answer")  # nginx's number for it
INTERNAL = Kind(500, "internal", "The server failed")
PROBLEMS: Mapping[type[errors.HeyvmError], Kind] = {
    errors.BadRequest: Kind(400, "bad-request", "The request cannot be read"),
    errors.Unauthorized: Kind(401, "unauthorized", "A good bearer token is needed"),
    errors.Forbidden: Kind(403, "forbidden", "Refused"),
    errors.NotFound: Kind(404, "not-found", "There is no such thing"),
    errors.Conflict: Kind(409, "conflict", "It conflicts with what is there"),
    errors.TooLarge: Kind(413, "too-large", "Too many bytes"),
    errors.UnsupportedMedia: Kind(415, "unsupported-media", "Another media type is needed"),
    errors.RangeNotSatisfiable: Kind(416, "range", "The range lies outside the file"),
    errors.Invalid: Kind(422, "invalid", "A value is wrong"),
    errors.HookFailed: Kind(422, "hook-failed", "A setup hook failed"),
    errors.ImageMissing: Kind(422, "image-missing", "There is no such image to be had"),
    errors.QuotaExceeded: Kind(429, "quota-exceeded", "A limit is reached"),
    errors.HeyvmError: INTERNAL,
    errors.Misconfigured: Kind(500, "misconfigured", "The server is set up wrongly"),
    errors.Unsupported: Kind(501, "unsupported", "This backend cannot do that"),
    errors.BackendFailed: Kind(502, "backend-failed", "The sandbox or its agent failed"),
    errors.PortClosed: Kind(502, "port-closed", "Nobody listens there"),
    errors.Unavailable: Kind(503, "unavailable", "Not now"),
    errors.StorageFull: Kind(507, "storage-full", "No space left"),
}
BY_STATUS = {kind.status: kind for kind in reversed(list(PROBLEMS.values()))}


class BadGateway(errors.HeyvmError):
    """The server that a request was forwarded to failed. Raised by forward.py."""


class GatewayTimeout(errors.HeyvmError):
    """The server that a request was forwarded to did not answer in time. Raised by forward.py."""


FORWARDING: Mapping[type[errors.HeyvmError], Kind] = {
    BadGateway: Kind(502, "bad-gateway", "The server behind failed"),
    GatewayTimeout: Kind(504, "gateway-timeout", "The server behind did not answer in time"),
}


def register(app: Flask) -> None:
    """Answer every exception of `app` with a problem."""
    app.register_error_handler(errors.HeyvmError, of_domain)
    app.register_error_handler(HTTPException, of_http)
    app.register_error_handler(OSError, of_system)
    app.register_error_handler(ClientGone, of_absence)
    app.register_error_handler(Exception, of_surprise)


def kind_of(error: errors.HeyvmError) -> Kind:
    """The row of the nearest class."""
    rows = {**PROBLEMS, **FORWARDING}
    return next(rows[cls] for cls in type(error).__mro__ if cls in rows)


def of_domain(error: errors.HeyvmError) -> Response:
    kind = kind_of(error)
    if kind.status >= 500:
        log.warning("%s %s: %s", request_id(), kind.slug, error.detail)
    members: dict[str, Any] = {}
    if isinstance(error, errors.Invalid):
        members["errors"] = error.errors
    if error.sandbox_id is not None:
        members["id"] = error.sandbox_id
    return respond(kind, error.detail, members, headers_of(error))


def of_http(error: HTTPException) -> Response:
    """What Werkzeug and Flask raise by themselves: unknown routes, methods, sizes."""
    status = error.code or 500
    kind = BY_STATUS.get(status) or Kind(status, _slug(status), HTTPStatus(status).phrase)
    kept = [(k, v) for k, v in error.get_headers(request.environ) if k != "Content-Type"]
    return respond(kind, _http_detail(error, status), {}, kept)


def of_system(error: OSError) -> Response:
    """A full disk and a lack of descriptors are states of the machine, not faults of the code."""
    if error.errno in NO_SPACE:
        return of_domain(errors.StorageFull("the server's disk is full: free some space there"))
    if error.errno in NO_DESCRIPTORS:
        return of_domain(errors.Unavailable(f"the server is out of resources: {error.strerror}"))
    return of_surprise(error)


def of_absence(_: ClientGone) -> Response:
    """Nobody is there to read it; it stands in the log of `--debug`."""
    return respond(CLIENT_GONE, "the client closed its connection", {}, [])


def of_surprise(error: Exception) -> Response:
    log.error("%s %s %s", request_id(), request.method, ascii(request.path), exc_info=error)
    return respond(INTERNAL, INTERNAL_DETAIL.format(request_id()), {}, [])


def respond(
    kind: Kind, detail: str, members: Mapping[str, Any], headers: Iterable[tuple[str, str]]
) -> Response:
    body = {
        "type": TYPE_PREFIX + kind.slug,
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "request_id": request_id(),
        # Clients of heyvm read one of these two.
        "error": detail,
        "message": detail,
        **members,
    }
    # ASCII: a detail may quote a name that is not valid Unicode.
    response = Response(json.dumps(body) + "\n", kind.status, mimetype=MEDIA_TYPE)
    response.headers.extend(list(headers))
    return response


def headers_of(error: errors.HeyvmError) -> list[tuple[str, str]]:
    if isinstance(error, errors.Unauthorized):
        return [("WWW-Authenticate", challenge())]
    if isinstance(error, errors.Unavailable):
        return [("Retry-After", str(error.retry_after))]
    if isinstance(error, errors.QuotaExceeded):
        return [("Retry-After", "10")]
    if isinstance(error, errors.RangeNotSatisfiable):
        return [("Content-Range", f"bytes */{error.size}"), ("Accept-Ranges", "bytes")]
    return []


def challenge() -> str:
    """RFC 6750 section 3: no error code for a request that carried no token at all."""
    if "Authorization" not in request.headers:
        return 'Bearer realm="heyvm"'
    return 'Bearer realm="heyvm", error="invalid_token"'


def request_id() -> str:
    return str(g.get("request_id", "-"))


def _slug(status: int) -> str:
    return HTTPStatus(status).phrase.lower().replace(" ", "-")


def _http_detail(error: HTTPException, status: int) -> str:
    if status == 404:
        return f"there is no route {request.method} {request.path}"
    if status == 405:
        return f"{request.path} does not know the method {request.method}"
    if isinstance(error, RequestEntityTooLarge):
        return "the body, or one of its parts, is larger than this route reads"
    return error.description or error.name
