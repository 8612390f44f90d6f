"""`/auth/*`, passed on to AUTH_SERVER_URL as it is, bounded in time and size.

Needs no bearer token: it is where one gets a token. Not part of the OpenAPI document: what these
routes are is that server's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import gevent
import urllib3
from flask import Blueprint, Response, current_app, request
from urllib3.exceptions import HTTPError, NewConnectionError, TimeoutError
from werkzeug.datastructures import Headers

from heyvm.api.bodies import stream
from heyvm.api.limits import FORWARD_BYTES, FORWARD_S
from heyvm.api.parts import settings
from heyvm.api.paths import check_path
from heyvm.errors import NotFound
from heyvm.problems import BadGateway, GatewayTimeout

blp = Blueprint("auth_forward", __name__)

POOL = "heyvm_auth_pool"
PIECE_BYTES = 64 * 1024
# RFC 9110 section 7.6.1; and what this side says anew.
HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
OURS = frozenset({"host", "content-length", "expect", "forwarded"})
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


class TooSlow(Exception):
    """The time for one forwarded request is over."""


@blp.route("/auth/<rest:path>", methods=METHODS)
def auth(path: str) -> Response:
    """Forward one request"""
    return forwarded(target(settings().auth_server_url))


def target(base: str | None) -> str:
    """The same path and query below `base`. Refuses `..`: it could leave `/auth/` over there."""
    if not base:
        raise NotFound("AUTH_SERVER_URL is not set: this server has no /auth routes")
    path = request.environ["PATH_INFO"].encode("latin-1")
    check_path(path.decode("utf-8", "surrogateescape"))
    query = request.environ.get("QUERY_STRING", "")
    return (
        base.rstrip("/") + quote(path, safe="/:@!$&'()*+,;=~-._") + (f"?{query}" if query else "")
    )


def forwarded(url: str) -> Response:
    body = b"".join(stream(FORWARD_BYTES, "the limit of /auth"))
    try:
        with gevent.Timeout(FORWARD_S, TooSlow):
            return answer_of(url, body)
    except NewConnectionError as error:  # to urllib3 a refused connection is a kind of timeout
        raise unreachable(error) from None
    except (TooSlow, TimeoutError):
        raise GatewayTimeout(f"AUTH_SERVER_URL did not answer within {FORWARD_S} s") from None
    except HTTPError as error:
        raise unreachable(error) from None


def unreachable(error: HTTPError) -> BadGateway:
    return BadGateway(f"AUTH_SERVER_URL cannot be reached: {type(error).__name__}")


def answer_of(url: str, body: bytes) -> Response:
    pool: urllib3.PoolManager = current_app.extensions[POOL]
    answer = pool.request(
        request.method,
        url,
        body=body or None,
        headers=kept(request.headers, OURS),
        redirect=False,
        retries=False,
        preload_content=False,
        decode_content=False,
        timeout=urllib3.Timeout(total=FORWARD_S),
    )
    try:
        content = b"".join(bounded(answer))
    finally:
        answer.close()
    response = Response(content, answer.status)
    del response.headers["Content-Type"]
    response.headers.extend(kept(answer.headers, frozenset({"content-length"})).items())
    return response


def bounded(answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    seen = 0
    while piece := answer.read(PIECE_BYTES):
        seen += len(piece)
        if seen > FORWARD_BYTES:
            raise BadGateway(f"AUTH_SERVER_URL answered more than {FORWARD_BYTES} bytes")
        yield piece


def kept(headers: Headers | urllib3.HTTPHeaderDict, ours: frozenset[str]) -> urllib3.HTTPHeaderDict:
    """The headers that travel on: neither this connection's nor those that Connection names."""
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    found = urllib3.HTTPHeaderDict()
    for name, value in headers.items():
        if name.lower() not in HOP_BY_HOP | named | ours:
            found.add(name, value)
    return found
