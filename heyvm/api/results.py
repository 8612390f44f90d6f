"""What a command printed, as JSON: at once where it is short, else piece by piece.

JSON can be six times what it says (a NUL byte is `\\u0000`), and it says most of it twice: as one
text, 10 MiB would hold 500 MB of a worker for a moment.
"""

from __future__ import annotations

import base64
import codecs
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from flask import Response

from heyvm.models import ExecResult

SHORT_BYTES = 256 * 1024
PIECE_BYTES = 48 * 1024  # a multiple of 3: base64 of the pieces is base64 of the whole
STREAMS = ("output", "stdout", "stderr")
REST = ("exit_code", "duration_ms", "timed_out", "truncated")


def answer(result: ExecResult, encoding: str) -> dict[str, Any] | Response:
    """The body of an execute's answer, for smorest or as a response of its own."""
    if len(result.output) > SHORT_BYTES:
        return Response(pieces(result, ENCODINGS[encoding]), mimetype="application/json")
    texts = {name: "".join(ENCODINGS[encoding](getattr(result, name))) for name in STREAMS}
    return texts | rest(result)


def rest(result: ExecResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in REST}


def pieces(result: ExecResult, texts: Callable[[bytes], Iterator[str]]) -> Iterator[bytes]:
    opening = b"{"
    for name in STREAMS:
        yield opening + f'"{name}":"'.encode()
        for text in texts(getattr(result, name)):
            time.sleep(0)  # others have their turn
            yield json.dumps(text, ensure_ascii=False)[1:-1].encode()
        opening = b'",'
    yield b'",' + json.dumps(rest(result), separators=(",", ":"))[1:].encode() + b"\n"


def as_text(raw: bytes) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for start in range(0, len(raw), PIECE_BYTES):
        yield decoder.decode(raw[start : start + PIECE_BYTES])
    yield decoder.decode(b"", True)


def as_base64(raw: bytes) -> Iterator[str]:
    for start in range(0, len(raw), PIECE_BYTES):
        yield base64.b64encode(raw[start : start + PIECE_BYTES]).decode("ascii")


ENCODINGS = {"utf-8": as_text, "base64": as_base64}
