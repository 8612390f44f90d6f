"""Problems as answers of Flask: whatever a view raises becomes one.

Which error is which problem stands in `heyvm.problems`.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from heyvm import errors
from heyvm.problems import (
    BAD_TOKEN,
    BY_STATUS,
    CHALLENGE,
    INTERNAL,
    MEDIA_TYPE,
    Kind,
    body_of,
    headers_of,
    kind_of,
    members_of,
)
from heyvm.processes import ClientGone

log = logging.getLogger("heyvm.api")

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
INTERNAL_DETAIL = "the server failed in a way that it did not foresee; its log has more, under {}"
CLIENT_GONE = Kind(499, "client-gone", "Nobody waits for the answer")  # nginx's number for it


def register(app: Flask) -> None:
    """Answer every exception of `app` with a problem."""
    app.register_error_handler(errors.HeyvmError, of_domain)
    app.register_error_handler(HTTPException, of_http)
    app.register_error_handler(OSError, of_system)
    app.register_error_handler(ClientGone, of_absence)
    app.register_error_handler(Exception, of_surprise)


def of_domain(error: errors.HeyvmError) -> Response:
    kind = kind_of(error)
    if kind.status >= 500:
        log.warning("%s %s: %s", request_id(), kind.slug, error.detail)
    return respond(kind, error.detail, members_of(error), headers_of(error, challenge()))


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
    body = body_of(kind, detail, request_id(), members)
    response = Response(body, kind.status, mimetype=MEDIA_TYPE)
    response.headers.extend(list(headers))
    return response


def challenge() -> str:
    return BAD_TOKEN if "Authorization" in request.headers else CHALLENGE


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
