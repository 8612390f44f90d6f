"""Terminals in real sandboxes: what a shell, a program and a client may expect of them."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from heyvm import frames, guest, streams
from heyvm.errors import BackendFailed, Invalid, NotFound
from heyvm.models import Limits
from heyvm.streams import Command, Ended, Output, Taken, Terminal
from tests.agents import wait_until
from tests.boxes import Box, Boxes

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user id: run as root")
PROMPT = re.compile(rb"[#$] $")
MIB = 1024 * 1024


class Tty:
    """A terminal, and all that it has printed."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.printed = b""
        self.seqs: list[int] = []
        self.end: Ended | None = None

    def type(self, text: str) -> None:
        self.terminal.send(text.encode())

    def take(self, timeout: float) -> bool:
        found = self.terminal.receive(timeout)
        if isinstance(found, Ended):
            self.end = found
        elif found is not None:
            self.printed += found.data
            self.seqs.append(found.seq)
        return found is not None

    def until(self, what: str | re.Pattern[bytes], timeout: float = 10.0) -> bytes:
        """What was printed up to and with this, which is then forgotten."""
        pattern = what if isinstance(what, re.Pattern) else re.compile(re.escape(what.encode()))
        deadline = time.monotonic() + timeout
        while (found := pattern.search(self.printed)) is None:
            assert self.end is None, self.printed[-500:]
            assert time.monotonic() < deadline, self.printed[-500:]
            self.take(0.5)
        before, self.printed = self.printed[: found.end()], self.printed[found.end() :]
        return before

    def finish(self, timeout: float = 10.0) -> int:
        """All that is printed until the end; its exit code."""
        deadline = time.monotonic() + timeout
        while self.end is None:
            assert time.monotonic() < deadline, self.printed[-500:]
            self.take(0.5)
        return self.end.exit_code

    def answer(self, line: str) -> str:
        """What a shell without echo prints for a line."""
        self.type(f"{line}; echo the'-'end\n")
        return self.until("the-end\r\n")[: -len("the-end\r\n")].decode().replace("\r\n", "\n")


class Lab:
    """One sandbox, and the terminals that a test opens in it."""

    def __init__(self, box: Box) -> None:
        self.box = box
        self.opened: list[tuple[str, Terminal]] = []

    def open(self, *argv: str, **options: Any) -> Tty:
        env = guest.base_environment(self.box.sandbox) | {"TERM": "xterm-256color"}
        env |= options.pop("env", {})
        fields: dict[str, Any] = {"cwd": "/tmp", "user": "", "size": (80, 24), "keep": 0.0}
        name = options.pop("session", None) or secrets.token_urlsafe(16)
        fields |= {"session": name, "argv": argv, "env": env, **options}
        return self._begun(name, lambda sock: Terminal.open(sock, **fields))

    def sh(self, line: str, **options: Any) -> Tty:
        return self.open("/bin/sh", "-c", line, **options)

    def shell(self, **options: Any) -> Tty:
        """Without a prompt and echo, for `answer`."""
        return self.ready(self.open("/bin/bash", "--norc", "--noediting", "-i", **options))

    def ready(self, tty: Tty) -> Tty:
        tty.type("PS1=; bind 'set enable-bracketed-paste off'; stty -echo; echo go'!'\n")
        tty.until("go!\r\n")
        return tty

    def attach(self, name: str) -> Tty:
        return self._begun(name, lambda sock: Terminal.attach(sock, name))

    def _begun(self, name: str, begin: Callable[[socket.socket], Terminal]) -> Tty:
        sock = self.connect()
        try:
            terminal = begin(sock)
        except BaseException:
            sock.close()
            raise
        self.opened.append((name, terminal))
        return Tty(terminal)

    def connect(self) -> socket.socket:
        return self.box.backend.connect(self.box.sandbox)

    def end(self, name: str) -> None:
        with self.connect() as sock:
            streams.end_terminal(sock, name)

    def leave_nothing(self) -> None:
        for name, terminal in self.opened:
            terminal.close()
            self.end(name)
        wait_until(lambda: self.devices() == [])
        wait_until(lambda: self.processes() == [])

    def devices(self) -> list[str]:
        return [one for one in self.box.output("ls /dev/pts").split() if one != "ptmx"]

    def processes(self) -> list[str]:
        """All but pid 1, and what looks."""
        shown = self.box.output("ps -e -o pid=,args=").splitlines()
        return [line for line in shown if "ps -e -o" not in line and line.split()[0] != "1"]

    def memory(self) -> int:
        """Of the agent."""
        shown = self.box.output("grep VmRSS /proc/1/status")
        return int(shown.split()[1]) * 1024

    def settled(self) -> int:
        """The agent's memory, once it does not grow any more."""
        looks = [0, self.memory()]

        def calm() -> bool:
            time.sleep(0.2)
            looks.append(self.memory())
            return looks[-1] - looks[-2] < 64 * 1024

        wait_until(calm, 30)
        return looks[-1]

    def descriptors(self) -> int:
        with self.connect() as sock:
            guest.ping(sock)
        return len(os.listdir(f"/proc/{self.agent}/fd"))

    @property
    def agent(self) -> int:
        """Its number outside."""
        mine = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cgroup")
            if self.box.sandbox.id in read(path)
        ]
        first = re.compile(r"^NSpid:\t\d+\t1$", re.MULTILINE)
        return next(pid for pid in mine if first.search(read(Path(f"/proc/{pid}/status"))))


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@pytest.fixture(scope="module")
def boxes() -> Iterator[Boxes]:
    with Boxes() as made:
        yield made


