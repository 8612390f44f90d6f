"""A file in JSON, taken apart while it arrives."""

from __future__ import annotations

import base64
import json
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heyvm.api.jsonupload import JsonUpload, content_start
from heyvm.errors import BadRequest, HeyvmError, Invalid, TooLarge
from heyvm.strictjson import parse_json


def take(text: bytes, size: int) -> tuple[tuple[str, str], bytes, bool]:
    """Where it goes, what is in it, and whether that was known before the content came."""
    upload = JsonUpload(text[at : at + size] for at in range(0, len(text), size))
    upload.until_file()
    settled = upload.settled()
    content = b"".join(upload.file())
    return upload.place(), content, settled


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


HELLO = "SGVsbG8gd29ybGQh"
GOOD = [
    (body(mount_path="/workspace", file_path="a", content=HELLO), True),
    (body(file_path="a", content=HELLO), False),
    (body(content=HELLO, mount_path="/workspace", file_path="a"), False),
    (body(mount_path="/workspace", content=HELLO, file_path="a"), False),
    (b' { "mount_path" : "\\/workspace" , "file_path":"\\u0061","content" : "SGVs\\nbG8g'
     b'd29y\\u0062GQh" } \n', True),
    (b'{"file_path":"a","cont\\u0065nt":"SGVsbG8gd29ybGQh"}', False),
    (b'{"mount_path":"/workspace/","file_path":"/workspace/a","content":"SGVsbG8gd29ybGQh"}', True),
]  # fmt: skip


@pytest.mark.parametrize(("text", "early"), GOOD)
def test_it_is_read_however_it_is_cut(text: bytes, early: bool) -> None:
    for size in (1, 2, 3, 5, 7, len(text)):
        assert take(text, size) == (("/workspace", "a"), b"Hello world!", early)


@pytest.mark.parametrize(("text", "early"), GOOD)
def test_it_is_refused_wherever_it_ends(text: bytes, early: bool) -> None:
    for length in range(len(text.rstrip()) - 1):
        with pytest.raises((BadRequest, Invalid)):
            take(text[:length], 4)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b"", BadRequest),
        (b"[]", Invalid),
        (b"{}", Invalid),
        (b'"content"', Invalid),
        (b'["content", ":", "x"]', Invalid),
        (body(file_path="a"), Invalid),
        (body(file_path="a", content=7), Invalid),
        (body(file_path="a", content=None), Invalid),
        (body(content=HELLO), Invalid),
        (body(file_path="", content=HELLO), Invalid),
        (body(file_path="a", content=HELLO, mode=7), Invalid),
        (body(file_path="a", inner={"content": HELLO}), Invalid),
        (body(file_path=["content", HELLO]), Invalid),
        (body(file_path="../a", content=HELLO), BadRequest),
        (body(file_path="a", content="***"), BadRequest),
        (body(file_path="a", content="SGVsb"), BadRequest),
        (body(file_path="a", content="YQ==YQ=="), BadRequest),
        (body(file_path="a", content="ü"), BadRequest),
        (body(file_path="a", content="\\"), BadRequest),
        (b'{"file_path":"a","content":"SGVs\nbG8g"}', BadRequest),
        (b'{"file_path":"a","content":"SGVs\\ud800"}', BadRequest),
        (b'{"file_path":"a","content":"SGVs\\x"}', BadRequest),
        (b'{"file_path":"a","content":"SGVs\xff"}', BadRequest),
        (b'{"content":"SGVs","content":"bG8g","file_path":"a"}', BadRequest),
        (b'{"file_path":"a","content":"SGVs","file_path":"b"}', BadRequest),
        (b'{"file_path":"a","content":"SGVs"}}', BadRequest),
        (b'{"file_path":"a","content":"SGVs"} {}', BadRequest),
        (b'{"file_path":"a","content":"SGVs",}', BadRequest),
        (b'{"file_path":"a" "content":"SGVs"}', BadRequest),
        (b'{"file_path":"a",,"content":"SGVs"}', BadRequest),
        (b'{"file_path":NaN,"content":"SGVs"}', BadRequest),
        (b'{"x":' + b"[" * 1000, BadRequest),
        (b'{"file_path":"' + b"a" * 200_000, TooLarge),
        (b'{"file_path":"a","content":""' + b" " * 200_000, TooLarge),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused(text: bytes, error: type[HeyvmError]) -> None:
    for size in (3, 65536) if len(text) < 5000 else (65536,):
        with pytest.raises(error):
            take(text, size)


def test_a_place_that_changes_after_the_file_is_seen() -> None:
    text = b'{"mount_path":"/workspace","file_path":"a","content":"","mount_path":"/other"}'
    with pytest.raises(BadRequest):
        take(text, 8)


def test_a_large_one_takes_little_memory() -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"mount_path":"/workspace","file_path":"a","content":"'
        for _ in range(1024):
            yield b"A" * 65536
        yield b'"}'

    upload = JsonUpload(pieces())
    tracemalloc.start()
    upload.until_file()
    size = sum(len(piece) for piece in upload.file())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 1024 * 65536 * 3 // 4
    assert peak < 2 * 1024 * 1024


@given(
    st.binary(max_size=300),
    st.text(max_size=20),
    st.permutations(["a", "b", "c"]),
    st.integers(1, 50),
)
def test_it_says_what_the_whole_json_says(
    content: bytes, other: str, order: list[str], size: int
) -> None:
    fields = {"a": ("content", base64.b64encode(content).decode()), "b": ("file_path", "x")}
    text = json.dumps(dict(fields.get(key, ("mount_path", "/" + other)) for key in order)).encode()
    start = content_start(text)
    assert start is not None
    assert text[:start].endswith(b'"content": "')
    try:
        place, found, _ = take(text, size)
    except HeyvmError:
        return  # `other` is no path
    assert found == content == base64.b64decode(parse_json(text)["content"])
    assert place[1] == "x"
