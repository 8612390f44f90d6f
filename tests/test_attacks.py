"""Attacks on a real server: from inside a sandbox, over HTTP, and by other users of the machine.

What one line of attack needs in breadth stands in the test of its module; here is what crosses
several.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.server import Server, wait_until

BOB = 23457  # an ordinary user of the host, who has nothing to do with the server
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="acts as several users of the host")


# --- other users of the machine -------------------------------------------------------------------


@pytest.fixture
def own() -> Iterator[Server]:
    """A server that the test may look at from outside while it is left alone."""
    with Server() as running:
        yield running


def entitled(title: str) -> subprocess.Popen[bytes]:
    """A process of Bob's that calls itself something."""
    arguments: dict[str, Any] = {"user": BOB, "group": BOB, "extra_groups": []}
    return subprocess.Popen([title, "60"], executable="/usr/bin/sleep", **arguments)


@ROOT
@pytest.mark.parametrize("name", ["../../precious", "sb-00000000"])
def test_a_process_that_calls_itself_a_sandbox_is_none(own: Server, name: str) -> None:
    """The keeper removes what no row knows: here a directory that the title leads to."""
    precious = own.home / "precious"
    precious.mkdir()
    with entitled(f"heyvm:{own.mark}:{name}") as bobs:
        swept(own)
        assert precious.is_dir()
        assert bobs.poll() is None
        bobs.kill()


def swept(server: Server) -> None:
    """Wait until the keeper has removed a stray that was put there, and so has looked."""
    stray = server.data_dir / "sandboxes" / "sb-ffffffff"
    for _ in range(2):
        stray.mkdir()
        wait_until(lambda: not stray.exists(), "the keeper has swept")
