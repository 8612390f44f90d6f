"""A real agent, spoken to over its socket: commands, start command, log, stop."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from heyvm import frames, guest
from heyvm.errors import BackendFailed, Invalid
from tests.agents import alive, children, own_box, running_agent, wait_until

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user id: run as root")
BOXED = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One agent for all tests that leave nothing behind."""
    with running_agent(tmp_path_factory.mktemp("agent")) as agent:
        yield agent.ready()


@pytest.fixture
def agent(tmp_path):
    with running_agent(tmp_path) as agent:
        yield agent.ready()


def memory_bytes(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no such line")


def pid_in(path):
    return int(wait_until(lambda: path.exists() and path.read_text().strip()))


# -- how a conversation begins ---------------------------------------------------------------------


def test_it_lets_go_of_its_output_when_it_says_hello(tmp_path):
    with running_agent(tmp_path) as agent:
        guest.greet(agent.first, 10)

        assert agent.process.stdout.read() == b""


def test_it_exits_when_the_host_goes_away_before_go(tmp_path):
    with running_agent(tmp_path) as agent:
        guest.greet(agent.first, 10)
        agent.first.close()

        assert agent.process.wait(5) == 0


def test_before_go_it_runs_nothing(tmp_path):
    with running_agent(tmp_path) as agent:
        guest.greet(agent.first, 10)

        with pytest.raises(BackendFailed):
            agent.run("true")
        guest.go(agent.first, {}, str(agent.workspace))
        assert agent.run("true").exit_code == 0


def test_anything_but_go_ends_it(tmp_path):
    with running_agent(tmp_path) as agent:
        guest.greet(agent.first, 10)
        agent.first.sendall(frames.header({"op": "exec", "argv": ["true"]}))

        assert agent.process.wait(5) == 0


def test_go_makes_the_working_directory(tmp_path):
    with running_agent(tmp_path) as agent:
        guest.greet(agent.first, 10)
        guest.go(agent.first, {}, str(tmp_path / "a/b/c"))

        assert (tmp_path / "a/b/c").is_dir()


def test_a_visit_ends_with_its_first_connection(tmp_path):
    with running_agent(tmp_path) as agent:
        guest.greet(agent.first, 10)
        guest.go(agent.first, {}, str(agent.workspace), visit=True)
        assert agent.run("true").exit_code == 0

        agent.first.close()

        assert agent.process.wait(5) == 0


def test_else_it_outlives_it(agent):
    agent.first.close()

    assert agent.run("true").exit_code == 0


# -- execute ---------------------------------------------------------------------------------------


def test_streams_and_exit_code_come_back(shared):
    result = shared.sh("echo out; echo err >&2; exit 3")

    assert (result.stdout, result.stderr, result.exit_code) == (b"out\n", b"err\n", 3)
    assert result.output in (b"out\nerr\n", b"err\nout\n")
    assert not result.timed_out
    assert not result.truncated


def test_output_keeps_the_order_in_which_it_was_printed(shared):
    lines = "; ".join(f"echo {n} >&{1 + n % 2}; sleep 0.02" for n in range(8))

    assert shared.sh(lines).output == b"".join(b"%d\n" % n for n in range(8))


def test_death_by_a_signal_is_128_and_its_number(shared):
    assert shared.sh("kill -TERM $$").exit_code == 143
    assert shared.sh("kill -KILL $$").exit_code == 137


def test_a_command_that_is_not_there_is_127(shared):
    for name in ("no-such-command", "/no/such/command", "/etc/passwd/x", ""):
        result = shared.run(name)
        assert result.exit_code == 127
        assert result.stderr == b"heyvm: %b: not found\n" % name.encode()


@pytest.mark.parametrize("content", [b"\x7fELF nonsense", b"no interpreter is named"])
def test_a_file_that_cannot_be_executed_is_126(shared, tmp_path, content):
    program = tmp_path / "program"
    program.write_bytes(content)
    program.chmod(0o755)

    assert shared.run(str(program)).exit_code == 126
    assert shared.run("/etc").exit_code == 126
    assert shared.run("/etc/passwd").exit_code == 126


def test_the_path_that_is_searched_is_the_commands_own(shared, tmp_path):
    tool = tmp_path / "my-tool"
    tool.write_text("#!/bin/sh\necho mine\n")
    tool.chmod(0o755)

    assert shared.run("my-tool", env={"PATH": f"/nowhere:{tmp_path}"}).stdout == b"mine\n"
    assert shared.run("my-tool").exit_code == 127


def test_relative_programs_are_found_from_the_working_directory(shared, tmp_path):
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\npwd\n")
    tool.chmod(0o755)

    assert shared.run("./tool", cwd=str(tmp_path)).stdout.decode() == f"{tmp_path}\n"


@pytest.mark.parametrize("cwd", ["/no/such", "/etc/passwd", "relative", "/proc/self/fd/3", "/\0"])
def test_a_working_directory_that_is_none_is_refused(shared, cwd):
    with pytest.raises((Invalid, BackendFailed)) as caught:
        shared.run("true", cwd=cwd)

    assert "\0" in cwd or caught.value.errors["cwd"]


def test_arguments_beyond_the_kernels_limit_are_refused(shared):
    with pytest.raises(Invalid, match="too long"):
        shared.run("true", "x" * (128 * 1024))
    assert shared.run("true", "x" * (128 * 1024 - 1)).exit_code == 0


def test_a_megabyte_of_arguments_arrives(shared):
    words = ["x" * 100_000] * 15

    result = shared.run("sh", "-c", 'echo "$#"; printf %s "$*" | wc -c', "-", *words)

    assert result.stdout.split() == [b"15", b"1500014"]


def test_its_environment_is_what_was_sent_and_who_it_is(shared):
    result = shared.run("env", env={"PATH": guest.PATH, "A": "1 2\n3", "ÄÖ": "ü"})

    assert sorted(result.stdout.decode().splitlines()) == sorted(
        [f"PATH={guest.PATH}", "A=1 2", "3", "ÄÖ=ü", "HOME=/root", "USER=root", "LOGNAME=root"]
    )


def test_a_home_that_was_sent_stays(shared):
    assert shared.sh("echo $HOME", env={"HOME": "/else"}).stdout == b"/else\n"


def test_it_inherits_three_descriptors_and_no_ignored_signal(shared):
    with shared.connect(), shared.connect():
        found = shared.sh("ls /proc/$$/fd; umask").stdout.split()
    masks = shared.run("grep", "-E", "SigBlk|SigIgn", "/proc/self/status").stdout.split()

    assert found == [b"0", b"1", b"2", b"0022"]
    assert masks == [b"SigBlk:", b"0" * 16, b"SigIgn:", b"0" * 16]


def test_it_is_a_likelier_victim_of_the_oom_killer_than_the_agent(shared):
    own = int(Path(f"/proc/{shared.process.pid}/oom_score_adj").read_text())
    result = shared.sh("sleep 0.01; cat /proc/self/oom_score_adj")

    assert int(result.stdout) > own


def test_it_is_answered_while_a_child_holds_its_output_which_then_goes_to_the_log(agent):
    began = time.monotonic()

    result = agent.sh("(sleep 0.3; echo late) & echo early")

    assert result.stdout == b"early\n"
    assert time.monotonic() - began < 0.25
    wait_until(lambda: " o late\n" in agent.log())


def test_what_it_printed_last_is_never_lost(shared):
    for size in (1, 65536, 65537, 300_000):
        result = shared.sh(f"head -c {size} /dev/zero; exec sleep 0.001 >/dev/null")
        assert len(result.stdout) == size


def test_of_each_stream_the_first_bytes_are_kept_and_it_runs_to_its_own_end(shared, tmp_path):
    done = tmp_path / "done"
    script = f"seq 1 200000; seq 1 9 >&2; touch {done}"

    result = shared.sh(script, max_output_bytes=100)

    assert result.stdout == b"".join(b"%d\n" % n for n in range(1, 100))[:100]
    assert result.stderr == b"".join(b"%d\n" % n for n in range(1, 10))
    assert result.truncated
    assert done.exists()


def test_output_of_just_the_bound_is_not_truncated(shared):
    assert not shared.sh("printf 12345", max_output_bytes=5).truncated
    assert shared.sh("printf 123456", max_output_bytes=5).truncated
    assert shared.sh("printf 1", max_output_bytes=0).stdout == b""


def test_a_hundred_megabytes_without_a_newline_leave_the_agent_small(agent):
    before = memory_bytes(agent.process.pid)

    result = agent.sh("head -c 100000000 /dev/zero | tr '\\0' x", max_output_bytes=MIB)

    assert result.stdout == b"x" * MIB
    assert memory_bytes(agent.process.pid) - before < 8 * MIB
    assert sum(file.stat().st_size for file in agent.logs.iterdir()) < 5 * MIB


def test_a_host_that_does_not_read_makes_the_command_wait_and_nobody_else(agent):
    with agent.connect() as deaf:
        request = {"op": "exec", "argv": ["yes"], "cwd": "/", "max_output": 1 << 40}
        deaf.sendall(frames.header({**request, "env": {"PATH": guest.PATH}}))
        assert deaf.recv(1)
        before = memory_bytes(agent.process.pid)

        for _ in range(20):
            assert agent.run("echo", "hi").stdout == b"hi\n"

        assert memory_bytes(agent.process.pid) - before < 4 * MIB


def test_fifty_at_once_lose_nothing(shared):
    def run(n):
        return shared.sh(f"echo {n}; head -c 50000 /dev/zero >&2; exit {n}")

    with ThreadPoolExecutor(50) as pool:
        results = list(pool.map(run, range(50)))

    assert [result.exit_code for result in results] == list(range(50))
    assert [result.stdout for result in results] == [b"%d\n" % n for n in range(50)]
    assert {len(result.stderr) for result in results} == {50000}


# -- stdin -----------------------------------------------------------------------------------------


def test_without_stdin_there_is_nothing_to_read(shared):
    assert shared.run("cat").stdout == b""


def test_stdin_goes_through_whole_whatever_its_size(shared):
    data = random.Random(1).randbytes(3 * MIB + 7)

    assert shared.run("cat", stdin=data).stdout == data
    assert shared.run("cat", stdin=b"").stdout == b""


def test_stdin_that_nobody_reads_is_no_failure(shared):
    assert shared.run("true", stdin=bytes(5 * MIB)).exit_code == 0
    assert shared.sh("exec <&-; sleep 0.05; echo ok", stdin=bytes(MIB)).stdout == b"ok\n"


def test_stdin_that_is_not_read_yet_waits_outside_the_agent(agent):
    before = memory_bytes(agent.process.pid)
    sizes = []

    def look():
        wait_until(lambda: (agent.directory / "started").exists())
        for _ in range(20):
            sizes.append(memory_bytes(agent.process.pid) - before)
            time.sleep(0.005)
        (agent.directory / "go").touch()

    watcher = threading.Thread(target=look)
    watcher.start()
    script = "touch started; until [ -e go ]; do sleep 0.01; done; wc -c"
    result = agent.sh(script, stdin=bytes(20 * MIB), cwd=str(agent.directory))
    watcher.join()

    assert result.stdout.split() == [b"%d" % (20 * MIB)]
    assert max(sizes) < 4 * MIB


# -- time limit, and clients that go away ----------------------------------------------------------

FAMILY = """
(setsid sh -c 'echo $$ > daemon; exec sleep 60' >/dev/null 2>&1 &)
sh -c 'sh -c "echo \\$\\$ > orphan; exec sleep 60" & exit' >/dev/null 2>&1
sh -c 'trap "" TERM INT HUP; echo $$ > stubborn; while :; do sleep 60; done' &
until [ -e daemon -a -e orphan -a -e stubborn ]; do sleep 0.01; done
echo ready
sleep 60
"""


def test_at_the_limit_the_whole_family_is_gone_and_the_output_is_kept(agent):
    began = time.monotonic()

    result = agent.sh(FAMILY, cwd=str(agent.workspace), timeout_seconds=1)

    assert 1 <= time.monotonic() - began < 1.5
    assert (result.exit_code, result.timed_out, result.stdout) == (124, True, b"ready\n")
    pids = [pid_in(agent.workspace / name) for name in ("daemon", "orphan", "stubborn")]
    assert [pid for pid in pids if alive(pid)] == []


def test_the_limit_is_kept_exactly(shared):
    for limit in (0.05, 0.2):
        result = shared.run("sleep", "60", timeout_seconds=limit)
        assert limit * 1000 <= result.duration_ms + 1 < limit * 1000 + 100


def test_a_command_that_ends_in_time_keeps_its_background(agent):
    script = "sleep 60 >/dev/null 2>&1 & echo $! > child"
    result = agent.sh(script, cwd=str(agent.workspace), timeout_seconds=0.5)

    assert (result.exit_code, result.timed_out) == (0, False)
    other = agent.run("sleep", "60", timeout_seconds=0.8)
    assert other.timed_out
    assert alive(pid_in(agent.workspace / "child"))


def test_processes_that_multiply_do_not_outrun_the_limit(agent):
    tree = "b() { [ $1 -gt 0 ] || exec sleep 60; b $(($1-1)) & b $(($1-1)) & wait; }; b 6"
    began = time.monotonic()

    result = agent.sh(f"{tree} & {tree}", timeout_seconds=0.15)

    assert result.timed_out
    assert time.monotonic() - began < 5
    wait_until(lambda: not any(alive(pid) for pid in children(agent.process.pid)))


def test_a_host_that_hangs_up_takes_the_command_with_it(agent):
    with agent.connect() as sock:
        request = {"op": "exec", "argv": ["sh", "-c", FAMILY], "cwd": str(agent.workspace)}
        request |= {"env": {"PATH": guest.PATH}, "max_output": 100}
        sock.sendall(frames.header(request))
        splitter = frames.Splitter()
        while splitter.next() is None:
            splitter.feed(sock.recv(100))

    pids = [pid_in(agent.workspace / name) for name in ("daemon", "orphan", "stubborn")]
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_a_client_that_hangs_up_is_noticed(shared, tmp_path):
    ours, theirs = socket.socketpair()
    script = f"echo $$ > {tmp_path}/pid; exec sleep 60"
    threading.Thread(target=lambda: (pid_in(tmp_path / "pid"), theirs.close())).start()

    with ours, pytest.raises(guest.ClientGone):
        shared.sh(script, client=ours)

    wait_until(lambda: not alive(pid_in(tmp_path / "pid")))


def test_a_client_that_sends_its_next_request_is_not_gone(shared):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"GET / HTTP/1.1")
        assert shared.sh("sleep 0.2; echo hi", client=ours).stdout == b"hi\n"