@pytest.fixture(scope="module")
def box(boxes: Boxes) -> Box:
    return boxes.start()


@pytest.fixture
def lab(box: Box) -> Iterator[Lab]:
    """All that is opened in it is gone when the test ends, and so is what ran in it."""
    made = Lab(box)
    yield made
    made.leave_nothing()


# -- a shell ---------------------------------------------------------------------------------------


def test_a_login_shell_with_a_prompt_and_a_terminal_of_its_own(lab: Lab) -> None:
    tty = lab.open()
    tty.until(PROMPT)
    lab.ready(tty)

    assert tty.answer("tty") == "/dev/pts/0\n"
    assert tty.answer("stty size; stty -a | grep -c -w iutf8") == "24 80\n1\n"
    assert tty.answer("shopt login_shell; echo $0") == "login_shell    \ton\n-bash\n"
    words = tty.answer('echo "$TERM $HOME $USER $LOGNAME $SHELL $PWD"').split()
    assert words == ["xterm-256color", "/root", "root", "root", "/usr/bin/bash", "/tmp"]
    ids = tty.answer("ps -o pid=,pgid=,sid= -p $$").split()
    assert len(set(ids)) == 1
    assert tty.answer("ls -l /proc/$$/fd | grep -c -v -e pts/0 -e total") == "0\n"
    tty.type("exit 3\n")
    assert tty.finish() == 3


def test_what_is_typed_before_the_shell_has_begun_is_not_lost(lab: Lab) -> None:
    tty = lab.open()
    tty.type("echo typed-$((40+2))\n")

    tty.until("typed-42")


def test_a_size_of_nothing_is_the_usual_one_and_resizing_is_told(lab: Lab) -> None:
    tty = lab.sh(
        "trap 'echo now $(stty size)' WINCH; stty size; while :; do sleep 1000 & wait; done",
        size=(0, 0),
    )
    tty.until("24 80\r\n")

    tty.terminal.resize(132, 50)
    tty.until("now 50 132\r\n")
    for size in ((0, 0), (70000, 3), (133, 51)):
        tty.terminal.resize(*size)
    assert tty.until("51 133\r\n") == b"now 51 133\r\n"


def test_a_storm_of_sizes_comes_down_to_the_last_one(lab: Lab) -> None:
    tty = lab.shell()
    other = lab.sh("stty raw -echo; echo go; cat")
    other.until("go")

    def rage() -> None:
        for at in range(100_000):
            tty.terminal.resize(1 + at % 500, 30)

    storm = threading.Thread(target=rage)
    storm.start()
    worst = 0.0
    while storm.is_alive():
        begun = time.monotonic()
        other.type("x")
        other.until("x")
        worst = max(worst, time.monotonic() - begun)
    storm.join()
    tty.terminal.resize(77, 33)

    assert tty.answer("stty size") == "33 77\n"
    assert worst < 1.0


