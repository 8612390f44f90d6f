"""The gateway between real sockets: what goes in, what comes back, and what does neither."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from threading import Thread
from typing import Any

import pytest

from heyvm import gateway as gateway_module
from heyvm import upstream
from heyvm.errors import Invalid
from heyvm.gateway import path_of, target_of, without_ours
from heyvm.localhttp import serve
from heyvm.tokens import Passes, make_token
from heyvm.upstream import Chunks
from tests.gatewayapp import (
    BASE,
    BROKEN,
    CLOSED,
    ENDPOINTS,
    KEY,
    OTHER,
    PRIVATE,
    PUBLIC,
    SECRET,
    SILENT_S,
    STOPPED,
    make,
)
from tests.gateways import Answered, Front, all_of, gateway, request, until, webapp
from tests.server import Server, Session, create, wait_until
from tests.test_faults_smuggling import CHUNKS, HEADS, TWO_FRAMINGS, TWO_LENGTHS
from tests.webapp import command as webapp_command

PASSES = Passes(lambda: KEY, SECRET)
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with webapp(tmp_path_factory.mktemp("inside")) as running:
        yield running


@pytest.fixture(scope="module", params=["gunicorn", "localhttp"])
def front(
    request: pytest.FixtureRequest, inside: Front, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Front]:
    with gateway(request.param, inside.port, tmp_path_factory.mktemp("front")) as running:
        yield running
    # Whatever servers and clients did, it is nothing to wake anybody for; gunicorn tells in a line
    # of each request that it could not read.
    told = [line for line in running.log.splitlines() if "Invalid request" not in line]
    assert told == []


def seen_by(answer: Answered) -> dict[str, Any]:
    """What the server inside says of the request that it got."""
    assert answer.status == 200, answer.raw[:300]
    _, _, text = answer.raw.partition(b"{")
    return dict(json.loads(b"{" + text[: text.rindex(b"}") + 1]))


def headers_in(answer: Answered, name: str) -> list[str]:
    return [value for key, value in seen_by(answer)["headers"] if key.lower() == name.lower()]


def problem(answer: Answered, status: int, slug: str) -> dict[str, Any]:
    assert answer.status == status, answer.raw[:500]
    assert answer.header("Content-Type") == ["application/problem+json"]
    assert answer.header("Cache-Control") == ["no-store"]
    body = json.loads(answer.body)
    assert body["type"] == f"urn:heyvm:problem:{slug}"
    return dict(body)


# -- which host ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        f"{PUBLIC}.{BASE}",
        f"{PUBLIC.upper()}.{BASE.upper()}",
        f"{PUBLIC}.{BASE}.",
        f"{PUBLIC}.{BASE}:8443",
    ],
)
def test_a_host_is_the_endpoint_s_however_it_is_spelled(host: str, front: Front) -> None:
    answer = front.get("/x", host=host)

    assert headers_in(answer, "Host") == [host]
    assert headers_in(answer, "X-Forwarded-Host") == [host]


@pytest.mark.parametrize("host", [BASE, f"api.{BASE}", f"API.{BASE}.:80", f"x{BASE}", "a.b", ""])
def test_other_hosts_are_the_api_s(host: str, front: Front) -> None:
    sent = request("/x", "Connection: close", host=host).replace(b"HTTP/1.1", b"HTTP/1.0")

    assert front.ask(sent).body == b"the API"


@pytest.mark.parametrize(
    "host",
    ["nobody0000000000", "short", f"{PUBLIC}x", f"a.{PUBLIC}", f"x.api.{BASE}", f"{PUBLIC[:-1]}-"],
)
def test_a_name_of_no_endpoint_is_nothing(host: str, front: Front) -> None:
    problem(front.get("/", host=host if "." not in host else f"{host}.{BASE}"), 404, "not-found")


@pytest.mark.parametrize(
    ("host", "status", "slug"),
    [
        (STOPPED, 503, "unavailable"),
        (CLOSED, 502, "port-closed"),
        (BROKEN, 502, "bad-gateway"),
    ],
)
def test_an_endpoint_that_leads_nowhere_says_why(
    host: str, status: int, slug: str, front: Front
) -> None:
    for path in ("/", "/.heyvm/why"):
        body = problem(front.get(path, host=host), status, slug)
        assert "sb-1" not in str(body)


def test_two_hosts_are_refused(front: Front) -> None:
    sent = request("/", "Connection: close", f"Host: {BASE}")

    assert front.ask(sent).status == 400


@pytest.mark.parametrize(("host", "status"), [(PUBLIC, 200), (PRIVATE, 400), ("evil.test", 400)])
def test_a_target_with_an_authority_names_the_same_host(
    host: str, status: int, front: Front
) -> None:
    name = host if "." in host else f"{host}.{BASE}"
    answer = front.get(f"http://{name}/a//b?c=%64", host=PUBLIC)

    assert answer.status == status
    if status == 200:
        assert seen_by(answer)["target"] == "/a//b?c=%64"


@pytest.mark.parametrize(
    "target", ["//a/../b", "/%2e%2e/%00?%zz=é".replace("é", "%c3%a9"), "/?", "/;x"]
)
def test_a_target_goes_in_as_it_was_sent(target: str, front: Front) -> None:
    assert seen_by(front.get(target))["target"] == target


def test_options_of_the_whole_server(front: Front) -> None:
    answer = front.get("*", method="OPTIONS")

    assert seen_by(answer)["target"] == "*"
    assert seen_by(answer)["method"] == "OPTIONS"


def test_this_is_no_proxy(front: Front) -> None:
    assert front.get(f"{PUBLIC}.{BASE}:80", method="CONNECT").status == 400


# -- headers -------------------------------------------------------------------------------------


def test_what_belongs_to_the_connection_stays_behind(front: Front) -> None:
    dropped = ["X-Auth: 1", "Keep-Alive: 5", "TE: trailers", "Proxy-Authorization: x", "Proxy: y"]
    answer = front.get("/x", "Connection: x-auth, Host, te", *dropped, "X-Kept: 1")

    names = {key.lower() for key, _ in seen_by(answer)["headers"]}
    assert "x-kept" in names and "host" in names
    assert not names & {"x-auth", "keep-alive", "te", "proxy-authorization", "proxy"}
    assert headers_in(answer, "Connection") == ["close"]


def test_only_our_own_proxy_says_who_the_client_is(front: Front) -> None:
    answer = front.get(
        "/x",
        "X-Forwarded-For: 203.0.113.9, 198.51.100.7",
        "X-Forwarded-Proto: https",
        "X-Forwarded-Host: evil.test",
        "X-Forwarded-Port: 1",
        "X-Real-IP: 10.0.0.1",
        "Forwarded: for=10.0.0.2",
    )

    assert headers_in(answer, "X-Forwarded-For") == ["198.51.100.7"]
    assert headers_in(answer, "X-Real-IP") == ["198.51.100.7"]
    assert headers_in(answer, "X-Forwarded-Proto") == ["https"]
    assert headers_in(answer, "X-Forwarded-Host") == [f"{PUBLIC}.{BASE}"]
    assert headers_in(answer, "X-Forwarded-Port") == []
    told = f'for=198.51.100.7;host="{PUBLIC}.{BASE}";proto=https'
    assert headers_in(answer, "Forwarded") == [told]


@pytest.mark.parametrize("said", ["", "nonsense", "127.0.0.1, x"])
def test_who_the_client_is_when_nobody_says(said: str, front: Front) -> None:
    answer = front.get("/x", *([f"X-Forwarded-For: {said}"] if said else []))

    assert headers_in(answer, "X-Forwarded-For") == ["127.0.0.1"]
    assert headers_in(answer, "X-Forwarded-Proto") == ["http"]


# -- bodies --------------------------------------------------------------------------------------


def test_head_has_no_body_and_a_length(front: Front) -> None:
    with front.connect() as sock:
        sock.sendall(request("/x", method="HEAD") + request("/page", "Connection: close"))
        answer = all_of(sock)

    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert b"\r\n\r\nHTTP/1.1 200 OK" in answer


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_without_a_body_has_none(status: int, front: Front) -> None:
    with front.connect() as sock:
        sock.sendall(request(f"/refusal?{status}") + request("/page", "Connection: close"))
        answer = Answered(all_of(sock))

    assert answer.statuses == [status, 200]
    assert b"my own words" not in answer.raw


def test_several_requests_on_one_connection(front: Front) -> None:
    with front.connect() as sock:
        for number in range(5):
            body = b"x" * number * 1000
            head = request(f"/{number}", f"Content-Length: {len(body)}", method="POST")
            sock.sendall(head + body)
            text = until(sock, b'"}')
            assert f'"/{number}"'.encode() in text
            assert f'"size": {len(body)}'.encode() in text


def test_chunks_go_both_ways_one_by_one(front: Front) -> None:
    with front.connect() as sock:
        sock.sendall(request("/there-and-back", "Transfer-Encoding: chunked", method="POST"))
        until(sock, b"\r\n\r\n")
        for piece in (b"a", b"bcd", b"e" * 70_000):
            sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            assert until(sock, piece[-1:] + b"\r\n")
        sock.sendall(b"0\r\n\r\n")
        until(sock, b"0\r\n\r\n")
        sock.sendall(request("/page", "Connection: close"))
        assert b"WebSocket" in all_of(sock)


def test_a_body_of_known_length_goes_in_as_it_comes(front: Front) -> None:
    with front.connect() as sock:
        sock.sendall(request("/there-and-back", "Content-Length: 3", method="POST"))
        until(sock, b"\r\n\r\n")
        for letter in (b"a", b"b", b"c"):
            sock.sendall(letter)
            until(sock, letter + b"\r\n")


def test_events_come_at_once(front: Front) -> None:
    with front.connect() as sock:
        sock.sendall(request("/events", "Accept: text/event-stream", "Connection: close"))
        until(sock, b"data: first")
        assert front.get("/go-on").status == 200
        until(sock, b"data: second")


def test_a_hundred_megabytes_each_way_in_bounded_memory(front: Front) -> None:
    before, size = front.most_memory(), 100 * MIB

    assert upload(front, size) == size
    assert download(front, size) == size
    assert front.most_memory() - before < 24 * MIB


def upload(front: Front, size: int) -> int:
    piece = bytes(MIB)
    head = request("/count", "Transfer-Encoding: chunked", "Connection: close", method="POST")
    with front.connect() as sock:
        sock.sendall(head)
        for _ in range(size // MIB):
            sock.sendall(b"%x\r\n%b\r\n" % (MIB, piece))
        sock.sendall(b"0\r\n\r\n")
        return int(seen_by(Answered(all_of(sock)))["size"])


def download(front: Front, size: int) -> int:
    with front.connect() as sock:
        sock.sendall(request(f"/zeros?{size}", "Connection: close"))
        seen = len(until(sock, b"\r\n\r\n").partition(b"\r\n\r\n")[2])
        while piece := sock.recv(MIB):
            seen += len(piece)
        return seen


def test_100_continue(front: Front) -> None:
    with front.connect() as sock:
        headers = ("Expect: 100-continue", "Content-Length: 2", "Connection: close")
        sock.sendall(request("/x", *headers, method="PUT"))
        assert until(sock, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"hi")
        answer = Answered(all_of(sock))

    assert seen_by(answer)["size"] == 2
    assert headers_in(answer, "Expect") == []


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client and a server, each as a socket, with a gateway between that has all patience."""
    client, there = ExitStack(), ExitStack()
    with client, there, socket.create_server(("127.0.0.1", 0)) as listener:
        browser = client.enter_context(socket.create_connection(listener.getsockname()))
        here, inside = socket.socketpair()
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        there.enter_context(inside)
        whole = make(0)
        monkeypatch.setattr(whole._proxies, "connect", lambda _: here)
        monkeypatch.setattr(upstream, "SILENT_S", 60.0)
        monkeypatch.setattr(upstream, "LOOK_S", 0.1)
        monkeypatch.setattr(gateway_module, "DRAIN_S", 0.2)
        accepted, peer = listener.accept()
        answering = Thread(target=serve, args=(accepted, peer, whole.wrap(lambda *_: [])))
        answering.start()
        yield browser, inside
        client.close()
        answering.join(10)
        assert not answering.is_alive()