# -- users -----------------------------------------------------------------------------------------


def test_root_is_the_only_user_where_there_is_a_single_id(shared):
    assert shared.run("true", user="root").exit_code == 0
    assert shared.run("true", user="0").exit_code == 0
    for user in ("nobody", "65534", "1", "root:1", "no-such-user"):
        with pytest.raises(Invalid) as caught:
            shared.run("true", user=user)
        assert "user" in caught.value.errors


@AS_ROOT
@pytest.mark.parametrize(
    ("user", "ids"),
    [
        ("", "0 0"),
        ("root", "0 0"),
        ("nobody", "65534 65534"),
        ("65534", "65534 65534"),
        ("nobody:daemon", "65534 1"),
        ("1234:5", "1234 5"),
        ("root:daemon", "0 1"),
    ],
)
def test_a_command_is_its_user_in_every_id(tmp_path, user, ids):
    with running_agent(tmp_path, spare=65533) as agent:
        agent.ready()
        result = agent.sh("grep -E '^(Uid|Gid):' /proc/$$/status; echo $HOME $USER", user=user)

    uid, gid = (number.encode() for number in ids.split())
    lines = result.stdout.split(b"\n")
    assert lines[0].split()[1:] == [uid] * 4
    assert lines[1].split()[1:] == [gid] * 4
    if user.startswith("nobody"):
        assert lines[2] == b"/nonexistent nobody"


