"""The agent's own Python: all that it needs to run inside any image, an empty one included.

A directory that is bound into each sandbox at `/.heyvm`: the interpreter, its libraries with their
loader, the few modules that the agent imports, compiled, and an empty `log` to mount on.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import heyvm
from heyvm.errors import Unavailable

INSIDE = "/.heyvm"
START = "from heyvm.agent import main; main()"
OPTIONS = ("-I", "-S", "-B", "-X", "utf8=1")
OLDEST = (3, 11)
LIBC = ctypes.CDLL(None, use_errno=True)
LOADERS = {
    "x86_64": "/lib64/ld-linux-x86-64.so.2",
    "aarch64": "/lib/ld-linux-aarch64.so.1",
}
PRELOAD = (b"/etc/ld.so.preload\0", b"/.heyvm/no.preload\0")
# What the interpreter or the standard library may import on the agent's behalf: an encoding, say.
LAZY = ("encodings.ascii", "encodings.latin_1", "encodings.utf_8", "os", "stat")
STALE_S = 60.0
LOOK_S = 0.01
PATIENCE_S = 20.0
TRIALS = 7
LIMIT_S = 60.0

# Stands in for the package `encodings`, which is a sixth of a bare interpreter's start: its table
# of aliases, `codecs` and a class for each encoding. Only for utf-8; the rest is asked of the real
# one, kept as `encodings.whole`.
ENCODINGS = """
import _codecs


class Encoder:
    def __init__(self, errors="strict"):
        self.errors = errors

    def encode(self, text, final=False):
        return _codecs.utf_8_encode(text, self.errors)[0]

    def reset(self):
        pass

    def getstate(self):
        return 0

    def setstate(self, state):
        pass


class Decoder:
    def __init__(self, errors="strict"):
        self.errors = errors
        self.rest = b""

    def decode(self, some, final=False):
        some = self.rest + some
        text, used = _codecs.utf_8_decode(some, self.errors, final)
        self.rest = some[used:]
        return text

    def reset(self):
        self.rest = b""

    def getstate(self):
        return self.rest, 0

    def setstate(self, state):
        self.rest = state[0]


def decode(some, errors="strict"):
    return _codecs.utf_8_decode(some, errors, True)


class Codec(tuple):
    name = "utf-8"
    _is_text_encoding = True
    encode = staticmethod(_codecs.utf_8_encode)
    decode = staticmethod(decode)
    incrementalencoder = Encoder
    incrementaldecoder = Decoder
    streamreader = streamwriter = None


UTF_8 = Codec((_codecs.utf_8_encode, decode, None, None))


def search_function(name):
    if name in ("utf-8", "utf_8", "utf8"):
        return UTF_8
    from encodings import whole
    return whole.search_function(name)


def __getattr__(name):
    if name.startswith("__") or name in ("whole", "aliases"):
        raise AttributeError(name)
    from encodings import whole
    return getattr(whole, name)


_codecs.register(search_function)
"""

# Run by the chosen interpreter: prints what importing the modules of its arguments loads.
CLOSURE = """
import sys
sys.path.append(sys.argv[1])
for name in sys.argv[2:]:
    __import__(name)
print([
    (name, file)
    for name, module in sorted(sys.modules.items())
    if name != "__main__" and module.__spec__.origin != "frozen"
    if (file := getattr(module, "__file__", None))
])
"""
# Frozen modules say no file of their own; this is where they would be.
STDLIB = """
import sys
print((sys.version_info[:2], sys._stdlib_dir))
"""
# Run by the chosen interpreter, whose bytecode it is: "source<TAB>target<TAB>name" on each line.
COMPILE = """
import __future__, ast, importlib.util, marshal, sys
for line in sys.stdin:
    source, target, name = line.rstrip("\\n").split("\\t")
    with open(source, "rb") as file:
        tree = ast.parse(file.read(), name)
    # `from __future__ import annotations` is a module to load at run time as well.
    flags = 0
    for node in [node for node in tree.body if isinstance(node, ast.ImportFrom)]:
        if node.module == "__future__" and not node.level:
            tree.body.remove(node)
            for alias in node.names:
                flags |= getattr(__future__, alias.name).compiler_flag
    code = compile(tree, name, "exec", flags, True, optimize=2)
    with open(target, "xb") as file:
        file.write(importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code))