def has_ended(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))


def test_a_client_that_breaks_off_its_body_ends_the_request_inside(silent: Any) -> None:
    browser, inside = silent
    browser.sendall(request("/", "Content-Length: 10", method="POST") + b"12345")
    until(inside, b"12345")
    browser.close()

    wait_until(lambda: has_ended(inside), "the server inside sees the end", timeout=3)


def test_a_client_that_leaves_while_nobody_reads_ends_the_request(silent: Any) -> None:
    """Bytes that wait to be read hide the end of file behind them: the kernel's state tells."""
    browser, inside = silent
    browser.sendall(request("/", "Content-Length: 1000000", method="POST") + bytes(120_000))
    assert not has_ended(inside)
    browser.close()

    wait_until(lambda: has_ended(inside), "the server inside sees the end", timeout=3)


def test_an_answer_before_the_body_has_come_ends_the_connection(silent: Any) -> None:
    """What is left of the body must not become the next request."""
    browser, inside = silent
    browser.sendall(request("/", "Content-Length: 1000000", method="POST") + request("/hidden"))
    until(inside, b"/hidden")
    inside.sendall(b"HTTP/1.1 413 Own\r\nContent-Length: 5\r\n\r\nwords")
    answer = Answered(all_of(browser))

    assert answer.statuses == [413]
    assert answer.body == b"words"


