"""What every test may ask for: a real server, a session with it, sandboxes that go away again."""

from __future__ import annotations

import compileall
import ctypes
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from heyvm.backends import trees
from tests.images import ImageRegistry
from tests.server import PARTS, REPOSITORY, Server, Session
from tests.server import run as run_in

Record = dict[str, Any]

# Long files, whose tests have a server each or share one that is soon there. Those of any other
# stay on one worker: each further one would start what they share once more.
APART = (
    *("test_crash.py", "test_faults_api.py", "test_faults_time.py", "test_images.py"),
    *("test_network.py", "test_network_dns.py", "test_server.py"),
)
RT_SIGACTION = {"x86_64": 13, "aarch64": 134}
GLIBCS_OWN_SIGNALS = (32, 33)  # nptl/internal-signals.h; sigaction(3) refuses to touch them


def pytest_configure(config: pytest.Config) -> None:
    take_signals_back()
    if PARTS not in os.environ:  # xdist's workers have the one of their parent
        prepare_servers(config)


def take_signals_back() -> None:
    """GNU make 4.3 leaves the C library's own signals ignored in what it starts; tests look at
    what a command inherits."""
    number = RT_SIGACTION.get(platform.machine())
    default_action = bytes(32)
    for sign in GLIBCS_OWN_SIGNALS if number else ():
        ctypes.CDLL(None).syscall(number, sign, default_action, None, 8)


def prepare_servers(config: pytest.Config) -> None:
    """What each would do anew: compile its modules, where its user cannot write that down, and copy
    parts of its host."""
    compileall.compile_dir(REPOSITORY / "heyvm", quiet=1)
    os.environ[PARTS] = tempfile.mkdtemp(prefix="hv-parts-")
    os.chmod(os.environ[PARTS], 0o755)
    config.add_cleanup(lambda: trees.remove(os.environ.pop(PARTS)))


def pytest_collection() -> None:
    """One of xdist's workers collects a second later than the others: a test whose name tells the
    time would stop the run sometimes, and now does so always."""
    if os.environ.get("PYTEST_XDIST_WORKER") == "gw1":
        time.sleep(1.1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file on one worker, but for those `APART`."""
    from xdist.scheduler import LoadGroupScheduling

    class ByFile(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith(APART) else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server for all tests of an xdist worker that do not harm it."""
    with Server() as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[Session]:
    """Talks to `server`: `http.get("/sandboxes")`."""
    with server.http() as session:
        yield session


@pytest.fixture
def sandbox(http: Session) -> Iterator[Callable[..., Record]]:
    """`sandbox(**fields)` makes one and gives its record; all are deleted when the test ends."""
    made: list[str] = []

    def create(**fields: Any) -> Record:
        answer = http.post("/sandboxes", json=fields)
        assert answer.status_code == 201, answer.text
        made.append(answer.json()["id"])
        return dict(answer.json())

    yield create
    for ref in made:
        assert http.delete(f"/sandboxes/{ref}").status_code in (204, 404)


@pytest.fixture(scope="session")
def image_registry() -> Iterator[ImageRegistry]:
    """A registry for images, on loopback, empty at first; see tests/images.py."""
    with ImageRegistry() as registry:
        yield registry


@pytest.fixture
def ref(sandbox: Callable[..., Record]) -> str:
    """The id of a sandbox."""
    return str(sandbox()["id"])


@pytest.fixture
def run(http: Session) -> Callable[..., Record]:
    """`run(ref, line, **options)` executes a line and gives what became of it."""
    return partial(run_in, http)
