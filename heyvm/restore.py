"""`heyvm restore`: a data directory out of what `heyvm backup` has written.

The file is taken for hostile as far as a path, a link or a device could reach beyond the data
directory. Its registry is believed: who wrote that says what sandboxes mount and may connect to.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from heyvm.backends import ranges, trees
from heyvm.backup import AUDIT, BOUND, END, FORMAT, HEAD, REGISTRY, Failed
from heyvm.errors import HeyvmError
from heyvm.registry import Registry
from heyvm.settings import Settings

MOST_JSON = 64 << 20
PIECE = 1 << 20
MOST_SAID = 500
LATEST = 1e11  # of times that have a year
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"  # RFC 8878 section 3.1.1
STAGES = ".restore.*"
# What may be there, and is no data of a server's.
NEUTRAL = frozenset({"keeper.lock", "lost+found"})
PARTS = ("images", "sandboxes", AUDIT)
SANDBOX_ID = re.compile(r"sb-[0-9a-f]{8}")
DIGEST = re.compile(r"[0-9a-f]{64}")
# What a sandbox's directory holds; the server opens these by name, so none may be a link.
SANDBOX_DIRECTORIES = frozenset({"root", "root.work", "usr", "usr.work", "log", "disk"})
SANDBOX_FILES = frozenset({"status", "ids", "disk.img"})
CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "MKNOD", "SETFCAP", "SYS_ADMIN")
UNPACK = (
    *("tar", "--extract", "--ignore-zeros", "--numeric-owner", "--same-owner"),
    *("--preserve-permissions", "--acls", "--xattrs", "--xattrs-include=*", "--sparse"),
)


def run(settings: Settings, source: str) -> int:
    """Unpack `source` (`-`: stdin) into an empty data directory. 0, or 1 with nothing left."""
    try:
        with _source(source) as file:
            _restore(settings, file)
    except (Failed, HeyvmError, OSError) as wrong:
        _say(f"{getattr(wrong, 'detail', wrong)}; nothing was restored")
        return 1
    except KeyboardInterrupt:
        _say("ended; nothing was restored")
        return 1
    return 0


@contextlib.contextmanager
def _source(name: str) -> Iterator[IO[bytes]]:
    if name == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(name, "rb")
    except OSError as error:
        raise Failed(f"{name} cannot be read: {error.strerror}") from None
    with file:
        yield file


def _restore(settings: Settings, file: IO[bytes]) -> None:
    data_dir = settings.data_dir
    lock = _take(data_dir)
    try:
        stage = data_dir / STAGES.replace("*", secrets.token_hex(4))
        stage.mkdir(mode=0o700)
        try:
            _unpack(file, stage)
            _settle(settings, stage)
        finally:
            trees.remove(str(stage))
    finally:
        os.close(lock)


def _take(data_dir: Path) -> int:
    """The keeper's lock of a data directory that is empty."""
    from heyvm.keeper import ENDING_S, take_lock

    if os.geteuid() != 0:
        raise Failed("only root can restore: the files of sandboxes have ids of their own")
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = take_lock(data_dir, ENDING_S)
    if lock is None:
        raise Failed(f"a server uses {data_dir}: stop it first")
    for left in data_dir.glob(STAGES):  # of a restore that was killed: nobody else has the lock
        trees.remove(str(left))
    there = sorted(set(os.listdir(data_dir)) - NEUTRAL)
    if there:
        os.close(lock)
        raise Failed(
            f"{data_dir} is not empty ({there[0]!r}): `heyvm purge --yes` empties it, or set"
            " HEYVM_DATA_DIR to another place"
        )
    os.chmod(data_dir, 0o700)
    return lock


# -- unpacking -----------------------------------------------------------------------------------


def _unpack(file: IO[bytes], stage: Path) -> None:
    first = file.read(len(ZSTD_MAGIC))
    chain = [_confined(stage)]
    if first == ZSTD_MAGIC:
        if shutil.which("zstd") is None:
            raise Failed("it was made with zstd, which is not installed: apt install zstd")
        chain.insert(0, ["zstd", "-q", "-d", "-c"])
    _say("unpacking ...")
    with _said(stage) as said:
        _pump(first, file, chain, said)


def _confined(stage: Path) -> list[str]:
    """tar refuses what leads out of its directory; and where it does not, it finds everything else
    read-only, and devices that cannot be opened."""
    capabilities = [word for one in CAPABILITIES for word in ("--cap-add", f"CAP_{one}")]
    return [
        *("bwrap", "--ro-bind", "/", "/", "--bind", str(stage), str(stage), "--chdir", str(stage)),
        *("--unshare-pid", "--unshare-net", "--unshare-ipc", "--die-with-parent"),
        *("--cap-drop", "ALL", *capabilities, *UNPACK),
    ]


@contextlib.contextmanager
def _said(stage: Path) -> Iterator[IO[bytes]]:
    path = stage.with_name(f"{stage.name}.said")
    try:
        with path.open("w+b") as said:
            yield said
    finally:
        path.unlink(missing_ok=True)


def _pump(first: bytes, file: IO[bytes], chain: Sequence[Sequence[str]], said: IO[bytes]) -> None:
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in chain:
            source = processes[-1].stdout if processes else subprocess.PIPE
            last = command is chain[-1]
            processes.append(
                subprocess.Popen(
                    [*BOUND, *command],
                    stdin=source,
                    stdout=subprocess.DEVNULL if last else subprocess.PIPE,
                    stderr=said,
                    env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
                )
            )
            if source is not subprocess.PIPE:
                source.close()  # type: ignore[union-attr]
        _feed(first, file, processes[0])
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(codes):
        said.seek(0)
        why = said.read(MOST_SAID).decode(errors="replace").strip()
        raise Failed(f"it cannot be unpacked: {why or codes}")


