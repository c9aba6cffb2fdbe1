"""Frames: what was sent comes out, and nothing else does."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlinfer.multihost.wire import HEADER, NO_PROGRAM, Frame, Kind, WireError, derive, encode, read

KEY = derive(b"k" * 32, b"nonce")
frames = st.builds(
    Frame,
    st.sampled_from(Kind),
    st.binary(min_size=16, max_size=16),
    st.binary(max_size=200),
)
ranks, numbers = st.integers(0, 2**16 - 1), st.integers(0, 2**64 - 1)


def take(data: bytes, rank: int = 0, number: int = 0, key: bytes = KEY, most: int = 200) -> Frame:
    at = 0

    def receive(size: int) -> bytes:
        nonlocal at
        at += size
        if at > len(data):
            raise WireError("cut off")
        return data[at - size : at]

    frame = read(receive, key, rank, number, lambda kind, program: most)
    assert at == len(data)
    return frame


@given(frames, ranks, numbers)
def test_what_is_sent_is_what_is_read(frame, rank, number):
    assert take(encode(KEY, rank, number, frame), rank, number) == frame


@given(frames, ranks, numbers, st.data())
def test_a_frame_with_any_bit_changed_is_refused(frame, rank, number, data):
    whole = encode(KEY, rank, number, frame)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        take(bytes(changed), rank, number)


@given(frames, numbers, numbers, ranks, ranks)
def test_a_frame_is_good_for_one_place_alone(frame, number, other, rank, from_rank):
    if (number, rank) == (other, from_rank):
        return
    with pytest.raises(WireError, match=f"is number {number} of rank {rank}; due is"):
        take(encode(KEY, rank, number, frame), from_rank, other)


@given(frames, st.binary(max_size=40))
def test_another_key_is_refused(frame, key):
    with pytest.raises(WireError, match="HMAC"):
        take(encode(derive(key, b"nonce"), 0, 0, frame), key=derive(key, b"other nonce"))


@given(st.binary(min_size=HEADER.size, max_size=300))
def test_bytes_of_somebody_else_are_refused(data):
    with pytest.raises(WireError):
        take(data)


def test_a_payload_too_long_is_refused_before_it_is_read():
    header = HEADER.pack(b"XLMH", 1, Kind.BEAT, 0, 0, NO_PROGRAM, 2**32 - 1)
    with pytest.raises(WireError, match="BEAT of 4294967295 bytes; it may have 200"):
        take(header)


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [(0, b"HTTP", "protocol"), (4, b"\x07", "version 7"), (5, b"\x63", "unknown kind 99")],
)
def test_a_strange_header_is_named(at, value, said):
    header = bytearray(HEADER.pack(b"XLMH", 1, Kind.BEAT, 0, 0, NO_PROGRAM, 0))
    header[at : at + len(value)] = value
    with pytest.raises(WireError, match=said):
        take(bytes(header))


def test_the_header_is_what_the_module_says():
    data = encode(KEY, 3, 5, Frame(Kind.CALL, bytes(range(16)), b"ab"))
    assert data[:6] == b"XLMH\x01\x05" and data[6:8] == b"\0\x03"
    assert struct.unpack("!Q", data[8:16]) == (5,) and data[16:32] == bytes(range(16))
    assert data[32:36] == b"\0\0\0\x02" and data[36:38] == b"ab" and len(data) == 38 + 32
