"""What only shows on a real connection to a real server: aborts, framing, streaming, curl."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server import (
    Server,
    Session,
    run,
    wait_until,
)

Make = Callable[..., dict[str, Any]]
PARTS = (
    b'--b0undary\r\nContent-Disposition: form-data; name="mount_path"\r\n\r\n/workspace\r\n'
    b'--b0undary\r\nContent-Disposition: form-data; name="file_path"\r\n\r\nbig.bin\r\n'
)
FILE_HEAD = b'--b0undary\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
END = b"\r\n--b0undary--\r\n"
MIB = 1024 * 1024


def listed(http: Session, ref: str) -> list[str]:
    return [
        one["path"] for one in http.get(f"/sandboxes/{ref}/files?recursive=true").json()["files"]
    ]


def connection(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def head(path: str, *headers: str, method: str = "POST") -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", "")).encode()


def status_of(sock: socket.socket) -> int:
    line = sock.makefile("rb").readline()
    return int(line.split()[1])


def form_head(ref: str, length: int) -> bytes:
    return head(
        f"/sandboxes/{ref}/files",
        "Content-Type: multipart/form-data; boundary=b0undary",
        f"Content-Length: {length}",
    )


@pytest.mark.parametrize("parts", [PARTS, b""])
def test_an_upload_aborted_half_way_leaves_nothing(
    parts: bytes, server: Server, http: Session, ref: str
) -> None:
    with connection(server) as sock:
        sock.sendall(form_head(ref, 8 * MIB) + parts + FILE_HEAD + bytes(4 * MIB))
    assert http.get("/health").ok
    wait_until(lambda: not run(http, ref, "find /workspace -mindepth 1")["output"], "cleaned up")
    assert listed(http, ref) == []


def test_an_upload_in_chunks_is_streamed(server: Server, http: Session, ref: str) -> None:
    def body() -> Iterator[bytes]:
        yield PARTS + FILE_HEAD
        for _ in range(32):
            yield bytes(MIB)
        yield END

    answer = http.post(
        f"/sandboxes/{ref}/files",
        data=body(),
        headers={"Content-Type": "multipart/form-data; boundary=b0undary"},
    )
    assert answer.json() == {"status": "created", "path": "big.bin", "size": 32 * MIB}


def test_broken_chunks_leave_nothing(server: Server, http: Session, ref: str) -> None:
    with connection(server) as sock:
        sock.sendall(
            head(
                f"/sandboxes/{ref}/files",
                "Content-Type: multipart/form-data; boundary=b0undary",
                "Transfer-Encoding: chunked",
            )
            + b"%x\r\n%b\r\nnonsense\r\n" % (len(PARTS + FILE_HEAD), PARTS + FILE_HEAD)
        )
        assert status_of(sock) == 400
    assert listed(http, ref) == []


def test_a_large_file_goes_in_and_out_in_constant_memory(
    server: Server, http: Session, ref: str
) -> None:
    size = 256 * MIB

    def peak() -> int:
        return sum(high_water(pid) for pid in server.server_pids())

    def body() -> Iterator[bytes]:
        yield PARTS + FILE_HEAD
        for number in range(size // MIB):
            yield bytes([number % 251]) * MIB
        yield END

    before = peak()
    answer = http.post(
        f"/sandboxes/{ref}/files",
        data=body(),
        headers={"Content-Type": "multipart/form-data; boundary=b0undary"},
    )
    assert answer.json()["size"] == size
    total = 0
    with http.get(f"/sandboxes/{ref}/files/big.bin", stream=True) as download:
        for piece in download.iter_content(MIB):
            total += len(piece)
    assert total == size
    assert peak() - before < 48 * MIB


def high_water(pid: int) -> int:
    """The most memory that a process has had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def test_an_upload_over_the_limit_is_refused_at_once_and_the_rest_goes_on() -> None:
    with Server(HEYVM_MAX_UPLOAD_BYTES="1000") as small, small.http() as http:
        ref = http.post("/sandboxes", json={}).json()["id"]
        with connection(small) as sock:
            sock.sendall(form_head(ref, 10 * 1024 * MIB))
            began = time.monotonic()
            assert status_of(sock) == 413
            assert time.monotonic() - began < 2
        assert listed(http, ref) == []


