"""marshmallow fields that take a value for what JSON says it is, and say so in the document.

marshmallow's own read `"1"` as 1, `1` as True and take half a surrogate pair for text.
"""

from __future__ import annotations

import ipaddress
import math
import posixpath
import re
import time
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from marshmallow import ValidationError, fields
from marshmallow.validate import Length, Range, Validator

from heyvm.files import MAX_NAME_BYTES, MAX_PATH_BYTES
from heyvm.models import Network

MOST_COMPLAINTS = 20  # about the items of one list
PAUSE_EVERY = 500  # items of an answer: the worker has other requests
NETWORK_WORDS = ("egress", "none")
MOST_CIDRS = 256
V4_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
ENV_NAME = re.compile(r"[^=\x00]+")


class Text(fields.String):
    """A string that can be handed to the kernel and to SQLite: no NUL, no half of a pair."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        text = plain_string(value)
        if "\0" in text:
            raise ValidationError("Must not hold a NUL character.")
        if not _encodes(text):
            raise ValidationError("Must be valid UTF-8.")
        return text


class Whole(fields.Integer):
    """A whole number: 3 and 3.0 (one number, for JSON Schema), not true, not "3"."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> int:
        if isinstance(value, str):
            raise ValidationError("Must be a whole number, without quotes or a unit.")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValidationError("Must be a whole number.")
        if value != math.floor(value):
            raise ValidationError("Must be a whole number.")
        return int(value)


class Number(fields.Float):
    """A number, not true and not "3"."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValidationError("Must be a number.")
        return float(value)


class Flag(fields.Boolean):
    """true or false, not "yes" and not 1."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise ValidationError("Must be true or false.")
        return value


class AbsolutePath(Text):
    """An absolute path, normalised: `//a/./b/` is `/a/b`. `..` is refused, not resolved."""

    def __init__(self, *, metadata: Mapping[str, Any], **options: Any) -> None:
        super().__init__(metadata={"pattern": "^/", **metadata}, **options)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        path = super()._deserialize(value, attr, data, **kwargs)
        if not path.startswith("/"):
            raise ValidationError("Must be an absolute path.")
        if ".." in path.split("/"):
            raise ValidationError("Must not hold `..`.")
        check_lengths(path)
        return "/" + posixpath.normpath(path).lstrip("/")


class FileName(fields.String):
    """A path inside a mount, raw: bytes that are not UTF-8 arrive as surrogates. See paths.py."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        return plain_string(value)


class Items(fields.List[Any]):
    """A list of a request: counted before any of it is looked at, and given up when most of it is
    wrong. A body's worth of items would hold the worker up for a minute."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> list[Any]:
        if not isinstance(value, list):
            raise ValidationError("Must be a list.")
        self._validate(value)
        good, wrong = [], dict[int, Any]()
        for number, item in enumerate(value):
            try:
                good.append(self.inner.deserialize(item, **kwargs))
            except ValidationError as error:
                wrong[number] = error.messages
                if len(wrong) == MOST_COMPLAINTS:
                    break
        if wrong:
            raise ValidationError(wrong)
        return good


class Many(fields.List[Any]):
    """A list of an answer that may be long."""

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> list[Any]:
        written = []
        for number, item in enumerate(value):
            if number % PAUSE_EVERY == PAUSE_EVERY - 1:
                time.sleep(0)
            written.append(self.inner._serialize(item, attr, obj, **kwargs))
        return written