@AS_ROOT
def test_the_agents_own_id_and_ids_that_are_none_are_refused(tmp_path):
    with running_agent(tmp_path, spare=65533) as agent:
        agent.ready()
        for user in ("65533", "4294967295", "-1", "99999999999", "no-such", "nobody:no-such", ":"):
            with pytest.raises(Invalid):
                agent.run("true", user=user)


@AS_ROOT
def test_a_user_is_held_to_what_it_may_do(tmp_path):
    with running_agent(tmp_path, spare=65533) as agent:
        agent.ready()
        assert agent.run("ls", "/root", user="nobody").exit_code != 0
        result = agent.run("sleep", "60", user="nobody", timeout_seconds=0.1)
        assert result.timed_out


# -- start command ---------------------------------------------------------------------------------


def start(agent, command, **environment):
    with agent.connect() as sock:
        guest.start_command(
            sock, command, str(agent.workspace), {"PATH": guest.PATH, **environment}
        )


def test_a_start_commands_lines_are_logged_with_the_time_and_so_is_its_end(agent):
    before = time.time()
    start(agent, "echo $GREETING; pwd; echo oops >&2; exit 4", GREETING="hello")

    wait_until(lambda: "exited" in agent.log())
    lines = [line.split(" ", 2) for line in agent.log().splitlines()]
    assert ["o", "hello"] in [line[1:] for line in lines]
    assert ["o", str(agent.workspace)] in [line[1:] for line in lines]
    assert ["e", "oops"] in [line[1:] for line in lines]
    assert ["e", "start command exited with code 4"] in [line[1:] for line in lines]
    assert all(before - 1 <= float(line[0]) <= time.time() for line in lines)


