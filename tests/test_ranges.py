"""Ids that belong to sandboxes alone: reserved where every tool of the system looks."""

import subprocess
import sys
from pathlib import Path

import pytest

from heyvm.backends import ranges

ROOT = Path(__file__).parent.parent


@pytest.fixture
def etc(tmp_path):
    (tmp_path / "passwd").write_text(
        "root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\n"
    )
    (tmp_path / "group").write_text("root:x:0:\n")
    (tmp_path / "subuid").write_text("ann:100000:65536")
    (tmp_path / "subgid").write_text("ann:100000:65536\n")
    return tmp_path


def lines(path):
    return path.read_text().splitlines()


def test_a_block_is_reserved_in_both_files_and_others_lines_are_kept(etc):
    base = ranges.free("aaaa", frozenset(), str(etc))
    for name in ("subuid", "subgid"):
        assert lines(etc / name) == ["ann:100000:65536", f"heyvm-aaaa:{base}:{ranges.BLOCK}"]


def test_a_taken_range_is_not_given_again(etc):
    first = ranges.free("aaaa", frozenset(), str(etc))
    assert ranges.free("aaaa", frozenset({first}), str(etc)) == first + ranges.SIZE


def test_a_full_block_is_followed_by_another(etc):
    first = ranges.free("aaaa", frozenset(), str(etc))
    every = frozenset(range(first, first + ranges.BLOCK, ranges.SIZE))
    second = ranges.free("aaaa", every, str(etc))
    assert second not in every
    assert len(lines(etc / "subuid")) == 3


def test_no_range_overlaps_another_user_or_server(etc):
    low = ranges.LOWEST
    (etc / "subuid").write_text(f"eve:{low + 5}:10\n")
    (etc / "passwd").write_text(f"odd:x:{low + ranges.BLOCK}:0::/:/bin/sh\n")
    one = ranges.free("aaaa", frozenset(), str(etc))
    two = ranges.free("bbbb", frozenset(), str(etc))
    assert one == low + 2 * ranges.BLOCK
    assert two == low + 3 * ranges.BLOCK


def test_a_reservation_cut_short_is_made_whole(etc):
    (etc / "subuid").write_text(f"heyvm-aaaa:{ranges.LOWEST}:{ranges.BLOCK}\n")
    base = ranges.free("aaaa", frozenset(), str(etc))
    assert lines(etc / "subuid") == [f"heyvm-aaaa:{base}:{ranges.BLOCK}"]
    assert f"heyvm-aaaa:{base}:{ranges.BLOCK}" in lines(etc / "subgid")


def test_release_takes_only_its_own_lines(etc):
    ranges.free("aaaa", frozenset(), str(etc))
    ranges.free("bbbb", frozenset(), str(etc))
    ranges.release("aaaa", str(etc))
    assert [line.split(":")[0] for line in lines(etc / "subuid")] == ["ann", "heyvm-bbbb"]


def test_servers_that_reserve_at_once_get_blocks_that_do_not_overlap(etc):
    program = (
        "import sys; from heyvm.backends import ranges;"
        "print(ranges.free(sys.argv[1], frozenset(), sys.argv[2]))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, f"m{number}", str(etc)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        for number in range(6)
    ]
    bases = [int(one.communicate()[0]) for one in running]
    assert len(set(bases)) == 6
    assert len(lines(etc / "subuid")) == 7
