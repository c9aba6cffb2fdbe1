"""Calls as bytes: each program's inputs have fixed shapes, so they need no description.

A program is called by a digest of its name and of everything that ranks must agree on; a rank that
has other programs, or other weights, has other digests.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import xlinfer
from xlinfer.compile import Key, title
from xlinfer.compile.store import versions
from xlinfer.compile.trees import encode_array
from xlinfer.engine.ready import Ready
from xlinfer.engine.worker import Call, host_inputs
from xlinfer.multihost.wire import NO_PROGRAM, WireError

END_BYTES = 64 * 2**10  # of a weight file, at its beginning and its end


class Layout(NamedTuple):
    key: Key
    inputs: Any  # a tree of ShapeDtypeStructs
    nbytes: int


class Calls:
    """The calls of the programs in `ready`, for ranks that have the same `facts`."""

    def __init__(self, ready: Ready, facts: Mapping[str, Any]):
        identity = json.dumps(facts, sort_keys=True)
        self._layouts: dict[bytes, Layout] = {}
        self._digests: dict[Key, bytes] = {}
        for key, inputs in host_inputs(ready.executables).items():
            digest = hashlib.sha256(f"{title(key)} {identity}".encode()).digest()
            digest = digest[: len(NO_PROGRAM)]
            nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(inputs))
            self._layouts[digest], self._digests[key] = Layout(key, inputs, nbytes), digest

    def encode(self, call: Call) -> tuple[bytes, bytes]:
        """The program's digest and its inputs."""
        digest = self._digests[call.program, call.bucket]
        layout, parts = self._layouts[digest], []
        given, wanted = jax.tree.leaves(call.inputs), jax.tree.leaves(layout.inputs)
        for x, want in zip(given, wanted, strict=True):
            if (x.shape, x.dtype) != (want.shape, want.dtype):
                raise ValueError(
                    f"{title(layout.key)} takes {want.dtype}{list(want.shape)}, and is given "
                    f"{x.dtype}{list(x.shape)}"
                )
            parts.append(x.tobytes())
        return digest, b"".join(parts)

    def decode(self, digest: bytes, payload: bytes) -> Call:
        """Raises WireError for a program that is not here, or inputs of another size."""
        layout = self._layout(digest)
        if len(payload) != layout.nbytes:
            raise WireError(f"{title(layout.key)} takes {layout.nbytes} bytes, not {len(payload)}")
        arrays, start = [], 0
        leaves, tree = jax.tree.flatten(layout.inputs)
        for want in leaves:
            flat = np.frombuffer(payload, want.dtype, want.size, start)
            arrays.append(flat.reshape(want.shape))
            start += flat.nbytes
        return Call(*layout.key, jax.tree.unflatten(tree, arrays))

    def longest(self, digest: bytes) -> int:
        """Bytes of the inputs. Raises WireError for a program that is not here."""
        return self._layout(digest).nbytes

    def _layout(self, digest: bytes) -> Layout:
        if digest not in self._layouts:
            raise WireError(f"it runs the program {digest.hex()}, which is not here")
        return self._layouts[digest]


def facts_of(ready: Ready, source: Path) -> dict[str, Any]:
    """What all ranks must have alike, by name; `source` is what the weights come from."""
    device = ready.mesh.devices.flat[0]
    parameters = [encode_array(p) for p in ready.params]
    plan = {f"plan.{name}": value for name, value in asdict(ready.plan).items()}
    return json.loads(
        json.dumps(
            {
                "xlinfer": xlinfer.__version__,
                **versions(device.platform),
                "device": device.device_kind,
                "mesh": dict(ready.mesh.shape),
                **plan,
                "attention_impl": ready.attention_impl,
                "kv_cache_dtype": ready.kv_cache_dtype,
                "vocab_size": ready.vocab_size,
                "parameters": _digest(json.dumps([*ready.paths, parameters]).encode()),
                **{f"file {name}": digest for name, digest in file_digests(source).items()},
            }
        )
    )


def file_digests(source: Path) -> dict[str, str]:
    """Digests of the weight files' sizes, beginnings and ends, and of the manifests: two sets of
    weights with the same of all of these are taken to be one."""
    files = [source]
    if source.is_dir():
        kinds = ("*.safetensors", "*.gguf", "config.json", "compiled.json", "xlinfer.json")
        files = sorted(file for kind in kinds for file in source.glob(kind))
    return {file.name: _file_digest(file) for file in files}


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first fact that is not the same, in words; None where all are."""
    for name in (*ours, *theirs):
        if ours.get(name) != theirs.get(name):
            return f"{name} is {theirs.get(name, 'missing')}, and here {ours.get(name, 'missing')}"
    return None


def _file_digest(file: Path) -> str:
    size = file.stat().st_size
    with open(file, "rb") as data:
        first = data.read(END_BYTES)
        data.seek(max(0, size - END_BYTES))
        return _digest(size.to_bytes(8, "big") + first + data.read(END_BYTES))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
