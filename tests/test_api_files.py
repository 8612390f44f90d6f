"""Files over HTTP, over a fake domain whose mounts are directories of the host."""

from __future__ import annotations

import base64
import io
import os
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import pytest
from flask.testing import FlaskClient

from heyvm.api.downloads import attachment
from heyvm.api.limits import MAX_FIELD_BYTES, MAX_PARTS
from tests.fake_domain import Fake, fake_app, problem

pytest_plugins = ["tests.fake_domain"]

FILES = "/sandboxes/box/files"
BOUNDARY = "x-boundary-x"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


@pytest.fixture
def workspace(fake: Fake) -> Path:
    return fake.files.root / "workspace"


def part(name: str, content: bytes, *, filename: str | None = None) -> bytes:
    head = f'Content-Disposition: form-data; name="{name}"'
    if filename is not None:
        head += f'; filename="{filename}"\r\nContent-Type: application/octet-stream'
    return f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def names(directory: Path) -> list[str]:
    return sorted(str(one.relative_to(directory)) for one in directory.rglob("*") if one.is_file())


WHERE = part("mount_path", b"/workspace"), part("file_path", b"a/b.txt")
FILE = part("file", b"hello", filename="index.html")


@pytest.mark.parametrize(
    ("query", "parts"),
    [
        ("", (*WHERE, FILE)),
        ("", (FILE, *WHERE)),
        ("", (WHERE[0], FILE, WHERE[1])),
        ("", (WHERE[1], FILE)),
        ("?mount_path=/workspace&file_path=a/b.txt", (FILE,)),
        ("?mount_path=/workspace&path=a/b.txt", (FILE,)),
        ("?file_path=other", (*WHERE, FILE)),
        ("", (*WHERE, part("file", b"hello"))),
        ("", (WHERE[0], part("file_path", b"/workspace/a/b.txt"), FILE)),
        ("", (part("mount_path", b"/workspace/"), part("file_path", b"./a//b.txt"), FILE)),
        ("", (part("note", b"x"), *WHERE, FILE, part("more", b"y"))),
    ],
)
def test_a_form_in_any_order_uploads(
    query: str, parts: tuple[bytes, ...], workspace: Path, api: FlaskClient
) -> None:
    answer = api.post(FILES + query, data=form(*parts), headers=FORM)
    assert answer.status_code == 201, answer.text
    assert answer.json == {"status": "created", "path": "a/b.txt", "size": 5}
    assert (workspace / "a/b.txt").read_bytes() == b"hello"
    assert names(workspace) == ["a/b.txt"]


def test_the_file_s_own_name_is_the_default(workspace: Path, api: FlaskClient) -> None:
    data = form(part("file", b"x", filename="C:/dir/index.html"))
    assert api.post(FILES, data=data, headers=FORM).json["path"] == "index.html"


@pytest.mark.parametrize(
    "body", [b"", b"\r\n", b"--x-boundary-x", b"\r\n--x-boundary-", b"\n" * 99]
)
def test_bytes_like_a_boundary_are_only_bytes(
    body: bytes, workspace: Path, api: FlaskClient
) -> None:
    content = b"a" + body + b"b"
    data = form(*WHERE, part("file", content, filename="x"))
    assert api.post(FILES, data=data, headers=FORM).status_code == 201
    assert (workspace / "a/b.txt").read_bytes() == content


@pytest.mark.parametrize(
    "parts",
    [
        (),
        WHERE,
        (*WHERE, FILE, FILE),
        (*WHERE, WHERE[1], FILE),
        (*WHERE, FILE, WHERE[0]),
        (part("file", b"x", filename=""),),
        (part("file_path", b"."), FILE),
    ],
)
def test_a_form_that_makes_no_sense_leaves_nothing(
    parts: tuple[bytes, ...], workspace: Path, api: FlaskClient
) -> None:
    assert api.post(FILES, data=form(*parts), headers=FORM).status_code in (400, 422)
    assert names(workspace) == []


@pytest.mark.parametrize("order", [(*WHERE, FILE), (FILE, *WHERE)])
def test_a_form_cut_at_any_byte_leaves_nothing(
    order: tuple[bytes, ...], workspace: Path, api: FlaskClient
) -> None:
    whole = form(*order)
    end = len(whole) - 2  # without the last line break it is whole all the same
    for length in range(end):
        answer = api.post(FILES, data=whole[:length], headers=FORM)
        assert answer.status_code in (400, 422), (length, answer.text)
        assert names(workspace) == [], length