def test_a_start_command_that_is_killed_says_by_what(agent):
    start(agent, "kill -9 $$")

    wait_until(lambda: "start command was killed by signal 9" in agent.log())


def test_a_new_start_command_ends_the_old_ones_family_first(agent):
    start(agent, "echo $$ > one; (trap '' TERM; echo 1 > child; sleep 60) & wait")
    old = pid_in(agent.workspace / "one")
    wait_until(lambda: (agent.workspace / "child").exists())

    start(agent, f"kill -0 {old} || echo gone > two; sleep 60")

    assert not alive(old)
    wait_until(lambda: (agent.workspace / "two").exists())


def test_an_empty_start_command_only_ends_the_old_one(agent):
    start(agent, "echo $$ > one; exec sleep 60")
    old = pid_in(agent.workspace / "one")

    start(agent, "")

    assert not alive(old)


def test_start_commands_asked_for_at_once_leave_one(agent):
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda n: start(agent, f"echo $$ > pid{n}; exec sleep 60"), range(5)))

    wait_until(lambda: len([p for p in children(agent.process.pid) if alive(p)]) == 1)


def test_a_start_command_whose_directory_is_missing_is_refused(agent):
    with agent.connect() as sock, pytest.raises(Invalid):
        guest.start_command(sock, "true", "relative", {})


