"""The wire format: what goes in comes out, and nothing but its one form goes in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heyvm import frames

INTEGERS = st.integers(-(10**18), 10**18)
VALUES = st.recursive(
    INTEGERS | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=5))
def test_what_is_encoded_is_decoded_again(fields):
    try:
        assert frames.decode_header(frames.encode(fields)) == fields
    except frames.FrameError as error:
        assert "deeply" in str(error)


@given(st.binary(max_size=40) | st.text("ild0123456789-e:a", max_size=20).map(str.encode))
def test_what_decodes_at_all_is_in_its_one_form(payload):
    try:
        value = frames.decode(payload)
    except frames.FrameError:
        return
    assert frames.encode(value) == payload


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"d",
        b"i5",
        b"ie",
        b"i05e",
        b"i-0e",
        b"i--1e",
        b"i 1e",
        b"i" + b"9" * 30 + b"e",
        b"3:ab",
        b"01:a",
        b"-1:a",
        b"l",
        b"d1:ai1e",
        b"di1ei1ee",
        b"d1:bi1e1:ai1ee",
        b"d1:ai1e1:ai1ee",
        b"i1ei1e",
        b"l" * 100 + b"e" * 100,
        b"99999999999999999999999:",
    ],
)
def test_every_other_form_is_refused(payload):
    with pytest.raises(frames.FrameError):
        frames.decode(payload)


def test_a_header_is_a_dict():
    with pytest.raises(frames.FrameError):
        frames.decode_header(b"le")


def test_names_that_are_not_utf_8_survive():
    name = b"caf\xe9\xff"

    decoded = frames.decode_header(frames.encode({"name": frames.text(name)}))

    assert decoded == {"name": name}


def test_text_that_is_no_file_name_is_still_sent():
    assert frames.decode(frames.encode("\ud800x")) == b"?x"


def test_frames_are_cut_out_of_a_stream_wherever_it_is_cut():
    stream = frames.frame(frames.STDOUT, b"abc") + frames.frame(frames.END)
    splitter = frames.Splitter()
    found = []

    for byte in stream:
        splitter.feed(bytes([byte]))
        while (frame := splitter.next()) is not None:
            found.append(frame)

    assert found == [(frames.STDOUT, b"abc"), (frames.END, b"")]
    assert not splitter.begun


def test_a_length_beyond_the_bound_is_refused_before_it_is_waited_for():
    splitter = frames.Splitter()
    splitter.feed((frames.MAX_PAYLOAD_BYTES + 1).to_bytes(4, "big") + b"O")

    with pytest.raises(frames.FrameError, match="bytes"):
        splitter.next()


def test_only_a_request_may_be_longer():
    splitter = frames.Splitter(frames.MAX_REQUEST_BYTES)
    splitter.feed(frames.frame(frames.HEADER, bytes(frames.MAX_REQUEST_BYTES)))
    assert splitter.next() == (frames.HEADER, bytes(frames.MAX_REQUEST_BYTES))

    splitter.feed((frames.MAX_REQUEST_BYTES).to_bytes(4, "big") + b"O")
    with pytest.raises(frames.FrameError):
        splitter.next()


def test_an_unknown_type_is_refused():
    splitter = frames.Splitter()
    splitter.feed(b"\0\0\0\0X")

    with pytest.raises(frames.FrameError, match="type"):
        splitter.next()