class NetworkField(fields.Field[Network]):
    """`egress`, `none`, or an object with lists of CIDRs; shown the same way."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Network:
        if isinstance(value, str):
            if value not in NETWORK_WORDS:
                raise ValidationError(f"Must be {' or '.join(NETWORK_WORDS)}, or an object.")
            return Network(value)
        if not isinstance(value, dict):
            raise ValidationError(f"Must be {' or '.join(NETWORK_WORDS)}, or an object.")
        lists: dict[str, tuple[str, ...]] = {}
        wrong: dict[str, Any] = {}
        for name, items in value.items():
            try:
                if name not in ("allow", "deny"):
                    raise ValidationError("There is no such field.")
                lists[name] = tuple(map(str, CIDRS.deserialize([] if items is None else items)))
            except ValidationError as error:
                wrong[name] = error.messages
                if len(wrong) == MOST_COMPLAINTS:
                    break
        if wrong:
            raise ValidationError(wrong)
        return Network("egress", **lists)

    def _serialize(self, value: Network | None, attr: str | None, obj: Any, **_: Any) -> Any:
        if value is None or not (value.allow or value.deny):
            return value and value.mode
        return {"allow": list(value.allow), "deny": list(value.deny)}


class Cidr(Text):
    """A network or one address, in its canonical form."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        text = super()._deserialize(value, attr, data, **kwargs)
        try:
            network = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise ValidationError(
                f"{text[:64]!r} is no CIDR: say a network like 203.0.113.0/24 or 2001:db8::/32."
            ) from None
        if str(network.network_address) != str(ipaddress.ip_interface(text).ip):
            raise ValidationError(f"{text} has bits beyond its prefix: {network} is meant?")
        if network.version == 6 and network.subnet_of(V4_MAPPED):
            raise ValidationError(f"{text} stands for IPv4 addresses: write these.")
        return str(network)


class Environment(fields.Dict):
    """Names to values, as a process can have them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keys=Text(), values=Text(), **kwargs)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        loaded: Mapping[str, str]
        if isinstance(value, dict):
            self._validate(value)  # counted first, as in Items
        loaded = super()._deserialize(value, attr, data, **kwargs)  # type: ignore[no-untyped-call]
        wrong = [name for name in loaded if not ENV_NAME.fullmatch(name)]
        if wrong:
            raise ValidationError({wrong[0]: ["A name must not be empty and not hold `=`."]})
        return loaded


class Moment(fields.Field[float]):
    """Seconds since the epoch, shown as RFC 3339 in UTC."""

    def _serialize(self, value: float | None, attr: str | None, obj: Any, **_: Any) -> str | None:
        return None if value is None else rfc3339(value)


class Shown(fields.Field[str]):
    """A name of a file for reading: what is not UTF-8 appears as U+FFFD."""

    def _serialize(self, value: str | None, attr: str | None, obj: Any, **_: Any) -> str | None:
        return None if value is None else shown(value)


class Known(Validator):
    """One of these words today. Unlike OneOf it makes no closed enum in the document."""

    def __init__(self, words: Collection[str]) -> None:
        self.words = words

    def __call__(self, value: str) -> str:
        if value not in self.words:
            raise ValidationError(f"Must be one of: {', '.join(self.words)}.")
        return value


class Form(Validator):
    """Of this form from end to end. The document has it from `metadata`, anchored ECMA's way."""

    def __init__(self, pattern: str, error: str) -> None:
        self.pattern = re.compile(pattern)
        self.complaint = error

    def __call__(self, value: str) -> str:
        if not self.pattern.fullmatch(value):
            raise ValidationError(self.complaint)
        return value


def plain_string(value: Any) -> str:
    if not isinstance(value, str):
        raise ValidationError("Must be a string.")
    return value


def check_lengths(path: str) -> None:
    """The kernel's limits (PATH_MAX with its NUL, NAME_MAX), told before it is asked."""
    raw = path.encode("utf-8", "surrogateescape")
    if len(raw) > MAX_PATH_BYTES:
        raise ValidationError(f"Must have at most {MAX_PATH_BYTES} bytes.")
    if any(len(name) > MAX_NAME_BYTES for name in raw.split(b"/")):
        raise ValidationError(f"A name in it must have at most {MAX_NAME_BYTES} bytes.")


def rfc3339(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def shown(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def between(low: float, high: float) -> Range:
    return Range(min=low, max=high)


def at_most(length: int) -> Length:
    return Length(max=length)


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


CIDRS = Items(Cidr(), validate=at_most(MOST_CIDRS))
