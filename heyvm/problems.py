"""Every failure as one kind of body: RFC 9457 `application/problem+json`.

`PROBLEMS` is the only place where a domain error meets an HTTP status. Knows no web framework, so
that whoever speaks HTTP here can say the same: the API, the gateway, and the keeper.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from heyvm import errors

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:heyvm:problem:"
# RFC 6750 section 3: no error code for a request that carried no token at all.
CHALLENGE = 'Bearer realm="heyvm"'
BAD_TOKEN = 'Bearer realm="heyvm", error="invalid_token"'


@dataclass(frozen=True)
class Kind:
    """What a class of errors is on the wire. `slug` ends the `type` of the problem."""

    status: int
    slug: str
    title: str


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
    errors.UpgradeRequired: Kind(426, "upgrade-required", "A WebSocket is needed"),
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
    """The server that a request was forwarded to failed."""


class GatewayTimeout(errors.HeyvmError):
    """The server that a request was forwarded to did not answer in time."""


# Said by no call of the API's own, only where a request is forwarded.
FORWARDING: Mapping[type[errors.HeyvmError], Kind] = {
    BadGateway: Kind(502, "bad-gateway", "The server behind failed"),
    GatewayTimeout: Kind(504, "gateway-timeout", "The server behind did not answer in time"),
}


def kind_of(error: errors.HeyvmError) -> Kind:
    """The row of the nearest class."""
    rows = {**PROBLEMS, **FORWARDING}
    return next(rows[cls] for cls in type(error).__mro__ if cls in rows)


def body_of(
    kind: Kind, detail: str, request_id: str = "-", members: Mapping[str, Any] | None = None
) -> bytes:
    """The JSON of a problem, in ASCII: a detail may quote a name that is not valid Unicode."""
    body = {
        "type": TYPE_PREFIX + kind.slug,
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "request_id": request_id,
        # Clients of heyvm read one of these two.
        "error": detail,
        "message": detail,
        **(members or {}),
    }
    return json.dumps(body).encode("ascii") + b"\n"


def members_of(error: errors.HeyvmError) -> dict[str, Any]:
    """What the body of this error has besides what every problem has."""
    members: dict[str, Any] = {}
    if isinstance(error, errors.Invalid):
        members["errors"] = error.errors
    if error.sandbox_id is not None:
        members["id"] = error.sandbox_id
    return members


def headers_of(error: errors.HeyvmError, challenge: str = CHALLENGE) -> list[tuple[str, str]]:
    """The headers that go with this error; `challenge` is what a 401 asks for."""
    if isinstance(error, errors.Unauthorized):
        return [("WWW-Authenticate", challenge)]
    if isinstance(error, errors.Unavailable):
        return [("Retry-After", str(error.retry_after))]
    if isinstance(error, errors.UpgradeRequired):
        return [("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")]
    if isinstance(error, errors.QuotaExceeded):
        return [("Retry-After", "10")]
    if isinstance(error, errors.RangeNotSatisfiable):
        return [("Content-Range", f"bytes */{error.size}"), ("Accept-Ranges", "bytes")]
    return []


def page(
    error: errors.HeyvmError, request_id: str = "-", *, challenge: str = CHALLENGE
) -> tuple[int, list[tuple[str, str]], bytes]:
    """A whole answer for `error`: status, headers, body."""
    kind = kind_of(error)
    body = body_of(kind, error.detail, request_id, members_of(error))
    headers = [
        ("Content-Type", MEDIA_TYPE),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        *headers_of(error, challenge),
    ]
    if request_id != "-":
        headers.append(("X-Request-Id", request_id))
    return kind.status, headers, body


def raw_page(error: errors.HeyvmError) -> bytes:
    """The same as bytes for a connection that nobody has read as HTTP, and which ends with it."""
    status, headers, body = page(error)
    lines = [f"HTTP/1.1 {status} {reason(status)}"]
    lines += [f"{name}: {value}" for name, value in [*headers, ("Connection", "close")]]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def reason(status: int) -> str:
    """The phrase after the number; empty for a number of nobody's."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