def test_jobs_are_controlled(lab: Lab) -> None:
    tty = lab.shell()
    tty.type("sleep 1000\n")
    wait_until(lambda: "sleep 1000" in lab.box.output("ps -e -o args="))
    tty.type("\x1a")
    tty.until("Stopped")
    assert "sleep" in tty.answer("jobs")
    assert tty.answer("bg >/dev/null; jobs").count("Running") == 1
    tty.type("fg\n")
    tty.until("sleep 1000")
    wait_until(lambda: "sleep 1000" in lab.box.output("ps -e -o stat=,args= | grep ' *S+'"))
    tty.type("\x03")
    assert tty.answer("echo $?").split()[-1] == "130"


def test_eof_and_signals_end_it_with_their_code(lab: Lab) -> None:
    tty = lab.sh("cat; exit 5")
    tty.type("a line\n")
    tty.until("a line\r\na line\r\n")
    tty.type("\x04")
    assert tty.finish() == 5

    assert lab.sh("kill -9 $$").finish() == 137
    tty = lab.sh("echo ready; exec sleep 100")
    tty.until("ready")
    tty.type("\x1c")
    assert tty.finish() == 131


@ROOT
def test_it_belongs_to_who_runs_it(lab: Lab) -> None:
    tty = lab.shell(user="nobody", cwd="/")

    assert (
        tty.answer("id -u; id -g; id -G; stat -c %U:%a $(tty)")
        == "65534\n65534\n65534\nnobody:620\n"
    )
    assert tty.answer("echo through-its-name >$(tty)") == "through-its-name\n"
    assert tty.answer("mesg; echo $HOME $USER") == "is y\n/nonexistent nobody\n"
    assert tty.answer("grep -c '^Groups:.65534 $' /proc/$$/status") == "1\n"
    assert (
        tty.answer("kill -0 1 2>&1 | grep -c permitted; cat /proc/$$/oom_score_adj") == "1\n500\n"
    )


def test_a_program_that_cannot_be_started_says_why(lab: Lab) -> None:
    for argv, code, said in (
        (["no-such-thing"], 127, b"heyvm: no-such-thing: not found\r\n"),
        (["/etc/passwd"], 126, b"heyvm: /etc/passwd: Permission denied\r\n"),
        (["/"], 126, b"heyvm: /: Permission denied\r\n"),
    ):
        tty = lab.open(*argv)
        assert (tty.finish(), tty.printed) == (code, said)
    kept = lab.open("no-such-thing", keep=30, session="s" * 16)
    assert kept.finish() == 127
    again = lab.attach("s" * 16)
    assert (again.finish(), again.printed) == (127, kept.printed)


def test_refusals_are_those_of_a_command(lab: Lab) -> None:
    for cwd in ("/nowhere", "/etc/passwd", "relative", "/proc/self/cwd"):
        with pytest.raises(Invalid):
            lab.open("true", cwd=cwd)
    with pytest.raises(Invalid):
        lab.open("true", user="whoever")
    with pytest.raises(Invalid):
        lab.open("true", env={"A": "x" * 200_000})
    for name in ("short", "x" * 65, "with/slash/0123456789", "umlaut-äöü-0123456789"):
        with pytest.raises(BackendFailed, match="not a name"):
            lab.open("true", session=name)


def test_sh_where_there_is_no_bash(lab: Lab) -> None:
    tty = lab.open(env={"PATH": "/nowhere"})
    tty.type("echo $0 $SHELL; exit\n")
    tty.finish()

    assert b"-sh /bin/sh" in tty.printed


# -- bytes -----------------------------------------------------------------------------------------


def test_much_output_comes_whole_and_in_order(lab: Lab) -> None:
    size = 20 * MIB
    source = "head -c 20971520 /dev/zero | openssl enc -aes-128-ctr -K 0 -iv 0 2>/dev/null"
    expected = lab.box.output(f"{source} | sha256sum").split()[0]
    tty = lab.sh(f"stty raw; {source}", keep=30)
    mark, count, last = hashlib.sha256(), 0, 0
    while isinstance(found := tty.terminal.receive(10), Output):
        assert found.seq == last + 1
        assert len(found.data) <= 32 * 1024
        last = found.seq
        count += len(found.data)
        mark.update(found.data)
        tty.terminal.ack(last)

    assert (found, count, mark.hexdigest()) == (Ended(0), size, expected)


def test_a_paste_of_a_megabyte_arrives(lab: Lab) -> None:
    paste = os.urandom(MIB)
    tty = lab.sh(f"stty raw -echo; echo go; head -c {MIB} | sha256sum")
    tty.until("go")
    tty.terminal.send(paste)

    tty.until(hashlib.sha256(paste).hexdigest())