# -- log -------------------------------------------------------------------------------------------


def test_what_is_executed_is_logged_when_asked(agent):
    agent.sh("echo shown", log="execute")
    agent.sh("echo hidden", log="")

    assert " o shown\n" in agent.log()
    assert "hidden" not in agent.log()


def test_long_lines_are_split_and_unfinished_ones_end_with_their_stream(agent):
    agent.sh("head -c 40000 /dev/zero | tr '\\0' x; echo; printf end")

    messages = [line.split(" ", 2)[2] for line in agent.log().splitlines()]
    assert [len(message) for message in messages] == [16384, 16384, 7232, 3]


def test_the_log_is_bounded_by_rotation(agent):
    agent.sh("seq 1 600000", max_output_bytes=10)

    files = {file.name: file.stat().st_size for file in agent.logs.iterdir()}
    assert set(files) == {"log", "log.1"}
    assert sum(files.values()) < 4.5 * MIB
    assert agent.log().endswith(" o 600000\n")


@pytest.mark.parametrize("script", ["rm log", "rm log; mkfifo log", "ln -sf /etc/motd log"])
def test_a_log_that_was_replaced_is_begun_anew(agent, script):
    agent.sh("echo before")
    agent.sh(script, cwd=str(agent.logs))

    agent.sh("echo after")

    assert not (agent.logs / "log").is_symlink()
    assert " o after\n" in agent.log()


