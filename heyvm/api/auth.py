"""Who may call: bearer tokens (HS256), the machine itself, and pages of no other origin.

Knows neither routes nor sandboxes. The only module that imports jwt.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
import warnings
from collections.abc import Mapping
from typing import Any

import jwt
from jwt.algorithms import HMACAlgorithm
from jwt.types import Options
from jwt.warnings import InsecureKeyLengthWarning

from heyvm.api.bodies import parse_json
from heyvm.api.limits import MAX_TOKEN_BYTES
from heyvm.api.origins import Machine, check_host, check_origin, is_local
from heyvm.errors import BadRequest, Forbidden, Misconfigured, Unauthorized
from heyvm.settings import Settings

ALGORITHM = "HS256"
LEEWAY_S = 10  # two clocks that are kept by NTP
COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
# `exp`, `nbf` and, where it is configured, `aud` are ours to check; the rest is the issuer's own.
CHECKS: Options = {
    "verify_signature": True,
    "verify_exp": True,
    "verify_nbf": True,
    "verify_iat": False,
    "verify_iss": False,
    "verify_sub": False,
    "verify_jti": False,
}
HOW = "send it as `Authorization: Bearer <token>`; `heyvm token` makes one"
OPEN_REFUSED = (
    "this server has no JWT_SECRET, so it answers only the machine that it runs on: set JWT_SECRET,"
    " or set HEYVM_ALLOW_OPEN=1 to let everybody who can reach it run commands"
)


class Guard:
    """Decides on each request before any view sees it. One per server."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._machine = Machine()
        if settings.jwt_secret is not None:
            prepare(settings.jwt_secret)

    def check(self, environ: Mapping[str, Any], *, bearer: bool = True) -> None:
        """Raise `BadRequest`, `Forbidden` or `Unauthorized`; `bearer=False`: no token is needed."""
        check_host(environ, self._settings.api_hostname, self._machine)
        check_origin(environ)
        if self._settings.jwt_secret is None:
            self._check_open(environ)
        elif bearer:
            verify(
                environ.get("HTTP_AUTHORIZATION"),
                self._settings.jwt_secret,
                self._settings.jwt_audience,
            )

    def _check_open(self, environ: Mapping[str, Any]) -> None:
        if not (self._settings.allow_open or is_local(environ)):
            raise Forbidden(OPEN_REFUSED)


def prepare(secret: str) -> None:
    """See that the secret can be one: PyJWT refuses what looks like a public key."""
    try:
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
    except (jwt.InvalidKeyError, UnicodeEncodeError) as error:
        raise Misconfigured(f"JWT_SECRET cannot be used: {error}") from None
    # Told once, at start, by the settings' own notice; not on every request.
    warnings.filterwarnings("ignore", category=InsecureKeyLengthWarning)


def make_token(
    secret: str,
    *,
    audience: str | None = None,
    subject: str | None = None,
    ttl_seconds: float | None = None,
) -> str:
    """A token that a server with this secret accepts; without `ttl_seconds`, for ever."""
    prepare(secret)
    now = int(time.time())
    expires = None if ttl_seconds is None else int(now + ttl_seconds)
    claims = {"iat": now, "exp": expires, "aud": audience, "sub": subject}
    said = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(said, secret, algorithm=ALGORITHM)


def verify(header: str | None, secret: str, audience: str | None) -> None:
    """Raise `Unauthorized` unless the Authorization header carries a good token.

    Says why only as far as the bearer of a token knows it anyway.
    """
    token = bearer_of(header)
    if len(token) > MAX_TOKEN_BYTES or not COMPACT.fullmatch(token):
        raise Unauthorized(f"that is no token: {HOW}")
    check_form(token)
    try:
        jwt.decode(
            token,
            secret,
            algorithms=[ALGORITHM],
            audience=audience,
            options={**CHECKS, "verify_aud": audience is not None},
            leeway=LEEWAY_S,
        )
    except jwt.ExpiredSignatureError:
        raise Unauthorized("the token has expired") from None
    except jwt.ImmatureSignatureError:
        raise Unauthorized("the token is not valid yet (nbf)") from None
    except (jwt.InvalidAudienceError, jwt.MissingRequiredClaimError):
        raise Unauthorized("the token is not meant for this server (aud)") from None
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError):
        raise Unauthorized(f"the token is not good: {HOW}") from None


def bearer_of(header: str | None) -> str:
    scheme, _, token = (header or "").strip().partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthorized(f"a bearer token is needed: {HOW}")
    return token.strip()


def check_form(token: str) -> None:
    """One spelling for one token: canonical base64url, and JSON without keys that stand twice."""
    header, claims, signature = token.split(".")
    try:
        parse_json(decoded(header))
        parse_json(decoded(claims))
        decoded(signature)
    except (binascii.Error, BadRequest):
        raise Unauthorized(f"the token is not good: {HOW}") from None


def decoded(segment: str) -> bytes:
    raw = base64.b64decode(segment + "=" * (-len(segment) % 4), altchars=b"-_", validate=True)
    if base64.urlsafe_b64encode(raw).rstrip(b"=").decode() != segment:
        raise binascii.Error("not canonical")
    return raw
