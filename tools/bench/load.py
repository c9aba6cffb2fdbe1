"""Loading 6 GiB checkpoints, of floats and of 4-bit integers: speed and peak memory.

A Llama of as many layers as make 6 GiB, in shards of 1 GiB, is written and thrown out of the
page cache; then `cat` reads it, and after the cache is emptied again load_model does, in a process
of its own. On the CPU what is loaded is host memory too, so what counts against the bound is the
peak of the process, less what it had before and less the model: at most the 1 GiB in flight and
the largest tensor, beside what the device needs for one layer.
"""

import gc
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

GIB = 1 << 30
BYTES, SHARD = 6 * GIB, GIB
D, F, N, K, H, V = 4096, 14336, 32, 8, 128, 32000  # of Llama 3 8B, with a smaller vocabulary
MATRICES = {
    "self_attn.q_proj": (N * H, D), "self_attn.k_proj": (K * H, D), "self_attn.v_proj": (K * H, D),
    "self_attn.o_proj": (D, N * H), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D),
    "mlp.down_proj": (D, F),
}  # fmt: skip
GROUP = 128
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
Spec = tuple[str, str, tuple[int, ...]]  # name, dtype of safetensors, shape
ITEMSIZE = {"BF16": 2, "F16": 2, "I32": 4}
OUTSIDE: list[Spec] = [
    ("model.embed_tokens.weight", "BF16", (V, D)), ("lm_head.weight", "BF16", (V, D)),
    ("model.norm.weight", "BF16", (D,)),
]  # fmt: skip


def main() -> dict[str, dict[str, float]]:
    return {kind: case(kind) for kind in ("bfloat16", "gptq int4")}


def case(kind: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        path = Path(folder)
        written = write(path, kind)
        shards = sorted(path.glob("*.safetensors"))
        forget(shards)
        started = time.perf_counter()
        subprocess.run(["cat", *shards], stdout=subprocess.DEVNULL, check=True)
        cat_s = time.perf_counter() - started
        forget(shards)
        child = subprocess.run(
            [sys.executable, "-m", "tools.bench.load", folder], check=True, capture_output=True
        )
        found = json.loads(child.stdout.splitlines()[-1])
    bound = GIB + found["largest_tensor_bytes"] + found["layer_bytes"]
    return {
        "checkpoint_GiB": written / GIB,
        "cat_s": cat_s,
        "load_s": found["seconds"],
        "load_over_cat_speed": cat_s / found["seconds"],
        "model_GiB": found["model_bytes"] / GIB,
        "peak_beside_model_GiB": found["beside_bytes"] / GIB,
        "bound_GiB": bound / GIB,
        "peak_over_bound": found["beside_bytes"] / bound,
    }


def forget(files: list[Path]) -> None:
    """Have the next read of the files come from the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write(path: Path, kind: str) -> int:
    """A checkpoint of at least BYTES; how many it has."""
    one = sum(size(spec) for spec in layer(kind, 0))
    layers = -(-(BYTES - sum(map(size, OUTSIDE))) // one)
    specs = [*OUTSIDE, *(spec for i in range(layers) for spec in layer(kind, i))]
    (path / "config.json").write_text(json.dumps(config(kind, layers)))
    weight_map, shard, held = {}, [], 0
    shards = []
    for spec in specs:
        if held + size(spec) > SHARD:
            shards.append(shard)
            shard, held = [], 0
        shard.append(spec)
        held += size(spec)
    shards.append(shard)
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_shard(path / name, shard)
        weight_map |= dict.fromkeys((spec[0] for spec in shard), name)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(map(size, specs))


def config(kind: str, layers: int) -> dict:
    return {
        "model_type": "llama", "vocab_size": V, "hidden_size": D, "intermediate_size": F,
        "num_hidden_layers": layers, "num_attention_heads": N, "num_key_value_heads": K,
        "head_dim": H, "hidden_act": "silu", "rms_norm_eps": 1e-5, "dtype": "bfloat16",
        "max_position_embeddings": 8192, "rope_theta": 5e5, "tie_word_embeddings": False,
        **({} if kind == "bfloat16" else {"quantization_config": GPTQ}),
    }  # fmt: skip


def layer(kind: str, i: int) -> Iterator[Spec]:
    at = f"model.layers.{i}"
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{at}.{name}.weight", "BF16", (D,)
    for name, (out, into) in MATRICES.items():
        if kind == "bfloat16":
            yield f"{at}.{name}.weight", "BF16", (out, into)
            continue
        yield f"{at}.{name}.qweight", "I32", (into // 8, out)
        yield f"{at}.{name}.qzeros", "I32", (into // GROUP, out // 8)
        yield f"{at}.{name}.scales", "F16", (into // GROUP, out)


def size(spec: Spec) -> int:
    return int(np.prod(spec[2])) * ITEMSIZE[spec[1]]


def write_shard(path: Path, specs: list[Spec]) -> None:
    text = header(specs)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 1 << 16, 1 << 23, np.uint16).tobytes()  # 16 MiB, over and over
    with path.open("wb") as file:
        file.write(text)
        for spec in specs:
            left = size(spec)
            content = {"qzeros": b"\x77", "scales": b"\x1c"}.get(spec[0].rpartition(".")[2], noise)
            block = content if len(content) > 1 else content * (1 << 20)
            while left:
                left -= file.write(block[: min(left, len(block))])


def header(specs: list[Spec]) -> bytes:
    described, at = {}, 0
    for spec in specs:
        name, dtype, shape = spec
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size(spec)]}
        at += size(spec)
    text = json.dumps(described).encode()
    return struct.pack("<Q", len(text)) + text


def child(folder: str) -> dict[str, float]:
    """In a process of its own: load, and watch the memory that is not in files."""
    import jax
    import jax.numpy as jnp

    from xlinfer.weights import load_model

    jax.block_until_ready(jnp.zeros(8) + 1)
    gc.collect()
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    model = load_model(folder, dtype="bfloat16")
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    from flax import nnx

    arrays = jax.tree.leaves(nnx.state(model))
    size_of = lambda x: x.addressable_shards[0].data.on_device_size_in_bytes()
    model_bytes = sum(map(size_of, arrays))
    matrices = [x for x in arrays if x.ndim == 3]
    return {
        "seconds": seconds,
        "model_bytes": model_bytes,
        "beside_bytes": peak - before - model_bytes,
        "largest_tensor_bytes": V * D * 2,
        "layer_bytes": sum(size_of(x) // x.shape[0] for x in matrices),
    }


def resident() -> int:
    """Bytes of this process that are not pages of a file, which the system takes back at will."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status names no RssAnon")


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1])))