def test_a_log_that_is_in_the_way_stops_nothing(agent):
    agent.sh("rm -rf log; mkdir log", cwd=str(agent.logs))

    assert agent.sh("echo hi").stdout == b"hi\n"


@BOXED
@AS_ROOT
def test_a_full_disk_loses_log_lines_and_says_so_once(tmp_path):
    box = own_box("--size", str(64 * 1024), "--tmpfs", str(tmp_path / "log"))
    with running_agent(tmp_path, box=box) as agent:
        agent.ready()
        log = f"{agent.logs}/log"
        agent.sh(f"head -c 1000000 /dev/zero > {agent.logs}/big", log="")

        assert agent.sh("for n in 1 2 3; do echo lost; done; sleep 0.01; echo x").exit_code == 0
        agent.sh(f"rm {agent.logs}/big", log="")
        agent.sh("echo kept")

        content = agent.run("cat", log, log="").stdout
    assert content.count(b"could not be written") == 1
    assert content.endswith(b" o kept\n")


# -- as pid 1 --------------------------------------------------------------------------------------


@pytest.fixture
def boxed(tmp_path):
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    spare = 65533 if os.geteuid() == 0 else -1
    box = own_box("--cap-drop", "CAP_SYS_RESOURCE")
    with running_agent(tmp_path, spare, box) as agent:
        yield agent.ready()


def test_as_pid_1_it_cannot_be_killed(boxed):
    everything = "; ".join(f"kill -{n} 1" for n in range(1, 65))

    boxed.sh(everything)
    boxed.sh("kill -9 -1")

    assert boxed.run("echo", "alive").stdout == b"alive\n"


@AS_ROOT
def test_as_pid_1_its_limits_are_out_of_reach(boxed):
    if shutil.which("prlimit") is None:
        pytest.skip("prlimit is not installed")

    result = boxed.sh("prlimit --pid 1 --cpu=0; prlimit --pid 1 --nofile=3 && echo done")

    assert result.stdout == b""
    assert b"prlimit" in result.stderr
    assert boxed.run("echo", "alive").stdout == b"alive\n"


BOMB = """
import os, resource
resource.setrlimit(resource.RLIMIT_NPROC, (150, 150))
while True:
    try:
        if os.fork() == 0:
            os.setsid()
    except OSError:
        pass
"""


@AS_ROOT
def test_a_fork_bomb_ends_at_its_time_limit_and_others_do_not(boxed):
    """Bounded by the kernel for an ordinary user only; the box ends with its pid 1."""
    start(boxed, "echo $$ > other; exec sleep 60")
    other = pid_in(boxed.workspace / "other")
    python = getattr(sys, "_base_executable", sys.executable)

    result = boxed.run(python, "-S", "-c", BOMB, user="54321", timeout_seconds=0.5, log="")

    assert (result.exit_code, result.timed_out) == (124, True)
    assert boxed.sh("grep -l '^Uid:.54321' /proc/[0-9]*/status 2>/dev/null").stdout == b""
    state = boxed.run("grep", "State", f"/proc/{other}/status").stdout
    assert b"S (sleeping)" in state


def test_it_reaps_orphans_by_the_thousand(boxed):
    boxed.sh("i=0; while [ $i -lt 2000 ]; do (: &); i=$((i+1)); done")

    def zombies():
        return int(boxed.sh("grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l").stdout)

    wait_until(lambda: zombies() == 0)


def test_stop_asks_everybody_and_answers_when_nobody_is_left(boxed):
    script = "trap 'echo bye > bye; exit' TERM; echo up > up; while :; do sleep 0.01; done"
    start(boxed, script)
    wait_until(lambda: (boxed.workspace / "up").exists())
    began = time.monotonic()

    with boxed.connect() as sock:
        guest.stop(sock, 10)

    assert (boxed.workspace / "bye").exists()
    assert time.monotonic() - began < 3


