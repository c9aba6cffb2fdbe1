"""Connections between hosts: who is at the other end is proved before anything else is read.

The leader greets with a nonce; the follower's HELLO proves that it has the key and heard the
nonce; the leader's WELCOME proves the same of the leader, and brings the group's nonce.
"""

import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum

from xlinfer.multihost.wire import (
    MAGIC,
    NO_PROGRAM,
    SMALL,
    VERSION,
    Frame,
    Kind,
    WireError,
    derive,
    encode,
    read,
)

NONCE_BYTES = 32
GREETING = struct.Struct(f"!4sB{NONCE_BYTES}s")
HELLO = struct.Struct(f"!{NONCE_BYTES}sBHH")
HANDSHAKE_S = 10.0


class Purpose(IntEnum):
    PLANS = 1  # calls, and what they gave
    TUNNEL = 2  # bytes between jax and its coordinator, which listens to its own host alone


@dataclass(frozen=True, kw_only=True)
class Hello:
    purpose: Purpose
    rank: int
    num_processes: int


class Lost(Exception):
    """The connection is gone."""


class Sender:
    """Sends the same frames to every rank of `sockets`; threads may share it."""

    def __init__(self, sockets: Mapping[int, socket.socket], key: bytes, rank: int):
        self._sockets, self._key, self._rank = dict(sockets), key, rank
        self._number, self._lock = 0, threading.Lock()

    def send(self, kind: Kind, payload: bytes = b"", program: bytes = NO_PROGRAM) -> list[int]:
        """The ranks whose connection is gone."""
        lost = []
        with self._lock:
            data = encode(self._key, self._rank, self._number, Frame(kind, program, payload))
            self._number += 1
            for rank, peer in self._sockets.items():
                try:
                    peer.sendall(data)
                except OSError:
                    lost.append(rank)
        return lost

    def close(self) -> None:
        """Who reads at the other end hears it."""
        for peer in self._sockets.values():
            close(peer)


class Receiver:
    """Reads what `rank` sends; for one thread."""

    def __init__(self, peer: socket.socket, key: bytes, rank: int):
        self._peer, self._key, self._rank, self._number = peer, key, rank, 0

    def receive(self, longest_call: Callable[[bytes], int]) -> Frame:
        """Waits for the next frame. Raises Lost or WireError."""

        def longest(kind: Kind, program: bytes) -> int:
            return longest_call(program) if kind == Kind.CALL else SMALL

        frame = read(
            lambda n: receive_exactly(self._peer, n), self._key, self._rank, self._number, longest
        )
        self._number += 1
        return frame


def receive_exactly(peer: socket.socket, size: int) -> bytes:
    """Raises Lost when the connection ends before."""
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        try:
            count = peer.recv_into(view[got:])
        except OSError as error:
            raise Lost(f"its connection broke: {error.strerror or error}") from None
        if not count:
            raise Lost("its connection closed")
        got += count
    return bytes(data)


def greet(peer: socket.socket, key: bytes, group_nonce: bytes) -> Hello:
    """The leader's side: who has come. Raises WireError, Lost or OSError."""
    peer.settimeout(HANDSHAKE_S)
    nonce = os.urandom(NONCE_BYTES)
    peer.sendall(GREETING.pack(MAGIC, VERSION, nonce))
    frame = _read_one(peer, derive(key, nonce), Kind.HELLO, HELLO.size)
    theirs, purpose, rank, num_processes = HELLO.unpack(frame.payload)
    if purpose not in Purpose.__members__.values():
        raise WireError(f"its connection is for the unknown purpose {purpose}")
    welcome = Frame(Kind.WELCOME, NO_PROGRAM, group_nonce)
    peer.sendall(encode(derive(key, nonce, theirs), 0, 0, welcome))
    peer.settimeout(None)
    return Hello(purpose=Purpose(purpose), rank=rank, num_processes=num_processes)


def introduce(peer: socket.socket, key: bytes, hello: Hello) -> bytes:
    """The follower's side: the group's nonce. Raises WireError, Lost or OSError."""
    peer.settimeout(HANDSHAKE_S)
    magic, version, nonce = GREETING.unpack(receive_exactly(peer, GREETING.size))
    if (magic, version) != (MAGIC, VERSION):
        raise WireError("no xlinfer of this version listens there")
    ours = os.urandom(NONCE_BYTES)
    payload = HELLO.pack(ours, hello.purpose, hello.rank, hello.num_processes)
    # Before it is known, a rank is no part of the header.
    peer.sendall(encode(derive(key, nonce), 0, 0, Frame(Kind.HELLO, NO_PROGRAM, payload)))
    frame = _read_one(peer, derive(key, nonce, ours), Kind.WELCOME, NONCE_BYTES)
    peer.settimeout(None)
    return frame.payload


def _read_one(peer: socket.socket, key: bytes, kind: Kind, size: int) -> Frame:
    frame = read(lambda n: receive_exactly(peer, n), key, 0, 0, lambda *_: size)
    if frame.kind != kind or len(frame.payload) != size:
        raise WireError(
            f"it sent a {frame.kind.name} of {len(frame.payload)} bytes for {kind.name}"
        )
    return frame


def close(one: socket.socket) -> None:
    """A thread that waits for it wakes."""
    with suppress(OSError):  # it never was connected, or is closed
        one.shutdown(socket.SHUT_RDWR)
    one.close()


def dial(host: str, port: int, timeout_s: float) -> socket.socket:
    """Raises OSError."""
    peer = socket.create_connection((host, port), timeout=timeout_s)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer


def limit_sending(peer: socket.socket, seconds: float) -> None:
    """A peer that reads nothing makes a send fail after so long. Reading may wait for ever."""
    whole, part = divmod(seconds, 1)
    limit = struct.pack("@ll", int(whole), int(part * 1e6))
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
