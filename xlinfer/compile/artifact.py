"""The compiled artifact: all that a replica needs to start without tracing or compiling.

    compiled.json            what it is, what it is tied to, and the digest of every other file
    programs/decode-64.json  what a program takes and gives, as JSON
    programs/decode-64.xla   its code, as PJRT serializes it
    parameters/              with --weights: the parameters as they lie in memory (Orbax)
    config.json, tokenizer.json, ...   with --weights: what stands beside them in a checkpoint

It runs only with the versions that compiled it, on the devices that it was compiled for. Nothing
in it is a pickle; but its programs are code, so it is opened only where nobody else can write.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

import xlinfer
from xlinfer.compile import Executables, Key, title
from xlinfer.compile.executable import Stored, load
from xlinfer.compile.store import Store, check_private, host_kind, versions
from xlinfer.compile.trees import decode_array, encode_array
from xlinfer.deployment import Deployment, Sizes
from xlinfer.plan import Plan
from xlinfer.program_inputs import (
    decode_shapes,
    encode_shapes,
    forward_shapes,
    pool_shapes,
    sample_shapes,
    score_shapes,
)
from xlinfer.sampling import empty_slots

MANIFEST, PROGRAMS, PARAMETERS = "compiled.json", "programs", "parameters"
FORMAT = 3


class ArtifactError(ValueError):
    """No artifact, a damaged one, or one for something else; the message says what mends it."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An artifact that was found whole, and to fit what is here."""

    path: Path
    manifest: Mapping[str, Any]
    plan: Plan
    mesh: Mesh
    params: tuple[jax.ShapeDtypeStruct, ...]  # placed
    paths: tuple[str, ...]

    @property
    def has_weights(self) -> bool:
        return bool(self.manifest["has_weights"])


def describe(
    deployment: Deployment,
    setup: Mapping[str, Any],
    digests: Mapping[Key, str],
) -> dict[str, Any]:
    """The manifest, but for the files' digests."""
    programs, mesh = deployment.programs, deployment.programs.mesh
    platform = programs.device.platform
    return {
        "format": FORMAT,
        "xlinfer": xlinfer.__version__,
        "setup": dict(setup),
        "config_sha256": config_digest(setup["config"]),
        "versions": versions(platform),
        "device": programs.device.kind,
        "host": host_kind() if platform == "cpu" else "",
        "mesh": dict(mesh.shape),
        "plan": asdict(programs.plan),
        "facts": deployment.facts._asdict(),
        "attention_impl": programs.attention_impl,
        "kv_cache_dtype": jnp.dtype(deployment.spec.dtype).name,
        "memory": asdict(deployment.memory),
        "parameters": [
            {"path": path, **encode_array(x)}
            for path, x in zip(deployment.paths, deployment.params, strict=True)
        ],
        "programs": {title(key): {"key": list(key), "digest": d} for key, d in digests.items()},
    }


def config_digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def write_programs(draft: Path, manifest: dict[str, Any], kept: Store) -> None:
    """The programs that `manifest` names, out of the store."""
    (draft / PROGRAMS).mkdir()
    for name, program in manifest["programs"].items():
        found = kept.read(program["digest"])
        if found is None:
            raise ArtifactError(f"program {name} has vanished from the compile cache")
        (draft / PROGRAMS / f"{name}.json").write_text(json.dumps(found.description))
        (draft / PROGRAMS / f"{name}.xla").write_bytes(found.code)


