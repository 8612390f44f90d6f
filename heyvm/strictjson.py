"""JSON read so that it means one thing to every reader."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from heyvm.errors import BadRequest

MAX_JSON_DEPTH = 64
MAX_INT_DIGITS = 308  # a double, which is what most clients read numbers as, ends there


def parse_json(text: bytes) -> Any:
    """One JSON value in which nothing is left to the reader's taste.

    No NaN, no number that a double cannot hold, no key twice, no half of a surrogate pair, no more
    than `MAX_JSON_DEPTH` levels. Raises `BadRequest`.
    """
    try:
        value = _DECODER.decode(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise BadRequest("the JSON is nested too deep") from error
    _check(value, text)
    return value


def _check(value: Any, text: bytes) -> None:
    if text.count(b"[") + text.count(b"{") > MAX_JSON_DEPTH:
        _check_depth(value)
    if b"\\u" in text:
        _check_text(value)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        inner = (child for parent in level for child in _children(parent))
        level = [child for child in inner if isinstance(child, dict | list)]
        if not level:
            return
    raise BadRequest(f"the JSON is nested deeper than {MAX_JSON_DEPTH} levels")


def _check_text(value: Any) -> None:
    """An escaped half of a surrogate pair is no character: it cannot be written as UTF-8."""
    if isinstance(value, str) and not _is_text(value):
        raise BadRequest("the JSON holds half of a surrogate pair")
    if isinstance(value, dict):
        _check_text(list(value))
    for child in _children(value):
        _check_text(child)


def _is_text(value: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise BadRequest("a key stands twice in one JSON object")
    return made


def _integer(digits: str) -> int:
    if len(digits) > MAX_INT_DIGITS:
        raise BadRequest("a number in the JSON is too large")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise BadRequest("a number in the JSON is too large")
    return value


def _constant(name: str) -> NoReturn:
    raise BadRequest(f"{name} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
)
