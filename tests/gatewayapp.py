"""A gateway with nothing around it, for tests: real sockets before and behind it, no sandboxes.

`gunicorn tests.gatewayapp:app`, or `python -m tests.gatewayapp PORT` for the keeper's own reading
of HTTP. INSIDE is the port of the server behind; the rows of endpoints are made up.
"""

from __future__ import annotations

# ruff: noqa: E402, I001
import gevent.monkey

if __name__ == "__main__":
    gevent.monkey.patch_all()

import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from heyvm import upstream
from heyvm.errors import BackendFailed, NotFound, PortClosed, Unavailable
from heyvm.gateway import Gateway
from heyvm.models import Endpoint
from heyvm.settings import Settings

BASE = "sandbox.test"
SECRET = "a secret of at least thirty-two bytes"
KEY = b"k" * 32
PUBLIC, PRIVATE, OTHER = "public0000000000", "private000000000", "other00000000000"
STOPPED, CLOSED, BROKEN = "stopped000000000", "closed0000000000", "broken0000000000"
ENDPOINTS = {
    name: Endpoint(name, "sb-1", 80, 0.0, is_public=name not in (PRIVATE, OTHER))
    for name in (PUBLIC, PRIVATE, OTHER, STOPPED, CLOSED, BROKEN)
}
SILENT_S = 2.0


class Rows:
    """What a gateway asks of proxies.py."""

    def __init__(self, port: int) -> None:
        self.port = port

    def find(self, subdomain: str) -> Endpoint:
        if subdomain not in ENDPOINTS:
            raise NotFound("no such endpoint")
        return ENDPOINTS[subdomain]

    def connect(self, endpoint: Endpoint) -> socket.socket:
        if endpoint.subdomain == STOPPED:
            raise Unavailable("its sandbox is stopped", sandbox_id="sb-1")
        if endpoint.subdomain == CLOSED:
            raise PortClosed("nobody listens there")
        if endpoint.subdomain == BROKEN:
            raise BackendFailed("the agent of sb-1 is at /run/heyvm/agents")
        return socket.create_connection(("127.0.0.1", self.port))


def make(inside: int) -> Gateway:
    upstream.SILENT_S = SILENT_S
    nowhere = Path("/nonexistent")
    settings = Settings(nowhere, nowhere, jwt_secret=SECRET, api_hostname=BASE)
    return Gateway(settings, Rows(inside), lambda: KEY)


def the_api(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Length", "7")])
    return [b"the API"]


def main() -> None:
    from gevent.server import StreamServer

    from heyvm.localhttp import serve

    entry = make(int(os.environ["INSIDE"])).wrap(the_api)
    address = ("127.0.0.1", int(sys.argv[1]))
    StreamServer(address, lambda sock, peer: serve(sock, peer, entry)).serve_forever()


if __name__ == "__main__":
    main()
elif "INSIDE" in os.environ:
    app = make(int(os.environ["INSIDE"])).wrap(the_api)