def test_stop_waits_for_the_stubborn_no_longer_than_the_grace(boxed):
    start(boxed, "trap '' TERM; echo up > up; while :; do sleep 0.05; done")
    wait_until(lambda: (boxed.workspace / "up").exists())
    began = time.monotonic()

    with boxed.connect() as sock:
        guest.stop(sock, 0.3)

    assert 0.3 <= time.monotonic() - began < 1.5


# -- what comes over the socket --------------------------------------------------------------------

GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    frames.frame(frames.HEADER, b"le"),
    frames.frame(frames.HEADER, b"d"),
    frames.frame(frames.STDIN, b"x"),
    frames.frame(frames.END),
    (1 << 31).to_bytes(4, "big") + b"H",
    b"\xff" * 100,
    frames.header({"op": 5}),
    frames.header({"op": "exec"}),
    frames.header({"op": "exec", "argv": []}),
    frames.header({"op": "exec", "argv": [5]}),
    frames.header({"op": "exec", "argv": ["true"], "env": {"A": 5}}),
    frames.header({"op": "exec", "argv": ["sleep", "9"], "timeout_ms": "x"}),
    frames.header({"op": "list", "mount": 5}),
    frames.header({"op": "ping"}) * 2,
]


@pytest.mark.parametrize("sent", GARBAGE)
def test_nonsense_ends_its_own_connection_only(shared, sent):
    with shared.connect() as sock:
        sock.sendall(sent)
        sock.settimeout(5)
        while sock.recv(65536):
            pass

    with shared.connect() as sock:
        guest.ping(sock)


def test_random_bytes_do_it_no_harm(agent):
    generator = random.Random(7)
    for _ in range(300):
        with agent.connect() as sock:
            sock.sendall(noise(generator))

    with agent.connect() as sock:
        guest.ping(sock)
    assert agent.run("echo", "hi").stdout == b"hi\n"


def noise(generator):
    """Headers with some of their bytes changed, cut off anywhere."""
    operation = generator.choice(["exec", "start", "stop", "list", "read", "write", "delete"])
    fields = {"op": operation, "argv": ["true"], "path": "no-such", "mount": "/no-such"}
    data = bytearray(frames.header({**fields, "cwd": "/", "command": "true", "env": {}}))
    for _ in range(generator.randrange(4)):
        data[generator.randrange(len(data))] = generator.randrange(256)
    return bytes(data[: generator.randrange(1, len(data) + 1)])


def test_connections_beyond_the_bound_are_closed_and_the_others_served(agent):
    socks = [agent.connect() for _ in range(300)]
    try:
        wait_until(lambda: closed(socks[-1]))
        guest.ping(socks[0])
    finally:
        for sock in socks:
            sock.close()
    wait_until(lambda: answers(agent))


def closed(sock):
    sock.settimeout(0)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False


def answers(agent):
    try:
        with agent.connect() as sock:
            guest.ping(sock)
    except BackendFailed:
        return False
    return True


def test_it_keeps_no_descriptor_of_what_is_over(agent):
    def descriptors():
        return len(os.listdir(f"/proc/{agent.process.pid}/fd"))

    agent.sh("echo x")
    before = descriptors()
    for n in range(20):
        agent.sh("cat; exit 1", stdin=b"x")
        agent.run("no-such")
        with pytest.raises(Invalid):
            agent.run("true", cwd="/no/such")
        with pytest.raises(Exception, match="there is no"), agent.connect() as sock:
            guest.list_files(sock, str(agent.workspace), f"none{n}", recursive=False)

    wait_until(lambda: descriptors() <= before)


def test_a_stopped_command_does_not_stop_the_agent(agent):
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(
            agent.sh, "echo $$ > pid; kill -STOP $$; echo on", cwd=str(agent.workspace)
        )
        pid = pid_in(agent.workspace / "pid")
        assert agent.run("echo", "hi").stdout == b"hi\n"
        wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] == "T")
        os.kill(pid, signal.SIGCONT)
        assert stopped.result(5).stdout == b"on\n"