def test_a_body_shorter_than_announced_leaves_nothing(workspace: Path, api: FlaskClient) -> None:
    whole = form(*WHERE, FILE)
    length = {"CONTENT_LENGTH": str(len(whole) + 10)}
    problem(api.post(FILES, data=whole, headers=FORM, environ_overrides=length), 400, "bad-request")
    assert names(workspace) == []


@pytest.mark.parametrize(
    "data",
    [
        form(*[part(f"n{number}", b"") for number in range(MAX_PARTS + 1)], *WHERE, FILE),
        form(part("mount_path", b"x" * (MAX_FIELD_BYTES + 1)), FILE),
        f"--{BOUNDARY}\r\nX: {'x' * 2_000_000}".encode(),
        b"preamble" * 200_000,
        form(*WHERE, FILE) + b"epilogue" * 200_000,
    ],
)
def test_a_form_with_too_much_of_anything_is_refused(
    data: bytes, workspace: Path, api: FlaskClient
) -> None:
    problem(api.post(FILES, data=data, headers=FORM), 413, "too-large")
    assert names(workspace) == []


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        f"multipart/form-data; boundary={'b' * 201}",
    ],
)
def test_a_form_without_a_sane_boundary_is_a_400(kind: str, api: FlaskClient) -> None:
    problem(api.post(FILES, data=b"x", headers={"Content-Type": kind}), 400, "bad-request")


@pytest.mark.parametrize("kind", ["", "application/json", "application/x-tar", "text/plain"])
def test_another_type_than_a_form_is_a_415(kind: str, api: FlaskClient) -> None:
    answer = api.post(FILES, data=b"x", headers={"Content-Type": kind})
    problem(answer, 415, "unsupported-media")


class Zeros(io.RawIOBase):
    """A form with a large file in it, made while it is read."""

    def __init__(self, size: int, *, head: bytes = form(*WHERE)[: -len(BOUNDARY) - 6]) -> None:
        self.pieces = self._pieces(size, head)

    def _pieces(self, size: int, head: bytes) -> Iterator[bytes]:
        yield head + part("file", b"", filename="x")[:-2]
        for _ in range(size // 65536):
            yield bytes(65536)
        yield b"\r\n" + form()

    def read(self, size: int = -1) -> bytes:
        return next(self.pieces, b"")


def test_a_large_upload_takes_little_memory(workspace: Path, api: FlaskClient) -> None:
    size = 64 * 1024 * 1024
    tracemalloc.start()
    stream = {
        "wsgi.input": Zeros(size),
        "CONTENT_LENGTH": "",
        "CONTENT_TYPE": FORM["Content-Type"],
    }
    answer = api.post(FILES, environ_overrides=stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert answer.json == {"status": "created", "path": "a/b.txt", "size": size}
    assert peak < 8 * 1024 * 1024


@pytest.fixture
def small(tmp_path: Path) -> FlaskClient:
    """A server that takes uploads of ten bytes."""
    return fake_app(tmp_path, max_upload_bytes=10).app.test_client()


def test_the_limit_is_told_before_the_body_is_read(small: FlaskClient, workspace: Path) -> None:
    class Untouched(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise AssertionError("the body was read")

    def refused(path: str, headers: dict[str, str]) -> None:
        length = {"CONTENT_LENGTH": str(10**10), "wsgi.input": Untouched()}
        answer = small.post(path, headers=headers, environ_overrides=length)
        assert "HEYVM_MAX_UPLOAD_BYTES" in problem(answer, 413, "too-large")["detail"]

    refused(FILES, FORM)
    refused(f"{FILES}?format=tar", {"Content-Type": "application/x-tar"})


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_limit_holds_for_the_file_alone(
    order: tuple[int, ...], small: FlaskClient, workspace: Path
) -> None:
    def send(content: bytes) -> Any:
        parts = (*WHERE, part("file", content, filename="x"))
        return small.post(FILES, data=form(*(parts[at] for at in order)), headers=FORM)

    assert send(b"0123456789").status_code == 201
    problem(send(b"0123456789a"), 413, "too-large")
    assert (workspace / "a/b.txt").read_bytes() == b"0123456789"


def test_the_limit_holds_in_json(small: FlaskClient, workspace: Path) -> None:
    def send(content: bytes) -> Any:
        text = base64.b64encode(content).decode()
        return small.post(f"{FILES}/upload", json={"file_path": "x", "content": text})

    assert send(b"0123456789").status_code == 201
    problem(send(b"0123456789a"), 413, "too-large")


def test_an_upload_in_json(workspace: Path, api: FlaskClient) -> None:
    answer = api.post(
        f"{FILES}/upload",
        json={
            "mount_path": "/workspace",
            "file_path": "hello.txt",
            "content": "SGVsbG8gd29ybGQh",
        },
    )
    assert answer.status_code == 201
    assert answer.json == {"status": "created", "path": "hello.txt", "size": 12}
    assert (workspace / "hello.txt").read_bytes() == b"Hello world!"


@pytest.mark.parametrize("content", ["", "SGVs\nbG8=\n", "SGVsbG8="])
def test_base64_may_be_empty_or_wrapped(content: str, workspace: Path, api: FlaskClient) -> None:
    body = {"file_path": "x", "content": content}
    assert api.post(f"{FILES}/upload", json=body).status_code == 201


@pytest.mark.parametrize("content", ["***", "SGVsbG8", "SGVs-_", "ü"])
def test_bad_base64_is_a_400(content: str, workspace: Path, api: FlaskClient) -> None:
    body = {"file_path": "x", "content": content}
    problem(api.post(f"{FILES}/upload", json=body), 400, "bad-request")
    assert names(workspace) == []


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"file_path": "x"},
        {"content": "SGVs"},
        {"file_path": "", "content": "SGVs"},
        {"file_path": 1, "content": "SGVs"},
        {"file_path": "x", "content": None},
        {"file_path": "x", "content": "SGVs", "mode": "0644"},
    ],
)
def test_a_wrong_json_upload_is_a_422(body: dict[str, Any], api: FlaskClient) -> None:
    problem(api.post(f"{FILES}/upload", json=body), 422, "invalid")