def test_a_client_that_sends_its_next_request_early_is_not_taken_for_gone(silent: Any) -> None:
    browser, inside = silent
    browser.sendall(request("/first") + request("/second"))
    until(inside, b"\r\n\r\n")
    time.sleep(0.3)  # some looks at the client
    assert not has_ended(inside)
    inside.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst")
    until(browser, b"first")


# -- smuggling -----------------------------------------------------------------------------------


AMBIGUOUS = {**TWO_LENGTHS, **{f"{name}, framings": one for name, one in TWO_FRAMINGS.items()}}
HIDDEN = request("/hidden")


@pytest.mark.parametrize("headers", AMBIGUOUS.values(), ids=list(AMBIGUOUS))
def test_a_body_of_two_readings_goes_nowhere(headers: bytes, front: Front) -> None:
    sent = request("/x", "X: y", method="POST")[:-2] + headers + b"\r\n0\r\n\r\n" + HIDDEN
    answer = front.ask(sent)

    assert [status for status in answer.statuses if status not in (400, 501)] == []
    assert len(answer.statuses) == 1


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=list(CHUNKS))
def test_broken_chunks_end_the_connection(chunks: bytes, front: Front) -> None:
    head = request("/hidden-no", "Transfer-Encoding: chunked", method="POST")
    answer = front.ask(head + chunks + b"0\r\n\r\n" + HIDDEN)

    # Cut, for the head had gone in before; never an answer to what came behind.
    assert b'"/hidden"' not in answer.raw
    assert len(answer.statuses) <= 1
    assert "/hidden" not in [line.split()[1] for line in lines_in(front)]


