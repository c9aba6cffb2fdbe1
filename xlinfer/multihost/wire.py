"""Frames between the hosts of a server: a fixed header, the payload, and an HMAC over both.

    bytes  0-3   magic, "XLMH"
           4     version
           5     kind
           6-7   rank of the sender
           8-15  number: how many frames the sender sent before, on all its connections alike
          16-31  program: digest of what a CALL runs; zeros in other frames
          32-35  length of the payload, at most what the receiver expects
          36-    payload, then 32 bytes of HMAC-SHA256 over all before them

Integers are big-endian. Every number is used once with a key, so a frame that was heard before, is
missing or comes out of turn is refused, as is one with any bit changed.
"""

import hashlib
import hmac
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

MAGIC, VERSION = b"XLMH", 1
HEADER = struct.Struct("!4sBBHQ16sI")
TAG_BYTES = 32
NO_PROGRAM = bytes(16)
SMALL = 64 * 2**10  # bytes of the largest payload that is no call's


class Kind(IntEnum):
    HELLO = 1  # follower: its rank, and what the connection is for
    WELCOME = 2  # leader: the group's nonce
    BEAT = 3  # both: still here
    READY = 4  # follower: what it built, as JSON
    CALL = 5  # leader: a program's inputs
    DIGEST = 6  # follower: the number of a call, and the digest of the tokens that it gave
    LEAVE = 7  # follower: it was asked to stop
    END = 8  # both: an exit code, and why


class WireError(Exception):
    """What came is no frame of this group; the message says why."""


@dataclass(frozen=True)
class Frame:
    kind: Kind
    program: bytes
    payload: bytes


def derive(key: bytes, *nonces: bytes) -> bytes:
    """A key for one purpose. Without a key of the group's own (b"") it is as secret as the
    nonces, which whoever listened from the start has heard."""
    return hmac.digest(key, MAGIC + b"".join(nonces), hashlib.sha256)


def encode(key: bytes, rank: int, number: int, frame: Frame) -> bytes:
    header = HEADER.pack(
        MAGIC, VERSION, frame.kind, rank, number, frame.program, len(frame.payload)
    )
    data = header + frame.payload
    return data + hmac.digest(key, data, hashlib.sha256)


def read(
    receive: Callable[[int], bytes],
    key: bytes,
    rank: int,
    number: int,
    longest: Callable[[Kind, bytes], int],
) -> Frame:
    """The next frame, which must be the `number`-th of `rank`. `receive(n)` gives n bytes;
    `longest(kind, program)` is the most that such a payload may have, and may raise WireError.

    Raises WireError, and then nothing of the frame may be used.
    """
    header = receive(HEADER.size)
    magic, version, kind, sender, count, program, length = HEADER.unpack(header)
    if magic != MAGIC:
        raise WireError("it does not speak xlinfer's protocol")
    if version != VERSION:
        raise WireError(f"it speaks version {version} of the protocol, and this is {VERSION}")
    if kind not in Kind.__members__.values():
        raise WireError(f"it sent a frame of the unknown kind {kind}")
    kind = Kind(kind)
    if length > (most := longest(kind, program)):
        raise WireError(f"it sent a {kind.name} of {length} bytes; it may have {most}")
    payload, tag = receive(length), receive(TAG_BYTES)
    if not hmac.compare_digest(tag, hmac.digest(key, header + payload, hashlib.sha256)):
        raise WireError(f"the HMAC of its {kind.name} is wrong")
    if (sender, count) != (rank, number):
        raise WireError(
            f"its {kind.name} is number {count} of rank {sender}; due is number {number} of "
            f"rank {rank}"
        )
    return Frame(kind, program, payload)
