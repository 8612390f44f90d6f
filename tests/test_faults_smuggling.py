"""Requests that two readers could take for different ones: one answer, 400, and the end of it."""

from __future__ import annotations

import contextlib
import re
import socket
import time

import pytest

from tests.server import Server

START = b"POST /sandboxes HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HIDDEN = b"GET /capabilities HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"0\r\n\r\n" + HIDDEN

TWO_LENGTHS = {
    "different": b"Content-Length: 0\r\nContent-Length: 50\r\n",
    "the same": b"Content-Length: 2\r\nContent-Length: 2\r\n",
    "in one line": b"Content-Length: 0, 50\r\n",
    "the same in one line": b"Content-Length: 2, 2\r\n",
    "signed": b"Content-Length: +2\r\n",
    "negative": b"Content-Length: -1\r\n",
    "hexadecimal": b"Content-Length: 0x2\r\n",
    "underscored": b"Content-Length: 1_0\r\n",
    "spaced": b"Content-Length: 1 0\r\n",
    "letters": b"Content-Length: ten\r\n",
    "digits of another script": b"Content-Length: \xd9\xa2\r\n",
    "before a space": b"Content-Length : 2\r\n",
    "with an underscore": b"Content_Length: 2\r\n",
}
TWO_FRAMINGS = {
    "CL.TE": b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n",
    "TE.CL": b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
    "TE twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
    "chunked twice": b"Transfer-Encoding: chunked, chunked\r\n",
    "chunked not last": b"Transfer-Encoding: chunked, identity\r\n",
    "unknown": b"Transfer-Encoding: xchunked\r\n",
    "unknown and chunked": b"Transfer-Encoding: x, chunked\r\n",
    "before a space": b"Transfer-Encoding : chunked\r\n",
    "quoted": b'Transfer-Encoding: "chunked"\r\n',
    "folded": b"Transfer-Encoding:\r\n chunked\r\n",
    "with an underscore": b"Transfer_Encoding: chunked\r\nContent-Length: 4\r\n",
    "a vertical tab": b"Transfer-Encoding: \x0bchunked\r\n",
    "a NUL": b"Transfer-Encoding: chunked\x00\r\n",
    "in a name's middle": b"X: x\rTransfer-Encoding: chunked\r\nContent-Length: 4\r\n",
}
CHUNKS = {
    "signed": b"+2\r\n{}\r\n",
    "hexadecimal": b"0x2\r\n{}\r\n",
    "underscored": b"0_2\r\n{}\r\n",
    "spaced": b"2 2\r\n{}\r\n",
    "empty": b"\r\n{}\r\n",
    "negative": b"-2\r\n{}\r\n",
    "without a number": b"xyz\r\n{}\r\n",
    "longer than told": b"2\r\n{}}\r\n",
    "ended by a line feed alone": b"2\n{}\n",
    "without its end": b"2\r\n{}XX",
}
HEADS = {
    "a line feed alone": b"GET /health HTTP/1.1\nHost: localhost\n\n",
    "a line feed alone after a header": b"GET /health HTTP/1.1\r\nHost: localhost\nX: x\r\n\r\n",
    "a carriage return alone": b"GET /health HTTP/1.1\r\nHost: localhost\rX: x\r\n\r\n",
    "a name of nothing": b"GET /health HTTP/1.1\r\nHost: localhost\r\n: x\r\n\r\n",
    "a header without a colon": b"GET /health HTTP/1.1\r\nHost: localhost\r\nfoo\r\n\r\n",
    "a space before the first header": b"GET /health HTTP/1.1\r\n Host: localhost\r\n\r\n",
    "a folded header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: x\r\n y\r\n\r\n",
    "a NUL in a header": b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: \x00\r\n\r\n",
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "HTTP/2 by its preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/3.0": b"GET /health HTTP/3.0\r\nHost: localhost\r\n\r\n",
    "HTTP/1.10": b"GET /health HTTP/1.10\r\nHost: localhost\r\n\r\n",
    "lower case": b"get /health http/1.1\r\nHost: localhost\r\n\r\n",
    "a tab in the request line": b"GET\t/health\tHTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no method": b" /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two Hosts": b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    "nonsense": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}


def answers(server: Server, sent: bytes, *, half_close: bool = False) -> list[bytes]:
    """The status lines of all that comes back until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(sent)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionError):
            while piece := sock.recv(65536):
                received += piece
    # A body need not end its last line.
    return re.findall(rb"HTTP/1\.\d \d{3} ", received)


def assert_one_refusal(server: Server, sent: bytes) -> None:
    """Fails by time where the connection stays open."""
    lines = answers(server, sent)

    assert len(lines) == 1, lines
    # 501: RFC 9112 section 6.1 for a transfer coding that is not understood.
    assert lines[0].split()[1] in (b"400", b"501", b"505"), lines


@pytest.mark.parametrize("headers", TWO_LENGTHS.values(), ids=list(TWO_LENGTHS))
def test_a_length_that_can_be_read_in_two_ways(headers: bytes, server: Server) -> None:
    assert_one_refusal(server, START + headers + b"\r\n{}" + HIDDEN)


@pytest.mark.parametrize("headers", TWO_FRAMINGS.values(), ids=list(TWO_FRAMINGS))
def test_a_body_that_can_end_in_two_places(headers: bytes, server: Server) -> None:
    assert_one_refusal(server, START + headers + b"\r\n" + CHUNKED)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=list(CHUNKS))
def test_chunks_that_are_none(chunks: bytes, server: Server) -> None:
    sent = START + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + CHUNKED
    lines = answers(server, sent)

    assert len(lines) == 1, lines
    assert lines[0].split()[1] == b"400"


@pytest.mark.parametrize("head", HEADS.values(), ids=list(HEADS))
def test_a_head_that_is_none(head: bytes, server: Server) -> None:
    assert_one_refusal(server, head + HIDDEN)


def test_a_body_that_nobody_asked_for_is_not_the_next_request(server: Server) -> None:
    body = HIDDEN
    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

    lines = answers(server, get + body + last)

    assert [line.split()[1] for line in lines] in ([b"200"], [b"200", b"200"])


def test_a_body_that_was_refused_unread_is_not_the_next_request() -> None:
    huge = START + b"Content-Length: 99999999\r\n\r\n" + HIDDEN * 100

    # The rest of a body is waited for no longer than the next request would be.
    with Server(GUNICORN_CMD_ARGS="--keep-alive 1") as impatient:
        lines = answers(impatient, huge)

    assert [line.split()[1] for line in lines] == [b"413"]


def test_a_chunk_that_never_comes_is_no_body(server: Server) -> None:
    sent = START + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 15 + b"\r\n{}"

    lines = answers(server, sent, half_close=True)

    assert [line.split()[1] for line in lines] == [b"400"]


def test_two_honest_requests_in_one_packet_get_two_answers(server: Server) -> None:
    last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

    assert [line.split()[1] for line in answers(server, HIDDEN + last)] == [b"200", b"200"]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 2_000_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: x\r\n" * 100_000 + b"\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer "
        + b"x" * 1_000_000 + b"\r\n\r\n",
        b"x" * 5_000_000,
    ],
    ids=["a long path", "a long header", "many headers", "a long token", "no line at all"],
)  # fmt: skip
def test_a_head_without_bounds_is_refused_quickly(head: bytes, server: Server) -> None:
    began = time.monotonic()

    lines = answers(server, head)

    assert time.monotonic() - began < 5
    # The kernel may drop the answer, when it closes a connection with bytes that nobody read.
    assert [line.split()[1][:1] for line in lines] in ([b"4"], [])