@pytest.mark.parametrize("head", HEADS.values(), ids=list(HEADS))
def test_a_head_that_is_none_goes_nowhere(head: bytes, front: Front) -> None:
    answer = front.ask(head.replace(b"Host: localhost", f"Host: {PUBLIC}.{BASE}".encode()) + HIDDEN)

    assert len(answer.statuses) == 1
    assert answer.status in (400, 501, 505)


def lines_in(front: Front) -> list[str]:
    return list(json.loads(front.get("/seen").body)["lines"])


def gone(front: Front) -> list[str]:
    return list(json.loads(front.get("/seen").body)["gone"])


# -- what a hostile server does ------------------------------------------------------------------


def test_a_server_that_never_answers_is_a_504(front: Front) -> None:
    began = time.monotonic()
    problem(front.get("/never?504"), 504, "gateway-timeout")

    assert SILENT_S <= time.monotonic() - began < SILENT_S + 3
    wait_until(lambda: "/never?504" in gone(front), "it was hung up on")


@pytest.mark.parametrize("path", ["/reset", "/nothing", "/nonsense", "/headers", "/1xx"])
def test_a_server_that_does_not_answer_as_it_should_is_a_502(path: str, front: Front) -> None:
    began = time.monotonic()
    problem(front.get(path), 502, "bad-gateway")

    assert time.monotonic() - began < 5


def test_interim_answers_are_skipped(front: Front) -> None:
    answer = front.get("/hint")

    assert answer.statuses == [200]
    assert answer.body == b"the real one"


def test_a_body_that_breaks_off_is_cut_and_not_ended(front: Front) -> None:
    with front.connect() as sock:
        sock.sendall(request("/short"))
        assert b"only this" in until(sock, b"only this")
        with pytest.raises(ConnectionResetError):
            while sock.recv(65536):
                pass


def test_a_client_that_leaves_ends_an_endless_body(front: Front) -> None:
    with front.connect() as sock:
        sock.sendall(request("/body?gone"))
        until(sock, b"\r\n\r\n")
    wait_until(lambda: "/body?gone" in gone(front), "the server inside sees the end")


def test_a_client_that_leaves_ends_a_silent_request(front: Front) -> None:
    with front.connect() as sock:
        sock.sendall(request("/never?left"))
        wait_until(lambda: any("left" in line for line in lines_in(front)), "it is in")
    wait_until(lambda: "/never?left" in gone(front), "the server inside sees the end", timeout=1.5)


@pytest.fixture
def liar() -> Iterator[Any]:
    """`liar(answer)`: a gateway before a server that gives every request these bytes."""
    with contextlib.ExitStack() as stack:

        def say(answer: bytes, method: str = "GET") -> Answered:
            return Answered(stack.enter_context(_said(answer, method)))

        yield say


@contextlib.contextmanager
def _said(answer: bytes, method: str) -> Iterator[bytes]:
    """What becomes of an answer, in this process: the server is a socket that is written ahead."""
    here, there = socket.socketpair()
    client, browser = socket.socketpair()
    with here, client, browser:
        there.sendall(answer)
        there.shutdown(socket.SHUT_WR)
        whole = make(0)
        whole._proxies.connect = lambda _: here  # type: ignore[method-assign]
        browser.sendall(request("/", "Connection: close", method=method))
        serve(client, ("127.0.0.1", 1), whole.wrap(lambda *_: []))
        there.close()
        yield all_of(browser)


