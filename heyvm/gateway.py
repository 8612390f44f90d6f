"""Forwards HTTP to the endpoint that the Host header names, for whoever may use it.

A WSGI application: in gunicorn's workers by Host, in the keeper for the port of one private
endpoint. What authenticates a request to heyvm goes no further than this; what goes further says
anew who asks. Knows no web framework, and of sandboxes only their endpoints.
"""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol
from urllib.parse import parse_qs, quote, unquote_to_bytes

from heyvm import journal
from heyvm.errors import (
    BadRequest,
    Forbidden,
    HeyvmError,
    Invalid,
    NotFound,
    PortClosed,
    Unauthorized,
    Unavailable,
)
from heyvm.models import Endpoint
from heyvm.origins import (
    AUTHORITY,
    Machine,
    came_by_https,
    check_host,
    check_origin,
    check_target,
    client_of,
    label_of,
)
from heyvm.problems import (
    BAD_TOKEN,
    CHALLENGE,
    BadGateway,
    GatewayTimeout,
    kind_of,
    page,
    reason,
)
from heyvm.settings import Settings
from heyvm.tokens import COOKIE_S, LINK_S, Passes, admit, verify
from heyvm.upstream import (
    Cut,
    Exchange,
    Head,
    Headers,
    keep_alive,
    relay,
    reset_on_close,
)

log = logging.getLogger("heyvm.gateway")

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
App = Callable[[Environ, StartResponse], Iterable[bytes]]

SUBDOMAIN = re.compile(r"[a-z0-9]{16}")
RESERVED = "/.heyvm"
ROUTE = "(endpoint)"  # as the metrics call it
# Two Cookie headers reach us as one, joined by a comma; ours has none.
COOKIE = {
    name: re.compile(rf"(?:^|[;,])[ \t]*{name}=([^;,]*)") for name in ("heyvm", "__Host-heyvm")
}
ANY_COOKIE = re.compile(r"(?:^|[;,])[ \t]*(?:__Host-)?heyvm=[^;,]*")
LEFT_OVER = re.compile(r"[;,][ \t]*")
MAX_COOKIES = 8  # of our name: an application next door can set some for its siblings
# A path of this host and no other: neither `//host` nor what browsers take for it.
LOCAL_PATH = re.compile(r"/(?:[!-.0-\[\]-~][!-\[\]-~]*)?")
# RFC 9110 section 7.6.1, and what older proxies say.
HOP_BY_HOP = frozenset(
    {
        "CONNECTION",
        "KEEP-ALIVE",
        "PROXY-AUTHENTICATE",
        "PROXY-AUTHORIZATION",
        "PROXY-CONNECTION",
        "TE",
        "TRAILER",
        "TRANSFER-ENCODING",
        "UPGRADE",
    }
)
# Said anew, or meant for us. `Proxy` would become a setting of CGI programs (httpoxy).
OURS = frozenset(
    {
        "HOST",
        "CONTENT-LENGTH",
        "EXPECT",
        "AUTHORIZATION",
        "COOKIE",
        "FORWARDED",
        "X-REAL-IP",
        "PROXY",
    }
)
OURS_BEGIN = ("X-FORWARDED-", "X-HEYVM-")
# By these, a server inside could have another proxy before us send what files of its own it likes.
FOR_PROXIES = frozenset({"X-ACCEL-REDIRECT", "X-SENDFILE", "X-LIGHTTPD-SEND-FILE"})
# gunicorn writes these two itself, whatever it is given.
OF_GUNICORN = frozenset({"DATE", "SERVER"})
READ_BYTES = 64 * 1024
# After an answer, for the rest of a body that nobody wants: an unread byte would make the kernel
# reset the connection, and the answer with it.
DRAIN_S = 5.0


class Proxies(Protocol):
    """What is asked of proxies.py."""

    def find(self, subdomain: str) -> Endpoint: ...

    def connect(self, endpoint: Endpoint) -> socket.socket: ...


@dataclass(frozen=True)
class Passed:
    """What goes on to the application of the two headers that may have been for us."""

    authorization: str | None
    cookie: str | None


