"""The wire format between an agent and its host. Imports nothing: the agent's start waits for it.

A frame is `u32 big-endian length of the payload, u8 type, payload`. A header is a bencoded dict,
in the one canonical form: keys sorted and unique, no leading zeros, nothing after the end. Values
are int, bytes, list and dict; a str is written as its bytes. Both sides refuse everything else.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in `typing`, whose import would cost the agent 5 ms
if TYPE_CHECKING:
    from typing import TypeAlias

    Value: TypeAlias = int | bytes | list["Value"] | dict[str, "Value"]
    Writable: TypeAlias = (
        int | bytes | str | list["Writable"] | tuple["Writable", ...] | dict[str, "Writable"]
    )

HEADER, STDOUT, STDERR, STDIN, DATA, END = b"HOEIDF"
KINDS = frozenset(b"HOEIDF")
PREFIX_BYTES = 5
MAX_PAYLOAD_BYTES = 256 * 1024
# A request carries a command's arguments and environment, of which the kernel takes 2 MiB.
MAX_REQUEST_BYTES = 4 * 1024 * 1024
CHUNK_BYTES = 64 * 1024  # a pipe's capacity, and what one read or one data frame carries
MAX_DEPTH = 8
MAX_DIGITS = 20


class FrameError(ValueError):
    """Bytes that are not of this format. The text says which rule they break."""


def frame(kind: int, payload: bytes = b"") -> bytes:
    """One frame, ready to send."""
    return b"%b%c%b" % (len(payload).to_bytes(4, "big"), kind, payload)


def header(fields: dict[str, Writable]) -> bytes:
    """A whole `H` frame."""
    return frame(HEADER, encode(fields))


class Splitter:
    """Cuts a byte stream into frames. Keeps at most one frame beyond what was fed last."""

    def __init__(self, max_header: int = MAX_PAYLOAD_BYTES) -> None:
        self._buffer = bytearray()
        self._max_header = max_header

    def feed(self, received: bytes) -> None:
        self._buffer += received

    def next(self) -> tuple[int, bytes] | None:
        """The next whole frame, None while there is none. Raises `FrameError`."""
        buffer = self._buffer
        if len(buffer) < PREFIX_BYTES:
            return None
        kind, end = buffer[4], PREFIX_BYTES + int.from_bytes(buffer[:4], "big")
        self._check(kind, end - PREFIX_BYTES)
        if len(buffer) < end:
            return None
        payload = bytes(buffer[PREFIX_BYTES:end])
        del buffer[:end]
        return kind, payload

    def _check(self, kind: int, length: int) -> None:
        if kind not in KINDS:
            raise FrameError(f"unknown frame type {kind}")
        if length > (self._max_header if kind == HEADER else MAX_PAYLOAD_BYTES):
            raise FrameError(f"a frame of {length} bytes")

    @property
    def begun(self) -> bool:
        """Part of a frame has come, and the rest has not."""
        return bool(self._buffer)


def text(value: bytes) -> str:
    """A byte string as Python's own file names have it: every byte survives."""
    return value.decode("utf-8", "surrogateescape")


def raw(value: str) -> bytes:
    """The bytes that `text` came from; what is not encodable at all becomes `?`."""
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return value.encode("utf-8", "replace")


def encode(value: Writable) -> bytes:
    """The canonical bencoding."""
    parts: list[bytes] = []
    _write(value, parts)
    return b"".join(parts)


def _write(value: Writable, parts: list[bytes]) -> None:
    if isinstance(value, str):
        value = raw(value)
    if isinstance(value, bytes):
        parts.append(b"%d:%b" % (len(value), value))
    elif isinstance(value, int):
        parts.append(b"i%de" % value)
    elif isinstance(value, dict):
        parts.append(b"d")
        for key, item in sorted([(raw(key), item) for key, item in value.items()], key=_first):
            parts.append(b"%d:%b" % (len(key), key))
            _write(item, parts)
        parts.append(b"e")
    else:
        parts.append(b"l")
        for item in value:
            _write(item, parts)
        parts.append(b"e")


def _first(pair: tuple[bytes, Writable]) -> bytes:
    return pair[0]


def decode(payload: bytes) -> Value:
    """The value that is bencoded there, and nothing besides. Raises `FrameError`."""
    value, end = _read(payload, 0, 0)
    if end != len(payload):
        raise FrameError("bytes after the end of the value")
    return value


def decode_header(payload: bytes) -> dict[str, Value]:
    """The dict that a header is. Raises `FrameError`."""
    value = decode(payload)
    if not isinstance(value, dict):
        raise FrameError("a header that is not a dict")
    return value


def _read(payload: bytes, at: int, depth: int) -> tuple[Value, int]:
    if depth > MAX_DEPTH:
        raise FrameError("nested too deeply")
    mark = payload[at : at + 1]
    if mark == b"i":
        return _read_int(payload, at + 1, b"e")
    if mark == b"l":
        return _read_list(payload, at + 1, depth)
    if mark == b"d":
        return _read_dict(payload, at + 1, depth)
    return _read_bytes(payload, at)


def _read_int(payload: bytes, at: int, stop: bytes) -> tuple[int, int]:
    end = payload.find(stop, at, at + MAX_DIGITS + 2)
    if end < 0:
        raise FrameError("a number without an end")
    digits = payload[at:end]
    value = _number(digits[1:]) if digits[:1] == b"-" else _number(digits)
    if digits[:1] == b"-":
        if value == 0:
            raise FrameError("minus zero")
        value = -value
    return value, end + 1


def _number(digits: bytes) -> int:
    # bytes.isdigit() is ASCII only, unlike str's.
    if not digits.isdigit() or (digits[:1] == b"0" and digits != b"0"):
        raise FrameError("not a number in its one form")
    return int(digits)


def _read_bytes(payload: bytes, at: int) -> tuple[bytes, int]:
    length, start = _read_int(payload, at, b":")
    if not 0 <= length <= len(payload) - start:
        raise FrameError("a string longer than its frame")
    return payload[start : start + length], start + length


def _read_list(payload: bytes, at: int, depth: int) -> tuple[list[Value], int]:
    values: list[Value] = []
    while payload[at : at + 1] != b"e":
        value, at = _read(payload, at, depth + 1)
        values.append(value)
    return values, at + 1


def _read_dict(payload: bytes, at: int, depth: int) -> tuple[dict[str, Value], int]:
    values: dict[str, Value] = {}
    last = None
    while payload[at : at + 1] != b"e":
        key, at = _read_bytes(payload, at)
        if last is not None and key <= last:
            raise FrameError("keys out of order")
        last = key
        values[text(key)], at = _read(payload, at, depth + 1)
    return values, at + 1