def test_a_client_that_goes_away_takes_its_command_with_it(
    server: Server, http: Session, ref: str
) -> None:
    body = json.dumps({"command": "sleep 4711"}).encode()
    path = f"/sandboxes/{ref}/execute"
    lines = ("Content-Type: application/json", f"Content-Length: {len(body)}")

    def sleeping() -> bool:
        return (
            "4711" in run(http, ref, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '; true # x")["output"]
        )

    with connection(server) as sock:
        sock.sendall(head(path, *lines) + body)
        wait_until(sleeping, "the command runs")
    wait_until(lambda: not sleeping(), "the command has ended", timeout=5)


def test_a_file_that_shrinks_breaks_the_connection(server: Server, http: Session, ref: str) -> None:
    run(http, ref, "truncate -s 200M /workspace/f")
    with connection(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.sendall(head(f"/sandboxes/{ref}/files/f", method="GET"))
        received = len(sock.recv(65536))
        run(http, ref, "truncate -s 1M /workspace/f")
        while piece := sock.recv(65536):
            received += len(piece)
    assert received < 200 * MIB


def curl(server: Server, *arguments: str, stdin: bytes = b"") -> tuple[int, bytes]:
    done = subprocess.run(
        ["curl", "-sS", "--path-as-is", "-w", "\n%{http_code}", *arguments],
        input=stdin,
        capture_output=True,
        check=False,
        timeout=60,
    )
    body, _, status = done.stdout.rpartition(b"\n")
    return int(status), body


@pytest.mark.parametrize("path", ["%2Fdata", "/data", "data", "%2fdata/"])
def test_curl_removes_a_mount_by_any_spelling(
    path: str, server: Server, sandbox: Make, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    mount = {"host_path": str(tmp_path), "sandbox_path": "/data", "read_only": True}
    ref = sandbox(mounts=[mount])["id"]
    status, body = curl(server, "-X", "DELETE", f"{server.url}/sandboxes/{ref}/mounts/{path}")
    assert (status, body) == (204, b"")


@pytest.mark.parametrize(
    "path", ["../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "..%2f..%2fetc%2fpasswd",
             "%252e%252e%252fetc", "//etc/passwd", "%c0%ae%c0%ae/etc/passwd"]
)  # fmt: skip
def test_curl_does_not_get_out_of_a_mount(path: str, server: Server, ref: str) -> None:
    status, body = curl(server, f"{server.url}/sandboxes/{ref}/files/{path}")
    assert status == 400
    assert b"root:" not in body


def test_curl_waits_for_100_continue_and_gets_its_answer(
    server: Server, http: Session, ref: str, tmp_path: Path
) -> None:
    (tmp_path / "f").write_bytes(os.urandom(2 * MIB))
    url = f"{server.url}/sandboxes/{ref}/files"
    status, _ = curl(
        server, url, "-H", "Expect: 100-continue", "-F", "mount_path=/workspace",
        "-F", "file_path=f", "-F", f"file=@{tmp_path}/f",
    )  # fmt: skip
    assert status == 201
    assert http.get(f"/sandboxes/{ref}/files/f").content == (tmp_path / "f").read_bytes()


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a b%41+?#", "grüße".encode(), b"-n", b"\\"])
def test_any_name_comes_back(name: bytes, server: Server, http: Session, ref: str) -> None:
    form = PARTS.replace(b"big.bin", b"d/" + name) + FILE_HEAD + b"content" + END
    answer = http.post(
        f"/sandboxes/{ref}/files",
        data=form,
        headers={"Content-Type": "multipart/form-data; boundary=b0undary"},
    )
    assert answer.status_code == 201
    (entry,) = http.get(f"/sandboxes/{ref}/files?path=d").json()["files"]
    assert entry["name"] == name.decode("utf-8", "replace")
    url = f"{server.url}/sandboxes/{ref}/files/{entry['path_encoded']}"
    assert curl(server, url) == (200, b"content")
    assert curl(server, "-X", "DELETE", url)[0] == 204


def test_a_tar_goes_in_and_out(http: Session, ref: str) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        info = tarfile.TarInfo("a/b")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"hello"))
    answer = http.post(
        f"/sandboxes/{ref}/files?format=tar&path=in",
        data=packed.getvalue(),
        headers={"Content-Type": "application/x-tar"},
    )
    assert answer.status_code == 201
    back = http.get(f"/sandboxes/{ref}/files/in?format=tar")
    with tarfile.open(fileobj=io.BytesIO(back.content)) as tar:
        assert tar.extractfile("a/b").read() == b"hello"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "headers",
    [
        ("Host: localhost", "Host: evil.example"),
        ("Host: evil.example",),
        ("Host: localhost", "Origin: http://evil.example"),
        ("Host: localhost", "Origin: null"),
        ("Host: localhost", "X-Forwarded-For: 203.0.113.7"),
        ("Host: localhost", "X-Forwarded-For: 127.0.0.1", "X-Forwarded-For: 203.0.113.7"),
        (),
    ],
)
def test_what_is_not_from_here_is_refused(headers: tuple[str, ...], server: Server) -> None:
    with connection(server) as sock:
        sock.sendall("\r\n".join(("GET /sandboxes HTTP/1.1", *headers, "", "")).encode())
        assert status_of(sock) in (400, 403)


def test_a_request_of_another_host_s_address_is_refused(server: Server) -> None:
    with connection(server) as sock:
        sock.sendall(b"GET http://evil.example/sandboxes HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert status_of(sock) == 400


def test_a_waiting_request_does_not_hold_up_health(http: Session, ref: str, server: Server) -> None:
    with connection(server) as sock:
        sock.sendall(head(f"/sandboxes/{ref}?wait=stopped&timeout=3", method="GET"))
        for _ in range(20):
            began = time.monotonic()
            assert http.get("/health").ok
            assert time.monotonic() - began < 1
        assert status_of(sock) == 200
