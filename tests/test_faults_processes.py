"""Commands that print too much, read nothing, die oddly or hide, asked for over HTTP."""

from __future__ import annotations

import base64
import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.server import (
    Server,
    Session,
    read_bytes,
    run,
    wait_until,
)

Make = Callable[..., dict[str, Any]]
MIB = 1024 * 1024
DEFAULT_OUTPUT = 10 * MIB
# A shell of no environment, in a session of its own, twice removed from whoever began it.
HIDDEN = "(setsid env -i /bin/sh -c '(sleep {0} & sleep {0}) & sleep {0}' &)"


def sleepers(http: Session, ref: str, seconds: int) -> int:
    """How many `sleep` of so many seconds there are inside."""
    return int(run(http, ref, f"pgrep -c -x -f 'sleep {seconds}'")["stdout"])


def memory(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has no {field}")


# -- output --------------------------------------------------------------------------------------


def test_a_line_of_a_hundred_megabytes_is_cut_and_the_workers_stay_small(
    server: Server, http: Session, ref: str
) -> None:
    command = f"head -c {100 * MIB} /dev/zero | tr '\\0' x; echo done >&2"

    result = run(http, ref, command)

    assert result["stdout"] == "x" * DEFAULT_OUTPUT
    assert (result["stderr"], result["exit_code"], result["truncated"]) == ("done\n", 0, True)
    # The answer holds what was kept twice, and JSON is made of it once.
    assert max(memory(pid, "VmHWM") for pid in server.worker_pids()) < 400 * MIB


def test_a_bound_of_the_callers_own_is_exact(http: Session, ref: str) -> None:
    for bound, truncated in ((999, True), (1000, False), (1001, False)):
        result = run(http, ref, "printf %01000d 7", max_output_bytes=bound)
        assert len(result["stdout"]) == min(bound, 1000)
        assert result["truncated"] is truncated


def test_every_byte_comes_back_in_base64(http: Session, ref: str) -> None:
    every = bytes(range(256)) * 300
    sent = base64.b64encode(every).decode()

    result = run(http, ref, "cat", stdin=sent, encoding="base64")

    assert base64.b64decode(result["stdout"]) == every


def test_what_is_not_utf8_is_replaced_and_the_rest_stays(http: Session, ref: str) -> None:
    result = run(http, ref, r"printf 'gr\303\274n \377\303 \0 \355\240\200.'")

    assert result["stdout"] == b"gr\xc3\xbcn \xff\xc3 \0 \xed\xa0\x80.".decode("utf-8", "replace")


def test_fifty_at_once_lose_nothing(http: Session, ref: str, server: Server) -> None:
    def one(number: int) -> dict[str, Any]:
        with server.http() as own:
            script = f"echo {number}; sleep 0.3; seq 2000; echo {number} >&2; exit {number}"
            return run(own, ref, script)

    with ThreadPoolExecutor(50) as pool:
        results = list(pool.map(one, range(50)))

    lines = "".join(f"{number}\n" for number in range(1, 2001))
    for number, result in enumerate(results):
        assert result["stdout"] == f"{number}\n{lines}"
        assert (result["stderr"], result["exit_code"]) == (f"{number}\n", number)


# -- input ---------------------------------------------------------------------------------------


def test_input_of_megabytes_arrives_whole(http: Session, ref: str) -> None:
    assert run(http, ref, "wc -c", stdin="x" * (8 * MIB))["stdout"].strip() == str(8 * MIB)


@pytest.mark.parametrize(
    ("command", "output"),
    [("true", ""), ("sleep 0.2", ""), ("head -c 3", "xxx"), ("exec <&-; echo closed", "closed\n")],
)
def test_input_that_is_not_read_to_its_end_harms_nothing(
    command: str, output: str, http: Session, ref: str
) -> None:
    result = run(http, ref, command, stdin="x" * (4 * MIB))

    assert (result["exit_code"], result["stdout"]) == (0, output)


def test_without_input_there_is_its_end_at_once(http: Session, ref: str) -> None:
    assert run(http, ref, "cat; echo end", timeout_seconds=10)["stdout"] == "end\n"


# -- what cannot be run --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "exit_code"),
    [
        ("there-is-no-such-program", 127),
        ("/no/such/program", 127),
        ("--bind", 127),
        ("-c", 127),
        ("/etc/passwd", 126),
        ("/etc", 126),
        ("./other-machine", 126),
        ("./no-interpreter", 127),
        ("./empty-interpreter", 126),
        ("/proc/self/fd/0", 126),
    ],
)
def test_what_cannot_be_run_says_so_in_its_exit_code(
    command: str, exit_code: int, http: Session, ref: str
) -> None:
    machine = r"printf '\177ELF\002\001\001\0\0\0\0\0\0\0\0\0\002\0\377\376' > other-machine"
    interpreter = r"printf '#!/no/such\n' > no-interpreter; printf '#!/etc\n' > empty-interpreter"
    run(http, ref, f"{machine}; {interpreter}; chmod +x other-machine *-interpreter")

    result = run(http, ref, command)

    assert result["exit_code"] == exit_code
    assert result["stderr"]
    assert result["stdout"] == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cwd", "/there/is/none"),
        ("cwd", "/etc/passwd"),
        ("cwd", "--chdir"),
        ("cwd", "/proc/self/fd/3"),
        ("cwd", "/proc/self/fd/0"),
        ("user", "nobody-has-this-name"),
        ("user", "70000"),
        ("user", "4294967295"),
        ("user", "-1"),
        ("user", "root\n"),
    ],
)
def test_a_wrong_place_or_user_is_a_422_that_names_the_field(
    field: str, value: str, http: Session, ref: str
) -> None:
    answer = http.post(f"/sandboxes/{ref}/execute", json={"command": "pwd", field: value})

    assert answer.status_code == 422, answer.text
    assert list(answer.json()["errors"]) == [field]