"""


@dataclass(frozen=True)
class Bundle:
    """`path` on the host, to be bound read-only at `/.heyvm`; `argv` starts the agent inside, its
    own arguments to follow."""

    path: Path
    argv: tuple[str, ...]


@dataclass(frozen=True)
class Interpreter:
    """A Python of the host. `stdlib` is the directory of its standard library."""

    path: str
    version: tuple[int, int]
    stdlib: str

    @property
    def library(self) -> str:
        return f"lib/python{self.version[0]}.{self.version[1]}"


def ensure(directory: Path) -> Bundle:
    """The bundle for this machine's Python and this agent, built below `directory` where missing.

    Any number of processes may call at once: one builds aside, the others wait for it, and what a
    killed one left goes at a later call. A bundle is never changed once it is there; another
    Python, agent or version makes another one, and sandboxes that run keep theirs.
    Raises `Unavailable` when there is no suitable Python.
    """
    loader = _loader()
    path = directory / _digest(loader)
    make_once(path, lambda: _build(path, loader))
    return Bundle(path, _argv(INSIDE, loader, START))


def make_once(path: Path, build: Callable[[], None]) -> None:
    """See that `path` is there, and that what builds of its kind left behind is not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    if not path.is_dir():
        with alone(path.parent):
            if not path.is_dir():
                build()


def _loader() -> str:
    machine = platform.machine()
    if machine not in LOADERS or not os.path.exists(LOADERS[machine]):
        raise Unavailable(f"the agent cannot be started here: no glibc loader for {machine}")
    return LOADERS[machine]


def _argv(prefix: str, loader: str, code: str) -> tuple[str, ...]:
    name = os.path.basename(loader)
    library = f"{prefix}/lib"
    own = ("--inhibit-cache", "--library-path", library)
    start = (f"{library}/{name}", *own, f"{prefix}/python3")
    return (*start, *OPTIONS, "-c", code)


def _candidates() -> list[str]:
    """Interpreters that may serve, each once. Debian's own has most extension modules built in."""
    base = getattr(sys, "_base_executable", None) or sys.executable
    found = (os.path.realpath(path) for path in ("/usr/bin/python3", base))
    return list(dict.fromkeys(path for path in found if os.access(path, os.X_OK)))


def _sources() -> list[Path]:
    """The agent: what of the package goes inside."""
    package = Path(heyvm.__file__).parent
    agent = sorted(package.glob("agent*.py"))
    return [package / "__init__.py", package / "frames.py", *agent]


def _digest(loader: str) -> str:
    mark = hashlib.sha256(f"{heyvm.__version__} {platform.machine()}\n".encode())
    for path in (loader, *_candidates()):
        status = os.stat(path)
        mark.update(f"{path} {status.st_mtime_ns} {status.st_size}\n".encode())
    for source in (*_sources(), Path(__file__)):
        mark.update(f"{source.name}\n".encode() + source.read_bytes())
    return mark.hexdigest()[:16]


def sweep(directory: Path) -> None:
    """Remove what builds that were killed left behind; one under way keeps its directory locked."""
    for left in directory.glob("*.new-*"):
        with contextlib.suppress(OSError):
            # Between mkdtemp and the lock a directory is nobody's: leave young ones alone.
            if time.time() - left.stat().st_mtime > STALE_S and _locked(left):
                _remove(left)


