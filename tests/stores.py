"""A store of images for a test: a directory of its own, and a look at what is left in it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heyvm.backends import trees
from heyvm.images import Images
from heyvm.models import Image, Sandbox, Status
from heyvm.registry import Registry
from heyvm.settings import Settings
from tests.server import all_pids, read_bytes, wait_until


class Store(Images):
    """The real one, with its registry and what it was told at hand."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.home = home
        self.data_dir = home / "data"
        self.data_dir.mkdir(mode=0o700, exist_ok=True)
        self.registry = Registry(self.data_dir / "registry.db")
        self.told: list[str] = []
        super().__init__(
            self.registry, Settings(data_dir=self.data_dir, run_dir=home / "run", **settings)
        )

    def tell(self, text: str) -> None:
        self.told.append(text)

    def have(self, name: str) -> Image:
        return self.pull(name, self.tell)

    def tree(self, name: str) -> Path:
        return self.rootfs(self.get(name))

    def use(self, image: Image, slug: str = "user") -> None:
        """Write a sandbox that has this image."""
        self.registry.add(
            Sandbox(
                id=f"sb-{slug}",
                name=slug,
                slug=slug,
                status=Status.STOPPED,
                status_changed_at=0.0,
                created_at=0.0,
                backend_type="bubblewrap",
                image_resolved=image.digest,
            )
        )

    def left(self) -> Sequence[str]:
        """What should not be there while nothing is under way."""
        images, trash = self.data_dir / "images", self.data_dir / "trash"
        known = {image.digest.removeprefix("sha256:") for image in self.list()} | {".lock"}
        found = [str(one) for one in images.glob("*") if one.name not in known]
        found += [str(one) for one in trash.glob("*")]
        return [*found, *map(str, self.workers())]

    def workers(self) -> list[int]:
        """Processes that work in it."""
        needle = os.fsencode(self.data_dir / "images")
        return [pid for pid in all_pids() if needle in place_of(pid)]

    def wait_until_clean(self) -> None:
        """As the keeper has it, which sweeps again and again: the last thread of a killed process
        holds its files a moment longer than it is seen."""

        def swept() -> bool:
            self.sweep()
            return self.left() == []

        wait_until(swept, "nothing works there any more, and nothing is left")


def place_of(pid: int) -> bytes:
    """Its working directory, unless it is a zombie."""
    try:
        return os.fsencode(os.readlink(f"/proc/{pid}/cwd"))
    except OSError:
        return b""


def command_of(pid: int) -> bytes:
    return read_bytes(f"/proc/{pid}/cmdline").replace(b"\0", b" ")


@contextmanager
def store(**settings: Any) -> Iterator[Store]:
    """An empty one; fails if anything is left in it but its images."""
    home = Path(tempfile.mkdtemp(prefix="heyvm-store-"))
    made = Store(home, **settings)
    try:
        yield made
        left = made.left()
    finally:
        made.registry.close()
        trees.remove(str(made.data_dir))
        shutil.rmtree(home, ignore_errors=True)
    assert not left, left
