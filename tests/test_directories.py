"""The server's directories are its own."""

import os

import pytest

from heyvm.directories import demand_safe, make_private
from heyvm.errors import Misconfigured

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="makes directories of other users")


def test_it_is_made_and_closed(tmp_path):
    path = tmp_path / "a" / "b"
    make_private(path)
    assert path.stat().st_mode & 0o777 == 0o700


def test_one_that_was_open_is_closed(tmp_path):
    path = tmp_path / "open"
    path.mkdir(mode=0o755)
    make_private(path)
    assert path.stat().st_mode & 0o777 == 0o700


@ROOT
def test_anothers_is_refused(tmp_path):
    path = tmp_path / "theirs"
    path.mkdir()
    os.chown(path, 23451, 23451)
    with pytest.raises(Misconfigured, match="23451"):
        make_private(path)


@ROOT
def test_one_that_another_could_swap_is_refused(tmp_path):
    above = tmp_path / "theirs"
    (above / "run").mkdir(parents=True)
    os.chown(above, 23451, 23451)
    with pytest.raises(Misconfigured, match="theirs"):
        demand_safe(above / "run")


def test_one_in_a_directory_that_everybody_writes_is_refused(tmp_path):
    above = tmp_path / "everybodys"
    (above / "run").mkdir(parents=True)
    above.chmod(0o777)
    with pytest.raises(Misconfigured, match="everybody"):
        demand_safe(above / "run")
    above.chmod(0o1777)
    demand_safe(above / "run")


@ROOT
def test_a_link_that_another_could_aim_elsewhere_is_refused(tmp_path):
    (tmp_path / "ours" / "run").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to("ours")
    demand_safe(link / "run")
    os.chown(link, 23451, 23451, follow_symlinks=False)
    with pytest.raises(Misconfigured, match="23451"):
        demand_safe(link / "run")