def seal(draft: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, with the digests of all that is in `draft`."""
    files = sorted(p for p in draft.rglob("*") if p.is_file())
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(file_digest, files))
    manifest["files"] = {
        str(p.relative_to(draft)): {"sha256": digest, "bytes": p.stat().st_size}
        for p, digest in zip(files, digests, strict=True)
    }
    manifest["has_weights"] = (draft / PARAMETERS).is_dir()
    manifest["sha256"] = own_digest(manifest)
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def own_digest(manifest: Mapping[str, Any]) -> str:
    """Of all that a manifest says, but for this digest."""
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: str | Path) -> tuple[Path, dict[str, Any]]:
    """Raises ArtifactError where there is none or it is of another format, PlanError where others
    may write to it."""
    path = Path(directory).expanduser()
    file = path / MANIFEST
    if not file.is_file():
        raise ArtifactError(
            f"{path} is no compiled artifact: it has no {MANIFEST}. "
            f"python -m xlinfer.compile --model=... --target=... --output={path} writes one."
        )
    check_private(path, "artifact")
    check_private(file, "artifact")
    manifest: dict[str, Any] = {}
    try:
        manifest = json.loads(file.read_bytes())
        whole = manifest["sha256"] == own_digest(manifest)
        wrong = manifest["format"] != FORMAT
    except (ValueError, KeyError, TypeError):
        whole = wrong = False
    if not whole:
        raise ArtifactError(
            f"{file} is damaged: it is not what was written. Copy or compile it again."
        )
    if wrong:
        raise ArtifactError(
            f"{file} is of format {manifest['format']}; this xlinfer reads {FORMAT}. "
            f"{compile_again(manifest)}"
        )
    return path, manifest


def compile_again(manifest: Mapping[str, Any]) -> str:
    """The command that mends a mismatch."""
    setup = manifest.get("setup", {})
    flags = [f"--target={setup.get('target', '...')}"]
    flags += [
        f"--{name}={setup[name]}"
        for name in ("tensor_parallel_size", "dtype", "quantization", "matmul_impl")
        if setup.get(name) is not None
    ]
    flags += [
        f"--{name}={setup[name]}"
        for name in ("expert_parallel_size", "sequence_parallel_size")
        if setup.get(name, 1) > 1
    ]
    default = asdict(Sizes())
    sizes = {n: v for n, v in setup.get("sizes", {}).items() if v != default.get(n)}
    flags += [f"--{name}={value}" for name, value in sizes.items()]
    if manifest.get("has_weights"):
        flags.append("--weights")
    return f"Compile it again: python -m xlinfer.compile --model=... {' '.join(flags)} --output=NEW"


def open_artifact(directory: str | Path, devices: Sequence[Any]) -> Opened:
    """Check that the artifact is whole, private, and for these versions and `devices`.

    Raises ArtifactError naming every difference and the command that mends it.
    """
    path, manifest = read_manifest(directory)
    try:
        differences = list(_differences(manifest, devices))
        if differences:
            raise ArtifactError(
                f"{path} does not fit: {'; '.join(differences)}. {compile_again(manifest)}"
            )
        size = dict(manifest["mesh"])
        types = (jax.sharding.AxisType.Auto,) * len(size)
        count = int(np.prod(list(size.values())))
        mesh = jax.make_mesh(tuple(size.values()), tuple(size), types, devices=devices[:count])
        given = dict(manifest["plan"])
        for name in ("token_buckets", "decode_buckets", "encode_buckets"):
            given[name] = tuple(given[name])
        _check_files(path, manifest["files"], manifest["programs"])
        return Opened(
            path=path,
            manifest=manifest,
            plan=Plan(**given),
            mesh=mesh,
            params=tuple(decode_array(p, mesh) for p in manifest["parameters"]),
            paths=tuple(p["path"] for p in manifest["parameters"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path / MANIFEST} is damaged: {error!r}") from None


def moved(opened: Opened, mesh: Mesh) -> Opened:
    """The same for other devices of the kind."""
    params = tuple(decode_array(p, mesh) for p in opened.manifest["parameters"])
    return replace(opened, mesh=mesh, params=params)


def _differences(manifest: Mapping[str, Any], devices: Sequence[Any]):
    here, kind = devices[0], manifest["device"]
    if here.device_kind != kind:
        yield f"it is for {kind}, and here is {here.device_kind}"
        return
    count = int(np.prod(list(manifest["mesh"].values())))
    if len(devices) < count:
        yield f"it is for {count} devices, and here are {len(devices)}"
    now = versions(here.platform) | {"xlinfer": xlinfer.__version__}
    for name, was in (manifest["versions"] | {"xlinfer": manifest["xlinfer"]}).items():
        if now.get(name) != was:
            yield f"it was compiled with {name} {was}, and here is {now.get(name, 'none')}"
    if here.platform == "cpu" and manifest["host"] != host_kind():
        yield "it was compiled for a CPU with other instructions than this one"


def _check_files(
    path: Path, files: Mapping[str, Mapping[str, Any]], programs: Iterable[str]
) -> None:
    """Every file is there, nobody else's, and to the bit what was written; programs are files."""
    read = (f"{PROGRAMS}/{name}.{kind}" for name in programs for kind in ("json", "xla"))
    if unknown := [name for name in read if name not in files]:
        raise ArtifactError(f"{path / MANIFEST} is damaged: it has no digest of {unknown[0]}")

    def check(item: tuple[str, Mapping[str, Any]]) -> str | None:
        name, want = item
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            return f"{name} lies outside of it"
        if not file.is_file():
            return f"{name} is missing"
        check_private(file, "artifact's file")
        check_private(file.parent, "artifact's folder")
        if file.stat().st_size != want["bytes"] or file_digest(file) != want["sha256"]:
            return f"{name} is not what was written (its sha256 differs)"
        return None

    with ThreadPoolExecutor() as pool:
        wrong = [why for why in pool.map(check, files.items()) if why]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ArtifactError(
            f"{path} is damaged: {'; '.join(wrong[:3])}{more}. Copy or compile it again."
        )


def load_programs(opened: Opened) -> Executables:
    """Ready to run; nothing is traced or compiled. Raises ExecutableError, ArtifactError."""
    folder = opened.path / PROGRAMS

    def one(item: tuple[str, Mapping[str, Any]]) -> tuple[Key, Compiled]:
        name, program = item
        description = json.loads((folder / f"{name}.json").read_bytes())
        stored = Stored(description=description, code=(folder / f"{name}.xla").read_bytes())
        _check_call(name, program["key"], description, opened)
        return (program["key"][0], program["key"][1]), load(stored, opened.mesh)

    with ThreadPoolExecutor() as pool:
        return Executables.of(dict(pool.map(one, opened.manifest["programs"].items())))


def _check_call(name: str, key: Sequence[Any], description: Mapping[str, Any], opened: Opened):
    """That the program takes what this xlinfer would give it."""
    plan, vocab = opened.plan, opened.manifest["facts"]["vocab_size"]
    packed = lambda shapes: [sum(x.size for x in jax.tree.leaves(shapes))]
    wanted = {
        "forward": lambda: [packed(forward_shapes(plan, key[1]))],
        "decode": lambda: [packed(decode_shapes(plan, key[1]))],
        "encode": lambda: [packed(encode_shapes(key[1]))],
        "sample": lambda: [packed(sample_shapes(plan))],
        "pool": lambda: [packed(pool_shapes(plan))],
        "score": lambda: [packed(score_shapes(plan))],
        "admit": lambda: [
            list(x.shape) for x in jax.tree.leaves(empty_slots(plan.max_num_seqs + 1, vocab))
        ],
    }.get(key[0], lambda: [])()
    shapes = [x["shape"] for x in description["arguments"]["arrays"]]
    have = shapes[: len(wanted)] if key[0] == "admit" else shapes[len(shapes) - len(wanted) :]
    if have != wanted:
        raise ArtifactError(
            f"program {name} was compiled by another xlinfer: it takes {have}, and is given "
            f"{wanted}. {compile_again(opened.manifest)}"
        )