def test_a_paste_that_nobody_reads_holds_up_its_terminal_alone(lab: Lab) -> None:
    deaf = lab.sh("stty raw -echo; echo go; sleep 1000", session="d" * 20, keep=30)
    deaf.until("go")
    before = lab.memory()
    pasting = threading.Thread(
        target=lambda: suppressed(lambda: deaf.terminal.send(b"x" * 8 * MIB)), daemon=True
    )
    pasting.start()
    other = lab.shell()

    assert other.answer("echo fine") == "fine\n"
    pasting.join(0.3)
    assert pasting.is_alive()
    assert lab.memory() - before < 8 * MIB
    # Whoever comes instead is heard, where the other's bytes go on to wait.
    again = lab.attach("d" * 20)
    pasting.join(5)
    assert not pasting.is_alive()
    again.terminal.close()


def suppressed(call: Callable[[], object]) -> None:
    with suppress(BackendFailed):
        call()


def test_a_key_is_echoed_without_delay(lab: Lab) -> None:
    tty = lab.sh("stty raw -echo; echo go; cat")
    tty.until("go")
    took = []
    for _ in range(300):
        begun = time.perf_counter()
        tty.terminal.send(b"k")
        assert isinstance(tty.terminal.receive(5), Output)
        took.append(time.perf_counter() - begun)

    # 0.06 ms on a quiet machine.
    assert sorted(took)[150] < 0.01


# -- who comes and goes ----------------------------------------------------------------------------


def test_what_was_not_acknowledged_comes_again_and_nothing_twice(lab: Lab) -> None:
    name = "n" * 22
    tty = lab.shell(session=name, keep=30)
    tty.answer("echo one")
    tty.terminal.ack(tty.seqs[-1])
    acked = tty.seqs[-1]
    tty.answer("echo two")
    seen = tty.seqs[-1]
    tty.type("read line; echo three; echo $line\n")
    wait_until(lambda: "cat" not in lab.box.output("true"))
    tty.terminal.close()

    again = lab.attach(name)
    assert again.terminal.last_seq >= seen
    assert again.terminal.lost == 0
    again.type("four\n")
    printed = again.until("four\r\n")
    assert printed.startswith(b"two\r\n")
    assert printed.count(b"three") == 1
    assert b"one" not in printed
    assert again.seqs[0] == acked + 1
    again.type("exit 9\n")
    assert again.finish() == 9


def test_it_goes_on_while_nobody_is_there_and_its_end_is_kept(lab: Lab) -> None:
    name = "k" * 22
    tty = lab.sh("echo begun; read x; echo more; exit 4", session=name, keep=30)
    tty.until("begun\r\n")
    tty.type("x\n")
    tty.terminal.close()
    wait_until(lambda: not lab.devices())

    for _ in range(2):  # each who attaches is told
        again = lab.attach(name)
        assert again.finish() == 4
        assert b"more\r\n" in again.printed
    lab.end(name)
    with pytest.raises(NotFound):
        lab.attach(name)


def test_a_second_client_takes_over(lab: Lab) -> None:
    name = "t" * 22
    first = lab.shell(session=name, keep=30)
    second = lab.attach(name)

    with pytest.raises(Taken):
        first.finish()
    first.terminal.send(b"echo from the first\n")
    assert second.answer("echo for the second").endswith("for the second\n")
    assert b"first" not in second.printed


def test_clients_that_fight_for_it_lose_nothing(lab: Lab) -> None:
    name = "f" * 22
    tty = lab.sh("stty raw; seq 100000; read x", session=name, keep=30)
    printed = dict[int, bytes]()
    deadline = time.monotonic() + 30
    while not b"".join(list(printed.values())[-2:]).endswith(b"100000\n"):
        assert time.monotonic() < deadline
        other = lab.attach(name)
        for _ in range(20):
            found = other.terminal.receive(0.5)
            if not isinstance(found, Output):
                break
            assert printed.setdefault(found.seq, found.data) == found.data
            other.terminal.ack(found.seq - 3)
        tty.terminal.close()
        tty = other

    assert list(printed) == list(range(1, len(printed) + 1))
    assert b"".join(printed.values()) == b"".join(b"%d\n" % at for at in range(1, 100001))


def test_without_keep_the_end_of_the_connection_hangs_up(lab: Lab) -> None:
    name = "h" * 22
    tty = lab.sh("trap 'echo hup >>/tmp/told' HUP; echo go; sleep 1000", session=name)
    tty.until("go")
    tty.terminal.close()

    wait_until(lambda: lab.processes() == [])
    with pytest.raises(NotFound):
        lab.attach(name)


