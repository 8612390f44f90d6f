"""Boxes of the bubblewrap backend without a server around them: for what no request can ask for.

with Boxes() as boxes:
    box = boxes.start(image=boxes.image(tree))   # a directory, or a layout of tests/images.py
    assert box.run("id -u").stdout == b"0\n"
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import os
import secrets
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from heyvm import guest
from heyvm.backends import cgroups, ranges, trees
from heyvm.backends.bubblewrap import Bubblewrap
from heyvm.models import ExecResult, Network, Sandbox, Status
from heyvm.settings import Settings
from tests import images


class Box:
    """A sandbox that runs, or did."""

    def __init__(self, backend: Bubblewrap, sandbox: Sandbox) -> None:
        self.backend, self.sandbox = backend, sandbox

    @property
    def directory(self) -> Path:
        return self.backend.sandboxes / self.sandbox.id

    def start(self) -> None:
        notes: list[Any] = []
        with self.backend.start(self.sandbox, notes.append) as first:
            guest.go(first, guest.base_environment(self.sandbox), "/workspace")
        self.change(state=notes[0])

    def change(self, **fields: Any) -> None:
        self.sandbox = dataclasses.replace(self.sandbox, **fields)

    def stop(self) -> None:
        self.backend.stop(self.sandbox, grace=0)

    def restart(self) -> None:
        self.stop()
        self.start()

    def execute(self, *argv: str, **options: Any) -> ExecResult:
        environment = guest.base_environment(self.sandbox)
        with self.backend.connect(self.sandbox) as sock:
            return guest.execute(sock, argv=argv, env=environment, timeout_seconds=120, **options)

    def run(self, line: str, **options: Any) -> ExecResult:
        return self.execute("/bin/sh", "-c", line, **options)

    def output(self, line: str, **options: Any) -> str:
        """What a line prints, which must succeed."""
        done = self.run(line, **options)
        assert done.exit_code == 0, done.output.decode()
        return done.stdout.decode()

    @contextlib.contextmanager
    def visit(self) -> Iterator[Callable[[], socket.socket]]:
        """Connections to the agent of a box on its files while it is stopped."""
        notes: list[Any] = []
        with self.backend.start(self.sandbox, notes.append, visit=True) as first:
            visited = dataclasses.replace(self.sandbox, state=notes[0])
            guest.go(first, {}, "/workspace", visit=True)
            yield lambda: self.backend.connect(visited)
        self.backend.stop(visited, grace=0)


class Boxes:
    """A backend with directories of its own, and everything that was made with it."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = home or Path(tempfile.mkdtemp(prefix="hv-"))
        self.settings = Settings(data_dir=self.home / "data", run_dir=self.home / "run")
        for directory in (self.settings.data_dir, self.settings.run_dir):
            directory.mkdir(mode=0o700)
        self.backend = Bubblewrap(self.settings)
        self.made: list[Box] = []

    def __enter__(self) -> Boxes:
        return self

    def __exit__(self, *_: object) -> None:
        for box in self.made:
            self.backend.destroy(box.sandbox)
        left = self.backend.inventory()
        self.backend.launcher._forget()
        if os.geteuid() == 0:
            ranges.release(self.settings.mark)
        with contextlib.suppress(AttributeError):
            cgroups.remove_tree(self.settings.mark)
        trees.remove(str(self.home))
        assert not left

    def image(self, source: Path) -> str:
        """Unpack it; the digest by which it is asked for."""
        if (source / "index.json").exists():
            return self._layout(source)
        digest = hashlib.sha256(os.fsencode(source)).hexdigest()
        store = self.settings.data_dir / "images" / digest
        store.mkdir(parents=True)
        subprocess.run(["cp", "-a", source, store / "rootfs"], check=True)
        return f"sha256:{digest}"

    def _layout(self, layout: Path) -> str:
        manifest = images.manifest_of(layout)
        digest = str(manifest["config"]["digest"])
        root = self.settings.data_dir / "images" / digest.removeprefix("sha256:") / "rootfs"
        if root.exists():
            return digest
        root.mkdir(parents=True)
        for one in manifest["layers"]:
            with gzip.open(images.blob(layout, one["digest"])) as tar:
                told = ["tar", "-x", "-p", "--numeric-owner", "--exclude=./dev/*", "-C", str(root)]
                subprocess.run(told, input=tar.read(), check=True)
        return digest

    def draft(self, image: str = "host", **fields: Any) -> Box:
        """One that was never started."""
        name = f"sb-{secrets.token_hex(4)}"
        taken = frozenset(one.sandbox.id_base or 0 for one in self.made)
        base = self.backend.allocate(taken)
        ids = {"ids": self.backend._offer_ids(), "network": Network("none"), **fields}
        sandbox = Sandbox(
            *(name, name, name, Status.RUNNING, 0.0, 0.0, "bubblewrap", image), id_base=base, **ids
        )
        self.made.append(Box(self.backend, sandbox))
        return self.made[-1]

    def start(self, image: str = "host", **fields: Any) -> Box:
        box = self.draft(image, **fields)
        box.start()
        return box