BAD_ANSWERS = {
    "no status line": b"hello\r\n\r\n",
    "HTTP/2": b"HTTP/2 200 OK\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "a status below 100": b"HTTP/1.1 099 OK\r\n\r\n",
    "no colon": b"HTTP/1.1 200 OK\r\nfoo\r\n\r\n",
    "a space before the colon": b"HTTP/1.1 200 OK\r\nfoo : x\r\n\r\n",
    "a folded header": b"HTTP/1.1 200 OK\r\nA: x\r\n y\r\n\r\n",
    "a NUL": b"HTTP/1.1 200 OK\r\nA: x\0y\r\n\r\n",
    "a CR alone": b"HTTP/1.1 200 OK\r\nA: x\rB: y\r\n\r\n",
    "an escape": b"HTTP/1.1 200 OK\r\nA: \x1b[31m\r\n\r\n",
    "a reason with an escape": b"HTTP/1.1 200 \x1b[31m\r\n\r\n",
    "a length of letters": b"HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\n",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "length and chunks": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n",
    "another coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
    "a switch of protocols": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "an end in the head": b"HTTP/1.1 200 OK\r\nA: x\r\n",
    "101 headers": b"HTTP/1.1 200 OK\r\n" + b"A: x\r\n" * 101 + b"\r\n",
    "70 KB of a header": b"HTTP/1.1 200 OK\r\nA: " + b"x" * 70_000 + b"\r\n\r\n",
    "70 KB of spaces": b"HTTP/1.1 200 OK\r\nA:" + b" " * 65_000 + b"x\0\r\n\r\n",
    "33 interim answers": b"HTTP/1.1 102 P\r\n\r\n" * 33 + b"HTTP/1.1 200 OK\r\n\r\n",
}


@pytest.mark.parametrize("answer", BAD_ANSWERS.values(), ids=list(BAD_ANSWERS))
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_answer_that_is_none_is_a_502(answer: bytes, method: str, liar: Any) -> None:
    began = time.monotonic()
    said = liar(answer, method)

    assert said.status == 502
    assert time.monotonic() - began < 1
    assert b"\x1b" not in said.raw


def test_what_is_twice_in_an_answer_stays_twice_and_what_is_the_connection_s_goes(
    liar: Any,
) -> None:
    said = liar(
        b"HTTP/1.0 200 Fine\nSet-Cookie: a=1\nSet-Cookie: b=2\nConnection: X-Own, close\n"
        b"X-Own: 1\nKeep-Alive: 5\nUpgrade: h2c\nTransfer-Encoding: chunked\n\n"
        b"3\nabc\n0;x=y\nTrailer: 1\n\n"
    )

    assert said.head.startswith("HTTP/1.1 200 Fine")
    assert said.header("Set-Cookie") == ["a=1", "b=2"]
    assert not said.header("X-Own") + said.header("Keep-Alive") + said.header("Upgrade")
    assert said.body == b"3\r\nabc\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "body",
    [b"3\r\nabc\r\n", b"3\r\nab", b"zz\r\nabc\r\n0\r\n\r\n", b"3\r\nabcd\r\n0\r\n\r\n",
     b"ffffffffffffffff\r\nabc", b"1;" + b"x" * 9000, b"0\r\n" + b"A: b\r\n" * 200 + b"\r\n"],
)  # fmt: skip
def test_chunks_that_are_none_end_in_no_end(body: bytes, liar: Any) -> None:
    said = liar(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body)

    assert not said.raw.endswith(b"0\r\n\r\n")


def test_chunks_are_found_however_they_are_cut() -> None:
    coded = b"5\r\nhello\r\n1;a=b\r\n,\r\nA\r\n the world\r\n0\r\nX: y\r\n\r\nnext"
    for size in range(1, len(coded)):
        chunks = Chunks(strict=True)
        found = b"".join(chunks.feed(coded[at : at + size]) for at in range(0, len(coded), size))
        assert found == b"hello, the world"
        assert chunks.is_over


# -- upgraded connections ------------------------------------------------------------------------


def masked(text: bytes) -> bytes:
    """A text frame of a client (RFC 6455 section 5.2)."""
    mask = b"\x01\x02\x03\x04"
    data = bytes(byte ^ mask[at % 4] for at, byte in enumerate(text))
    return bytes([0x81, 0x80 | len(text)]) + mask + data


KEY_SENT = base64.b64encode(b"0123456789abcdef").decode()
HANDSHAKE = ("Upgrade: websocket", "Connection: keep-alive, Upgrade", "Sec-WebSocket-Version: 13")


