"""A command's result is the same JSON, whether it is written at once or in pieces."""

import json

import pytest

from heyvm.api import results
from heyvm.models import ExecResult

ODD = 'naïve € 𝄞 \x00\x1b[0m"\\\n'.encode() + b"\xff\xfe\xe2\x82"


def result_of(raw: bytes) -> ExecResult:
    return ExecResult(raw + b"!", raw, b"!", 3, 12, False, True)


@pytest.mark.parametrize("encoding", ["utf-8", "base64"])
@pytest.mark.parametrize("raw", [b"", b"x", ODD, ODD * 30_000])
def test_pieces_say_what_the_whole_says(raw, encoding):
    result = result_of(raw)
    write = results.ENCODINGS[encoding]
    pieces = list(results.pieces(result, write))
    whole = json.loads(b"".join(pieces))
    assert whole == {
        "output": "".join(write(result.output)),
        "stdout": "".join(write(result.stdout)),
        "stderr": "".join(write(result.stderr)),
        "exit_code": 3,
        "duration_ms": 12,
        "timed_out": False,
        "truncated": True,
    }
    assert max(map(len, pieces)) <= 6 * results.PIECE_BYTES + 100
    if encoding == "utf-8":
        assert whole["stdout"] == raw.decode("utf-8", "replace")


def test_a_worker_stays_small_while_it_answers_much(server, http, sandbox):
    path = f"/sandboxes/{sandbox()['id']}/execute"

    def largest():
        peaks = (line.split() for pid in server.worker_pids() for line in status(pid))
        return max(int(words[1]) for words in peaks if words[0] == "VmHWM:")

    def status(pid):
        with open(f"/proc/{pid}/status") as file:
            return file.readlines()

    http.post(path, json={"command": "true"})
    before = largest()
    answer = http.post(path, json={"command": "head -c 10000000 /dev/zero"})
    assert len(answer.json()["stdout"]) == 10_000_000
    assert largest() - before < 100_000  # kB; as one text it took 430,000
