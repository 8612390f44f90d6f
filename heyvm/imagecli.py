"""`heyvm images`: the store of images on the command line, whether or not a server is running."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from heyvm import directories, settings
from heyvm.errors import HeyvmError, Misconfigured
from heyvm.images import Images
from heyvm.models import Image
from heyvm.registry import Registry

LINE_S = 5.0  # between lines that only say how far it is, where nobody can see one line change
INTERRUPTED = 130
HEXADECIMAL = re.compile("[0-9a-f]{64}")


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command with `heyvm`."""
    images = commands.add_parser(
        "images",
        help="pull, import, list and remove images",
        description="The images that sandboxes are made from, as this server's store has them. It"
        " needs no server; call it as the user that the server runs as.",
    )
    images.set_defaults(command=lambda _: _told_nothing(images))
    verbs = images.add_subparsers(title="commands", metavar="COMMAND")
    pull = _add(verbs, "pull", "fetch what a registry has under a name now", pull_images)
    pull.add_argument("names", nargs="+", metavar="NAME", help="as for docker pull")
    take = _add(verbs, "import", "take an image from a tar", import_image)
    take.add_argument("name", metavar="NAME", help="what it is to be called")
    take.add_argument(
        "file",
        metavar="FILE",
        help="a root file system, or what `docker save` or an OCI archive holds; - for stdin",
    )
    take.add_argument("--sha256", type=_sum, metavar="HEX", help="what FILE must have")
    _add(verbs, "list", "list the images that are here", list_images)
    show = _add(verbs, "show", "print what is known of an image", show_image)
    show.add_argument("name", metavar="NAME", help="a name, or a digest")
    remove = _add(verbs, "rm", "remove images that no sandbox uses", remove_images)
    remove.add_argument("names", nargs="+", metavar="NAME", help="a name, or a digest")
    prune = _add(verbs, "prune", "remove every image that no sandbox uses", prune_images)
    prune.add_argument("--nameless", action="store_true", help="only those that have no name")


def pull_images(store: Images, options: argparse.Namespace) -> Any:
    return [_pulled(store, name) for name in options.names]


def import_image(store: Images, options: argparse.Namespace) -> Any:
    store.demand_name(options.name)
    with Progress() as progress:
        if options.file != "-":
            taken = store.take(options.name, options.file, options.sha256, progress)
            return [_shown(store, taken)]
        with tempfile.TemporaryFile(dir=_settings().data_dir) as spool:
            shutil.copyfileobj(sys.stdin.buffer, spool)
            spool.flush()
            path = f"/proc/self/fd/{spool.fileno()}"
            return [_shown(store, store.take(options.name, path, options.sha256, progress))]


def list_images(store: Images, _: argparse.Namespace) -> Any:
    return [_shown(store, image) for image in store.list()]


def show_image(store: Images, options: argparse.Namespace) -> Any:
    return _shown(store, store.get(options.name))


def remove_images(store: Images, options: argparse.Namespace) -> Any:
    for name in options.names:
        store.remove(name)
    return None


def prune_images(store: Images, options: argparse.Namespace) -> Any:
    return [_shown(store, image) for image in store.prune(nameless=options.nameless)]


class Progress:
    """Says on stderr how far something is: one line that changes, or lines where that cannot be."""

    def __init__(self) -> None:
        self._seen, self._due, self._stem = "", 0.0, ""
        self._one_line = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._one_line and self._seen:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __call__(self, text: str) -> None:
        if text == self._seen:
            return
        stem, now = re.sub("[0-9]+", "", text), time.monotonic()
        if self._one_line:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)
        elif stem != self._stem or now >= self._due:
            print(text, file=sys.stderr, flush=True)
            self._due = now + LINE_S
        self._seen, self._stem = text, stem


def _pulled(store: Images, name: str) -> dict[str, Any]:
    with Progress() as progress:
        return _shown(store, store.pull(name, progress))


def _add(verbs: Any, verb: str, text: str, act: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(verb, help=text, description=text + ".")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    parser.set_defaults(command=lambda options: _run(act, options))
    return parser


def _run(act: Any, options: argparse.Namespace) -> int:
    try:
        store = _store()
        store.sweep()
        answer = act(store, options)
    except Misconfigured:
        raise
    except HeyvmError as error:
        print(f"heyvm: {error.detail}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("heyvm: interrupted; nothing is left of it", file=sys.stderr)
        return INTERRUPTED
    if options.json:
        print(json.dumps(answer, indent=2))
    elif isinstance(answer, list):
        print("\n".join(_table(answer)))
    elif answer is not None:
        print("\n".join(f"{name}: {_plain(value)}" for name, value in answer.items()))
    return 0


def _settings() -> settings.Settings:
    return settings.from_env(os.environ)


def _store() -> Images:
    known = _settings()
    directories.make_private(known.data_dir)
    return Images(Registry(known.data_dir / "registry.db"), known)


def _shown(store: Images, image: Image) -> dict[str, Any]:
    return {
        "names": list(image.names),
        "digest": image.digest,
        "path": str(store.rootfs(image)),
        "size_bytes": image.size_bytes,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(image.created_at)),
        "source": image.source,
        "devices": image.devices,
        "config": {**vars(image.config), "command": list(image.config.command)},
        "used_by": list(store.users(image)),
    }


def _table(images: Sequence[dict[str, Any]]) -> list[str]:
    lines = [("NAME", "DIGEST", "SIZE", "USED BY")]
    for one in images:
        size, users = f"{one['size_bytes'] / 1e6:.1f} MB", ", ".join(one["used_by"]) or "-"
        names = one["names"] or ["-"]
        lines += [(name, one["digest"][7:19], size, users) for name in names]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return ["  ".join(map(str.ljust, line, [*widths, 0])) for line in lines]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _told_nothing(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 0


def _sum(text: str) -> str:
    if not HEXADECIMAL.fullmatch(text.lower()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a sha256: say 64 hexadecimal digits")
    return text.lower()