def at(encoded: str) -> dict[str, str]:
    """A file's route as WSGI has it. (Werkzeug's client cannot send bytes that are not UTF-8.)"""
    return {"PATH_INFO": unquote_to_bytes(f"{FILES}/{encoded}").decode("latin-1")}


UNSAFE = [
    "../x",
    "a/../../x",
    "a/..",
    "/etc/passwd",
    "/workspaces/x",
    "/workspace/../x",
    "%2e%2e/x",
    "%252e%252e/x",
    "a%2f..%2fx",
    "\udcc0\udcae\udcc0\udcae/x",
    "..\udcc0\udcafx",
    "a\0b",
    "a\nb",
    "x" * 256,
    "x/" * 2100,
]


@pytest.mark.parametrize("path", UNSAFE)
def test_an_unsafe_path_in_a_form_is_a_400(path: str, workspace: Path, api: FlaskClient) -> None:
    data = form(part("file_path", os.fsencode(path)), FILE)
    problem(api.post(FILES, data=data, headers=FORM), 400, "bad-request")
    data = form(part("mount_path", os.fsencode(path)), WHERE[1], FILE)
    assert api.post(FILES, data=data, headers=FORM).status_code in (400, 201)
    there = {name for name in names(workspace.parent.parent) if not name.startswith("data/audit/")}
    assert there <= {"mounts/" + path.strip("/") + "/a/b.txt"}


@pytest.mark.parametrize("path", UNSAFE)
def test_an_unsafe_path_in_a_url_is_a_400(path: str, api: FlaskClient) -> None:
    there = quote(os.fsencode(path), safe="")
    for answer in (
        api.get("/", environ_overrides=at(there)),
        api.delete("/", environ_overrides=at(there)),
        api.get(f"{FILES}?path={there}"),
        api.post(f"{FILES}?format=tar&path={there}", headers={"Content-Type": "application/x-tar"}),
    ):
        problem(answer, 400, "bad-request")


@pytest.mark.parametrize("path", [path for path in UNSAFE if path.isascii()])
def test_an_unsafe_path_in_json_is_a_400(path: str, api: FlaskClient) -> None:
    problem(
        api.post(f"{FILES}/upload", json={"file_path": path, "content": ""}), 400, "bad-request"
    )


@pytest.mark.parametrize(
    "name",
    [b"plain", b"a b", b"a+b", b"a%b", b"100%", b"\xff\xfe", "grüße".encode(), b"a?b#c", b"upload",
     b"q\"uo'te", b"a\\b", b"...", b"-rf", b"%41", b"semi;colon"],
)  # fmt: skip
def test_any_name_is_listed_and_comes_back(name: bytes, workspace: Path, api: FlaskClient) -> None:
    directory = os.fsencode(workspace) + b"/d"
    os.mkdir(directory)
    with open(directory + b"/" + name, "wb") as file:
        file.write(b"content of " + name)
    (entry,) = api.get(f"{FILES}?path=d").json["files"]
    assert entry["name"] == name.decode("utf-8", "replace")
    assert entry["path"] == "d/" + entry["name"]
    answer = api.get("/", environ_overrides=at(entry["path_encoded"]))
    assert answer.data == b"content of " + name
    answer.close()
    deleted = api.delete("/", environ_overrides=at(entry["path_encoded"]))
    assert deleted.status_code == 204
    assert os.listdir(directory) == []


