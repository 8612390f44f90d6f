"""The API of a server, as far as `heyvm connect` asks it for tickets."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from heyvm.errors import HeyvmError, Invalid, NotFound, Unauthorized, Unavailable

DEFAULT_API = "http://localhost:3000"
API_VARIABLE = "HEYVM_URL"
TOKEN_VARIABLES = ("HEYVM_API_KEY", "HEYO_API_KEY")
ANSWER_S = 10.0
END_S = 3.0
LONGEST_ANSWER = 1 << 20
LONGEST_DETAIL = 300
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Api:
    """Where a server is, and what lets one in."""

    base: str
    token: str | None

    def begin_session(self, ref: str) -> tuple[str, str]:
        """A new shell session's connection URL and id."""
        answer = self._ask("POST", f"{_path(ref)}/shell-session", {})
        return _text(answer, "connection_url"), _text(answer, "session_id")

    def end_session(self, ref: str, session: str) -> None:
        """As well as it can be done; it would expire."""
        path = f"{_path(ref)}/shell-session/{urllib.parse.quote(session, safe='')}"
        with suppress(HeyvmError):
            self._ask("DELETE", path, timeout=END_S)

    def tunnel(self, ref: str, port: int) -> str:
        """The connection URL of a port inside."""
        answer = self._ask("POST", f"{_path(ref)}/tcp-tunnel", {"port": port})
        return _text(answer, "connection_url")

    def _ask(self, method: str, path: str, body: Any = None, *, timeout: float = ANSWER_S) -> Any:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.base + path, data=data, headers=headers, method=method
        )
        try:
            with self._opener().open(request, timeout=timeout) as answer:
                return json.loads(answer.read(LONGEST_ANSWER) or b"null")
        except urllib.error.HTTPError as refusal:
            raise _problem(refusal, bool(self.token)) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = _plain(str(getattr(error, "reason", error)))
            where = f"{self.base} ({API_VARIABLE} or --api-url says where it is)"
            raise Unavailable(f"no API answers at {where}: {why}") from None

    def _opener(self) -> urllib.request.OpenerDirector:
        handlers: list[Any] = [_NoRedirect]
        if urllib.parse.urlsplit(self.base).hostname in LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        return urllib.request.build_opener(*handlers)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would take the token along to wherever it is sent."""

    def redirect_request(self, *_: Any) -> None:
        return None


def api_of(options: argparse.Namespace) -> Api:
    """What the command line and the environment say."""
    base = options.api_url or os.environ.get(API_VARIABLE) or DEFAULT_API
    if urllib.parse.urlsplit(base).scheme not in ("http", "https"):
        raise Invalid(f"{base!r} is no address of an API: say http://HOST:PORT")
    return Api(base.rstrip("/"), _token(options.token_file))


def _token(path: str | None) -> str | None:
    if path is None:
        found = next((os.environ[one] for one in TOKEN_VARIABLES if os.environ.get(one)), None)
        return found and _checked(found.strip(), "the token")
    try:
        with open(path, encoding="ascii") as file:
            return _checked(file.read(LONGEST_ANSWER).strip(), path)
    except (OSError, UnicodeError) as error:
        raise Invalid(f"cannot read a token in {path}: {error}") from None


def _checked(token: str, where: str) -> str:
    if not token.isascii() or not token.isprintable() or " " in token:
        raise Invalid(f"{where} is no token: a line of ASCII is one")
    return token


def _path(ref: str) -> str:
    return f"/sandboxes/{urllib.parse.quote(ref, safe='')}"


def _text(answer: Any, name: str) -> str:
    value = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(value, str):
        raise Unavailable(f"the API's answer has no {name}: is this a heyvm server?")
    return value


def _problem(refusal: urllib.error.HTTPError, had_token: bool) -> HeyvmError:
    if refusal.code == 401:
        if had_token:
            return Unauthorized("the API does not take this token")
        return Unauthorized("the API asks for a token: set HEYVM_API_KEY, or say --token-file FILE")
    detail = ""
    with suppress(OSError, ValueError, AttributeError, http.client.HTTPException):
        detail = str(json.loads(refusal.read(LONGEST_ANSWER)).get("detail", ""))
    detail = _plain(detail)
    if refusal.code == 404:
        return NotFound(detail or "the API knows no such sandbox")
    return Unavailable(detail or f"the API answers {refusal.code}")


def _plain(text: str) -> str:
    """On one line, harmless to a terminal: a server's words."""
    return "".join(one if one.isprintable() else "?" for one in text)[:LONGEST_DETAIL]
