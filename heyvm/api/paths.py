"""Paths in URLs, byte for byte.

WSGI hands over the path with its percent-encoding undone once, each byte as one Latin-1 character.
Werkzeug then reads that as UTF-8 and puts U+FFFD for what is not, so a file with such a name could
be listed and never fetched: what a view needs of a path is therefore taken from the bytes.
"""

from __future__ import annotations

import os
import posixpath
from urllib.parse import parse_qsl, quote, unquote_to_bytes

from flask import Request, request
from marshmallow import ValidationError
from werkzeug.datastructures import ImmutableMultiDict
from werkzeug.routing import BaseConverter
from werkzeug.utils import cached_property

from heyvm.api.fields import check_lengths
from heyvm.errors import BadRequest, Invalid

MAX_ARGUMENTS = 50
DEFAULT_MOUNT = "/workspace"
OVERLONG = {b".": (b"\xc0\xae", b"\xe0\x80\xae"), b"/": (b"\xc0\xaf", b"\xe0\x80\xaf")}


class Rest(BaseConverter):
    """All of the rest of the path, slashes at its start and an empty rest included."""

    regex = r"[\s\S]*"
    part_isolating = False
    weight = 300


class ImageName(Rest):
    """As `Rest`, but for what is a route of its own. (An image of that name is `pull:latest`.)"""

    regex = r"(?!pull\Z)[\s\S]*"
    part_isolating = False


class ByteRequest(Request):
    """A request whose query arguments keep bytes that are not UTF-8, as surrogates."""

    @cached_property
    def args(self) -> ImmutableMultiDict[str, str]:
        try:
            pairs = parse_qsl(
                self.environ.get("QUERY_STRING", ""),
                keep_blank_values=True,
                errors="surrogateescape",
                max_num_fields=MAX_ARGUMENTS,
            )
        except ValueError as error:
            raise BadRequest(f"more than {MAX_ARGUMENTS} query arguments") from error
        return ImmutableMultiDict(pairs)


def rest_of_path(segments: int) -> str:
    """The request's path after its first `segments` segments, as the file system spells it."""
    raw = request.environ["PATH_INFO"].encode("latin-1")
    return os.fsdecode(raw.split(b"/", segments + 1)[segments + 1])


def within(mount_path: str, path: str) -> str:
    """`path` relative to `mount_path`; one that begins with the mount's own path is taken for that.

    Clients of heyvm send `/workspace/.env` as well as `.env`.
    """
    check_path(path)
    prefix = mount_path.rstrip("/") + "/"
    below = path[len(prefix) :] if path.startswith(prefix) else path
    if below.startswith("/"):
        raise BadRequest(f"the path {path!r} does not lie in the mount {mount_path!r}")
    return "" if below in ("", ".", "./") else posixpath.normpath(below)


def file_path(mount_path: str, path: str) -> str:
    """As `within`, for what must be a file: not the mount itself."""
    found = within(mount_path, path)
    if not found:
        raise Invalid("file_path names no file", errors={"file_path": ["is missing"]})
    return found


def mount_of(path: str) -> str:
    """The mount that a request names, normalised. `BadRequest`."""
    check_path(path)
    return "/" + posixpath.normpath("/" + path).lstrip("/")


def check_path(path: str) -> None:
    """Refuse what is no path, and what means another one to whoever decodes it once more."""
    if any(letter in path for letter in "\0\n\r"):
        raise BadRequest("a path must not hold NUL or line breaks")
    if climbs(path):
        raise BadRequest("a path must not hold `..`, encoded or not")
    try:
        check_lengths(path)
    except ValidationError as error:
        raise BadRequest(f"the path is too long: {error.messages[0]}") from None


def climbs(path: str) -> bool:
    """Whether a component is `..`, also after more percent-decoding or as overlong UTF-8."""
    raw = os.fsencode(path)
    for _ in range(3):
        if b".." in _shortest(raw).split(b"/"):
            return True
        raw = unquote_to_bytes(raw)
    return False


def _shortest(raw: bytes) -> bytes:
    for letter, forms in OVERLONG.items():
        for form in forms:
            raw = raw.replace(form, letter)
    return raw


def url_form(path: str) -> str:
    """The percent-encoded form of a path, slashes kept: what to put into a URL."""
    return quote(os.fsencode(path), safe="/")