def test_a_name_that_is_not_utf8_can_be_uploaded(workspace: Path, api: FlaskClient) -> None:
    data = form(part("file_path", b"a\xffb"), FILE)
    assert api.post(FILES, data=data, headers=FORM).json["path"] == "a\ufffdb"
    assert os.listdir(os.fsencode(workspace)) == [b"a\xffb"]


def test_a_list_tells_what_is_there(workspace: Path, api: FlaskClient) -> None:
    (workspace / "d").mkdir()
    (workspace / "d/f").write_text("12345")
    (workspace / "d/f").chmod(0o640)
    os.utime(workspace / "d/f", (0, 1.5))
    listing = api.get(f"{FILES}?mount_path=/workspace&recursive=true").json
    assert list(listing) == ["mount_path", "path", "files"]
    assert [one["type"] for one in listing["files"]] == ["directory", "file"]
    assert listing["files"][1] == {
        "name": "f",
        "path": "d/f",
        "path_encoded": "d/f",
        "type": "file",
        "size": 5,
        "mode": "0640",
        "modified_at": "1970-01-01T00:00:01.500000Z",
    }


def test_a_download_is_an_attachment(workspace: Path, api: FlaskClient) -> None:
    (workspace / "page.html").write_text("<script>alert(1)</script>")
    answer = api.get(f"{FILES}/page.html?mount_path=/workspace")
    assert answer.data == b"<script>alert(1)</script>"
    assert answer.mimetype == "application/octet-stream"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Content-Disposition"].startswith("attachment;")
    assert "sandbox" in answer.headers["Content-Security-Policy"]
    assert answer.content_length == 25
    assert answer.headers["Accept-Ranges"] == "bytes"


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("a.txt", "attachment; filename=\"a.txt\"; filename*=UTF-8''a.txt"),
        ('a"b\\c', "attachment; filename=\"a_b_c\"; filename*=UTF-8''a%22b%5Cc"),
        ("grüße", "attachment; filename=\"gr??e\"; filename*=UTF-8''gr%C3%BC%C3%9Fe"),
        ("a\r\nb", "attachment; filename=\"a__b\"; filename*=UTF-8''a%0D%0Ab"),
        ("a\udcff", "attachment; filename=\"a?\"; filename*=UTF-8''a%EF%BF%BD"),
    ],
)
def test_a_name_in_a_header_can_be_anything(name: str, header: str) -> None:
    assert attachment(name) == header


def test_head_tells_the_size_and_reads_nothing(
    fake: Fake, workspace: Path, api: FlaskClient
) -> None:
    (workspace / "f").write_bytes(b"x" * 1000)
    answer = api.head(f"{FILES}/f")
    assert (answer.status_code, answer.data, answer.content_length) == (200, b"", 1000)
    assert answer.headers["ETag"] == api.get(f"{FILES}/f").headers["ETag"]


@pytest.mark.parametrize(
    ("given", "content", "told"),
    [
        ("bytes=0-0", b"0", "bytes 0-0/10"),
        ("bytes=2-4", b"234", "bytes 2-4/10"),
        ("bytes=5-", b"56789", "bytes 5-9/10"),
        ("bytes=8-100", b"89", "bytes 8-9/10"),
        ("bytes=-3", b"789", "bytes 7-9/10"),
        ("bytes=-100", b"0123456789", "bytes 0-9/10"),
    ],
)
def test_a_range_is_a_part(
    given: str, content: bytes, told: str, workspace: Path, api: FlaskClient
) -> None:
    (workspace / "f").write_bytes(b"0123456789")
    answer = api.get(f"{FILES}/f", headers={"Range": given})
    assert (answer.status_code, answer.data) == (206, content)
    assert answer.headers["Content-Range"] == told
    assert answer.content_length == len(content)


@pytest.mark.parametrize("given", ["bytes=10-", "bytes=11-20", "bytes=99999999999999999999-"])
def test_a_range_outside_is_a_416(given: str, workspace: Path, api: FlaskClient) -> None:
    (workspace / "f").write_bytes(b"0123456789")
    answer = api.get(f"{FILES}/f", headers={"Range": given})
    problem(answer, 416, "range")
    assert answer.headers["Content-Range"] == "bytes */10"


