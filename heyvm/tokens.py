"""Who may call: bearer tokens (HS256), and the signed links and cookies of private endpoints.

Knows neither routes nor sandboxes. The only module that imports jwt and itsdangerous.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jwt
from itsdangerous import BadSignature, URLSafeTimedSerializer
from jwt.algorithms import HMACAlgorithm
from jwt.types import Options
from jwt.warnings import InsecureKeyLengthWarning

from heyvm.errors import BadRequest, Forbidden, Misconfigured, Unauthorized
from heyvm.origins import is_local
from heyvm.settings import Settings
from heyvm.strictjson import parse_json

MAX_TOKEN_BYTES = 8 * 1024
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
LINK_S = 300
COOKIE_S = 12 * 60 * 60
MAX_PASS_BYTES = 512  # ours have a third of that
BAD_LINK = "the link is not good for this endpoint, or no longer: ask for another"


def admit(environ: Mapping[str, Any], settings: Settings) -> Mapping[str, Any]:
    """The claims of whoever may use the API; empty ones on a server without JWT_SECRET.

    Raises `Unauthorized`, or `Forbidden` on an open server that is asked from another machine.
    """
    if settings.jwt_secret is not None:
        given = environ.get("HTTP_AUTHORIZATION")
        return verify(given, settings.jwt_secret, settings.jwt_audience)
    if not (settings.allow_open or is_local(environ)):
        raise Forbidden(OPEN_REFUSED)
    return {}


def subject_of(claims: Mapping[str, Any]) -> str | None:
    """Whose token it is, as far as it says."""
    subject = claims.get("sub")
    return subject if isinstance(subject, str) else None


class Passes:
    """Links and cookies that open a private endpoint to a browser.

    Each is good for one endpoint, one purpose and a time. They end with the endpoint, and all of
    them when JWT_SECRET changes; making an endpoint public and private again does not end them.
    `key` is asked at the first use, not before.
    """

    def __init__(self, key: Callable[[], bytes], secret: str | None) -> None:
        self._key, self._secret = key, secret or ""
        self._signers: dict[str, URLSafeTimedSerializer] = {}

    def link(self, subdomain: str) -> str:
        """Good for `LINK_S` seconds, and only to get a cookie."""
        return self._sign("link", subdomain)

    def cookie(self, subdomain: str) -> str:
        """Good for `COOKIE_S` seconds."""
        return self._sign("cookie", subdomain)

    def check_link(self, text: str, subdomain: str) -> None:
        """Raise `Unauthorized` unless `text` is a link's token for this endpoint."""
        if not self._is_good("link", text, subdomain, LINK_S):
            raise Unauthorized(BAD_LINK)

    def is_cookie(self, text: str, subdomain: str) -> bool:
        """Whether `text` is a good cookie for this endpoint."""
        return self._is_good("cookie", text, subdomain, COOKIE_S)

    def _sign(self, purpose: str, subdomain: str) -> str:
        return str(self._signer(purpose).dumps(subdomain))

    def _is_good(self, purpose: str, text: str, subdomain: str, most_s: int) -> bool:
        if len(text) > MAX_PASS_BYTES or not text.isascii():
            return False
        try:
            decoded(text.rpartition(".")[2])  # a signature has one spelling
            found = self._signer(purpose).loads(text, max_age=most_s)
        except (BadSignature, binascii.Error):
            return False
        return isinstance(found, str) and hmac.compare_digest(found, subdomain)

    def _signer(self, purpose: str) -> URLSafeTimedSerializer:
        if purpose not in self._signers:
            told = b"heyvm endpoints\0" + self._secret.encode("utf-8", "surrogateescape")
            key = hmac.digest(self._key(), told, "sha256")
            self._signers[purpose] = URLSafeTimedSerializer(
                key,
                salt=f"heyvm {purpose}",
                signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
            )
        return self._signers[purpose]


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


def verify(header: str | None, secret: str, audience: str | None) -> Mapping[str, Any]:
    """The claims of the good token in an Authorization header; `Unauthorized` where there is none.

    Says why only as far as the bearer of a token knows it anyway.
    """
    token = bearer_of(header)
    if len(token) > MAX_TOKEN_BYTES or not COMPACT.fullmatch(token):
        raise Unauthorized(f"that is no token: {HOW}")
    check_form(token)
    try:
        claims: dict[str, Any] = jwt.decode(
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
    return claims


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
