"""Compiled programs on disk, each under the digest of everything that it depends on.

    DIR/programs/<digest>.json, <digest>.xla    the description and the code
    DIR/latest/<label>.json                     what the program of that label last depended on

A program is there whole or not at all, so whoever is interrupted goes on where they were, and two
that compile the same do no harm. What is read back is code that runs: a directory that somebody
else may write to is refused.
"""

import hashlib
import json
import os
import platform
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Lowered

from xlinfer.compile.executable import Stored
from xlinfer.plan import PlanError

PLUGINS = {"tpu": ("libtpu",), "cuda": ("jax-cuda13-plugin", "jax-cuda13-pjrt")}
FORMAT = 1  # of a program's description


@dataclass(frozen=True, kw_only=True)
class Origin:
    """All that decides what comes out of a compile."""

    hlo: str  # digest of the program as it was lowered
    versions: Mapping[str, str]
    device: str  # kind, and of a CPU what it can do
    mesh: Mapping[str, int]
    options: Mapping[str, Any]
    format: int = FORMAT

    @staticmethod
    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    @property
    def key(self) -> str:
        return self.digest(asdict(self))


def origin_of(lowered: Lowered, mesh: Mesh, options: Mapping[str, Any]) -> Origin:
    device = mesh.devices.flat[0]
    kind = device.device_kind
    # A program for devices of several processes does not run on as many of one.
    processes = len({d.process_index for d in mesh.devices.flat})
    shape = dict(mesh.shape) | ({"processes": processes} if processes > 1 else {})
    return Origin(
        hlo=hashlib.sha256(lowered.as_text().encode()).hexdigest(),
        versions=versions(device.platform),
        device=f"{kind} {host_kind()}" if device.platform == "cpu" else kind,
        mesh=shape,
        options=dict(options),
    )


def versions(platform: str) -> dict[str, str]:
    """Of what compiles and of what runs the result: an executable is for these alone."""
    found = {}
    for name in ("jax", "jaxlib", *PLUGINS.get({"gpu": "cuda"}.get(platform, platform), ())):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def host_kind() -> str:
    """The instructions that this machine's CPU has: XLA:CPU compiles for them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    digest = hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()
    return f"{platform.machine()} {digest[:12]}"


def check_private(path: Path, what: str) -> None:
    """Raise PlanError unless `path` is owned by the user or root and nobody else may write it."""
    found = path.stat()
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PlanError(
            f"The {what} {path} must be owned by you and writable by nobody else: what is in it "
            f"runs as you. Run `chmod go-w {path}`, or name another directory."
        )


class Store:
    def __init__(self, directory: str | os.PathLike):
        """Made for the owner alone if it is not there. Raises PlanError for one that somebody
        else owns or may write to."""
        root = Path(directory).expanduser()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(root, "compile cache")
        self._programs, self._latest = root / "programs", root / "latest"
        for folder in (self._programs, self._latest):
            folder.mkdir(mode=0o700, exist_ok=True)
            check_private(folder, "compile cache")

    def get(self, origin: Origin) -> Stored | None:
        """What was put under `origin`. A damaged one counts as missing, and is made anew."""
        return self.read(origin.key)

    def read(self, digest: str) -> Stored | None:
        """What was put under the origin of this digest."""
        try:
            held = json.loads((self._programs / f"{digest}.json").read_bytes())
            code = (self._programs / f"{digest}.xla").read_bytes()
        except (OSError, ValueError):
            return None
        if not isinstance(held, dict) or held.get("sha256") != hashlib.sha256(code).hexdigest():
            return None
        return Stored(description=held["description"], code=code)

    def put(self, label: str, origin: Origin, stored: Stored) -> None:
        held = {
            "description": stored.description,
            "sha256": hashlib.sha256(stored.code).hexdigest(),
            "origin": asdict(origin),
        }
        write_whole(self._programs / f"{origin.key}.xla", stored.code)
        write_whole(self._programs / f"{origin.key}.json", json.dumps(held).encode())
        write_whole(self._latest / f"{label}.json", json.dumps(asdict(origin)).encode())

    def why_missed(self, label: str, origin: Origin) -> str:
        """What is different from the last time that the program of this label was compiled."""
        try:
            last = json.loads((self._latest / f"{label}.json").read_bytes())
        except (OSError, ValueError):
            return "it was never compiled here"
        now, changed = asdict(origin), []
        for name, value in (last | {"versions": None}).items():
            if name not in ("hlo", "versions") and value != now.get(name):
                changed.append(f"{name} was {value}, is {now.get(name)}")
        for name, value in (last.get("versions") or {}).items():
            if (new := now["versions"].get(name)) != value:
                changed.append(f"{name} was {value}, is {new}")
        if last.get("hlo") != now["hlo"]:
            changed.append("the program is another: of other sizes, options or xlinfer version")
        return "; ".join(changed) or "its files were missing or damaged"


def write_whole(path: Path, data: bytes) -> None:
    """Atomically: `path` has all of `data` or does not change."""
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def use_jax_cache(directory: str | os.PathLike) -> None:
    """Where jax keeps the small programs that load and place weights."""
    jax.config.update("jax_compilation_cache_dir", str(Path(directory).expanduser() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