@pytest.mark.parametrize(
    "given",
    [
        "bytes=0-1,3-4",
        "bytes=" + ",".join(f"{number}-{number}" for number in range(1000)),
        "bytes=4-2",
        "bytes=a-b",
        "bytes=--1",
        "bytes",
        "lines=1-2",
        "bytes=0-1-2",
        "",
    ],
)
def test_what_is_no_single_range_is_the_whole_file(
    given: str, workspace: Path, api: FlaskClient
) -> None:
    (workspace / "f").write_bytes(b"0123456789")
    answer = api.get(f"{FILES}/f", headers={"Range": given})
    assert (answer.status_code, answer.data) == (200, b"0123456789")


def test_if_range_with_another_tag_is_the_whole_file(workspace: Path, api: FlaskClient) -> None:
    (workspace / "f").write_bytes(b"0123456789")
    etag = api.head(f"{FILES}/f").headers["ETag"]

    def status(given: str) -> int:
        headers = {"Range": "bytes=0-1", "If-Range": given}
        return api.get(f"{FILES}/f", headers=headers).status_code

    assert status(etag) == 206
    assert status('"stale"') == 200
    assert status(f"W/{etag}") == 200
    assert status("Mon, 23 Nov 2026 00:00:00 GMT") == 200


def test_if_none_match_is_a_304(workspace: Path, api: FlaskClient) -> None:
    (workspace / "f").write_bytes(b"0123456789")
    etag = api.head(f"{FILES}/f").headers["ETag"]
    for given in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        answer = api.get(f"{FILES}/f", headers={"If-None-Match": given})
        assert (answer.status_code, answer.data) == (304, b"")
        assert answer.headers["ETag"] == etag
    assert api.get(f"{FILES}/f", headers={"If-None-Match": '"other"'}).status_code == 200


def test_an_empty_file_is_a_file(workspace: Path, api: FlaskClient) -> None:
    (workspace / "f").touch()
    answer = api.get(f"{FILES}/f")
    assert (answer.status_code, answer.data, answer.content_length) == (200, b"", 0)
    problem(api.get(f"{FILES}/f", headers={"Range": "bytes=0-"}), 416, "range")


def test_a_file_that_shrinks_breaks_the_connection(
    fake: Fake, workspace: Path, api: FlaskClient
) -> None:
    (workspace / "f").write_bytes(b"0123456789")
    fake.files.shrink = True
    with pytest.raises(Exception, match="changed its size"):
        api.get(f"{FILES}/f", buffered=True)


def test_a_download_that_nobody_reads_is_let_go(
    fake: Fake, workspace: Path, api: FlaskClient
) -> None:
    (workspace / "f").write_bytes(bytes(10**6))
    answer = api.get(f"{FILES}/f")
    next(iter(answer.response))
    assert fake.files.left_open == 1
    answer.close()
    assert fake.files.left_open == 0


def test_a_directory_goes_and_comes_as_a_tar(workspace: Path, api: FlaskClient) -> None:
    (workspace / "d/e").mkdir(parents=True)
    (workspace / "d/e/f").write_text("x")
    problem(api.get(f"{FILES}/d"), 409, "conflict")
    answer = api.get(f"{FILES}/d?format=tar")
    assert answer.mimetype == "application/x-tar"
    assert 'filename="d.tar"' in answer.headers["Content-Disposition"]
    with tarfile.open(fileobj=io.BytesIO(answer.data)) as tar:
        assert "./e/f" in tar.getnames()
    back = api.post(
        f"{FILES}?format=tar&path=copy",
        data=answer.data,
        headers={"Content-Type": "application/x-tar"},
    )
    assert back.status_code == 201
    assert (workspace / "copy/e/f").read_text() == "x"
    whole = api.get(f"{FILES}/?format=tar")
    assert 'filename="workspace.tar"' in whole.headers["Content-Disposition"]


def test_delete_answers_204_404_and_409(workspace: Path, api: FlaskClient) -> None:
    (workspace / "d").mkdir()
    (workspace / "d/f").touch()
    problem(api.delete(f"{FILES}/none"), 404, "not-found")
    problem(api.delete(f"{FILES}/d?mount_path=/workspace"), 409, "conflict")
    assert api.delete(f"{FILES}/d?recursive=true").status_code == 204
    assert names(workspace) == []


@pytest.mark.parametrize("query", ["format=zip", "recursive=maybe", "mount_path=a&mount_path=b"])
def test_a_query_that_makes_no_sense_is_a_422(query: str, api: FlaskClient) -> None:
    route = {"r": FILES, "f": f"{FILES}/x", "m": FILES}[query[0]]
    problem(api.get(f"{route}?{query}"), 422, "invalid")
