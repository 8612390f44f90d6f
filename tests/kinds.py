"""The kinds of sandboxes that a promise has to hold for: who runs the server, and what lies below.

    @pytest.fixture(scope="module", params=kinds.SERVERS)
    def server(request):
        with kinds.user(request.param) as uid, Server(user=uid) as running: ...

`root`: 65,536 ids for each sandbox; `sub-ids`: an ordinary user with lines in /etc/subuid;
`single`: one without. `host` and `image` are the root file systems; the image holds busybox alone.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import images
from tests.server import ORDINARY, Session

SERVERS = ("root", "sub-ids", "single") if os.geteuid() == 0 else ("single",)
ROOTS = ("host", "image")
IMAGE = "kinds:1"


@contextlib.contextmanager
def user(kind: str) -> Iterator[int | None]:
    """Who runs a server of this kind; None: whoever runs the tests."""
    if kind == "single" and os.geteuid() == 0:
        yield ORDINARY
    elif kind == "sub-ids":
        if not os.path.exists("/usr/bin/newuidmap"):
            pytest.skip("apt install uidmap")
        name = f"hv{secrets.token_hex(4)}"
        told = ["useradd", "--no-create-home", "--home-dir", "/nonexistent", name]
        subprocess.run(told, check=True)
        try:
            yield pwd.getpwnam(name).pw_uid
        finally:
            subprocess.run(["userdel", name], check=True, capture_output=True)
    else:
        yield None


def bring(http: Session, layout: Path | None = None, name: str = IMAGE) -> None:
    """Import an image: busybox, or another layout of tests/images.py."""
    told = ["tar", "-C", str(layout or images.tiny()), "-c", "."]
    packed = subprocess.run(told, stdout=subprocess.PIPE, check=True)
    answer = http.put(f"/images/{name}", data=packed.stdout)
    assert answer.status_code == 201, answer.text


def wanted(root: str) -> dict[str, str]:
    """What a create says to get this root file system."""
    return {} if root == "host" else {"image": IMAGE}
