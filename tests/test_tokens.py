"""Links and cookies of private endpoints, and what a token says. tests/test_api_auth.py has the
rest of bearer tokens, over HTTP."""

from __future__ import annotations

import time
from typing import Any

import pytest

from heyvm import tokens
from heyvm.errors import Unauthorized
from heyvm.tokens import COOKIE_S, LINK_S, Passes, make_token, subject_of, verify

SECRET = "a secret of at least thirty-two bytes"
KEY = b"k" * 32
NAME, OTHER = "a" * 16, "b" * 16


def passes(key: bytes = KEY, secret: str | None = SECRET) -> Passes:
    return Passes(lambda: key, secret)


def is_link(text: str, name: str = NAME, by: Passes | None = None) -> bool:
    try:
        (by or passes()).check_link(text, name)
    except Unauthorized:
        return False
    return True


def test_a_link_and_a_cookie_are_good_for_what_they_were_made_for() -> None:
    link, cookie = passes().link(NAME), passes().cookie(NAME)

    assert is_link(link)
    assert passes().is_cookie(cookie, NAME)
    assert not is_link(link, OTHER)
    assert not passes().is_cookie(cookie, OTHER)
    assert not is_link(cookie)
    assert not passes().is_cookie(link, NAME)


def test_a_link_and_a_cookie_have_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    link, cookie = passes().link(NAME), passes().cookie(NAME)
    now = time.time()

    monkeypatch.setattr(time, "time", lambda: now + LINK_S - 2)
    assert is_link(link)
    monkeypatch.setattr(time, "time", lambda: now + LINK_S + 2)
    assert not is_link(link)
    assert passes().is_cookie(cookie, NAME)
    monkeypatch.setattr(time, "time", lambda: now + COOKIE_S + 2)
    assert not passes().is_cookie(cookie, NAME)


def test_another_secret_or_key_ends_them_all() -> None:
    for made, asked in [
        (passes(), passes(secret="another secret of thirty-two bytes")),
        (passes(), passes(secret=None)),
        (passes(secret=None), passes()),
        (passes(), passes(key=b"l" * 32)),
    ]:
        assert not is_link(made.link(NAME), by=asked)
        assert not asked.is_cookie(made.cookie(NAME), NAME)
    assert is_link(passes(secret=None).link(NAME), by=passes(secret=None))


def test_every_letter_counts() -> None:
    link = passes().link(NAME)
    for at in range(len(link)):
        for letter in "A.-é\0":
            if link[at] != letter:
                assert not is_link(link[:at] + letter + link[at + 1 :])


@pytest.mark.parametrize("text", ["", ".", "..", "...", "x" * 10_000, "é", "\0", " ", '"a".b.c'])
def test_nonsense_is_none(text: str) -> None:
    assert not is_link(text)
    assert not passes().is_cookie(text, NAME)


def test_they_fit_into_a_url_and_a_cookie() -> None:
    for made in (passes().link(NAME), passes().cookie(NAME)):
        assert len(made) < 200
        assert all(letter.isalnum() or letter in "._-" for letter in made)
        assert SECRET not in made


def test_the_key_is_asked_for_late_and_once() -> None:
    asked: list[int] = []

    def key() -> bytes:
        asked.append(1)
        return KEY

    made = Passes(key, SECRET)
    assert asked == []
    for _ in range(5):
        made.cookie(NAME)
    assert asked == [1]


@pytest.mark.parametrize(
    ("claims", "subject"),
    [({"sub": "ci"}, "ci"), ({}, None), ({"sub": 7}, None), ({"sub": []}, None)],
)
def test_a_subject_is_a_text(claims: dict[str, Any], subject: str | None) -> None:
    assert subject_of(claims) == subject


def test_a_good_token_gives_its_claims() -> None:
    header = f"Bearer {make_token(SECRET, subject='ci', ttl_seconds=60)}"

    claims = verify(header, SECRET, None)

    assert claims["sub"] == "ci"
    assert claims["exp"] - claims["iat"] == 60


def test_the_key_of_links_is_not_the_secret_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    real = tokens.URLSafeTimedSerializer

    def spy(key: bytes, *args: Any, **more: Any) -> Any:
        seen.append(key)
        return real(key, *args, **more)

    monkeypatch.setattr(tokens, "URLSafeTimedSerializer", spy)
    passes().link(NAME)

    assert len(seen[0]) == 32
    assert seen[0] not in (KEY, SECRET.encode())