def _feed(first: bytes, file: IO[bytes], process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended: its exit code says why
        piece = first
        while piece:
            process.stdin.write(piece)
            piece = file.read(PIECE)
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


# -- judging -------------------------------------------------------------------------------------


def _settle(settings: Settings, stage: Path) -> None:
    head, end = _json(stage, HEAD), _json(stage, END)
    if head.get("format") != FORMAT:
        raise Failed(f"it has the format {head.get('format')!r}, which this heyvm does not know")
    made_at = head.get("made_at")
    if not isinstance(made_at, (int, float)) or not 0 <= made_at < LATEST:
        raise Failed("its backup.json says no time")
    sandboxes = _names(stage, "sandboxes", SANDBOX_ID) & set(map(str, end.get("sandboxes", ())))
    images = _names(stage, "images", DIGEST)
    for sandbox_id in sandboxes:
        _judge_sandbox(stage / "sandboxes" / sandbox_id)
    for digest in images:
        _demand(stage / "images" / digest / "rootfs", stat.S_ISDIR)
    _judge_audit(stage)
    _judge_devices(stage)
    gone = _settle_registry(settings, stage, float(made_at), sandboxes, images)
    _move(stage, settings.data_dir)
    _report(head, sandboxes, gone)


def _json(stage: Path, name: str) -> dict[str, Any]:
    path = stage / name
    if not path.is_file() or path.is_symlink() or path.stat().st_size > MOST_JSON:
        raise Failed(f"it is no whole backup (no {name}): it was cut short, or is something else")
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Failed(f"its {name} cannot be read")
    return value


def _names(stage: Path, part: str, form: re.Pattern[str]) -> frozenset[str]:
    directory = stage / part
    if not os.path.lexists(directory):
        return frozenset()
    _demand(directory, stat.S_ISDIR)
    names = frozenset(os.listdir(directory))
    for name in names:
        if not form.fullmatch(name):
            raise Failed(f"what is {part}/{name!r}? No backup holds that")
        _demand(directory / name, stat.S_ISDIR)
    return names


def _judge_sandbox(directory: Path) -> None:
    for name in os.listdir(directory):
        if name in SANDBOX_DIRECTORIES:
            _demand(directory / name, stat.S_ISDIR)
        elif name in SANDBOX_FILES:
            _demand(directory / name, stat.S_ISREG)
        else:
            raise Failed(f"what is {name!r} in a sandbox's directory? No backup holds that")


def _judge_audit(stage: Path) -> None:
    if os.path.lexists(stage / AUDIT):
        _demand(stage / AUDIT, stat.S_ISDIR)
        for name in os.listdir(stage / AUDIT):
            _demand(stage / AUDIT / name, stat.S_ISREG)


def _demand(path: Path, kind: Any) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        raise Failed(f"{path.name!r} is missing in it") from None
    if not kind(found.st_mode) or (kind is stat.S_ISREG and found.st_nlink != 1):
        raise Failed(f"{path.name!r} is not what it has to be: no backup holds that")


def _judge_devices(stage: Path) -> None:
    """A file that was deleted is a device 0:0 in an overlay (overlayfs: "whiteouts"); no other one
    has any business there."""
    told = ["find", str(stage), "-xdev", "(", "-type", "b", "-printf", "x", ")", "-o"]
    told += ["(", "-type", "c", "-exec", "stat", "-c", "%t:%T", "{}", "+", ")"]
    found = subprocess.run(told, capture_output=True, check=False)
    if found.returncode != 0 or set(found.stdout.split()) - {b"0:0"}:
        raise Failed("there are devices in it: no backup holds these")


# -- taking it over ------------------------------------------------------------------------------


def _settle_registry(
    settings: Settings,
    stage: Path,
    made_at: float,
    sandboxes: frozenset[str],
    images: frozenset[str],
) -> Sequence[str]:
    """Make its registry that of a server that has stopped, and reserve its ids here."""
    _demand(stage / REGISTRY, stat.S_ISREG)
    registry = Registry(stage / REGISTRY)
    try:
        gone = registry.settle_restored(
            sandboxes, frozenset(f"sha256:{one}" for one in images), made_at
        )
        bases = registry.id_bases()
    finally:
        registry.close()
    if any(base % 1 or not _is_range(base) for base in bases):
        raise Failed("its sandboxes have ids that are not for sandboxes")
    ranges.claim(settings.mark, bases)
    return gone


def _is_range(base: object) -> bool:
    return (
        isinstance(base, int)
        and ranges.LOWEST <= base < ranges.HIGHEST
        and (base - ranges.LOWEST) % ranges.SIZE == 0
    )


def _move(stage: Path, data_dir: Path) -> None:
    """Into its place. The registry comes last: without it there is no data directory."""
    for part in PARTS:
        if (stage / part).is_dir():
            os.rename(stage / part, data_dir / part)
    # Not by a rename: a server that was started meanwhile has made one of its own.
    os.link(stage / REGISTRY, data_dir / REGISTRY)


def _report(head: dict[str, Any], sandboxes: frozenset[str], gone: Sequence[str]) -> None:
    if gone:
        _say(f"without files in the backup, and therefore gone: {', '.join(gone)}")
    _say(
        f"{len(sandboxes)} sandboxes as of {head.get('made')!s}, all of them stopped. Start the"
        " server, and those that you want"
    )


def _say(text: str) -> None:
    print(f"heyvm restore: {text}", file=sys.stderr, flush=True)
