"""`heyvm backup`: the data directory as one file, made while the server runs.

The file is a row of tars, end to end (GNU tar: --ignore-zeros), through zstd where that is
installed: `backup.json`, the registry as it was at one moment, images, sandboxes, the trail of
calls, and last `complete.json`, which says what of it is whole. `restore.py` reads it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from heyvm import __version__
from heyvm.backends import pids
from heyvm.errors import Conflict, HeyvmError, NotFound, Unavailable
from heyvm.models import Sandbox, Status
from heyvm.registry import Registry, rfc3339
from heyvm.settings import Settings

if TYPE_CHECKING:
    from heyvm.api.parts import Services

FORMAT = 1
HEAD, END, REGISTRY = "backup.json", "complete.json", "registry.db"
AUDIT = "audit"
STAGES = ".backup.*"
PAUSE_S = 30.0
LOOK_S = 0.05
SYNC_TIMEOUT_S = 10.0
MOST_SAID = 500
# Whatever starts these may be killed at any instruction: they go with it.
BOUND = ("setpriv", "--pdeathsig", "KILL", "--")
# Overlays keep what is deleted as devices and in trusted.* attributes, disks are full of holes.
PACK = (
    *("tar", "--create", "--format=posix", "--numeric-owner", "--sparse", "--one-file-system"),
    *("--acls", "--xattrs", "--xattrs-include=*"),
)
ZSTD = ("zstd", "-q", "-3", "-T0", "-c")


class Failed(Exception):
    """It cannot go on, and why, for a person."""


def run(settings: Settings, target: str, *, pause: bool, pause_limit: float) -> int:
    """Write a backup to the file `target`, or to stdout for `-`. The exit code: 0, or 1 with
    nothing left of it."""
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGHUP, _end)
    # A backup that stands still would keep a sandbox still.
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    try:
        _check(settings, target)
        from app import build

        services = build(settings)
        services.lifecycle.open()
        with _stage(settings.data_dir) as stage, _output(target) as out:
            archive = Archive(out)
            made = Backup(services, stage, archive, pause_limit if pause else None).make()
            archive.close()
            size = os.fstat(out.fileno()).st_size
    except (Failed, HeyvmError, OSError) as wrong:
        _say(f"{getattr(wrong, 'detail', wrong)}; no backup was made")
        return 1
    except KeyboardInterrupt:
        _say("ended; no backup was made")
        return 1
    where = "" if target == "-" else f" in {target} ({_amount(size)})"
    _say(f"{made} sandboxes{where}. It holds secrets: whoever reads it has all that they have")
    return 0


def _end(*_: object) -> None:
    raise KeyboardInterrupt


def _check(settings: Settings, target: str) -> None:
    if os.geteuid() != 0:
        raise Failed("only root's server can be backed up so; stop another, and copy its directory")
    if not (settings.data_dir / REGISTRY).exists():
        raise Failed(f"no server has used {settings.data_dir}: set HEYVM_DATA_DIR as it did")
    for tool in ("tar", "setpriv"):
        if shutil.which(tool) is None:
            raise Failed(f"{tool} is not installed")
    if target == "-":
        if sys.stdout.isatty():
            raise Failed("a backup is nothing for a terminal: name a file, or pipe it on")
        return
    if os.path.lexists(target):
        raise Failed(f"{target} is there already: name another file, or remove it")
    inside = Path(os.path.realpath(target)).is_relative_to(os.path.realpath(settings.data_dir))
    if inside:
        raise Failed(f"{target} lies in what is to be backed up: name a file elsewhere")


@contextlib.contextmanager
def _stage(data_dir: Path) -> Iterator[Path]:
    """A directory of its own; those that killed backups have left are removed."""
    for path in data_dir.glob(STAGES):
        with contextlib.suppress(OSError), _locked(path):
            shutil.rmtree(path)
    stage = data_dir / STAGES.replace("*", secrets.token_hex(4))
    stage.mkdir(mode=0o700)
    try:
        with _locked(stage):
            yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Raises BlockingIOError where another process uses it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _output(target: str) -> Iterator[IO[bytes]]:
    """Where it goes: a file has its name when it is whole and on the disk, and mode 0600."""
    if target == "-":
        yield sys.stdout.buffer
        return
    part = f"{target}.part"
    try:
        # Never one that is there: it may be a link, or of somebody who would read all of this.
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise Failed(
            f"{part} is there already: another backup writes it, or one that was killed has left"
            " it; remove it then"
        ) from None
    except OSError as error:
        raise Failed(f"{part} cannot be written: {error.strerror}") from None
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)
            yield file
            os.fsync(descriptor)
        os.rename(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


@dataclass(frozen=True)
class Packed:
    """How one tar went: 0; 1 where something changed while it was read; 2 where it failed."""

    code: int
    said: str


class Archive:
    """Tars, one after another, into one file. Nothing of them passes through this process."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._zstd: subprocess.Popen[bytes] | None = None
        if shutil.which("zstd") is not None:
            self._zstd = subprocess.Popen([*BOUND, *ZSTD], stdin=subprocess.PIPE, stdout=out)
            assert self._zstd.stdin is not None
            self._out = self._zstd.stdin

    def add(self, directory: Path, *names: str, look: Callable[[], None] = lambda: None) -> Packed:
        """Pack these of `directory`; `look` is called all the while."""
        with tempfile.TemporaryFile() as said:
            told = [*BOUND, *PACK, "--directory", str(directory), "--", *names]
            tar = subprocess.Popen(told, stdout=self._out, stderr=said, env=_environment())
            try:
                while (code := _ended(tar)) is None:
                    look()
            except BaseException:
                tar.kill()
                tar.wait()
                raise
            said.seek(0)
            return Packed(code, said.read(MOST_SAID).decode(errors="replace").strip())

    def add_all(self, directory: Path, *names: str) -> None:
        """As `add`, of what nobody else changes."""
        done = self.add(directory, *names)
        if done.code > 1:
            raise Failed(f"{', '.join(names)}: {done.said}")

    def close(self) -> None:
        """Everything is written."""
        if self._zstd is not None:
            self._out.close()
            if self._zstd.wait() != 0:
                raise Failed("zstd failed")