def test_a_websocket_passes_even_what_was_sent_with_the_handshake(front: Front) -> None:
    key = f"Sec-WebSocket-Key: {KEY_SENT}"
    with front.connect() as sock:
        sock.sendall(request("/ws", *HANDSHAKE, key) + masked(b"early"))
        head = until(sock, b"early")
        accept = hashlib.sha1(f"{KEY_SENT}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()
        assert head.startswith(b"HTTP/1.1 101 ")
        assert base64.b64encode(accept) in head
        assert head.lower().count(b"connection: upgrade") == 1
        for number in range(20):
            sock.sendall(masked(b"%d" % number))
            assert until(sock, b"%d" % number)
        sock.sendall(bytes([0x88, 0x80, 1, 2, 3, 4]))
        assert all_of(sock).endswith(b"\x88\x00")


def test_half_of_a_websocket_may_end_first(front: Front) -> None:
    with front.connect() as sock:
        sock.sendall(request("/ws", *HANDSHAKE, f"Sec-WebSocket-Key: {KEY_SENT}") + masked(b"last"))
        sock.shutdown(socket.SHUT_WR)
        assert b"last" in all_of(sock)


def test_an_upgrade_that_is_refused_is_an_answer_like_another(front: Front) -> None:
    with front.connect() as sock:
        sock.sendall(request("/refusal?426", *HANDSHAKE))
        until(sock, b"my own words")
        sock.sendall(request("/page", "Connection: close"))
        assert b"WebSocket" in all_of(sock)


def test_an_upgrade_that_nobody_asked_for_in_connection_does_not_pass(front: Front) -> None:
    assert headers_in(front.get("/x", "Upgrade: websocket"), "Upgrade") == []


# -- private ones --------------------------------------------------------------------------------


def bearer() -> str:
    return f"Authorization: Bearer {make_token(SECRET)}"


def test_a_private_endpoint_is_for_whoever_may_use_the_api(front: Front) -> None:
    refused = front.get("/x", host=PRIVATE)
    problem(refused, 401, "unauthorized")
    assert refused.header("WWW-Authenticate") == ['Bearer realm="heyvm"']
    wrong = front.get("/x", f"Authorization: Bearer {make_token('another' * 9)}", host=PRIVATE)
    assert "invalid_token" in wrong.header("WWW-Authenticate")[0]

    assert headers_in(front.get("/x", bearer(), host=PRIVATE), "Authorization") == []


def test_an_application_s_own_authorization_passes_and_ours_never(front: Front) -> None:
    own = front.get("/x", "Authorization: Basic eDp5")
    assert headers_in(own, "Authorization") == ["Basic eDp5"]
    foreign = f"Bearer {make_token('another' * 9)}"
    assert headers_in(front.get("/x", f"Authorization: {foreign}"), "Authorization") == [foreign]

    assert headers_in(front.get("/x", bearer()), "Authorization") == []


def test_a_link_becomes_a_cookie_that_opens_this_endpoint_alone(front: Front) -> None:
    url, expires_at = make(0).link_for(ENDPOINTS[PRIVATE], "https://x", "/a?b=c&d=%20")
    assert 290 < expires_at - time.time() <= 300

    entered = front.get(url.removeprefix("https://x"), host=PRIVATE)
    assert entered.status == 303
    assert entered.header("Location") == ["/a?b=c&d=%20"]
    assert entered.header("Referrer-Policy") == ["no-referrer"]
    [cookie] = entered.header("Set-Cookie")
    pair, *flags = cookie.split("; ")
    assert pair.startswith("heyvm=")
    assert set(flags) == {"Max-Age=43200", "Path=/", "HttpOnly", "SameSite=Lax"}

    opened = front.get("/x", f"Cookie: a=1; {pair}; b=2", "Authorization: Basic eA==", host=PRIVATE)
    assert headers_in(opened, "Cookie") == ["a=1; b=2"]
    assert headers_in(opened, "Authorization") == ["Basic eA=="]
    assert headers_in(front.get("/x", f"Cookie: {pair}", host=PRIVATE), "Cookie") == []
    problem(front.get("/x", f"Cookie: {pair}", host=OTHER), 401, "unauthorized")
    problem(front.get(f"/.heyvm/enter?token={pair[6:]}", host=PRIVATE), 401, "unauthorized")


def test_over_tls_the_cookie_is_bound_to_its_host(front: Front) -> None:
    url, _ = make(0).link_for(ENDPOINTS[PRIVATE], "", "/")
    tls = "X-Forwarded-Proto: https"
    [cookie] = front.get(url, tls, host=PRIVATE).header("Set-Cookie")
    pair, *flags = cookie.split("; ")

    assert pair.startswith("__Host-heyvm=")
    assert "Secure" in flags and "Path=/" in flags
    assert not [flag for flag in flags if flag.lower().startswith("domain")]
    assert front.get("/x", tls, f"Cookie: {pair}", host=PRIVATE).status == 200
    # Without the prefix a neighbour could have set it, over TLS; and with it, without TLS.
    unbound = pair.removeprefix("__Host-")
    assert front.get("/x", tls, f"Cookie: {unbound}", host=PRIVATE).status == 401
    assert front.get("/x", f"Cookie: {pair}", host=PRIVATE).status == 401


@pytest.mark.parametrize(
    "token",
    ["", "x", PASSES.link(OTHER), PASSES.cookie(PRIVATE)],
    ids=["empty", "nonsense", "of another endpoint", "a cookie"],  # a token's text tells the time
)
def test_another_link_is_none(token: str, front: Front) -> None:
    answer = front.get(f"/.heyvm/enter?token={token}&to=/x", host=PRIVATE)

    problem(answer, 401, "unauthorized")
    assert answer.header("Set-Cookie") == []


@pytest.mark.parametrize(
    "where",
    ["//evil.test", "/%5Cevil.test", "%5C%5Cevil.test", "https://evil.test", "evil.test", "",
     "javascript:alert(1)", "/a%0d%0aSet-Cookie:x=y", "/%09/evil.test", "/a%20b", "/é"],
)  # fmt: skip
def test_a_link_leads_nowhere_else(where: str, front: Front) -> None:
    where = where.replace("é", "%C3%A9")
    token = PASSES.link(PRIVATE)
    answer = front.get(f"/.heyvm/enter?token={token}&to={where}", host=PRIVATE)

    problem(answer, 400, "bad-request")
    assert answer.header("Location") == []
    public = front.get(f"/.heyvm/enter?to={where}")
    problem(public, 400, "bad-request")


def test_a_link_to_a_public_endpoint_just_leads_there(front: Front) -> None:
    answer = front.get("/.heyvm/enter?token=x&to=/a")

    assert answer.status == 303
    assert answer.header("Location") == ["/a"]
    assert answer.header("Set-Cookie") == []


@pytest.mark.parametrize("path", ["//x", "x", "/a b", "/\\x", "http://x/", "", "/é"])
def test_no_link_is_made_to_elsewhere(path: str) -> None:
    with pytest.raises(Invalid):
        make(0).link_for(ENDPOINTS[PRIVATE], "http://x", path)


def test_nginx_is_told_what_it_may_pass_on(front: Front) -> None:
    pair = f"heyvm={PASSES.cookie(PRIVATE)}"
    ask = ("/.heyvm/authorize", f"Cookie: a=1; {pair}", "Authorization: Basic eA==")

    answer = front.get(*ask, host=PRIVATE)
    assert answer.status == 204
    assert answer.header("X-Heyvm-Cookie") == ["a=1"]
    assert answer.header("X-Heyvm-Authorization") == ["Basic eA=="]
    by_token = front.get("/.heyvm/authorize", bearer(), host=PRIVATE)
    assert by_token.status == 204
    assert by_token.header("X-Heyvm-Authorization") == by_token.header("X-Heyvm-Cookie") == []
    assert front.get(*ask, host=OTHER).status == 401
    assert front.get(*ask, host="nobody0000000000").status == 404
    assert front.get(*ask).status == 204


def test_nginx_is_told_why_it_failed(front: Front) -> None:
    problem(front.get("/.heyvm/why", host="nobody0000000000"), 404, "not-found")
    problem(front.get("/.heyvm/why", "X-Heyvm-Status: 504"), 504, "gateway-timeout")
    problem(front.get("/.heyvm/why"), 502, "bad-gateway")
    problem(front.get("/.heyvm/why", host=PRIVATE), 401, "unauthorized")


@pytest.mark.parametrize(
    "path", ["/.heyvm/x", "/.heyvm/", "/.heyvm", "/%2eheyvm/x", "/.heyvm/why/x"]
)
def test_nothing_below_our_own_path_goes_in(path: str, front: Front) -> None:
    problem(front.get(path), 404, "not-found")


def test_no_secret_is_logged(front: Front) -> None:
    token, cookie, link = make_token(SECRET), PASSES.cookie(PRIVATE), PASSES.link(PRIVATE)
    headers = (f"Authorization: Bearer {token}", f"Cookie: heyvm={cookie}")
    for path in ("/reset", "/short", f"/.heyvm/enter?token={link}", f"/x?token={link}", "/never"):
        with contextlib.suppress(AssertionError):
            front.get(path, *headers, host=PRIVATE)

    for secret in (token, cookie, link):
        assert secret not in front.log


# -- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("a=1; b=2", "a=1; b=2"),
        ("heyvm=x", ""),
        ("heyvm=x; a=1", "a=1"),
        ("a=1; heyvm=x", "a=1"),
        ("a=1;  b = 2 ;heyvm=x;c", "a=1;  b = 2 ;c"),
        ("heyvm=x; heyvm=y; __Host-heyvm=z; a=1", "a=1"),
        ("a=1,heyvm=x", "a=1"),
        (
            "xheyvm=1; heyvmx=2; Heyvm=3; heyvm; a=heyvm=4",
            "xheyvm=1; heyvmx=2; Heyvm=3; heyvm; a=heyvm=4",
        ),
        ("; ;a", "; ;a"),
    ],
)
def test_our_cookies_go_and_all_else_stays_byte_for_byte(given: str, kept: str) -> None:
    assert without_ours(given) == kept


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/a?b", "/a"),
        ("*", "*"),
        ("http://h/a?b", "/a"),
        ("http://h", "/"),
        ("http://h?b/c", "/"),
        ("http://h#/.heyvm/x", "/"),
        ("/%2Eheyvm%2fx", "/.heyvm/x"),
    ],
)
def test_the_path_of_a_target(target: str, path: str) -> None:
    assert path_of(target_of({"RAW_URI": target})) == path


