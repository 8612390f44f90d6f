"""A file in JSON on its way in, in constant memory.

`{"mount_path": ..., "file_path": ..., "content": "<base64>"}`: the string of `content` is taken out
while it arrives; what is around it is put together again without it, and then read as strictly as
any other JSON.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator
from typing import Any

from heyvm.api import paths
from heyvm.api.blueprint import load
from heyvm.api.schemas import UploadJson
from heyvm.errors import BadRequest, Invalid, TooLarge
from heyvm.strictjson import parse_json

# Possessive (`++`, `*+`): a string that has not ended yet would otherwise be tried in every way.
TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}\[\]:,]|[^"{}\[\]:,\s]++|\s++', re.DOTALL)
STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
# Two paths fit; and it bounds what is taken apart token by token, while other requests wait.
MAX_AROUND_BYTES = 64 * 1024
AROUND = (
    f"there is no `content` in the first {MAX_AROUND_BYTES} bytes of the JSON, or more after it"
)
LONGEST_ESCAPE = len(rb"\u0000")
DEPTH = {b"{": 1, b"[": 1, b"}": -1, b"]": -1}


class JsonUpload:
    """The pieces of a body, taken apart. `file` may be read once, after `until_file`."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._head = b""  # up to and with the quote that opens the content
        self._rest = b""  # what has been read beyond it
        self._tail: bytes | None = None  # from the quote that closes it

    def until_file(self) -> None:
        """Read up to the first letter of `content`."""
        for piece in self._pieces:
            self._head += piece
            start = content_start(self._head[:MAX_AROUND_BYTES])
            if start is not None:
                self._head, self._rest = self._head[:start], self._head[start:]
                return
            if len(self._head) > MAX_AROUND_BYTES:
                raise TooLarge(AROUND)
        load(UploadJson(), parse_json(self._head))  # says what is wrong with it, if it is JSON
        raise Invalid("content: Must be a string", errors={"content": ["Must be a string."]})

    def settled(self) -> bool:
        """Whether all is known that stands after the content otherwise."""
        try:
            return {"mount_path", "file_path"} <= set(parse_json(self._head + b'"}'))
        except BadRequest:
            return False  # not an end that could be left out: it is told when all has come

    def place(self) -> tuple[str, str]:
        """The mount and the path in it, as far as they have come."""
        tail = b'"}' if self._tail is None else self._tail
        told: dict[str, Any] = load(UploadJson(), parse_json(self._head + tail))
        mount_path = paths.mount_of(told["mount_path"])
        return mount_path, paths.file_path(mount_path, told["file_path"])

    def file(self) -> Iterator[bytes]:
        """The file's bytes; then the rest of the JSON is read, before this ends."""
        yield from decoded(self._texts())
        tail = bytearray(self._rest)
        while len(tail) <= MAX_AROUND_BYTES and (piece := next(self._pieces, b"")):
            tail += piece
        if len(tail) > MAX_AROUND_BYTES:
            raise TooLarge(AROUND)
        self._tail = bytes(tail)
        self.place()

    def _texts(self) -> Iterator[str]:
        """The letters of the content, up to the quote that closes it."""
        while True:
            found = STRING.match(self._rest)
            end = 0 if found is None else found.end()
            closed = self._rest[end : end + 1] == b'"'
            keep = end if closed else whole_escapes(self._rest, end)
            yield parse_json(b'"' + self._rest[:keep] + b'"')
            self._rest = self._rest[keep:]
            if closed:
                return
            self._rest += self._next_piece()

    def _next_piece(self) -> bytes:
        for piece in self._pieces:
            return piece
        raise BadRequest("the JSON ended within `content`")


def content_start(head: bytes) -> int | None:
    """Where the string of the outermost object's `content` begins, if it has come so far."""
    depth, before, last, position = 0, b"", b"", 0
    while position < len(head):
        if depth == 1 and last == b":" and head[position] == ord('"') and is_content(before):
            return position + 1
        found = TOKEN.match(head, position)
        if found is None:
            return None
        position, token = found.end(), found[0]
        depth += DEPTH.get(token, 0)
        if not token.isspace():
            before, last = last, token
    return None


def is_content(key: bytes) -> bool:
    """Whether a key, with its quotes, is `content` (in whatever escapes)."""
    try:
        return bool(json.loads(key) == "content")
    except ValueError:
        return False


def whole_escapes(text: bytes, end: int) -> int:
    """An end at or before `end` at which no escape is cut in two."""
    cut = text.rfind(b"\\", max(0, end - LONGEST_ESCAPE), end)
    return end if cut < 0 else cut


def decoded(texts: Iterator[str]) -> Iterator[bytes]:
    """The bytes that base64 stands for; line breaks in it are fine, as `base64` prints them."""
    carry, padded = "", False
    for text in texts:
        letters = carry + "".join(text.split())
        if padded and letters:
            raise BadRequest("content is not base64: there is more after its padding")
        whole = len(letters) - len(letters) % 4
        carry = letters[whole:]
        padded = letters[:whole].endswith("=")
        yield from_quads(letters[:whole])
    if carry:
        raise BadRequest("content is not base64: its length is not a multiple of four")


def from_quads(letters: str) -> bytes:
    try:
        return base64.b64decode(letters.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise BadRequest(f"content is not base64: {error}") from None
