"""Reading a log that its sandbox may have replaced by anything."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from heyvm import logs
from heyvm.logs import Logs
from heyvm.models import Sandbox, Status

NOW = 1_700_000_000.0


@dataclass
class Stored:
    """A lifecycle whose only sandbox keeps its log in one directory."""

    directory: Path

    def get(self, ref):
        return Sandbox("sb-1", "a", "a", Status.STOPPED, NOW, NOW, "fake", "host")

    def backend_of(self, sandbox):
        return SimpleNamespace(open_log=lambda _: self.opened())

    def opened(self):
        try:
            return os.open(self.directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            return None


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "log"
    path.mkdir()
    return path


@pytest.fixture
def read(directory):
    return lambda **query: Logs(Stored(directory)).read("a", **query)


def written(directory, *lines, name="log"):
    with (directory / name).open("ab") as file:
        for second, source, message in lines:
            file.write(b"%d.000 %b %b\n" % (second, source, message))


def messages(page):
    return [entry.message for entry in page.logs]


def test_a_sandbox_without_a_log_has_an_empty_one(read, directory):
    assert read().total == 0

    directory.rmdir()
    assert read().total == 0


def test_entries_are_oldest_first_over_both_files(read, directory):
    written(directory, (3, b"o", b"three"))
    written(directory, (1, b"o", b"one"), (2, b"e", b"two"), name="log.1")

    page = read()

    assert messages(page) == ["one", "two", "three"]
    assert [entry.source for entry in page.logs] == ["stdout", "stderr", "stdout"]
    assert [entry.timestamp for entry in page.logs] == [1.0, 2.0, 3.0]


def test_limit_takes_the_newest_and_offset_skips_from_the_newest_end(read, directory):
    written(directory, *((n, b"o", b"%d" % n) for n in range(1, 11)))

    assert messages(read(limit=3)) == ["8", "9", "10"]
    assert messages(read(limit=3, offset=2)) == ["6", "7", "8"]
    assert messages(read(limit=3, offset=9)) == ["1"]
    assert messages(read(limit=3, offset=50)) == []
    assert read(limit=3, offset=2).total == 10


def test_total_counts_what_matches_before_paging(read, directory):
    written(directory, (1, b"o", b"a"), (2, b"e", b"b"), (3, b"e", b"error: c"))

    page = read(source="stderr", limit=1)

    assert (messages(page), page.total) == (["error: c"], 2)
    assert messages(read(level="error")) == ["error: c"]


@pytest.mark.parametrize(
    ("message", "level"),
    [
        (b"DEBUG x", "debug"),
        (b"[info] error", "info"),
        (b"a Warn: b", "warning"),
        (b"warning", "warning"),
        (b"level=error", "error"),
        (b"errors were 0", None),
        (b"reinformed", None),
        (b"informational", None),
        (b"", None),
        (b"\xff error", "error"),
    ],
)
def test_a_lines_level_is_the_first_that_it_names_as_a_word(message, level):
    assert logs.level_of(message) == level


def test_levels_match_exactly(read, directory):
    written(directory, (1, b"o", b"warn: a"), (2, b"o", b"error: b"), (3, b"o", b"plain"))

    assert messages(read(level="warning")) == ["warn: a"]
    assert messages(read(level="warn")) == []


def test_bytes_that_are_no_text_are_shown_as_such(read, directory):
    written(directory, (1, b"o", b"\x1b[31mred\xff\r"))

    assert messages(read()) == ["\x1b[31mred\ufffd\r"]


def test_lines_that_no_agent_wrote_are_shown_as_they_stand(read, directory):
    (directory / "log").write_bytes(b"hello\n9" + b"9" * 40 + b".000 o x\n1.000 q y\n\n5.000 o z")

    page = read()

    assert messages(page)[0] == "hello"
    assert messages(page)[-1] == "z"
    assert all(0 <= entry.timestamp <= time.time() for entry in page.logs)


def test_nothing_is_from_the_future(read, directory):
    written(directory, (99_999_999_999, b"o", b"later"))

    assert read().logs[0].timestamp <= time.time()


@pytest.mark.parametrize("kind", ["link", "fifo", "socket", "directory"])
def test_what_is_no_regular_file_is_not_read(read, directory, tmp_path, kind):
    secret = tmp_path / "secret"
    secret.write_text("1.000 o secret\n")
    path = directory / "log"
    if kind == "link":
        path.symlink_to(secret)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    else:
        path.mkdir()

    assert read().total == 0


def test_a_link_in_place_of_the_directory_is_not_followed(read, directory, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    written(other, (1, b"o", b"secret"))
    directory.rmdir()
    directory.symlink_to(other)

    assert read().total == 0


def test_of_a_file_that_was_made_huge_the_end_is_read_and_quickly(read, directory):
    with (directory / "log").open("wb") as file:
        file.truncate(1 << 40)
        file.seek(0, os.SEEK_END)
        file.write(b"\n1.000 o last\n")
    began = time.monotonic()

    page = read(limit=1)

    assert messages(page) == ["last"]
    assert time.monotonic() - began < 2


def test_a_full_log_of_empty_lines_is_counted_quickly(read, directory):
    line = b"1700000000.000 o \n"
    for name in ("log", "log.1"):
        (directory / name).write_bytes(line * (2 * 1024 * 1024 // len(line)))
    began = time.monotonic()

    page = read(limit=5, source="stderr")

    assert page.total == 0
    assert time.monotonic() - began < 3