def test_who_ignores_the_hangup_lives_on_but_not_the_leader(lab: Lab) -> None:
    tty = lab.shell(session="i" * 22, keep=30)
    tty.answer("nohup sleep 4321 >/dev/null 2>&1 & sleep 1234 & disown -h %1")
    stubborn = lab.sh("trap '' HUP; echo go; while :; do sleep 1; done", session="j" * 22)
    stubborn.until("go")

    lab.end("i" * 22)
    assert tty.finish() == 129
    lab.end("j" * 22)
    assert stubborn.finish() == 137
    left = "".join(lab.processes())
    assert "sleep 4321" in left
    assert "1234" not in left
    lab.box.run("pkill sleep; true")


def test_nobody_comes_back_in_time(lab: Lab) -> None:
    running, over = "r" * 22, "o" * 22
    lab.shell(session=running, keep=0.3).terminal.close()
    ended = lab.sh("true", session=over, keep=0.3)
    ended.finish()
    lab.attach(over).finish()

    wait_until(lambda: lab.processes() == [])
    for name in (running, over):
        wait_until(partial(is_gone, lab, name))


def is_gone(lab: Lab, name: str) -> bool:
    try:
        lab.attach(name).terminal.close()
    except NotFound:
        return True
    return False


def test_a_client_that_never_acknowledges_gets_all_and_learns_what_was_lost(lab: Lab) -> None:
    name = "u" * 22
    before = lab.memory()
    tty = lab.sh(f"stty raw; head -c {12 * MIB} /dev/zero; read x", session=name, keep=30)
    while len(tty.printed) < 12 * MIB:
        assert tty.take(10)
    last = tty.seqs[-1]
    assert lab.memory() - before < 10 * MIB

    again = lab.attach(name)
    assert again.terminal.last_seq == last
    assert 0 < again.terminal.lost < last
    while again.seqs[-1:] != [last]:
        assert again.take(5)
    assert again.seqs == list(range(again.terminal.lost + 1, last + 1))
    assert 3 * MIB < len(again.printed) <= 4 * MIB


def test_while_nobody_is_there_a_program_waits_at_the_bound(lab: Lab) -> None:
    name = "w" * 22
    before = lab.memory()
    tty = lab.sh("stty raw; yes", session=name, keep=30)
    tty.take(5)
    tty.terminal.close()
    assert lab.settled() - before < 10 * MIB

    again = lab.attach(name)
    assert 120 < again.terminal.last_seq < 300  # of 32 KiB, but for the first
    while len(again.printed) < 8 * MIB:
        assert again.take(5)
        again.terminal.ack(again.seqs[-1])
    assert again.terminal.lost == 0
    assert again.printed.replace(b"y\n", b"") in (b"", b"y", b"\n")


def test_bytes_printed_one_by_one_while_nobody_is_there_are_few_pieces(lab: Lab) -> None:
    name = "p" * 22
    line = "stty raw; i=0; while [ $i -lt 20000 ]; do echo x; i=$((i+1)); done; echo end"
    tty = lab.sh(line, session=name, keep=30)
    tty.terminal.close()
    wait_until(lambda: not lab.devices())

    again = lab.attach(name)
    assert again.finish() == 0
    assert again.printed.endswith(b"x\nend\n")
    assert again.terminal.last_seq < 200


def test_many_that_keep_much_keep_less_each(lab: Lab) -> None:
    before = lab.memory()
    names = [f"many-terminals-{at:03}" for at in range(24)]
    for name in names:
        lab.sh("stty raw; yes", session=name, keep=60).terminal.close()
    assert lab.settled() - before < 48 * MIB
    kept = sum(lab.attach(name).terminal.last_seq for name in names) * 32 * 1024
    assert 20 * MIB < kept < 40 * MIB

    last = lab.attach(names[-1]).terminal.last_seq
    lab.opened[-1][1].close()
    for name in names[:12]:
        lab.end(name)
    wait_until(lambda: lab.attach(names[-1]).terminal.last_seq > last)  # room again: it goes on


