"""`heyvm purge`: takes back everything that a server has made on this machine, and knows what."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from heyvm.errors import HeyvmError
from heyvm.settings import Settings
from heyvm.sockets import PLACES

if TYPE_CHECKING:
    from heyvm.api.parts import Services

LAUNCHER_END_S = 2.0
REGISTRY = "registry.db"
# The directory may hold what is not ours, so that it is not removed as a whole.
MADE = (
    *("sandboxes", "images", "trash", "bundle", "host", "audit", "seccomp-*.bpf", f"{REGISTRY}*"),
    "tunnels.lock",
)
MADE_TO_RUN = (
    "agents",
    "visits",
    "locks",
    "pasta",
    "usage.json*",
    "forwarding.json*",
    "keeper.sock*",
    "metrics",
)


def run(settings: Settings, *, sure: bool) -> int:
    """0 where nothing of the server is left; 1 says what is, or what would go."""
    from heyvm.keeper import ENDING_S, LOCK_NAME, take_lock

    if not (settings.data_dir / REGISTRY).exists():
        return _refuse(f"no server has used {settings.data_dir}: set HEYVM_DATA_DIR as it did")
    if take_lock(settings.data_dir, ENDING_S) is None:
        return _refuse(f"a server uses {settings.data_dir}: stop it first")
    from app import build

    services = build(settings, with_keeper=False)
    services.lifecycle.open()
    sandboxes, images = services.lifecycle.registry.known_ids(), services.images.list()
    if not sure:
        return _refuse(
            f"this would delete {len(sandboxes)} sandboxes, {len(images)} images and what else a"
            f" server has made in {settings.data_dir} and {settings.run_dir}: say --yes"
        )
    try:
        _delete(services, sandboxes)
        give_back(services)
        services.lifecycle.registry.close()
        for place in PLACES:  # made with an API_HOSTNAME, which may be gone from the settings
            _remove(settings.ports / place, ("*.sock", "*.sock.new"))
        _remove(settings.ports, ())
        _remove(settings.run_dir, MADE_TO_RUN)
        if settings.run_dir.name == settings.mark:  # the default, in a directory made for it
            _remove(settings.run_dir.parent, ())
        _remove(settings.data_dir, (*MADE, LOCK_NAME))
    except HeyvmError as wrong:
        return _refuse(f"{wrong.detail}; the rest is as it was: call it again")
    except OSError as error:
        return _refuse(f"{error}; the rest is as it was: call it again")
    return 0


def _delete(services: Services, sandboxes: frozenset[str]) -> None:
    for number, sandbox_id in enumerate(sorted(sandboxes), 1):
        print(f"deleting sandbox {number} of {len(sandboxes)} ...", file=sys.stderr)
        services.lifecycle.delete(sandbox_id)
    services.images.prune()
    services.images.sweep()
    known = services.lifecycle.registry.known_ids()
    for backend in services.backends.values():
        backend.sweep(backend.inventory() - known)  # what a crash left, with the ids that it has


def give_back(services: Services) -> None:
    """What was made or reserved outside of the server's directories. No sandbox may be left."""
    from heyvm.backends import ranges
    from heyvm.backends.bubblewrap import Bubblewrap

    mark = services.settings.mark
    backend = services.backends[Bubblewrap.name]
    assert isinstance(backend, Bubblewrap)
    backend.networks.remove()
    backend.launcher._forget()  # it ends, and with it what keeps the groups from going
    _remove_groups(mark)
    if backend.root:
        with contextlib.suppress(HeyvmError):
            ranges.release(mark)


def _remove_groups(mark: str) -> None:
    from heyvm.backends import cgroups

    places = [place.under(f"heyvm-{mark}") for place in cgroups.hierarchies()]
    end = time.monotonic() + LAUNCHER_END_S
    cgroups.remove_tree(mark)
    while any(map(os.path.exists, places)) and time.monotonic() < end:
        time.sleep(0.02)
        cgroups.remove_tree(mark)


def _remove(directory: Path, patterns: tuple[str, ...]) -> None:
    from heyvm.backends import trees

    for path in (one for pattern in patterns for one in directory.glob(pattern)):
        if path.is_dir() and not path.is_symlink():
            trees.remove(str(path))
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()


def _refuse(text: str) -> int:
    print(f"heyvm: {text}", file=sys.stderr)
    return 1