# -- before a real sandbox -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    """A server with a secret, and without API_HOSTNAME."""
    with Server(JWT_SECRET=SECRET, HEYVM_LOG="json") as running:
        yield running


@pytest.fixture(scope="module")
def owner(locked: Server) -> Iterator[Session]:
    with locked.http() as http:
        http.headers.update(locked.authorization())
        yield http


@pytest.fixture(scope="module")
def box(owner: Session) -> str:
    return str(create(owner, start_command=webapp_command())["id"])


@pytest.fixture
def private(owner: Session, box: str) -> Iterator[dict[str, Any]]:
    answer = owner.post(f"/sandboxes/{box}/proxy", json={"port": 8000, "is_public": False})
    assert answer.status_code == 201, answer.text
    yield answer.json()
    owner.delete(f"/sandboxes/{box}/proxy?subdomain={answer.json()['subdomain']}")


def by_name(server: Server, made: dict[str, Any], path: str, *headers: str) -> Answered:
    """Asks a worker, by the endpoint's name below localhost."""
    return at(server.port, f"{made['subdomain']}.localhost", path, *headers)


def at(port: int, host: str, path: str, *headers: str) -> Answered:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sent = request(path, f"Host: {host}", "Connection: close", *headers, host="")
        sock.sendall(sent)
        return Answered(all_of(sock))


