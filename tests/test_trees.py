"""A tree that hostile code made is removed whole, whatever it is."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from heyvm.backends import trees


@pytest.fixture
def tmp_path_of_anybody():
    """pytest's own lie where only their owner gets to."""
    with tempfile.TemporaryDirectory(prefix="hv-") as path:
        yield Path(path)


def nest(top, depth):
    """`depth` directories, one in the other: far beyond PATH_MAX and Python's recursion limit."""
    here = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d" * 200, dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def test_a_tree_deeper_than_any_path_is_removed(tmp_path):
    top = tmp_path / "top"
    top.mkdir()
    nest(top, 3000)
    trees.remove(str(top))
    assert not top.exists()


def test_what_takes_long_is_left_to_a_process_of_its_own(tmp_path, monkeypatch):
    """The keeper and the workers have others to answer meanwhile."""
    monkeypatch.setattr(trees, "SOON_S", 0.01)
    top = tmp_path / "top"
    top.mkdir()
    nest(top, 3000)
    began = time.process_time()
    trees.remove(str(top))
    assert not top.exists()
    assert time.process_time() - began < 0.1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts something")
def test_what_cannot_be_removed_there_either_is_told_here(tmp_path, monkeypatch):
    monkeypatch.setattr(trees, "SOON_S", 0.0)
    top = tmp_path / "top"
    (top / "mounted").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", top / "mounted"], check=True)
    try:
        with pytest.raises(OSError, match="busy"):
            trees.remove(str(top))
    finally:
        subprocess.run(["umount", top / "mounted"], check=True)


def test_links_are_removed_and_never_followed(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("precious")
    top = tmp_path / "top"
    (top / "a").mkdir(parents=True)
    (top / "a" / "link").symlink_to(tmp_path / "kept")
    (top / "loop").symlink_to(top)
    trees.remove(str(top))
    assert not top.exists()
    assert (tmp_path / "kept" / "file").read_text() == "precious"


def test_a_link_in_its_own_place_is_refused(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("precious")
    (tmp_path / "top").symlink_to(tmp_path / "kept")
    with pytest.raises(OSError):
        trees.remove(str(tmp_path / "top"))
    assert (tmp_path / "kept" / "file").exists()


def test_sockets_fifos_and_odd_names_are_removed(tmp_path):
    top = tmp_path / "top"
    top.mkdir()
    os.mkfifo(top / "fifo")
    os.mkdir(os.fsencode(top) + b"/\xff\n")
    (top / "-rf").mkdir()
    trees.remove(str(top))
    assert not top.exists()


def test_a_missing_one_is_fine(tmp_path):
    trees.remove(str(tmp_path / "nothing"))


def test_several_may_remove_the_same_one(tmp_path):
    top = tmp_path / "top"
    for number in range(200):
        (top / f"{number}" / "a" / "b").mkdir(parents=True)
    failures = []

    def remove():
        try:
            trees.remove(str(top))
            assert not top.exists()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=remove) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.skipif(os.geteuid() != 0, reason="drops root's rights to show an ordinary user's")
def test_an_ordinary_user_removes_what_was_made_unreadable(tmp_path_of_anybody):
    tmp_path = tmp_path_of_anybody
    top = tmp_path / "top"
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "file").touch()
    (top / "a" / "b").chmod(0)
    (top / "a").chmod(0o500)
    subprocess.run(["chown", "-R", "12345:12345", tmp_path], check=True)
    program = (
        "import os,sys; os.setresuid(12345,12345,12345);"
        "from heyvm.backends import trees; trees.remove(sys.argv[1])"
    )
    root = os.path.dirname(os.path.dirname(__file__))
    done = subprocess.run(
        [sys.executable, "-c", program, str(top)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not top.exists()
