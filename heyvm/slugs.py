"""Slugs: the names that stand in paths and host names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Set
from itertools import count

LONGEST = 63  # a DNS label, RFC 1035 section 2.3.4
LONGEST_SUFFIX = 8  # -9999999: more than any machine holds
# `/sandboxes/<word>` is a route of its own: a sandbox of that slug could never be reached.
ROUTE_WORDS = frozenset({"inactive"})
RULE = "lower-case ASCII letters, digits and hyphens, at most 63, a letter or digit at both ends"
_SLUG = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_ID = re.compile(r"sb-[0-9a-f]{8}")


def is_slug(text: str) -> bool:
    """Whether `text` has the form of a slug."""
    return _SLUG.fullmatch(text) is not None


def is_id(text: str) -> bool:
    """Whether `text` has the form of a sandbox's id; no slug may, but a sandbox's own id."""
    return _ID.fullmatch(text) is not None


def slugify(name: str) -> str:
    """The slug that a name gives, or an empty string where it has no usable letter or digit."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:LONGEST].rstrip("-")


def first_free(base: str, taken: Callable[[str], Set[str]]) -> str:
    """`base`, or `base-2`, `base-3`...: the first that is not taken, a route word or an id's form.

    `taken(prefix)` gives the slugs in use that begin with `prefix`; it is called once.
    """
    used = taken(base[: LONGEST - LONGEST_SUFFIX].rstrip("-"))
    if base not in used | ROUTE_WORDS and not is_id(base):
        return base
    suffixes = (f"-{number}" for number in count(2))
    candidates = (base[: LONGEST - len(suffix)].rstrip("-") + suffix for suffix in suffixes)
    return next(slug for slug in candidates if slug not in used)