def test_there_is_an_end_to_how_many(lab: Lab) -> None:
    ended = lab.sh("true", keep=60, session="e" * 22)
    ended.finish()
    for _ in range(128):
        lab.open("/bin/sleep", "1000")
    with pytest.raises(BackendFailed, match="128 terminals"):
        lab.open("/bin/sleep", "1000")
    with pytest.raises(NotFound):  # it has made room
        lab.attach("e" * 22)
    name, terminal = lab.opened[-1]
    terminal.close()
    wait_until(lambda: opens(lab))


def opens(lab: Lab) -> bool:
    try:
        lab.open("/bin/sleep", "1000")
    except BackendFailed:
        return False
    return True


# -- the end ---------------------------------------------------------------------------------------


def test_the_last_words_come_and_who_is_left_behind_is_not_waited_for(lab: Lab) -> None:
    for line in (
        "seq 20000; exit 2",
        "(trap '' HUP; while :; do echo noise; done) & seq 20000; exit 2",
        "setsid sh -c 'while :; do echo noise; done' & seq 20000; exit 2",
        "exec <&- >&- 2>&-; sleep 0.2; (seq 20000 >/dev/tty); exit 2",
    ):
        tty = lab.sh(line)
        assert tty.finish() == 2, line
        assert b"\r\n20000\r\n" in tty.printed, line
    lab.box.run("pkill -9 sh; pkill -9 seq; true")


def test_a_stopped_sandbox_ends_its_terminals(box: Box) -> None:
    lab = Lab(box)
    tty = lab.open(keep=60)
    tty.until(PROMPT)
    begun = time.monotonic()
    with lab.connect() as sock:
        guest.stop(sock, 20)

    assert tty.finish() == 129
    assert time.monotonic() - begun < 5
    lab.leave_nothing()


@ROOT
def test_nothing_is_left_in_the_agent(lab: Lab) -> None:
    lab.sh("true").finish()
    before, memory = lab.descriptors(), lab.memory()
    for at in range(60):
        tty = lab.sh("echo some; cat", keep=0.2 if at % 2 else 0)
        tty.until("some")
        if at % 3:
            tty.type("\x04")
            tty.finish()
        tty.terminal.close()

    wait_until(lambda: lab.descriptors() == before)
    wait_until(lambda: lab.processes() == [])
    assert lab.memory() - memory < 2 * MIB


# -- commands --------------------------------------------------------------------------------------


def test_a_command_streams_and_ends_with_its_connection(lab: Lab) -> None:
    env = guest.base_environment(lab.box.sandbox)
    options: dict[str, Any] = {"env": env, "cwd": "/tmp", "user": ""}
    copy = Command.start(lab.connect(), argv=["cat"], **options)

    def feed() -> None:
        copy.send(b"x" * 5 * MIB)
        copy.end_input()

    sent = threading.Thread(target=feed)
    sent.start()
    count = 0
    while isinstance(found := copy.receive(10), Output):
        count += len(found.data)
    sent.join()
    assert (found, count) == (Ended(0), 5 * MIB)
    copy.close()

    both = Command.start(lab.connect(), argv=["sh", "-c", "echo e >&2; exit 6"], **options)
    assert [both.receive(10), both.receive(10)] == [Output(b"e\n", is_error=True), Ended(6)]
    both.close()
    left = Command.start(lab.connect(), argv=["sh", "-c", "sleep 1000 & echo go; wait"], **options)
    assert left.receive(10) == Output(b"go\n")
    left.close()
    wait_until(lambda: lab.processes() == [])
    wrong = Command.start(lab.connect(), argv=["true"], **{**options, "cwd": "/nowhere"})
    with pytest.raises(Invalid):
        wrong.receive(10)
    wrong.close()


# -- attacks ---------------------------------------------------------------------------------------


def raw(lab: Lab, *said: bytes, **fields: Any) -> bytes:
    """What the agent answers to these bytes behind a request with these fields, to the end or up to
    where it is ready."""
    request: dict[str, Any] = {"op": "terminal", "session": secrets.token_urlsafe(16), "new": 1}
    request |= {"argv": ("sleep", "1000"), "env": {"PATH": guest.PATH}, "cwd": "/tmp", "user": ""}
    request |= {"cols": 80, "rows": 24, "keep_ms": 0}
    with lab.connect() as sock:
        sock.sendall(frames.header(request | fields) + b"".join(said))
        sock.settimeout(10)
        found = b""
        with suppress(ConnectionResetError):
            while b"ready" not in found and (some := sock.recv(65536)):
                found += some
        return found


