"""Who gets in."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from flask.testing import FlaskClient

from heyvm.errors import Misconfigured
from heyvm.tokens import MAX_TOKEN_BYTES, make_token
from tests.fake_domain import fake_app, problem

pytest_plugins = ["tests.fake_domain"]

SECRET = "my-secret-key"
DAY_S = 86_400


def encoded(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def signed(header: Any, claims: Any, secret: str = SECRET) -> str:
    text = f"{encoded(header)}.{encoded(claims)}"
    return f"{text}.{encoded(hmac.digest(secret.encode(), text.encode(), hashlib.sha256))}"


def token(**claims: Any) -> str:
    return signed({"alg": "HS256", "typ": "JWT"}, claims)


@pytest.fixture
def locked(tmp_path: Path) -> FlaskClient:
    return fake_app(tmp_path, jwt_secret=SECRET).app.test_client()


@pytest.fixture
def addressed(tmp_path: Path) -> FlaskClient:
    return fake_app(tmp_path, jwt_secret=SECRET, jwt_audience="heyvm").app.test_client()


def ask(client: FlaskClient, authorization: str | None, path: str = "/sandboxes") -> Any:
    headers = {} if authorization is None else {"Authorization": authorization}
    return client.get(path, headers=headers)


def refused(answer: Any) -> dict[str, Any]:
    body = problem(answer, 401, "unauthorized")
    assert answer.headers["WWW-Authenticate"].startswith('Bearer realm="heyvm"')
    assert SECRET not in answer.text
    return body


def test_a_token_of_the_command_line_is_good(locked: FlaskClient) -> None:
    assert ask(locked, f"Bearer {make_token(SECRET)}").status_code == 200
    assert ask(locked, f"Bearer {make_token(SECRET, ttl_seconds=60)}").status_code == 200
    refused(ask(locked, f"Bearer {make_token('another')}"))
    refused(ask(locked, f"Bearer {make_token(SECRET, ttl_seconds=-60)}"))


def test_a_token_says_what_it_was_asked_to(addressed: FlaskClient) -> None:
    made = make_token(SECRET, audience="heyvm", subject="ci", ttl_seconds=60)
    claims = jwt.decode(made, SECRET, algorithms=["HS256"], audience="heyvm")
    assert claims["sub"] == "ci"
    assert claims["exp"] - claims["iat"] == 60
    assert ask(addressed, f"Bearer {made}").status_code == 200


@pytest.mark.parametrize(
    "claims",
    [
        {},
        {"exp": time.time() + DAY_S},
        {"exp": 10**15},
        {"nbf": time.time() - 1},
        {"nbf": time.time() + 5},
        {"aud": "anything"},
        {"aud": ["a", "b"]},
        {"iat": time.time() + DAY_S},
        {"iss": "anybody", "sub": 7, "jti": 7},
    ],
)
def test_good_claims(claims: dict[str, Any], locked: FlaskClient) -> None:
    assert ask(locked, f"Bearer {token(**claims)}").status_code == 200


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": time.time() - 60},
        {"exp": 0},
        {"exp": -1},
        {"exp": "soon"},
        {"exp": None},
        {"exp": []},
        {"nbf": time.time() + DAY_S},  # from when it was collected, which may be long ago
        {"nbf": "soon"},
        {"nbf": {}},
        {"nbf": 10**300},
    ],
)
def test_bad_claims(claims: dict[str, Any], locked: FlaskClient) -> None:
    refused(ask(locked, f"Bearer {token(**claims)}"))


@pytest.mark.parametrize("audience", ["heyvm", ["heyvm"], ["other", "heyvm"]])
def test_the_right_audience(audience: Any, addressed: FlaskClient) -> None:
    assert ask(addressed, f"Bearer {token(aud=audience)}").status_code == 200


@pytest.mark.parametrize("audience", ["other", "HEYVM", "heyvm ", ["other"], [], "", None, 7, {}])
def test_the_wrong_audience(audience: Any, addressed: FlaskClient) -> None:
    refused(ask(addressed, f"Bearer {token(aud=audience)}"))


def test_no_audience_where_one_is_wanted(addressed: FlaskClient) -> None:
    assert "aud" in refused(ask(addressed, f"Bearer {token()}"))["detail"]


GOOD = token()
HEAD, CLAIMS, SIGNATURE = GOOD.split(".")


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "x",
        "a.b.c",
        "..",
        f"{HEAD}.{CLAIMS}.",
        f"{HEAD}.{CLAIMS}",
        f"{HEAD}.{CLAIMS}.{SIGNATURE[:-4]}",
        f"{GOOD}AAAA",
        f"{GOOD}.",
        f"{GOOD}=",
        f"{GOOD},{GOOD}",
        f"{GOOD} {GOOD}",
        GOOD.replace("-", "+").replace("_", "/") + "+",
        f"{HEAD}.{CLAIMS}.{SIGNATURE[:-1]}" + chr(ord(SIGNATURE[-1]) ^ 1),
        jwt.encode({}, None, algorithm="none"),  # type: ignore[arg-type]
        f"{encoded({'alg': 'none'})}.{CLAIMS}.",
        f"{encoded({'alg': 'none'})}.{CLAIMS}.{SIGNATURE}",
        signed({"alg": "none"}, {}),
        signed({"alg": "RS256"}, {}),
        signed({"alg": "HS512"}, {}),
        signed({"alg": "hs256"}, {}),
        signed({}, {}),
        signed({"alg": ["HS256"]}, {}),
        signed({"alg": "HS256", "crit": ["exp"], "exp": 1}, {}),
        signed({"alg": "HS256", "b64": False, "crit": ["b64"]}, {}),
        signed([], {}),
        signed({"alg": "HS256"}, []),
        signed({"alg": "HS256"}, b"not json"),
        signed({"alg": "HS256"}, b'{"exp": 1, "exp": 99999999999}'),
        signed(b'{"alg": "none", "alg": "HS256"}', {}),
        signed(b"[" * 4000, {}),
        signed({"alg": "HS256"}, b'{"a":' * 1000),
        signed({"alg": "HS256"}, b'{"exp": NaN}'),
        "A" * (MAX_TOKEN_BYTES + 1),
        "A" * 1_000_000,
        token(pad="x" * MAX_TOKEN_BYTES),
    ],
)
def test_a_bad_token(bad: str, locked: FlaskClient) -> None:
    began = time.monotonic()
    refused(ask(locked, f"Bearer {bad}"))
    assert time.monotonic() - began < 0.5


@pytest.mark.parametrize(
    "header",
    [
        {"jku": "http://127.0.0.1:9/keys"},
        {"x5u": "http://127.0.0.1:9/cert"},
        {"jwk": {"kty": "oct", "k": "AAAA"}},
        {"kid": "../../dev/null"},
        {"kid": "' OR 1=1 --"},
    ],
)
def test_no_header_chooses_the_key(header: dict[str, Any], locked: FlaskClient) -> None:
    whole = {"alg": "HS256", **header}
    assert ask(locked, f"Bearer {signed(whole, {})}").status_code == 200
    refused(ask(locked, f"Bearer {signed(whole, {}, '')}"))
    refused(ask(locked, f"Bearer {signed(whole, {}, chr(0) * 3)}"))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  ", " Bearer"])
def test_the_scheme_by_any_spelling(scheme: str, locked: FlaskClient) -> None:
    assert ask(locked, f"{scheme} {GOOD}").status_code == 200


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", GOOD, f"Basic {GOOD}", f"Token {GOOD}"]
)
def test_another_scheme_is_no_token(header: str, locked: FlaskClient) -> None:
    refused(ask(locked, header))


def test_a_token_in_the_query_is_no_token(locked: FlaskClient) -> None:
    refused(locked.get(f"/sandboxes?token={GOOD}&access_token={GOOD}"))


def test_no_token_at_all_is_told_apart(locked: FlaskClient) -> None:
    assert ask(locked, None).headers["WWW-Authenticate"] == 'Bearer realm="heyvm"'
    assert "invalid_token" in ask(locked, "Bearer x").headers["WWW-Authenticate"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/sandboxes"),
        ("HEAD", "/sandboxes"),
        ("OPTIONS", "/sandboxes"),
        ("POST", "/sandboxes"),
        ("DELETE", "/sandboxes"),
        ("GET", "/sandboxes/box"),
        ("POST", "/sandboxes/box/execute"),
        ("GET", "/sandboxes/box/files/x"),
        ("GET", "/capabilities"),
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/docs/docs.js"),
        ("GET", "/nope"),
        ("GET", "/healthy"),
        ("GET", "/health/../sandboxes"),
        ("GET", "/authx"),
    ],
)
def test_every_other_route_needs_it(method: str, path: str, locked: FlaskClient) -> None:
    answer = locked.open(path, method=method)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_health_needs_none(method: str, locked: FlaskClient) -> None:
    assert locked.open("/health", method=method).status_code == 200


def test_a_token_is_not_needed_and_not_looked_at_on_an_open_server(api: FlaskClient) -> None:
    assert ask(api, None).status_code == 200
    assert ask(api, "Bearer nonsense").status_code == 200


def test_a_public_key_is_no_secret() -> None:
    with pytest.raises(Misconfigured, match="JWT_SECRET"):
        make_token("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----")


def test_another_machine_with_a_token_is_let_in(locked: FlaskClient) -> None:
    answer = locked.get(
        "/sandboxes",
        headers={"Authorization": f"Bearer {GOOD}"},
        environ_overrides={"REMOTE_ADDR": "203.0.113.7"},
    )
    assert answer.status_code == 200