def webapp_listens(server: Server, made: dict[str, Any]) -> None:
    def answers() -> bool:
        return by_name(server, made, "/page", bearer()).status == 200

    wait_until(answers, "the server inside listens")


def test_a_worker_and_the_keeper_open_a_private_endpoint_alike(
    locked: Server, owner: Session, box: str, private: dict[str, Any]
) -> None:
    webapp_listens(locked, private)
    assert by_name(locked, private, "/x").status == 401
    subdomain, port = private["subdomain"], private["local_port"]
    link = owner.post(f"/sandboxes/{box}/proxy/{subdomain}/link", json={"path": "/x?y"}).json()
    base = f"http://{subdomain}.localhost:{port}"
    assert link["url"].startswith(f"{base}/.heyvm/enter?token=")

    asked, name = link["url"].removeprefix(base), f"{subdomain}.localhost:{port}"

    entered = at(port, name, asked)
    assert entered.status == 303
    assert entered.header("Location") == ["/x?y"]
    cookie = entered.header("Set-Cookie")[0].partition(";")[0]
    found = at(port, name, "/x?y", f"Cookie: a=1; {cookie}")
    assert seen_by(found)["target"] == "/x?y"
    assert headers_in(found, "Cookie") == ["a=1"]
    # The same cookie in a worker; under the name of nobody, it is no cookie.
    assert headers_in(by_name(locked, private, "/x", f"Cookie: {cookie}"), "Cookie") == []
    assert at(port, "localhost", "/x", f"Cookie: {cookie}").status == 401
    assert headers_in(at(port, "127.0.0.1", "/x", bearer()), "Authorization") == []
    assert at(port, "127.0.0.1", asked).status == 400
    assert at(port, "evil.test", "/x", bearer()).status == 403
    assert link["url"].partition("token=")[2][:40] not in locked.log
    lines = [json.loads(line) for line in locked.log.splitlines() if subdomain in line]
    said = [line for line in lines if line["kind"] == "access" and line.get("host")]
    assert {line["process"] for line in said} == {"worker", "keeper"}
    assert {line["status"] for line in said} >= {200, 303, 401}


def test_a_websocket_reaches_a_sandbox_and_is_cut_with_its_endpoint(
    locked: Server, owner: Session, box: str, private: dict[str, Any]
) -> None:
    webapp_listens(locked, private)
    host = f"{private['subdomain']}.localhost"
    for port in (locked.port, private["local_port"]):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
            key = f"Sec-WebSocket-Key: {KEY_SENT}"
            sock.sendall(request("/ws", *HANDSHAKE, key, bearer(), host=host) + masked(b"hello"))
            until(sock, b"hello")
            if port == locked.port:
                continue
            gone = f"/sandboxes/{box}/proxy?subdomain={private['subdomain']}"
            assert owner.delete(gone).status_code == 204
            assert all_of(sock) == b""
    problem(by_name(locked, private, "/x", bearer()), 404, "not-found")
    assert "Traceback" not in locked.log


def test_a_sandbox_that_is_stopped_is_told_apart_from_a_port_that_is_closed(
    locked: Server, owner: Session
) -> None:
    other = create(owner)["id"]
    made = owner.post(f"/sandboxes/{other}/proxy", json={"port": 8000}).json()
    problem(by_name(locked, made, "/x"), 502, "port-closed")

    assert owner.post(f"/sandboxes/{other}/stop").status_code == 200
    problem(by_name(locked, made, "/x"), 503, "unavailable")
    assert owner.delete(f"/sandboxes/{other}").status_code == 204
    problem(by_name(locked, made, "/x"), 404, "not-found")
    # And no other name below localhost is the API's.
    with locked.http() as http:
        assert http.get("/health", headers={"Host": "x.localhost"}).status_code == 403