def test_frames_that_make_no_sense_end_their_connection_alone(lab: Lab) -> None:
    header, frame = frames.header, frames.frame
    fields: dict[str, Any]
    senseless = [
        *(header({"ack": "x"}), header({"resize": 5}), header({"resize": [1]})),
        *(header({"resize": ["a", 2]}), frame(frames.END), frame(frames.DATA, b"x")),
        *(frame(frames.STDOUT, b"x"), frame(frames.HEADER, b"zz"), b"\xff" * 10),
    ]
    for said in senseless:
        assert raw(lab, said) == b"", said
    for fields in ({"argv": 5}, {"argv": (5,)}, {"env": 5}, {"cols": "x"}, {"session": 5}):
        assert raw(lab, **fields) == b"", fields
    for odd in (header({"ack": 1 << 62}), header({"ack": -5}), header({}), frame(frames.STDIN)):
        assert b"ready" in raw(lab, odd), odd
    for fields in ({"cols": 1 << 62}, {"rows": -1}, {"keep_ms": -1}):
        assert b"ready" in raw(lab, **fields), fields
    for fields in ({"argv": ("a\0b",)}, {"cwd": "/tmp\0"}, {"env": {"A": "\0"}}):
        assert b"6:failed" in raw(lab, **fields), fields
    assert b"gone" in raw(lab, new=0)
    assert lab.open("").finish() == 127


def test_noise_comes_through_as_it_is(lab: Lab) -> None:
    noise = bytes(range(256)) * 4 + b"\x1b]52;c;aGk=\x07\x1b[6n\x1b[c\x1bP\x9b" * 50
    tty = lab.sh(f"stty raw -echo; echo go; exec head -c {len(noise)}")
    tty.until("go\n")
    tty.terminal.send(noise)

    assert tty.finish() == 0
    assert tty.printed == noise


def test_nobody_inside_types_for_another_or_takes_all_terminals(lab: Lab) -> None:
    tty = lab.shell()
    inject = "import fcntl; fcntl.ioctl(0, 0x5412, b'x')"
    assert "Operation not permitted" in tty.answer(f'python3 -c "{inject}" 2>&1 | tail -1')
    steal = "import fcntl; fcntl.ioctl(0, 0x540E, 1)"
    stolen = tty.answer(f'setsid python3 -c "{steal}" 2>&1 | tail -1')
    assert "Operation not permitted" in stolen

    grab = "import os, itertools\nfor at in itertools.count():\n  os.openpty()"
    holder = lab.shell()
    holder.type(f'python3 -ic "{grab}"\n')  # which then waits, with all that it has
    holder.until("No space left on device")
    with pytest.raises(BackendFailed, match="no terminals left"):
        lab.sh("true")
    assert tty.answer("echo fine") == "fine\n"
    holder.terminal.close()
    wait_until(lambda: len(lab.devices()) == 1)
    with open("/proc/sys/kernel/pty/nr") as file:
        assert int(file.read()) < 2048


def test_what_stands_at_dev_ptmx_does_not_matter(lab: Lab) -> None:
    lab.box.output("rm /dev/ptmx; mkfifo /dev/ptmx; chmod 0 /dev/pts/ptmx")
    try:
        assert lab.sh("tty").finish() == 0
    finally:
        lab.box.output("rm /dev/ptmx; ln -s pts/ptmx /dev/ptmx; chmod 666 /dev/pts/ptmx")


def test_a_program_that_stops_itself_or_its_output_is_ended_all_the_same(lab: Lab) -> None:
    for line in ("echo go; kill -STOP $$", "stty -echo; echo go; read x; yes"):
        tty = lab.sh(line)
        tty.until("go")
        tty.type("\x13\n")
        tty.terminal.close()
        wait_until(lambda: lab.processes() == [])


@ROOT
def test_a_fork_bomb_in_a_terminal_is_hung_up(boxes: Boxes) -> None:
    lab = Lab(boxes.start(limits=Limits(pids=60)))
    tty = lab.open("/bin/bash", "-c", "b() { b | b & }; b; sleep 1000", session="b" * 22, keep=30)
    tty.until("unavailable")
    with suppress(BackendFailed):  # there may be no room for it
        lab.sh("echo hello")

    lab.end("b" * 22)
    assert tty.finish() in (129, 137)
    with lab.connect() as sock:
        guest.stop(sock, 5)
    wait_until(lambda: lab.box.run("true").exit_code == 0)
    lab.leave_nothing()
