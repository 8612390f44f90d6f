"""A real nginx on loopback with the configuration of deploy/nginx, as it is installed.

with Nginx(upstream=f"127.0.0.1:{server.port}", ports_dir=directory) as nginx:
    nginx.curl("https://api.sandbox.test/health")

Its certificate is for `sandbox.test` and all names below it. Its workers are www-data's where that
can be (root), so the sockets of endpoints have to be for that group.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heyvm.backends import trees
from tests.server import REPOSITORY, free_port, wait_until

HOSTNAME = "sandbox.test"
USER = "www-data"
TEMPLATES = REPOSITORY / "deploy" / "nginx"
CONFIGURATION = """
{user}
daemon off;
worker_processes 2;
worker_rlimit_nofile 16384;
pid {home}/pid;
error_log {home}/error.log notice;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    include heyvm.conf;
}}
"""


@contextmanager
def traversable() -> Iterator[Path]:
    """A directory that the workers of nginx can enter, with a short path."""
    with tempfile.TemporaryDirectory(prefix="hp-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


class Nginx:
    """Starts at once. Use it as a context manager, or call `close`."""

    def __init__(self, *, upstream: str, ports_dir: Path, **values: str) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="hn-"))
        self.home.chmod(0o755)
        self.values = {"UPSTREAM": upstream, "PORTS_DIR": str(ports_dir), **values}
        self.certificate = Certificate(self.home)
        self.access_log, self.error_log = self.home / "access.log", self.home / "requests.log"
        self.start()

    def __enter__(self) -> Nginx:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start it, on ports that are free."""
        for _ in range(5):
            self.http_port, self.https_port = free_port(), free_port()
            self._write()
            self.process = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL)
            wait_until(lambda: self._answers() or self.process.poll() is not None, "nginx answers")
            if self.process.poll() is None:
                return
        raise AssertionError(f"nginx does not start:\n{self.log}")

    def close(self) -> None:
        """End it, and see that it leaves nothing."""
        self.process.terminate()
        self.process.wait(15)
        trees.remove(str(self.home))

    @property
    def log(self) -> str:
        """All that it has written."""
        files = (self.home / "error.log", self.error_log, self.access_log)
        return "\n".join(path.read_text(errors="replace") for path in files if path.exists())

    def accesses(self) -> list[dict[str, Any]]:
        """The access log, oldest first."""
        lines = self.access_log.read_text().splitlines() if self.access_log.exists() else []
        return [json.loads(line) for line in lines]

    def url(self, name: str, path: str = "/") -> str:
        return f"https://{name}:{self.https_port}{path}"

    def curl(self, url: str, *options: str, timeout: float = 60) -> Answer:
        """One request, to wherever the URL's name and port lead: all names are this nginx."""
        done = subprocess.run(
            [*self.curl_command(), "-i", *options, url],
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        return Answer(done.returncode, done.stdout)

    def curl_command(self) -> list[str]:
        """curl without a proxy, with our authority alone, and every name resolved to loopback."""
        curl = ["curl", "-q", "-sS", "--noproxy", "*", "--cacert", str(self.certificate.authority)]
        curl += ["--connect-to", f"::127.0.0.1:{self.https_port}"]
        return curl

    def connect(self, name: str = HOSTNAME, *, timeout: float = 10) -> ssl.SSLSocket:
        """A bare connection over TLS, for requests that no client would write."""
        context = ssl.create_default_context(cafile=str(self.certificate.authority))
        context.set_alpn_protocols(["http/1.1"])
        plain = socket.create_connection(("127.0.0.1", self.https_port), timeout=timeout)
        return context.wrap_socket(plain, server_hostname=name)

    def _write(self) -> None:
        user = f"user {USER};" if os.geteuid() == 0 else ""
        text = CONFIGURATION.format(home=self.home, user=user)
        (self.home / "nginx.conf").write_text(text)
        shared = (TEMPLATES / "heyvm-server.conf").read_text()
        (self.home / "heyvm-server.conf").write_text(shared)
        (self.home / "heyvm.conf").write_text(self._rendered())

    def _rendered(self) -> str:
        values = {
            "API_HOSTNAME": HOSTNAME,
            "CERTIFICATE": str(self.certificate.chain),
            "KEY": str(self.certificate.key),
            "HTTP": f"127.0.0.1:{self.http_port}",
            "HTTPS": f"127.0.0.1:{self.https_port}",
            "ACCESS_LOG": str(self.access_log),
            "ERROR_LOG": str(self.error_log),
            **self.values,
        }
        pairs = [f"{name}={value}" for name, value in values.items()]
        done = subprocess.run(
            [TEMPLATES / "render", *pairs], capture_output=True, text=True, check=True
        )
        return done.stdout

    def _command(self) -> list[str]:
        return ["/usr/sbin/nginx", "-p", str(self.home), "-c", str(self.home / "nginx.conf")]

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.https_port)) == 0


class Answer:
    """What curl printed: the last head, and the body."""

    def __init__(self, code: int, output: bytes) -> None:
        self.code, self.output = code, output
        head, body = b"", output
        while body.startswith(b"HTTP/"):
            head, _, body = body.partition(b"\r\n\r\n")
        self.body = body
        status, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(status.split()[1]) if status else 0
        pairs = [line.partition(":") for line in lines]
        self.headers = {name.lower(): value.strip() for name, _, value in pairs}

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        return json.loads(self.body)


class Certificate:
    """An authority of its own and what it has signed: keys of a test, in a test's directory."""

    def __init__(self, home: Path) -> None:
        self.authority, self.chain, self.key = home / "ca.pem", home / "chain.pem", home / "key.pem"
        authority_key = home / "ca.key"
        subject = ["-days", "30", "-subj", "/CN=heyvm tests"]
        new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        openssl(*new, "-keyout", authority_key, "-out", self.authority, *subject)
        names = f"subjectAltName=DNS:{HOSTNAME},DNS:*.{HOSTNAME}"
        extensions = ["-addext", names, "-addext", "basicConstraints=critical,CA:FALSE"]
        signed = ["-CA", self.authority, "-CAkey", authority_key, *subject]
        openssl(*new, "-keyout", self.key, "-out", self.chain, *signed, *extensions)

    def pin(self) -> str:
        """The base64 SHA-256 of its public key (RFC 7469), by which chromium can be told of it."""
        public = openssl("pkey", "-in", self.key, "-pubout", "-outform", "DER")
        return base64.b64encode(hashlib.sha256(public).digest()).decode()


def openssl(*arguments: str | Path) -> bytes:
    """What this command of openssl's prints."""
    done = subprocess.run(["openssl", *arguments], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout
