"""Bodies of requests: their types, their sizes, and their JSON.

Reads the server's stream itself: Werkzeug would buffer forms, and take a body that ended early for
a whole one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from flask import request

from heyvm.errors import BadRequest, TooLarge, UnsupportedMedia
from heyvm.strictjson import parse_json

CHUNK_BYTES = 256 * 1024
MAX_JSON_BYTES = 1024 * 1024
MAX_EXECUTE_BYTES = 16 * 1024 * 1024
# Strings, spaces, brackets, commas and words: 16 MiB of `{},` would take ten seconds, in which the
# worker does nothing else. No text is looked at twice, whatever is in it.
MAX_JSON_TOKENS = 1024 * 1024
TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|\s++|[\[\]{}:,]|[^"\s\[\]{}:,]++', re.DOTALL)


def require_type(*accepted: str) -> None:
    """415 unless the request's body is of one of these types, plain and in UTF-8."""
    if "HTTP_CONTENT_ENCODING" in request.environ:
        raise UnsupportedMedia("send the body plain: a Content-Encoding is not read here")
    if request.mimetype not in accepted:
        given = f"not {request.mimetype}" if request.mimetype else "and there is no Content-Type"
        raise UnsupportedMedia(f"this route reads a body of type {' or '.join(accepted)}, {given}")
    charset = request.mimetype_params.get("charset", "utf-8").lower()
    if charset not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMedia(f"send UTF-8, not {charset}")


def stream(limit: int | None, name: str) -> Iterator[bytes]:
    """The request's body in pieces of at most `CHUNK_BYTES`.

    `TooLarge` before the first byte is read where the length is announced, `BadRequest` where the
    client stopped in the middle. `name` says whose limit it is.
    """
    announced = announced_length()
    if limit is not None and announced is not None and announced > limit:
        raise TooLarge(f"the body has {announced} bytes, {name} is {limit}")
    return _pieces(announced, limit, name)


def announced_length() -> int | None:
    given = request.environ.get("CONTENT_LENGTH") or None
    return None if given is None else int(given)


def has_no_body() -> bool:
    """Neither a length nor chunks were announced, and no type."""
    announced = announced_length() or "HTTP_TRANSFER_ENCODING" in request.environ
    return not announced and not request.mimetype


def _pieces(announced: int | None, limit: int | None, name: str) -> Iterator[bytes]:
    seen = 0
    while piece := _read(request.environ["wsgi.input"].read):
        seen += len(piece)
        if limit is not None and seen > limit:
            raise TooLarge(f"the body has more than {limit} bytes, which is {name}")
        yield piece
    if announced is not None and seen < announced:
        raise BadRequest(f"the body ended after {seen} of {announced} bytes")


def _read(read: Callable[[int], bytes]) -> bytes:
    try:
        return read(CHUNK_BYTES)
    except Exception as error:
        # Broken chunks and connections: gunicorn's classes for these share no base but Exception.
        raise BadRequest(f"the body cannot be read: {type(error).__name__}") from error


def read_json(limit: int = MAX_JSON_BYTES) -> Any:
    """The request's JSON. 415 for another type, 413 above `limit`, 400 for what is not JSON."""
    require_type("application/json")
    text = b"".join(stream(limit, "the limit of this route"))
    if len(text) > MAX_JSON_TOKENS and tokens(text) > MAX_JSON_TOKENS:
        raise TooLarge(f"the JSON has more than {MAX_JSON_TOKENS} values, commas and brackets")
    return parse_json(text)


def tokens(text: bytes) -> int:
    """How many there are, as far as it matters."""
    return sum(1 for _ in islice(TOKEN.finditer(text), MAX_JSON_TOKENS + 1))
