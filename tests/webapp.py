"""A web server for tests that runs inside a sandbox: `python3 webapp.py PORT`.

Written on bare sockets, so that what arrives is seen as it is, and what no framework would send can
be sent. Standard library only. `command()` is a start command that carries all of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
import sys
import threading
import zlib

MIB = bytes(1024 * 1024)
EVENT = threading.Event()
SEEN: list[str] = []  # each request line, on whatever connection
GONE: list[str] = []  # what of those that never end did end


def command(port: int = 8000) -> str:
    """A line for a shell that starts it."""
    with open(__file__, "rb") as source:
        packed = base64.b64encode(zlib.compress(source.read())).decode()
    unpack = f'import base64,zlib;exec(zlib.decompress(base64.b64decode("{packed}")))'
    return f"exec python3 -c '{unpack}' {port}"


class Request:
    """A request as it came; its body is read on demand."""

    def __init__(self, connection, reader, line):
        self.connection, self.reader, self.line = connection, reader, line
        SEEN.append(line)
        self.method, self.target, _ = (*line.split(" "), "", "")[:3]
        self.path, _, self.query = self.target.partition("?")
        self.pairs = []
        while header := reader.readline().rstrip(b"\r\n").decode("latin-1"):
            name, _, value = header.partition(":")
            self.pairs.append((name, value.strip()))
        self.headers = {name.lower(): value for name, value in self.pairs}

    def body(self):
        """Its pieces."""
        if "expect" in self.headers:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" in self.headers.get("transfer-encoding", ""):
            yield from self._chunks()
            return
        left = int(self.headers.get("content-length") or 0)
        while left > 0 and (piece := self.reader.read1(min(left, 1 << 20))):
            left -= len(piece)
            yield piece

    def _chunks(self):
        while size := int(self.reader.readline().split(b";")[0] or b"0", 16):
            yield self.reader.read(size)
            self.reader.readline()
        self.reader.readline()

    def send(self, *pieces):
        for piece in pieces:
            self.connection.sendall(piece)

    def answer(self, body, *headers, status="200 OK"):
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
        self.send("\r\n".join(lines).encode("latin-1"), b"" if self.method == "HEAD" else body)

    def json(self, value):
        self.answer(json.dumps(value).encode(), "Content-Type: application/json")

    def start_chunks(self, kind="application/octet-stream"):
        head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
        self.send(f"{head}Content-Type: {kind}\r\nCache-Control: no-store\r\n\r\n".encode())

    def chunk(self, piece):
        self.send(b"%x\r\n%s\r\n" % (len(piece), piece))


def echo(request):
    digest, size = hashlib.sha256(), 0
    for piece in request.body():
        digest.update(piece)
        size += len(piece)
    request.json(
        {
            "method": request.method,
            "target": request.target,
            "headers": request.pairs,
            "size": size,
            "sha256": digest.hexdigest(),
        }
    )


def count(request):
    """Reads without looking: for the speed of it."""
    request.json({"size": sum(len(piece) for piece in request.body())})


def zeros(request):
    left = int(request.query)
    request.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % left)
    while left > 0:
        request.send(MIB[: min(left, len(MIB))])
        left -= len(MIB)


def there_and_back(request):
    """Each chunk goes back before the next has come."""
    request.start_chunks()
    for piece in request.body():
        request.chunk(piece)
    request.send(b"0\r\n\r\n")


def events(request):
    """The second event comes only when somebody has asked for it, who has seen the first."""
    EVENT.clear()
    request.start_chunks("text/event-stream")
    request.chunk(b"data: first\n\n")
    EVENT.wait(30)
    request.chunk(b"data: second\n\n")
    request.send(b"0\r\n\r\n")


def go_on(request):
    EVENT.set()
    request.answer(b"")


def seen(request):
    request.json({"lines": SEEN, "gone": GONE})


def never(request):
    """Silent until the other side has gone."""
    request.connection.recv(1)
    GONE.append(request.target)


def reset(request):
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()


def nothing(request):
    """Takes the request, and closes."""


def nonsense(request):
    request.send(b"\x00\xff what?\r\n\r\n")


def forever(request, head, piece):
    try:
        request.send(head)
        while True:
            request.send(piece)
    finally:
        GONE.append(request.target)


def headers(request):
    forever(request, b"HTTP/1.1 200 OK\r\n", b"X-More: and more and more\r\n" * 1000)


def provisional(request):
    forever(request, b"", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 1000)


def hint(request):
    """One honest provisional answer before the real one."""
    request.send(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n")
    request.answer(b"the real one")


def body(request):
    forever(request, b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n", MIB)


def short(request):
    request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this")


def refusal(request):
    """An error of its own."""
    request.answer(b"my own words", status=f"{request.query} Own")


def accelerated(request):
    """What would have nginx look elsewhere."""
    request.answer(b"here", f"X-Accel-Redirect: {request.query}", "X-Accel-Buffering: yes")


def hold(request):
    """A WebSocket that sends back what it gets, and `/page` as a place to talk to it from."""
    key = request.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
    lines = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade"]
    request.send("\r\n".join([*lines, f"Sec-WebSocket-Accept: {accept}", "", ""]).encode())
    while True:
        opcode, data = frame(request.reader)
        request.send(bytes([0x80 | opcode, len(data)]), data)
        if opcode == 8:
            return


def frame(reader):
    """RFC 6455 section 5.2, for short and masked ones."""
    first, second = reader.read(2)
    mask = reader.read(4)
    data = bytes(byte ^ mask[i % 4] for i, byte in enumerate(reader.read(second & 0x7F)))
    return first & 0x0F, data


def page(request):
    request.answer(PAGE, "Content-Type: text/html; charset=utf-8")


PAGE = b"""<!doctype html><title>sandbox</title><p id=said>nothing yet</p><script>
const socket = new WebSocket(location.href.replace(/^http/, "ws").replace("/page", "/ws"));
socket.onopen = () => socket.send("hello from " + location.pathname);
const show = text => { document.getElementById("said").textContent = text; };
socket.onmessage = event => show("back: " + event.data);
socket.onerror = () => show("failed");
</script>"""

ROUTES = {
    "/count": count,
    "/zeros": zeros,
    "/there-and-back": there_and_back,
    "/events": events,
    "/go-on": go_on,
    "/seen": seen,
    "/never": never,
    "/reset": reset,
    "/nothing": nothing,
    "/nonsense": nonsense,
    "/headers": headers,
    "/1xx": provisional,
    "/hint": hint,
    "/body": body,
    "/short": short,
    "/refusal": refusal,
    "/accelerated": accelerated,
    "/ws": hold,
    "/page": page,
}


def serve(connection):
    with connection, connection.makefile("rb", 1 << 20) as reader:
        while line := reader.readline().rstrip(b"\r\n").decode("latin-1"):
            request = Request(connection, reader, line)
            ROUTES.get(request.path, echo)(request)
            ends = request.headers.get("connection", "").lower() == "close"
            if ends or request.path in ("/reset", "/nothing", "/nonsense", "/short", "/ws"):
                return


def quietly(connection):
    try:
        serve(connection)
    except (OSError, ValueError):
        pass


def main():
    listener = socket.create_server(("127.0.0.1", int(sys.argv[-1])), backlog=128)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=quietly, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