def test_what_no_kernel_takes_is_a_422_and_what_it_takes_arrives(http: Session, ref: str) -> None:
    def execute(**fields: Any) -> Any:
        return http.post(f"/sandboxes/{ref}/execute", json={"command": "printenv", **fields})

    many = {f"V{number}": "x" * 50 for number in range(10_000)}
    refused = [
        execute(args=["x" * (128 * 1024)]),
        execute(env={"V": "x" * (128 * 1024)}),
        execute(args=["x" * 100_000] * 30),
        execute(env={"A=B": "x"}),
        execute(env={"": "x"}),
    ]

    assert [answer.status_code for answer in refused] == [422] * len(refused)
    assert execute(env=many).json()["stdout"].count("x" * 50) == 10_000
    assert len(execute(command="echo", args=["x" * 100_000] * 10).json()["stdout"]) == 1_000_010


def test_nothing_that_begins_with_a_dash_is_taken_for_an_option(
    http: Session, sandbox: Make
) -> None:
    """CVE-2024-32462: a command that bubblewrap took for its own `--bind`."""
    made = sandbox(
        name="--bind / /",
        working_directory="/--bind",
        start_command="--bind / /host",
        env_vars={"--setenv": "--bind"},
        metadata={"--ro-bind": "/"},
    )

    assert run(http, made["id"], "pwd; ls -d /host /proc/1/root/host")["stdout"] == "/--bind\n"
    value = run(http, made["id"], "printenv", args=["--", "--setenv"])
    assert value["stdout"] == "--bind\n"
    assert run(http, made["id"], "hostname")["stdout"].strip() == made["slug"] == "bind"


# -- how they end --------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, 2, 3, 6, 8, 9, 11, 13, 14, 15, 31, 34, 64])
def test_a_signal_is_128_and_its_number(sign: int, http: Session, ref: str) -> None:
    assert run(http, ref, f"kill -{sign} $$")["exit_code"] == 128 + sign


def test_at_the_limit_everything_of_the_command_is_gone_and_its_output_is_kept(
    http: Session, ref: str
) -> None:
    script = f"trap '' TERM INT HUP; echo before; {HIDDEN.format(4712)}; sleep 4712; sleep 4712"
    bystander = f"{HIDDEN.format(4713)}; true"
    run(http, ref, bystander)

    result = run(http, ref, script, timeout_seconds=1)

    assert (result["exit_code"], result["timed_out"]) == (124, True)
    assert result["stdout"] == "before\n"
    assert 1000 <= result["duration_ms"] < 3000
    assert sleepers(http, ref, 4712) == 0
    assert sleepers(http, ref, 4713) == 3


def test_a_child_that_holds_the_output_does_not_hold_up_the_answer(http: Session, ref: str) -> None:
    began = time.monotonic()
    result = run(http, ref, "(sleep 1.5; echo much later; sleep 4714) & echo now")
    took = time.monotonic() - began

    assert result["stdout"] == "now\n"
    assert result["duration_ms"] < 1000
    assert took < 1.2  # of a machine that may be busy; the child prints after 1.5 s
    assert sleepers(http, ref, 4714) == 0  # not begun yet
    wait_until(lambda: "much later" in messages(http, ref), "what it printed is in the log")
    assert sleepers(http, ref, 4714) == 1


def messages(http: Session, ref: str) -> list[str]:
    return [entry["message"] for entry in http.get(f"/sandboxes/{ref}/logs").json()["logs"]]


def test_orphans_of_many_commands_are_reaped(http: Session, ref: str) -> None:
    script = "for i in $(seq 400); do (sleep 0.001 &) ; done"
    for _ in range(3):
        run(http, ref, script)

    def zombies() -> str:
        look = "cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z '"
        return str(run(http, ref, look)["stdout"]).strip()

    wait_until(lambda: zombies() == "0", "all are reaped")


def test_a_process_that_takes_every_descriptor_harms_only_itself(
    http: Session, ref: str, sandbox: Make
) -> None:
    hog = (
        'my @held; while (open(my $f, "<", "/dev/null")) { push @held, $f }'
        ' print scalar(@held), "\\n"; $| = 1; sleep 4715'
    )
    answer = run(http, ref, "perl", args=["-e", hog], timeout_seconds=2)

    assert int(answer["stdout"] or 0) >= 0
    assert run(http, ref, "echo fine")["stdout"] == "fine\n"
    assert run(http, sandbox()["id"], "echo fine")["stdout"] == "fine\n"
    assert http.get("/health").ok


def test_an_agent_that_is_killed_is_told_of_and_start_helps(
    server: Server, http: Session, ref: str
) -> None:
    (agent,) = agents(server, ref)
    os.kill(agent, signal.SIGKILL)

    path = f"/sandboxes/{ref}"
    wait_until(lambda: http.get(path).json()["status"] == "failed", "it is failed", timeout=5)
    assert "signal 9" in http.get(path).json()["error_message"]
    assert http.post(f"{path}/execute", json={"command": "true"}).status_code in (409, 502)
    assert http.post(f"{path}/start").json()["status"] == "running"
    assert http.get(path).json()["error_message"] is None
    assert run(http, ref, "echo back")["stdout"] == "back\n"


def agents(server: Server, ref: str) -> list[int]:
    """The sandbox's pid 1, as this machine numbers it."""
    place = f"sandboxes/{ref}/".encode()
    mine = [pid for pid in server.sandbox_pids() if place in read_bytes(f"/proc/{pid}/mountinfo")]
    return [pid for pid in mine if re.search(rb"NSpid:.*\t1\n", read_bytes(f"/proc/{pid}/status"))]
