"""The host's side against agents that lie, dawdle and flood."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
import tracemalloc

import pytest

from heyvm import frames, guest
from heyvm.errors import (
    BackendFailed,
    BadRequest,
    Conflict,
    HeyvmError,
    Invalid,
    NotFound,
    StorageFull,
)

OK = {"ok": 1}
RESULT = {"ok": 1, "exit_code": 0, "duration_ms": 1, "timed_out": 0, "truncated": 0}
HEAD = {"type": "file", "size": 3, "mode": 0o644, "mtime_ns": 0, "ino": 1}
ENTRY = {"name": "a", "path": "a", **HEAD}
END = frames.frame(frames.END)


@pytest.fixture
def agent():
    """`agent(script)` is a connection to an agent that does what the script does with its end.
    Bytes are a script too: what it says at once, before it hangs up."""
    with contextlib.ExitStack() as stack:

        def make(script):
            host, inside = socket.socketpair()
            stack.enter_context(host)
            thread = threading.Thread(target=play, args=(script, inside))
            thread.start()
            stack.callback(thread.join, 10)
            stack.callback(host.close)
            return host

        yield make


def play(script, sock):
    with sock, contextlib.suppress(OSError):
        sock.settimeout(20)
        if isinstance(script, bytes):
            sock.recv(65536)
            sock.sendall(script)
        else:
            script(sock)


def execute(sock, **options):
    return guest.execute(sock, argv=["true"], env={}, **options)


def out(payload):
    return frames.frame(frames.STDOUT, payload)


def frame(fields):
    return frames.header(fields)


# -- execute ---------------------------------------------------------------------------------------


def test_an_honest_answer_is_taken(agent):
    answer = out(b"a") + frames.frame(frames.STDERR, b"b") + out(b"c") + frame(RESULT)

    result = execute(agent(answer))

    assert (result.output, result.stdout, result.stderr) == (b"abc", b"ac", b"b")


LIES = {
    "nothing": b"",
    "half a prefix": b"\0\0",
    "half a frame": out(b"abc")[:6],
    "a huge length": b"\xff\xff\xff\xffO",
    "a huge header": (1 << 20).to_bytes(4, "big") + b"H",
    "an unknown type": b"\0\0\0\0Z",
    "an empty output": out(b"") + frame(RESULT),
    "a file's bytes": frames.frame(frames.DATA, b"x") + frame(RESULT),
    "stdin": frames.frame(frames.STDIN, b"x") + frame(RESULT),
    "an end": END + frame(RESULT),
    "no bencoding": frames.frame(frames.HEADER, b"{}"),
    "a list": frames.frame(frames.HEADER, b"le"),
    "no result": frame({}),
    "no exit code": frame(OK),
    "an exit code that is text": frame({**RESULT, "exit_code": "0"}),
    "an exit code that cannot be": frame({**RESULT, "exit_code": 256}),
    "an exit code below zero": frame({**RESULT, "exit_code": -1}),
    "a duration below zero": frame({**RESULT, "duration_ms": -1}),
    "a duration that is no number": frame({**RESULT, "duration_ms": [1]}),
    "truncated by five": frame({**RESULT, "truncated": 5}),
    "an error that is a number": frame({"error": 5, "message": "x"}),
    "an error without a text": frame({"error": "failed"}),
    "an error that there is not": frame({"error": "explode", "message": "x"}),
    "an endless error": frame({"error": "failed", "message": "x" * 100_000}),
    "output after all": out(b"x" * 11) + frame(RESULT),
}


@pytest.mark.parametrize("lie", LIES)
def test_every_lie_is_a_failure_of_the_backend(agent, lie):
    with pytest.raises(BackendFailed):
        execute(agent(LIES[lie]), max_output_bytes=10)


def test_endless_output_is_cut_off_at_the_bound(agent):
    def flood(sock):
        while True:
            sock.sendall(out(b"x" * 65536))

    tracemalloc.start()
    try:
        with pytest.raises(BackendFailed, match="more output"):
            execute(agent(flood), max_output_bytes=1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_output_byte_by_byte_costs_no_more_memory_than_its_bytes(agent):
    def crumbs(sock):
        for _ in range(20):
            sock.sendall(out(b"x") * 5000)
        sock.sendall(frame(RESULT))

    tracemalloc.start()
    try:
        assert len(execute(agent(crumbs)).stdout) == 100_000
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()


def test_a_frame_that_is_begun_must_come_to_its_end(agent, monkeypatch):
    monkeypatch.setattr(guest, "FRAME_TIMEOUT_S", 0.3)

    def trickle(sock):
        for byte in out(b"x" * 1000):
            sock.sendall(bytes([byte]))
            if select_closed(sock, 0.02):
                return

    began = time.monotonic()
    with pytest.raises(BackendFailed, match="did not end it"):
        execute(agent(trickle))
    assert time.monotonic() - began < 2


def select_closed(sock, timeout):
    """Wait a moment; True when the other side has hung up."""
    sock.settimeout(timeout)
    try:
        while sock.recv(65536):
            pass
    except TimeoutError:
        return False
    return True


def until_closed(sock):
    while not select_closed(sock, 10):
        pass


def test_an_agent_that_keeps_silent_beyond_the_time_limit_is_given_up(agent, monkeypatch):
    monkeypatch.setattr(guest, "WAIT_S", 0.02)
    monkeypatch.setattr(guest, "KILL_ALLOWANCE_S", 0.1)

    with pytest.raises(BackendFailed, match="time limit"):
        execute(agent(until_closed), timeout_seconds=0.1)


def test_one_that_dawdles_beyond_it_is_too(agent, monkeypatch):
    monkeypatch.setattr(guest, "WAIT_S", 0.02)
    monkeypatch.setattr(guest, "KILL_ALLOWANCE_S", 0.1)

    def dawdle(sock):
        while not select_closed(sock, 0.01):
            sock.sendall(out(b"x"))

    with pytest.raises(BackendFailed, match="time limit"):
        execute(agent(dawdle), timeout_seconds=0.1)


def test_silence_is_asked_about(agent, monkeypatch):
    monkeypatch.setattr(guest, "WAIT_S", 0.01)
    asked = []

    def give_up():
        asked.append(1)
        if len(asked) == 3:
            raise BackendFailed("it is gone")

    with pytest.raises(BackendFailed, match="gone"):
        execute(agent(until_closed), on_wait=give_up)


def test_an_agent_that_takes_no_stdin_and_says_nothing_is_asked_about_too(agent, monkeypatch):
    monkeypatch.setattr(guest, "WAIT_S", 0.01)

    def give_up():
        raise BackendFailed("it is gone")

    def deaf(sock):
        done.wait(10)

    done = threading.Event()
    with pytest.raises(BackendFailed, match="gone"):
        execute(agent(deaf), stdin=bytes(4 << 20), on_wait=give_up)
    done.set()


def test_an_agent_that_hangs_up_during_stdin_may_have_answered(agent):
    assert execute(agent(frame(RESULT)), stdin=bytes(4 << 20)).exit_code == 0
    with pytest.raises(BackendFailed):
        execute(agent(b""), stdin=bytes(4 << 20))


@pytest.mark.parametrize("stdin", [None, bytes(4 << 20)])
def test_a_client_that_goes_away_ends_the_wait(agent, stdin):
    ours, theirs = socket.socketpair()
    done = threading.Event()
    sock = agent(lambda inside: done.wait(10))
    threading.Timer(0.1, theirs.close).start()

    with ours, pytest.raises(guest.ClientGone):
        execute(sock, client=ours, stdin=stdin)
    done.set()


def test_text_from_inside_is_made_harmless(agent):
    message = "\x1b[31m<b>\n" + "x" * 4000

    with pytest.raises(BackendFailed) as caught:
        execute(agent(frame({"error": "failed", "message": message})))

    assert "\x1b" not in caught.value.detail
    assert "\n" not in caught.value.detail
    assert len(caught.value.detail) < 300


@pytest.mark.parametrize(
    ("code", "field"), [("bad-cwd", "cwd"), ("bad-user", "user"), ("too-long", "command")]
)
def test_refusals_of_a_command_name_the_field(agent, code, field):
    with pytest.raises(Invalid) as caught:
        execute(agent(frame({"error": code, "message": "x"})))

    assert list(caught.value.errors) == [field]


# -- life ------------------------------------------------------------------------------------------


def test_hello_is_waited_for_no_longer_than_asked(agent):
    began = time.monotonic()
    with pytest.raises(BackendFailed, match="no answer"):
        guest.greet(agent(until_closed), 0.1)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("said", [b"", frame({}), frame({"hello": 2}), frame({"hello": "1"}), END])
def test_what_is_no_hello_is_a_failure(said):
    host, inside = socket.socketpair()
    with host, inside:
        inside.sendall(said)
        inside.shutdown(socket.SHUT_WR)
        with pytest.raises(BackendFailed):
            guest.greet(host, 1)


def test_ping_stop_go_and_start_want_a_good_result(agent):
    calls = [
        lambda sock: guest.ping(sock, 1),
        lambda sock: guest.stop(sock, 0),
        lambda sock: guest.go(sock, {}, "/"),
        lambda sock: guest.start_command(sock, "x", "/", {}),
        lambda sock: guest.mkdir(sock, "/x"),
        lambda sock: guest.delete(sock, "/m", "x", recursive=False),
    ]
    for call in calls:
        call(agent(frame(OK)))
        for answer in (b"", frame({}), frame({"ok": 0}), END):
            with pytest.raises(BackendFailed):
                call(agent(answer))


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("not-found", NotFound),
        ("is-directory", Conflict),
        ("not-directory", Conflict),
        ("not-empty", Conflict),
        ("read-only", Conflict),
        ("denied", Conflict),
        ("not-regular", BadRequest),
        ("outside", BadRequest),
        ("bad-path", BadRequest),
        ("bad-archive", BadRequest),
        ("no-space", StorageFull),
        ("failed", BackendFailed),
    ],
)
def test_refusals_of_a_path_name_it(agent, code, kind):
    with pytest.raises(kind) as caught:
        guest.delete(
            agent(frame({"error": code, "message": "x"})), "/workspace", "a/b", recursive=False
        )

    assert "/workspace/a/b" in caught.value.detail


def listing(*items):
    return frames.frame(frames.DATA, frames.encode(list(items)))


LISTINGS = {
    "no entries": listing() + frame(OK),
    "a number": listing(5) + frame(OK),
    "a dict": frames.frame(frames.DATA, frames.encode(ENTRY)) + frame(OK),
    "no name": listing(HEAD) + frame(OK),
    "a name that is a number": listing({**ENTRY, "name": 5}) + frame(OK),
    "a kind that there is not": listing({**ENTRY, "type": "door"}) + frame(OK),
    "a size below zero": listing({**ENTRY, "size": -1}) + frame(OK),
    "a size beyond all disks": listing({**ENTRY, "size": 1 << 64}) + frame(OK),
    "a mode beyond all bits": listing({**ENTRY, "mode": 0o10000}) + frame(OK),
    "no end": listing(ENTRY),
    "output": out(b"x"),
    "nonsense": frames.frame(frames.DATA, b"l5"),
}


@pytest.mark.parametrize("lie", LISTINGS)
def test_lies_about_a_directory_are_failures(agent, lie):
    with pytest.raises(BackendFailed):
        guest.list_files(agent(LISTINGS[lie]), "/m", "", recursive=True)


def test_a_listing_without_end_is_given_up(agent, monkeypatch):
    monkeypatch.setattr(guest, "MAX_ENTRIES", 1000)

    def endless(sock):
        while True:
            sock.sendall(listing(*[ENTRY] * 300))

    with pytest.raises(Conflict, match="more than 1000 entries"):
        guest.list_files(agent(endless), "/m", "", recursive=True)


BODIES = {
    "cut off": frames.frame(frames.DATA, b"ab"),
    "short": frames.frame(frames.DATA, b"ab") + END + frame(OK),
    "long": frames.frame(frames.DATA, b"abcd") + END + frame(OK),
    "longer still": frames.frame(frames.DATA, b"abc") * 2 + END + frame(OK),
    "empty frames": frames.frame(frames.DATA, b"") + frames.frame(frames.DATA, b"abc"),
    "no result": frames.frame(frames.DATA, b"abc") + END,
    "a bad result": frames.frame(frames.DATA, b"abc") + END + frame({"error": "failed"}),
    "a result before the end": frames.frame(frames.DATA, b"abc") + frame(OK),
    "output": out(b"abc"),
}


@pytest.mark.parametrize("lie", BODIES)
def test_a_file_that_is_not_what_was_promised_is_a_failure(agent, lie):
    head, chunks = guest.read(agent(frame(HEAD) + BODIES[lie]), "/m", "a")

    assert head.size == 3
    with pytest.raises(BackendFailed):
        list(chunks)


def test_a_part_of_a_file_is_as_long_as_it_can_be(agent):
    answer = frame(HEAD) + frames.frame(frames.DATA, b"bc") + END + frame(OK)

    _, chunks = guest.read(agent(answer), "/m", "a", offset=1, length=100)

    assert b"".join(chunks) == b"bc"


def test_an_upload_that_the_agent_breaks_off_says_why(agent):
    refused = frame({"error": "no-space", "message": "x"})

    def endless():
        while True:
            yield bytes(65536)

    with pytest.raises(StorageFull):
        guest.write(agent(refused), "/m", "a", endless())


def test_an_upload_to_an_agent_that_does_not_read_is_given_up(agent, monkeypatch):
    monkeypatch.setattr(guest, "TRANSFER_TIMEOUT_S", 0.1)
    done = threading.Event()

    with pytest.raises(BackendFailed, match="does not read"):
        guest.write(agent(lambda sock: done.wait(10)), "/m", "a", iter([bytes(8 << 20)]))
    done.set()


# -- anything at all -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_random_answers_end_in_an_answer_or_an_error_of_ours(agent, seed):
    generator = random.Random(seed)
    calls = [
        lambda sock: execute(sock, max_output_bytes=1000),
        lambda sock: guest.list_files(sock, "/m", "", recursive=True),
        lambda sock: list(guest.read(sock, "/m", "a")[1]),
        lambda sock: list(guest.read_tar(sock, "/m", "a")[1]),
        lambda sock: guest.write(sock, "/m", "a", iter([b"x"])),
    ]
    for _ in range(40):
        sock = agent(noise(generator))
        with contextlib.suppress(HeyvmError):
            generator.choice(calls)(sock)
        sock.close()


def noise(generator):
    """Good frames in any order, some of their bytes changed."""
    good = [out(b"abc"), frame(RESULT), frame(HEAD), listing(ENTRY), END, frame(OK)]
    data = bytearray(b"".join(generator.choices(good, k=generator.randrange(1, 5))))
    for _ in range(generator.randrange(4)):
        data[generator.randrange(len(data))] = generator.randrange(256)
    return bytes(data)