def _locked(directory: Path) -> bool:
    """Whether its lock was free to take (and to let go again)."""
    with _opened(directory) as descriptor:
        return _try_lock(descriptor)


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Nobody else builds in `directory` meanwhile: a server's workers start at the same moment, and
    each would make the same. (CPython 3.11's parser also fails with several threads in it.) Who
    has not finished in time hangs, and is not waited for: it does no harm."""
    deadline = time.monotonic() + PATIENCE_S
    with _opened(directory) as descriptor:
        while not _try_lock(descriptor) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        yield


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(directory: Path) -> None:
    # Its directories are read-only, which stops an ordinary user's rmtree.
    for top, _, _ in os.walk(directory):
        os.chmod(top, 0o700)
    shutil.rmtree(directory)


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A new directory beside `path`, to be filled, which then appears there whole or not at all."""
    made = Path(tempfile.mkdtemp(prefix=f"{path.name}.new-", dir=path.parent))
    with _opened(made) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield made
            with contextlib.suppress(FileExistsError):
                _rename(made, path)
        finally:
            if made.exists():
                _remove(made)


def _rename(made: Path, path: Path) -> None:
    try:
        os.rename(made, path)
    except OSError as error:
        if not path.is_dir():
            raise
        raise FileExistsError(path) from error  # somebody was first


def flush(directory: Path) -> None:
    """A power failure must not leave a directory that is there, and empty files in it. The whole
    file system at once: a call for each of some thousand files takes seconds."""
    with _opened(directory) as descriptor:
        if LIBC.syncfs(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(directory))


def _build(path: Path, loader: str) -> None:
    interpreter = _fastest()
    with aside(path) as made:
        library = made / interpreter.library
        for directory in (made / "log", library / "lib-dynload"):
            directory.mkdir(parents=True)
        modules = _modules(interpreter)
        extensions = [file for file in modules.values() if not file.endswith(".py")]
        _compile(interpreter, modules, library)
        _copy(interpreter.path, made / "python3", 0o555)
        for file in extensions:
            _copy(file, library / "lib-dynload" / os.path.basename(file), 0o444)
        for name, file in _libraries(loader, [interpreter.path, *extensions]).items():
            _copy(file, made / "lib" / name, 0o444)
        _copy_loader(loader, made / "lib" / os.path.basename(loader))
        _try(made, loader)
        flush(made)
        _close(made, loader)


def _close(made: Path, loader: str) -> None:
    # A program that may not be read makes its process non-dumpable: out of reach for ptrace and
    # /proc/1. prctl would do so only later, and not for all of it.
    os.chmod(made / "lib" / os.path.basename(loader), 0o111)
    for top, _, _ in os.walk(made):
        os.chmod(top, 0o555)


def _fastest() -> Interpreter:
    able = [found for path in _candidates() if (found := _interpreter(path))]
    if not able:
        oldest = ".".join(map(str, OLDEST))
        raise Unavailable(f"there is no Python {oldest} or newer here; apt install python3")
    return min(able, key=_seconds_to_start) if len(able) > 1 else able[0]


def _interpreter(path: str) -> Interpreter | None:
    try:
        version, stdlib = ast.literal_eval(_run(path, STDLIB))
    except (Unavailable, ValueError, SyntaxError):  # too old to know sys._stdlib_dir, or broken
        return None
    return Interpreter(path, version, stdlib) if version >= OLDEST and stdlib else None


def _seconds_to_start(interpreter: Interpreter) -> float:
    return min(_timed(interpreter.path) for _ in range(TRIALS))


def _timed(path: str) -> float:
    before = time.perf_counter()
    _run(path, "pass")
    return time.perf_counter() - before


def _bare(path: str) -> list[str]:
    return [path, "-I", "-S", "-B"]


def _run(path: str, code: str, *arguments: str) -> str:
    return _output([*_bare(path), "-c", code, *arguments])


def _output(argv: list[str], stdin: str = "") -> str:
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, text=True, env={}, timeout=LIMIT_S, check=True
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"the agent cannot be built with {argv[0]}: {last}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the agent cannot be built with {argv[0]}: {error}") from error
    return done.stdout


