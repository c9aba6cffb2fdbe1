"""`python -m tools.aot.load KIND DEVICE`: the programs that write a checkpoint's tensors into the
parameters, for Llama 3 8B in floats or in a quantized format; JSON as the last line.

Nothing is loaded: the checkpoint has headers and no bytes, and the device need not be here.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from converters import PackedStep, Step, open_checkpoint, weight_forms
from pallas_kernels.devices import DEVICES
from tools.bench.load import OUTSIDE, config, header, layer, size
from xlinfer.compile import options_for
from xlinfer.deployment import bytes_on_one
from xlinfer.placing import Write, write, write_packed
from xlinfer.topology import described_mesh
from xlinfer.weights import abstract_model

KINDS = {"gptq": "gptq int4", "floats": "bfloat16"}  # of tools.bench.load
LAYERS = 32


def compile_loading(kind: str, device_name: str) -> dict[str, Any]:
    """The most that a write holds beside the parameters, all of which it must alias, and what a
    layer takes: the bound."""
    device = DEVICES[device_name]
    mesh = described_mesh(device)
    started, temporaries, copied = time.perf_counter(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        hollow(Path(folder), KINDS[kind])
        checkpoint = open_checkpoint(folder)
        forms = weight_forms(checkpoint.config, checkpoint.scheme, folder)
        model = abstract_model(checkpoint.config, jnp.bfloat16, mesh, device, forms)
        flat = nnx.to_flat_state(nnx.state(model))
        targets = {path: param.get_value() for path, param in flat}
        writes: dict[str, Write] = {}
        for step in checkpoint.schedule():
            target = targets[step.rule.target]
            if isinstance(step, Step):
                one = write(step, target, target.sharding, mesh, abstract)
            else:
                assert isinstance(step, PackedStep)
                one = write_packed(step, target, target, mesh, {}, abstract)
            writes.setdefault(repr(shapes_of(one)), one)
        for one in writes.values():
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                lowered = one.program.trace(*one.arguments).lower(
                    lowering_platforms=(device.platform,)
                )
            memory = lowered.compile(options_for(device)).memory_analysis()
            assert memory is not None
            held = sum(map(bytes_on_one, jax.tree.leaves(one.arguments[0])))
            temporaries = max(temporaries, memory.temp_size_in_bytes)
            copied = max(copied, held - memory.alias_size_in_bytes)
    stacks = [x for path, x in targets.items() if path[0] == "layers"]
    a_layer = sum(map(bytes_on_one, jax.tree.leaves(stacks))) // LAYERS
    return {
        "seconds": time.perf_counter() - started,
        "writes": len(writes),
        "temp_bytes": temporaries,
        "copied_bytes": copied,
        "most_temp_bytes": a_layer,
    }


def abstract(x, lies) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies)


def shapes_of(one: Write) -> Any:
    """What tells its program from others: starts are but numbers."""
    place = lambda x: (x.shape, x.dtype.name) if hasattr(x, "shape") else x
    return one.program.__name__, jax.tree.map(place, one.arguments)


def hollow(folder: Path, kind: str) -> None:
    """A checkpoint of zeros that take no room on the disk."""
    specs = [*OUTSIDE, *(spec for i in range(LAYERS) for spec in layer(kind, i))]
    text = header(specs)
    document = config(kind, LAYERS)
    if "quantization_config" in document:
        document["quantization_config"] |= {"sym": False}  # which zeros as zero points do not say
    (folder / "config.json").write_text(json.dumps(document))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(text)
        file.truncate(len(text) + sum(map(size, specs)))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print(json.dumps(compile_loading(*sys.argv[1:])))
