"""Files on their way out: attachments, conditional requests and ranges (RFC 9110, 13 and 14)."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

from flask import Response, request
from werkzeug.http import parse_etags

from heyvm.api.fields import shown
from heyvm.api.parts import files
from heyvm.api.schemas import Place
from heyvm.errors import BackendFailed, RangeNotSatisfiable
from heyvm.models import Download

OCTETS = "application/octet-stream"
TAR = "application/x-tar"
FALLBACK = dict.fromkeys((*range(32), 127, ord('"'), ord("\\"), ord("/"), ord("%")), "_")


@dataclass(frozen=True)
class Span:
    """A range of bytes: `[start, stop)`."""

    start: int
    stop: int


def send(ref: str, place: Place) -> Response:
    """The answer to GET or HEAD of a file."""
    if place.format == "tar":
        return send_tar(ref, place)
    if asks_little():
        return send_part(ref, place)
    return whole(files().open(ref, place.mount_path, place.path))


def asks_little() -> bool:
    """Whether the answer may be less than the whole file, so that the size is wanted first."""
    headers = request.headers
    return request.method == "HEAD" or "Range" in headers or "If-None-Match" in headers


def send_tar(ref: str, place: Place) -> Response:
    download = files().open_tar(ref, place.mount_path, place.path)
    name = posixpath.basename(place.path or place.mount_path) + ".tar"
    response = Response(download.chunks, mimetype=TAR)
    response.headers["Content-Disposition"] = attachment(name)
    return response


def send_part(ref: str, place: Place) -> Response:
    """Looks first, then reads what is wanted and no more."""
    look = files().open(ref, place.mount_path, place.path, 0, 0)
    close(look.chunks)
    if unchanged(look):
        return described(Response(status=304), look)
    if request.method == "HEAD":
        return sized(described(Response(mimetype=OCTETS), look), look.size or 0)
    span = wanted(look)
    if span is None:
        return whole(files().open(ref, place.mount_path, place.path))
    length = span.stop - span.start
    return part(files().open(ref, place.mount_path, place.path, span.start, length), span)


def whole(download: Download) -> Response:
    size = download.size or 0
    return sized(described(Response(exactly(download, size), mimetype=OCTETS), download), size)


def part(download: Download, span: Span) -> Response:
    """Of the file as it is by now: a log that has grown meanwhile is told by its new size."""
    total = download.size or 0
    if span.stop > total:
        close(download.chunks)
        raise BackendFailed("the file was cut short while it was read: ask again")
    length = span.stop - span.start
    response = described(Response(exactly(download, length), 206, mimetype=OCTETS), download)
    response.headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{total}"
    return sized(response, length)


def described(response: Response, download: Download) -> Response:
    if download.etag is not None:
        response.headers["ETag"] = quoted(download.etag)
    response.headers["Accept-Ranges"] = "bytes"
    response.headers["Content-Disposition"] = attachment(posixpath.basename(download.info.name))
    # A sandbox's own HTML must never run with the API's origin, whatever opens it.
    response.headers["Content-Security-Policy"] = "sandbox; default-src 'none'"
    response.headers["Cache-Control"] = "private, no-cache"
    return response


def sized(response: Response, size: int) -> Response:
    response.headers["Content-Length"] = str(size)
    return response


def exactly(download: Download, size: int) -> Iterator[bytes]:
    """Its bytes, or an exception, which ends the connection: a short answer must not look whole."""
    left = size
    try:
        for chunk in download.chunks:
            left -= len(chunk)
            yield chunk
    finally:
        close(download.chunks)
    if left:
        raise BackendFailed(f"{download.info.name!r} changed its size while it was sent")


def close(chunks: Iterator[bytes]) -> None:
    """Generators are told that nobody reads on; what has no `close` needs none."""
    ending = getattr(chunks, "close", None)
    if ending is not None:
        ending()


def quoted(etag: str) -> str:
    return etag if etag.endswith('"') else f'"{etag}"'


def unchanged(download: Download) -> bool:
    given = request.headers.get("If-None-Match")
    if given is None or download.etag is None:
        return False
    return parse_etags(given).contains_weak(quoted(download.etag).strip('"'))


def wanted(download: Download) -> Span | None:
    """The range asked for; None: all of it, as for what cannot be read or holds several ranges."""
    ranges = request.range
    if ranges is None or ranges.units != "bytes" or len(ranges.ranges) != 1:
        return None
    if not current(download):
        return None
    return span_of(*ranges.ranges[0], download.size or 0)


def span_of(start: int, stop: int | None, size: int) -> Span:
    """RFC 9110 section 14.1.2. A negative start: so many of the last bytes, all if it has less."""
    first = max(0, size + start) if start < 0 else start
    if first >= size:
        raise RangeNotSatisfiable(f"the file has {size} bytes", size=size)
    return Span(first, size if stop is None else min(stop, size))


def current(download: Download) -> bool:
    """If-Range: a stale tag (or a date, which says too little) means the whole file."""
    given = request.headers.get("If-Range")
    return given is None or (download.etag is not None and given == quoted(download.etag))


def attachment(name: str) -> str:
    """RFC 6266: a plain form for old clients, and the name itself in UTF-8."""
    readable = shown(name)
    plain = readable.encode("ascii", "replace").decode("ascii").translate(FALLBACK)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(readable, safe='')}"