def _modules(interpreter: Interpreter) -> dict[str, str]:
    """Every module that the agent can come to import, by name, with its file. Built-in and frozen
    ones are in the interpreter itself."""
    package = Path(heyvm.__file__).parent
    closure = _run(interpreter.path, CLOSURE, str(package.parent), *_imported(), *LAZY)
    modules: dict[str, str] = dict(ast.literal_eval(closure))
    # The interpreter takes the directory with this file in it for its standard library.
    return modules | {"os": os.path.join(interpreter.stdlib, "os.py")}


def _imported() -> list[str]:
    """What the agent names in an import, in whichever function and however late it gets there."""
    mine = {f"heyvm.{source.stem}" for source in _sources() if source.stem != "__init__"}
    trees = [ast.parse(source.read_bytes()) for source in _sources()]
    return sorted(mine.union(*(_named(tree) for tree in trees)) - {"__future__"})


def _named(node: ast.AST) -> set[str]:
    match node:
        case ast.Import(names):
            return {alias.name for alias in names}
        case ast.ImportFrom(str(module)):
            return {module}
        case ast.If(ast.Name("TYPE_CHECKING"), _, otherwise):
            return set().union(*map(_named, otherwise))
    return set().union(*map(_named, ast.iter_child_nodes(node)))


def _compile(interpreter: Interpreter, modules: dict[str, str], library: Path) -> None:
    """Without their sources, which spares a look at each; the names in tracebacks are short."""
    lines = []
    for name, source in modules.items():
        if not source.endswith(".py"):
            continue
        target = library / _target(name, source)
        target.parent.mkdir(parents=True, exist_ok=True)
        lines.append((source, target, name))
    with tempfile.NamedTemporaryFile("w", suffix=".py") as encodings:
        encodings.write(ENCODINGS)
        encodings.flush()
        lines.append((encodings.name, library / "encodings" / "__init__.pyc", "encodings"))
        stdin = "".join(f"{source}\t{target}\t{name}\n" for source, target, name in lines)
        # Without column numbers (-X no_debug_ranges) there is a third less to load.
        _output([*_bare(interpreter.path), "-X", "no_debug_ranges", "-c", COMPILE], stdin)
    for _, target, _ in lines:
        os.chmod(target, 0o444)


def _target(name: str, source: str) -> str:
    if name == "encodings":
        return "encodings/whole.pyc"
    place = name.replace(".", "/")
    return f"{place}/__init__.pyc" if source.endswith("/__init__.py") else f"{place}.pyc"


def _libraries(loader: str, programs: Iterable[str]) -> dict[str, str]:
    """The shared libraries that these programs and modules load, by the loader's own account."""
    found: dict[str, str] = {}
    for program in programs:
        listing = _output([loader, "--list", program])
        found |= dict(re.findall(r"^\t(\S+) => (/.+) \(0x[0-9a-f]+\)$", listing, re.MULTILINE))
    found.pop(os.path.basename(loader), None)
    return found


def _copy(source: str, target: Path, mode: int) -> None:
    shutil.copyfile(source, target)
    os.chmod(target, mode)


def _copy_loader(source: str, target: Path) -> None:
    """It loads what /etc/ld.so.preload names into every program (ld.so(8)), whatever it is told: in
    pid 1 that would be the sandbox's own code. This one looks where there never is such a file."""
    target.write_bytes(Path(source).read_bytes().replace(*PRELOAD))
    os.chmod(target, 0o555)


def _try(made: Path, loader: str) -> None:
    """Start it, and import everything, from where it was built."""
    names = ", ".join([*_imported(), *LAZY])
    code = f"import {names}; 'ä'.encode('latin-1'); open('/dev/null', 'w').close()"
    _output(list(_argv(str(made), loader, code)))
