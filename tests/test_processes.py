"""Execute: what becomes of a request, with a real agent behind a backend that only connects."""

from __future__ import annotations

from dataclasses import replace

import pytest

from heyvm import guest
from heyvm.errors import TO_RUN, BackendFailed, Conflict, Invalid
from heyvm.models import ExecRequest, Sandbox, Status
from heyvm.processes import Processes, argv_of
from tests.agents import running_agent

NOW = 1_700_000_000.0
SANDBOX = Sandbox("sb-1", "a", "a", Status.RUNNING, NOW, NOW, "fake", "host")


class OneSandbox:
    """A lifecycle and a backend in one, for a single sandbox."""

    def __init__(self, agent):
        self.agent = agent
        self.sandbox = replace(SANDBOX, working_directory=str(agent.workspace))
        self.death = None

    def get(self, ref):
        return self.sandbox

    def backend_of(self, sandbox):
        return self

    def connect(self, sandbox, timeout=5.0):
        try:
            return self.agent.connect()
        except OSError as error:
            raise BackendFailed(str(error)) from None

    def poll(self, sandbox):
        return self.death


@pytest.fixture
def one(tmp_path):
    with running_agent(tmp_path) as agent:
        yield OneSandbox(agent.ready())


@pytest.fixture
def execute(one):
    return lambda command, *args, **options: Processes(one).execute(
        "a", ExecRequest(command, args or None, **options)
    )


@pytest.mark.parametrize(
    ("command", "args", "argv"),
    [
        ("ls", None, ("ls",)),
        ("ls", (), ("ls",)),
        ("/usr/bin/g++-12", None, ("/usr/bin/g++-12",)),
        ("a b", ("c d", ""), ("a b", "c d", "")),
        ("echo hi", None, ("/bin/sh", "-c", "echo hi")),
        ("echo\n", None, ("/bin/sh", "-c", "echo\n")),
        ("é", None, ("/bin/sh", "-c", "é")),
        ("a;b", (), ("/bin/sh", "-c", "a;b")),
        ("", None, ("/bin/sh", "-c", "")),
        ("-c", None, ("-c",)),
    ],
)
def test_a_shell_reads_what_is_more_than_a_name(command, args, argv):
    assert argv_of(ExecRequest(command, args)) == argv


def test_a_command_runs_in_the_sandboxes_directory_and_environment(one, execute):
    one.sandbox = replace(one.sandbox, env_vars={"A": "sandbox", "B": "sandbox"})

    result = execute("echo $PWD $A $B $LANG $PATH $HOME", env={"A": "request"})

    words = [str(one.agent.workspace), "request", "sandbox", "C.UTF-8", guest.PATH, "/root"]
    assert result.stdout.decode().split() == words


def test_what_is_sent_wins(execute, tmp_path):
    result = execute("pwd; cat; echo $PATH", cwd="/", stdin=b"in\n", env={"PATH": "/bin:/usr/bin"})

    assert result.stdout == b"/\nin\n/bin:/usr/bin\n"
    assert execute("sleep", "9", timeout_seconds=0.1).exit_code == 124
    assert execute("seq", "99", max_output_bytes=3).stdout == b"1\n2"


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.RUNNING])
def test_a_sandbox_that_does_not_run_executes_nothing(one, execute, status):
    one.sandbox = replace(one.sandbox, status=status)

    with pytest.raises(Conflict, match=f"is {status}: {TO_RUN.get(status, 'start it first')}"):
        execute("true")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (ExecRequest("a\0b"), "args"),
        (ExecRequest("a", ("b\0",)), "args"),
        (ExecRequest("a", env={"A": "\0"}), "env"),
        (ExecRequest("a", env={"": "x"}), "env"),
        (ExecRequest("a", env={"A=B": "x"}), "env"),
        (ExecRequest("a", env={"A": "x" * 131072}), "env"),
        (ExecRequest("a", ("x" * 131072,)), "args"),
        (ExecRequest("echo " + "x" * 131072), "args"),
        (ExecRequest("a", ("x" * 100_000,) * 21), "args"),
        (ExecRequest("a", ("",) * 250_000), "args"),
        (ExecRequest("true", cwd="/no/such"), "cwd"),
        (ExecRequest("true", user="no-such"), "user"),
    ],
)
def test_what_no_kernel_would_take_is_refused_by_its_field(one, request_, field):
    with pytest.raises(Invalid) as caught:
        Processes(one).execute("a", request_)

    assert list(caught.value.errors) == [field]


def test_a_million_bytes_of_arguments_are_taken(execute):
    assert execute("true", *["x" * 100_000] * 15).exit_code == 0


def test_an_agent_that_died_is_told_with_its_reason(one, execute):
    one.agent.process.kill()
    one.agent.process.wait(5)
    one.death = "its pid 1 was killed"

    with pytest.raises(BackendFailed, match="its pid 1 was killed"):
        execute("true")


def test_a_sandbox_that_is_stopped_meanwhile_is_told_so(one):
    class Stopping(OneSandbox):
        def connect(self, sandbox, timeout=5.0):
            self.sandbox = replace(self.sandbox, status=Status.STOPPED)
            raise BackendFailed("nobody there")

    with pytest.raises(Conflict, match="is stopped now"):
        Processes(Stopping(one.agent)).execute("a", ExecRequest("true"))
