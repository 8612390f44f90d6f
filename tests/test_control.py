"""The keeper's control socket: a real process that listens, and workers that ask."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from heyvm import control
from heyvm.errors import HeyvmError, NotFound, Unavailable, Unsupported
from tests.server import REPOSITORY, wait_until

LISTENS = """
import sys
from gevent import monkey
monkey.patch_all()
import os, signal, time
from pathlib import Path
from heyvm import control
from heyvm.errors import NotFound

def missing(request):
    raise NotFound("there is no such thing", sandbox_id="sb-1")

def slow(request):
    Path(request["mark"]).touch()
    time.sleep(request["seconds"])
    return {"pid": os.getpid()}

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
control.CLIENT_TIMEOUT_S = 0.5
server = control.Server(Path(sys.argv[1]), {
    "echo": lambda request: {"got": request["text"], "pid": os.getpid()},
    "missing": missing,
    "crash": lambda request: 1 / 0,
    "slow": slow,
})
server.listen()
print("listens", flush=True)
while True:
    server.listen()
    time.sleep(0.1)
"""


class Keeper:
    """A process that answers."""

    def __init__(self, run_dir: Path) -> None:
        command = [sys.executable, "-c", LISTENS, str(run_dir)]
        self.process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE)

    def wait_until_it_listens(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"listens\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def start(run_dir: Path) -> Iterator[Callable[[], Keeper]]:
    started: list[Keeper] = []

    def begin() -> Keeper:
        started.append(Keeper(run_dir))
        return started[-1]

    yield begin
    for keeper in started:
        keeper.kill()


@pytest.fixture
def keeper(start: Callable[[], Keeper]) -> Keeper:
    keeper = start()
    keeper.wait_until_it_listens()
    return keeper


def echo(run_dir: Path, text: str = "hello", timeout: float = 20.0) -> dict[str, object]:
    return control.ask(run_dir, {"op": "echo", "text": text}, timeout)


def test_what_is_asked_is_answered(run_dir: Path, keeper: Keeper) -> None:
    assert echo(run_dir, "Grüße\n") == {"got": "Grüße\n", "pid": keeper.process.pid}
    mode = os.stat(run_dir / control.SOCKET_NAME).st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600


def test_a_refusal_is_the_same_error_here(run_dir: Path, keeper: Keeper) -> None:
    with pytest.raises(NotFound, match="there is no such thing") as refused:
        control.ask(run_dir, {"op": "missing"}, 20)
    assert refused.value.sandbox_id == "sb-1"

    with pytest.raises(HeyvmError, match="the keeper failed: ZeroDivisionError"):
        control.ask(run_dir, {"op": "crash"}, 20)
    with pytest.raises(Unsupported):
        control.ask(run_dir, {"op": "nothing"}, 20)
    assert echo(run_dir)["got"] == "hello"


def test_without_a_keeper_it_gives_up_in_time(run_dir: Path) -> None:
    began = time.monotonic()
    with pytest.raises(Unavailable, match="the keeper does not answer"):
        echo(run_dir, timeout=0.5)
    assert 0.4 < time.monotonic() - began < 2


def test_a_keeper_that_stands_still_is_not_waited_for_longer(run_dir: Path, keeper: Keeper) -> None:
    keeper.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(Unavailable):
        echo(run_dir, timeout=0.5)
    assert time.monotonic() - began < 2


def test_a_keeper_that_is_being_started_is_waited_for(
    run_dir: Path, start: Callable[[], Keeper]
) -> None:
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(echo, run_dir)
        keeper = start()
        assert waiting.result(30)["pid"] == keeper.process.pid


def test_what_a_killed_keeper_owes_the_next_one_answers(
    run_dir: Path, keeper: Keeper, start: Callable[[], Keeper], tmp_path: Path
) -> None:
    mark = tmp_path / "begun"
    request = {"op": "slow", "mark": str(mark), "seconds": 1}
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(control.ask, run_dir, request, 30)
        wait_until(mark.exists, "it is being answered")
        keeper.kill()
        successor = start()
        assert waiting.result(30) == {"pid": successor.process.pid}


def test_the_socket_of_the_next_one_outlives_the_last(
    run_dir: Path, keeper: Keeper, start: Callable[[], Keeper]
) -> None:
    """Both may be there for a moment: one that ends in order leaves the other's alone."""
    keeper.process.send_signal(signal.SIGSTOP)
    successor = start()
    successor.wait_until_it_listens()
    keeper.process.send_signal(signal.SIGTERM)
    keeper.process.send_signal(signal.SIGCONT)
    assert keeper.process.wait(20) == 0

    assert echo(run_dir)["pid"] == successor.process.pid


def test_a_socket_that_somebody_removed_is_made_again(run_dir: Path, keeper: Keeper) -> None:
    os.unlink(run_dir / control.SOCKET_NAME)

    assert echo(run_dir)["got"] == "hello"


def raw(run_dir: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(run_dir / control.SOCKET_NAME))
    return sock


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b"[]\n", b'{"op": 1}\n', b'{"op": {}}\n', b'"op"\n', b"\xff\n", b"{}\n"]
)
def test_what_cannot_be_read_is_refused(run_dir: Path, keeper: Keeper, line: bytes) -> None:
    with raw(run_dir) as sock:
        sock.sendall(line)
        answer = json.loads(sock.makefile().readline())
    assert answer["error"]["kind"] == "Unsupported"


def test_endless_and_slow_lines_are_cut_and_hold_nobody_up(run_dir: Path, keeper: Keeper) -> None:
    slow = [raw(run_dir) for _ in range(control.AT_ONCE + 20)]
    endless = raw(run_dir)
    with pytest.raises(OSError):
        for _ in range(200):
            endless.sendall(b"x" * control.MAX_LINE_BYTES)

    assert echo(run_dir)["got"] == "hello"
    assert slow[0].recv(1) == b""
    for one in (*slow, endless):
        one.close()


def test_many_ask_at_once(run_dir: Path, keeper: Keeper) -> None:
    answers: list[object] = []

    def ask(number: int) -> None:
        answers.append(echo(run_dir, str(number))["got"])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert sorted(answers, key=str) == sorted(map(str, range(200)))