class Gateway:
    """One per process; any number of requests at once. `key` is what links are signed with."""

    def __init__(self, settings: Settings, proxies: Proxies, key: Callable[[], bytes]) -> None:
        self._settings, self._proxies = settings, proxies
        self._passes = Passes(key, settings.jwt_secret)
        self._base = settings.api_hostname or "localhost"
        self._machine = Machine()

    # -- doors -----------------------------------------------------------------------------------

    def wrap(self, app: App) -> App:
        """Requests whose Host is below the base go to an endpoint, all others to `app`."""

        def entry(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
            label = self._label(environ)
            if label is None:
                return app(environ, start_response)
            name_request(environ)
            seen = journal.Witness(environ, start_response, ROUTE)
            return seen.witness(partial(self._answer, label, is_named=True))

        return entry

    def for_port(self, endpoint: Endpoint) -> App:
        """The application behind a private endpoint's own local port.

        There the Host may be localhost too; but cookies count only under the endpoint's own name,
        for a browser sends those of localhost to every port of it.
        """

        def entry(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
            is_named = self._label(environ) == endpoint.subdomain
            name_request(environ)
            seen = journal.Witness(environ, start_response, ROUTE)
            return seen.witness(partial(self._answer, endpoint.subdomain, is_named=is_named))

        return entry

    def link_for(self, endpoint: Endpoint, base_url: str, path: str = "/") -> tuple[str, float]:
        """An address that opens a private endpoint to a browser, and until when. `base_url` must
        be of the endpoint's own name; `Invalid` unless `path` is a path of it."""
        if not LOCAL_PATH.fullmatch(path):
            raise Invalid(
                "path: say one of this endpoint's that begins with /, as /docs?page=2",
                errors={"path": ["Must begin with /, as /docs?page=2"]},
            )
        token = self._passes.link(endpoint.subdomain)
        where = f"{base_url.rstrip('/')}{RESERVED}/enter"
        return f"{where}?token={token}&to={quote(path, safe='/')}", time.time() + LINK_S

    def _label(self, environ: Mapping[str, Any]) -> str | None:
        """What stands before the base in Host; None where it is the API's."""
        found = AUTHORITY.fullmatch(environ.get("HTTP_HOST", ""))
        label = label_of(found[1].lower().removesuffix("."), self._base) if found else None
        if self._settings.api_hostname is None:
            # Other names below localhost are nobody's.
            return label if label is not None and SUBDOMAIN.fullmatch(label) else None
        return None if label == "api" else label

    # -- one request -----------------------------------------------------------------------------

    def _answer(
        self, subdomain: str, environ: Environ, start_response: StartResponse, *, is_named: bool
    ) -> Iterable[bytes]:
        try:
            self._check(environ, is_named)
            endpoint = self._found(subdomain)
            return Call(self, endpoint, environ, start_response, is_named).answer()
        except HeyvmError as error:
            return tell(error, environ, start_response)
        except Cut:
            reset_client(environ)
            raise

    def _check(self, environ: Environ, is_named: bool) -> None:
        if environ["REQUEST_METHOD"] == "CONNECT":
            raise BadRequest("this is no proxy for CONNECT")
        check_target(environ.get("RAW_URI", "/"), environ.get("HTTP_HOST", ""))
        if not is_named:
            check_host(environ, None, self._machine)

    def _found(self, subdomain: str) -> Endpoint:
        if not SUBDOMAIN.fullmatch(subdomain):
            raise NotFound(f"there is no endpoint {subdomain[:100]!r}")
        return self._proxies.find(subdomain)

    # -- who may ---------------------------------------------------------------------------------

    def passed(self, endpoint: Endpoint, environ: Environ, *, is_named: bool) -> Passed:
        """What may go on to the endpoint. Raises `Unauthorized` or `Forbidden` where a private one
        is not for whoever asks."""
        authorization = environ.get("HTTP_AUTHORIZATION")
        cookie = environ.get("HTTP_COOKIE")
        is_ours = self._is_bearer(authorization)
        if not (endpoint.is_public or is_ours):
            check_page(environ)
            if not (is_named and self._has_cookie(endpoint, environ)):
                admit(environ, self._settings)
        kept = None if cookie is None else without_ours(cookie)
        return Passed(None if is_ours else authorization, kept or None)

    def _is_bearer(self, authorization: str | None) -> bool:
        """Whether it is a good token for the API: no application gets it, not even a public one."""
        if authorization is None or self._settings.jwt_secret is None:
            return False
        try:
            verify(authorization, self._settings.jwt_secret, self._settings.jwt_audience)
        except Unauthorized:
            return False
        return True

    def _has_cookie(self, endpoint: Endpoint, environ: Environ) -> bool:
        given = COOKIE[cookie_name(environ)].findall(environ.get("HTTP_COOKIE", ""))
        return any(
            self._passes.is_cookie(value.strip(), endpoint.subdomain)
            for value in given[:MAX_COOKIES]
        )

    def cookie_for(self, endpoint: Endpoint, environ: Environ, token: str) -> str:
        """The Set-Cookie for a good link. `Unauthorized` for another."""
        self._passes.check_link(token, endpoint.subdomain)
        value = self._passes.cookie(endpoint.subdomain)
        secure = "; Secure" if came_by_https(environ) else ""
        return (
            f"{cookie_name(environ)}={value}; Max-Age={COOKIE_S}; Path=/"
            f"{secure}; HttpOnly; SameSite=Lax"
        )

    def connect(self, endpoint: Endpoint) -> socket.socket:
        """A stream to the port inside."""
        try:
            stream = self._proxies.connect(endpoint)
        except (NotFound, PortClosed, Unavailable) as error:
            error.sandbox_id = None
            raise
        except (HeyvmError, OSError) as error:
            # What else it says is for whoever owns the sandbox: this goes to anybody.
            log.info("%s cannot be reached: %s", endpoint.subdomain, error)
            raise BadGateway("the sandbox of this endpoint does not answer") from None
        try:
            self._check_again(endpoint)
        except HeyvmError:
            stream.close()
            raise
        return stream

    def _check_again(self, endpoint: Endpoint) -> None:
        """What was open is cut after the row has changed: who was let in before that, and is
        connected after the cut, would stay in for as long as a WebSocket lasts."""
        now = self._proxies.find(endpoint.subdomain)
        if endpoint.is_public and not now.is_public:
            raise Unavailable("this endpoint was made private a moment ago: try again")


@dataclass(frozen=True)
class Call:
    """One request for one endpoint."""

    gateway: Gateway
    endpoint: Endpoint
    environ: Environ
    start_response: StartResponse
    is_named: bool

    def answer(self) -> Iterable[bytes]:
        path = path_of(target_of(self.environ))
        if path == RESERVED or path.startswith(RESERVED + "/"):
            return self._reserved(path.removeprefix(RESERVED + "/"))
        return self._forward(self._passed())

    def _passed(self) -> Passed:
        return self.gateway.passed(self.endpoint, self.environ, is_named=self.is_named)

    # -- our own paths ---------------------------------------------------------------------------

    def _reserved(self, name: str) -> Iterable[bytes]:
        ways = {"enter": self._enter, "authorize": self._authorize, "why": self._why}
        if name not in ways:
            raise NotFound(f"there is nothing under {RESERVED}/ of that name")
        return ways[name]()

    def _enter(self) -> Iterable[bytes]:
        """From a link to a cookie, and on to where the link leads."""
        asked = query_of(target_of(self.environ))
        where = asked.get("to", "/")
        if self.environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            raise BadRequest("a link is for GET")
        if not LOCAL_PATH.fullmatch(where):
            raise BadRequest("the link leads to no path of this endpoint")
        headers = [("Location", where), ("Referrer-Policy", "no-referrer")]
        if not self.endpoint.is_public:
            if not self.is_named:
                raise BadRequest(
                    f"open it as {self.endpoint.subdomain}.localhost: cookies of other"
                    " names go to every port"
                )
            token = asked.get("token", "")
            headers.append(
                ("Set-Cookie", self.gateway.cookie_for(self.endpoint, self.environ, token))
            )
        return self._empty(303, headers)

    def _authorize(self) -> Iterable[bytes]:
        """For nginx's auth_request: what it may pass on to the endpoint's socket."""
        passed = self._passed()
        told = [
            ("X-Heyvm-Authorization", passed.authorization),
            ("X-Heyvm-Cookie", passed.cookie),
        ]
        return self._empty(204, [(name, value) for name, value in told if value])

    def _why(self) -> Iterable[bytes]:
        """For nginx's error_page: why an endpoint could not be reached. Always raises."""
        self._passed()
        if self.environ.get("HTTP_X_HEYVM_STATUS") == "504":
            raise GatewayTimeout("the server inside did not answer in time")
        self.gateway.connect(self.endpoint).close()
        raise BadGateway("the server inside did not answer as HTTP has it")

    def _empty(self, status: int, headers: Headers) -> Iterable[bytes]:
        ours = [("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff")]
        length = [] if status == 204 else [("Content-Length", "0")]
        self.start_response(f"{status} {reason(status)}", [*headers, *ours, *length])
        return []

    # -- forwarding ------------------------------------------------------------------------------

    def _forward(self, passed: Passed) -> Iterable[bytes]:
        framing, body = self._body()
        upgrade = None if body is not None else upgrade_of(self.environ)
        lines = [
            *framing,
            *forwarded_headers(self.environ, passed),
            *([] if upgrade is None else [("Upgrade", upgrade)]),
            ("Connection", "close" if upgrade is None else "Upgrade"),
        ]
        head = request_head(self.environ, lines)
        exchange = Exchange(self.gateway.connect(self.endpoint), socket_of(self.environ))
        try:
            exchange.send(head, body, chunked=("Transfer-Encoding", "chunked") in framing)
            answer = exchange.head()
            if answer.status == 101:
                return self._upgrade(exchange, answer, upgrade)
            return self._pass_back(exchange, answer)
        except HeyvmError as error:
            told = tell(error, self.environ, self.start_response)
            return Answer(exchange, iter(told), self.environ)
        except BaseException:
            exchange.end()
            raise

    def _body(self) -> tuple[Headers, Iterator[bytes] | None]:
        coding = self.environ.get("HTTP_TRANSFER_ENCODING")
        length = self.environ.get("CONTENT_LENGTH") or None
        if coding is not None:
            if coding.lower() != "chunked":
                raise BadRequest("a Transfer-Encoding other than chunked cannot be passed on")
            return [("Transfer-Encoding", "chunked")], body_of(self.environ)
        if length is None:
            return [], None
        framing = [("Content-Length", str(int(length)))]
        return framing, body_of(self.environ) if int(length) else None

    def _pass_back(self, exchange: Exchange, answer: Head) -> Iterable[bytes]:
        pieces = exchange.body(answer, self.environ["REQUEST_METHOD"])
        status = f"{answer.status} {answer.reason or reason(answer.status)}"
        self.start_response(status, answer_headers(answer, self.environ))
        # WSGI servers hold a head back until there is something of the body, if only nothing.
        return Answer(
            exchange, pieces if exchange.has_more else chain((b"",), pieces), self.environ
        )

    def _upgrade(self, exchange: Exchange, answer: Head, upgrade: str | None) -> Iterable[bytes]:
        """The client's connection becomes the one inside. Returns when both ways have ended, with
        what the servers that this runs in take for the end of a connection: StopIteration."""
        client = socket_of(self.environ)
        became = [value.lower() for value in answer.values("upgrade")]
        if upgrade is None or client is None or became != ["websocket"]:
            raise BadGateway("the server inside changed protocols, which nobody asked for")
        lines = [*answer_headers(answer, {}), ("Connection", "Upgrade"), ("Upgrade", "websocket")]
        inside, down = exchange.take()
        keep_alive(client)
        relay(
            client,
            inside,
            early_bytes(self.environ),
            head_bytes("HTTP/1.1 101 Switching Protocols", lines) + down,
        )
        exchange.end()
        raise StopIteration


class Answer:
    """The body on its way back; closed by the server that this runs in, whatever happens."""

    def __init__(self, exchange: Exchange, pieces: Iterator[bytes], environ: Environ) -> None:
        self._exchange, self._pieces, self._environ = exchange, pieces, environ
        self._patience = DRAIN_S

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            return next(self._pieces)
        except Cut:
            self._patience = 0.0
            reset_client(self._environ)
            raise

    def close(self) -> None:
        """Where the request's body cannot be read to its end, the connection cannot go on."""
        if self._exchange.end(self._patience):
            return
        client = socket_of(self._environ)
        if client is not None:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        raise StopIteration


# -- what is asked -----------------------------------------------------------------------------


def name_request(environ: Environ) -> None:
    """Its X-Request-Id, by which the client, the log and the application know it: the client's own
    where it can stand in a log."""
    environ["HTTP_X_REQUEST_ID"] = journal.request_id_of(environ.get("HTTP_X_REQUEST_ID"))


def target_of(environ: Mapping[str, Any]) -> str:
    """Path and query as they were sent; `*` of OPTIONS too."""
    target = str(environ["RAW_URI"])
    if target.startswith("/") or target == "*":
        return target
    # RFC 9112 section 3.2.2: a server takes this form too. Its authority is checked.
    rest = target.partition("://")[2]
    at = min((rest.find(mark) for mark in "/?#" if mark in rest), default=len(rest))
    return rest[at:] if rest[at:].startswith("/") else "/" + rest[at:]


def path_of(target: str) -> str:
    """The path, decoded: `%2e` is a dot to whoever serves it."""
    return unquote_to_bytes(re.split(r"[?#]", target, maxsplit=1)[0]).decode("latin-1")


def query_of(target: str) -> dict[str, str]:
    """The first value of each name."""
    query = target.partition("?")[2].partition("#")[0]
    found = parse_qs(query, keep_blank_values=True, max_num_fields=10)
    return {name: values[0] for name, values in found.items()}


def socket_of(environ: Mapping[str, Any]) -> socket.socket | None:
    """The client's connection, as gunicorn or localhttp.py has it in the environ."""
    return environ.get("gunicorn.socket") or environ.get("heyvm.socket")


def early_bytes(environ: Mapping[str, Any]) -> bytes:
    """What a client sent behind a request without a body."""
    unreader = environ.get("heyvm.unreader") or environ["wsgi.input"].reader.unreader
    return bytes(unreader.take_buffered())


def body_of(environ: Mapping[str, Any]) -> Iterator[bytes]:
    """The request's body as it comes. gunicorn's own `read` waits for 1 KiB at least, and who
    speaks by turns would wait for ever: this goes one step below it, where it knows the step."""
    stream = environ["wsgi.input"]
    reader = getattr(stream, "reader", None)
    try:
        if hasattr(reader, "parser"):
            yield from _chunks(reader)
        elif hasattr(reader, "unreader"):
            yield from _bytes_of_known_length(reader)
        else:
            yield from iter(partial(stream.read, READ_BYTES), b"")
    except BaseException:
        # Where the next request begins is not known: gunicorn closes the connection then.
        stream.failed = True
        raise


def _chunks(reader: Any) -> Iterator[bytes]:
    yield from reader.parser
    reader.parser = None


def _bytes_of_known_length(reader: Any) -> Iterator[bytes]:
    while reader.length:
        piece = reader.unreader.read(None, read_ahead=min(reader.length, READ_BYTES))
        if not piece:
            raise ConnectionResetError("the body ended too early")
        if len(piece) > reader.length:
            reader.unreader.unread(piece[reader.length :])
            piece = piece[: reader.length]
        reader.length -= len(piece)
        yield piece


def upgrade_of(environ: Mapping[str, Any]) -> str | None:
    """The protocol that a client wants to change to: a WebSocket, or None. Over h2c, a client would
    tell the server inside what authenticates its next requests to us."""
    asked = environ.get("HTTP_UPGRADE", "")
    is_new = environ.get("SERVER_PROTOCOL") == "HTTP/1.1"
    is_meant = is_new and "UPGRADE" in named_in_connection(environ)
    return asked if is_meant and asked.lower() == "websocket" else None


def named_in_connection(environ: Mapping[str, Any]) -> set[str]:
    return {name.strip().upper() for name in environ.get("HTTP_CONNECTION", "").split(",")}


def cookie_name(environ: Mapping[str, Any]) -> str:
    return "__Host-heyvm" if came_by_https(environ) else "heyvm"


def check_page(environ: Mapping[str, Any]) -> None:
    """`Forbidden` for what a page of another origin sends. A browser sends our cookie with that of
    the endpoints next door too: to SameSite, all names below ours are one site."""
    check_origin(environ)
    is_own = environ.get("HTTP_SEC_FETCH_SITE", "none") in ("none", "same-origin")
    if not (is_own or environ.get("HTTP_SEC_FETCH_DEST") == "document"):  # a link was followed
        raise Forbidden("a page of another origin cannot use a private endpoint")


def without_ours(cookie: str) -> str:
    """A Cookie header without what is ours; all else byte for byte."""
    rest = ANY_COOKIE.sub("", cookie)
    if rest == cookie or not ANY_COOKIE.match(cookie):
        return rest
    mark = LEFT_OVER.match(rest)
    return rest[mark.end() :] if mark else rest


# -- what goes in ------------------------------------------------------------------------------


def forwarded_headers(environ: Mapping[str, Any], passed: Passed) -> Headers:
    """The client's own headers, and ours about the client instead of whatever it said itself."""
    return [
        *own_headers(environ),
        *([] if passed.authorization is None else [("Authorization", passed.authorization)]),
        *([] if passed.cookie is None else [("Cookie", passed.cookie)]),
        *headers_about(environ),
    ]


def own_headers(environ: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    dropped = HOP_BY_HOP | OURS | named_in_connection(environ)
    if environ.get("CONTENT_TYPE"):
        yield "Content-Type", environ["CONTENT_TYPE"]
    for key, value in environ.items():
        name = key.removeprefix("HTTP_").replace("_", "-")
        if key.startswith("HTTP_") and name not in dropped and not name.startswith(OURS_BEGIN):
            # WSGI has lost how it was spelled.
            yield name.title().replace("Sec-Websocket", "Sec-WebSocket"), value


def headers_about(environ: Mapping[str, Any]) -> Headers:
    client = client_of(environ)
    scheme = "https" if came_by_https(environ) else "http"
    host = environ.get("HTTP_HOST", "")
    quoted = f'"[{client}]"' if ":" in client else client
    return [
        ("X-Forwarded-For", client),
        ("X-Forwarded-Proto", scheme),
        ("X-Forwarded-Host", host),
        ("X-Real-IP", client),
        ("Forwarded", f'for={quoted};host="{host}";proto={scheme}'),
    ]


def request_head(environ: Mapping[str, Any], lines: Headers) -> bytes:
    first = f"{environ['REQUEST_METHOD']} {target_of(environ)} HTTP/1.1"
    return head_bytes(first, [("Host", environ.get("HTTP_HOST", "")), *lines])


def head_bytes(first: str, headers: Headers) -> bytes:
    lines = [first, *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1")


# -- what comes back ---------------------------------------------------------------------------


def answer_headers(answer: Head, environ: Mapping[str, Any]) -> Headers:
    """What of an answer's headers goes back, duplicates and all."""
    named = {
        name.strip().upper() for value in answer.values("connection") for name in value.split(",")
    }
    dropped = HOP_BY_HOP | FOR_PROXIES | named
    if "gunicorn.socket" in environ:
        dropped |= OF_GUNICORN
    if answer.status < 200:
        dropped |= {"CONTENT-LENGTH"}
    return [(name, value) for name, value in answer.headers if name.upper() not in dropped]


def tell(error: HeyvmError, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    """An error as a problem."""
    request_id = environ["HTTP_X_REQUEST_ID"]
    challenge = BAD_TOKEN if "HTTP_AUTHORIZATION" in environ else CHALLENGE
    status, headers, body = page(error, request_id, challenge=challenge)
    log.debug("%s %s: %s", request_id, kind_of(error).slug, error.detail)
    start_response(f"{status} {reason(status)}", [*headers, ("Referrer-Policy", "no-referrer")])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def reset_client(environ: Mapping[str, Any]) -> None:
    """What is cut short is not to pass for whole; and nobody reads on of what is closed next."""
    client = socket_of(environ)
    if client is not None:
        reset_on_close(client)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RD)