class Backup:
    """One run. `pause_limit`: for how many seconds a sandbox may stand still; None: for none."""

    def __init__(
        self, services: Services, stage: Path, archive: Archive, pause_limit: float | None
    ) -> None:
        self._lifecycle = services.lifecycle
        self._settings = services.settings
        self._stage = stage
        self._archive = archive
        self._limit = pause_limit
        self._whole: list[str] = []

    def make(self) -> int:
        """Write all of it; how many sandboxes it holds."""
        ids, images = self._copy_registry()
        self._write(HEAD, self._head())
        self._archive.add_all(self._stage, HEAD)
        self._archive.add_all(self._stage, REGISTRY)
        there = [digest for digest in images if self._image(digest)]
        for number, sandbox_id in enumerate(ids, 1):
            self._sandbox(sandbox_id, f"sandbox {number} of {len(ids)}")
        if (self._settings.data_dir / AUDIT).is_dir():
            self._archive.add_all(self._settings.data_dir, AUDIT)
        self._write(END, {"sandboxes": self._whole, "images": there})
        self._archive.add_all(self._stage, END)
        return len(self._whole)

    def _copy_registry(self) -> tuple[Sequence[str], Sequence[str]]:
        """The sandboxes and images of that moment: of what comes later nothing is copied."""
        path = self._stage / REGISTRY
        self._lifecycle.registry.snapshot(path)
        copy = Registry(path)
        try:
            return sorted(copy.known_ids()), [image.digest for image in copy.images()]
        finally:
            copy.close()

    def _head(self) -> dict[str, Any]:
        now = time.time()
        return {
            "format": FORMAT,
            "heyvm": __version__,
            "made_at": now,
            "made": rfc3339(now),
            "data_dir": str(self._settings.data_dir),
        }

    def _write(self, name: str, value: dict[str, Any]) -> None:
        (self._stage / name).write_text(json.dumps(value, indent=1) + "\n")

    def _image(self, digest: str) -> bool:
        name = digest.removeprefix("sha256:")
        _say(f"image {digest[:19]} ...")
        done = self._archive.add(self._settings.data_dir, f"images/{name}")
        if done.code == 0:
            return True
        if (self._settings.data_dir / "images" / name).exists():
            raise Failed(f"image {digest}: {done.said}")
        _say(f"image {digest} was removed meanwhile: left out")
        return False

    def _sandbox(self, sandbox_id: str, which: str) -> None:
        with contextlib.ExitStack() as hold:
            try:
                held = self._hold(sandbox_id, hold, which)
            except (NotFound, Conflict):
                _say(f"{which}: {sandbox_id} was deleted meanwhile: left out")
                return
            done = self._archive.add(
                self._settings.data_dir, f"sandboxes/{sandbox_id}", look=held.look
            )
            held.look()
        self._note(sandbox_id, which, held, done)

    def _note(self, sandbox_id: str, which: str, held: Hold, done: Packed) -> None:
        if self._is_going(sandbox_id):
            _say(f"{which}: {sandbox_id} was deleted meanwhile: left out")
            return
        directory = self._settings.data_dir / "sandboxes" / sandbox_id
        if done.code > 1 and directory.exists():
            raise Failed(f"sandbox {sandbox_id}: {done.said}")
        if done.code > 1:
            _say(f"{which}: {sandbox_id} has no files (it is only being made): left out")
            return
        self._whole.append(sandbox_id)
        if done.code == 1:
            _say(f"{which}: it changed while it was copied: {done.said.splitlines()[0]}")
        _say(f"{which}: {sandbox_id}{held.told()}")

    def _hold(self, sandbox_id: str, hold: contextlib.ExitStack, which: str) -> Hold:
        """Nobody starts, stops or deletes it until `hold` is closed, and nothing in it moves."""
        try:
            sandbox = hold.enter_context(self._lifecycle.turn(sandbox_id))
        except Unavailable:
            _say(f"{which}: {sandbox_id} is being changed for so long that it is copied as it is")
            return Hold(hold, None, lambda: False)
        held = Hold(hold, self._limit, lambda: self._is_wanted(sandbox_id))
        if sandbox.status is Status.RUNNING and self._limit is not None:
            self._halt(sandbox, hold, held, which)
        return held

    def _halt(self, sandbox: Sandbox, hold: contextlib.ExitStack, held: Hold, which: str) -> None:
        # Whoever is killed from here on leaves it still, and its lock free: by this the keeper
        # knows that it has to go on (Lifecycle.wake).
        backend = self._lifecycle.backend_of(sandbox)
        hold.callback(backend.resume, sandbox)
        try:
            backend.pause(sandbox)
        except HeyvmError as error:
            _say(
                f"{which}: {sandbox.id} cannot be halted, and is copied as it runs: {error.detail}"
            )
            return
        held.halted = True
        self._flush(sandbox, which)

    def _flush(self, sandbox: Sandbox, which: str) -> None:
        """What its own disk (`disk_size_gb`) still has in memory."""
        directory = self._settings.data_dir / "sandboxes" / sandbox.id
        process = pids.Process(sandbox.state["pid"], sandbox.state["start"])
        if not (directory / "disk.img").exists() or not process.alive():
            return
        try:
            told = [*BOUND, "sync", "-f", f"/proc/{process.pid}/root"]
            subprocess.run(told, check=True, timeout=SYNC_TIMEOUT_S)
        except (subprocess.SubprocessError, OSError):
            _say(f"{which}: the disk of {sandbox.id} could not be synced: it is copied as it lies")

    def _is_wanted(self, sandbox_id: str) -> bool:
        """Whether somebody waits to stop or delete it."""
        try:
            return self._lifecycle.registry.entry(sandbox_id).wanted is not None
        except HeyvmError:
            return True

    def _is_going(self, sandbox_id: str) -> bool:
        try:
            return self._lifecycle.registry.entry(sandbox_id).wanted in ("deleted", "expired")
        except NotFound:
            return True


class Hold:
    """A sandbox that is kept as it is: until it is copied, its time is over or somebody waits."""

    def __init__(
        self, hold: contextlib.ExitStack, limit: float | None, is_wanted: Callable[[], bool]
    ) -> None:
        self._hold = hold
        self._is_wanted = is_wanted
        self._began = time.monotonic()
        self._end = self._began + (PAUSE_S if limit is None else limit)
        self._let_go: str | None = None
        self.halted = False

    def look(self) -> None:
        if self._let_go is not None:
            return
        if time.monotonic() > self._end:
            self._let_go = "its files may be of different moments: it was long"
        elif self._is_wanted():
            self._let_go = "somebody wanted it meanwhile: its files may be of different moments"
        if self._let_go is not None:
            self._hold.close()

    def told(self) -> str:
        took = f"{min(time.monotonic(), self._end) - self._began:.1f} s"
        if self.halted and self._let_go is None:
            return f" (halted for {took})"
        return f" ({self._let_go})" if self._let_go else ""


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(LOOK_S)
    except subprocess.TimeoutExpired:
        return None


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}


def _amount(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"


def _say(text: str) -> None:
    print(f"heyvm backup: {text}", file=sys.stderr, flush=True)
