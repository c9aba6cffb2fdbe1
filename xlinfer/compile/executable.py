"""A compiled program as a description in JSON and XLA's own bytes, and back, for devices that were
elsewhere when it was compiled.

jax's `serialize_executable` writes a pickle; what it pickles is written out here. It builds the
objects that jax makes after a compile, with jax's own classes: their fields are those of the jax
that pyproject.toml asks for, and of no other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax._src import core
from jax._src.compiler import get_compile_options
from jax._src.interpreters import pxla
from jax._src.layout import Layout
from jax._src.lib import _jax  # type: ignore[reportPrivateImportUsage]
from jax._src.stages import ArgInfo
from jax.sharding import Mesh
from jax.stages import Compiled

from xlinfer.compile.trees import decode_array, decode_tree, encode_array, encode_tree


class ExecutableError(ValueError):
    """A stored program is not one, or is not for these devices."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    description: dict[str, Any]  # JSON
    code: bytes  # as PJRT serializes it: runs only with the same version of the same plugin


def serialize(compiled: Compiled, args: tuple, donated: Sequence[int]) -> Stored:
    """`compiled`, which was jitted with keep_unused=True for `args` (abstract and placed), of which
    those at `donated` are given away."""
    held: pxla.UnloadedMeshExecutable = compiled._executable._unloaded_executable  # type: ignore
    if held.host_callbacks or held.keepalive or held.mut or compiled._params.const_args:
        raise ExecutableError(f"{held.name} keeps constants or calls the host: it cannot be stored")
    program = held.xla_executable
    if isinstance(program, _jax.Executable):  # compiled for devices that are not here
        code = program.serialize()
    else:
        code = program.client.serialize_executable(program)
    out = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=lies)
        for aval, lies in zip(held.output_avals, held.output_shardings, strict=True)
    ]
    result = jax.tree.unflatten(compiled.out_tree, out)
    info = held.all_args_info
    return Stored(
        description={
            "name": held.name,
            "arguments": {
                "tree": encode_tree(args),
                "arrays": [encode_array(x) for x in jax.tree.leaves(args)],
                "names": list((info and info.debug_info.arg_names) or ()),
                "donated": list(donated),
            },
            "results": {"tree": encode_tree(result), "arrays": [encode_array(x) for x in out]},
        },
        code=code,
    )


def _placed_on(devices: Sequence[Any]) -> _jax.CompileOptions | None:
    """Code runs on the devices that it was compiled for, the first ones here, unless these say
    otherwise."""
    ids = [device.id for device in devices]
    if ids == list(range(len(ids))):
        return None
    return get_compile_options(
        num_replicas=1, num_partitions=len(ids), device_assignment=np.array([ids])
    )


def load(stored: Stored, mesh: Mesh) -> Compiled:
    """Ready to call with arrays on `mesh`, which has the shape it was compiled for. Nothing is
    traced or compiled. Raises ExecutableError when description or code are damaged, or the code is
    for other devices or another version."""
    devices = tuple(mesh.devices.flat)
    backend, device_list = devices[0].client, _jax.DeviceList(devices)
    try:
        given, results = stored.description["arguments"], stored.description["results"]
        ins = [decode_array(x, mesh) for x in given["arrays"]]
        outs = [decode_array(x, mesh) for x in results["arrays"]]
        name, names = str(stored.description["name"]), tuple(given["names"])
        args, out = decode_tree(given["tree"], ins), decode_tree(results["tree"], outs)
    except (KeyError, TypeError, ValueError) as error:
        raise ExecutableError(f"a program's description is damaged: {error}") from None
    try:
        code = backend.deserialize_executable(stored.code, device_list, _placed_on(devices))
    except jax.errors.JaxRuntimeError as error:
        raise ExecutableError(
            f"{name} does not load on {devices[0].device_kind}: {str(error).splitlines()[0]}"
        ) from None
    avals = lambda arrays: [core.ShapedArray(x.shape, x.dtype) for x in arrays]
    in_avals, in_shardings = avals(ins), tuple(x.sharding for x in ins)
    layouts = lambda found: [Layout.from_pjrt_layout(x) for x in found]
    in_layouts = layouts(code.get_parameter_layouts())
    info = core.DebugInfo(name, name, names, None)
    donated = set(given["donated"])
    executable = pxla.UnloadedMeshExecutable(
        xla_executable=code,
        device_list=device_list,
        backend=backend,
        input_avals=in_avals,
        input_shardings=in_shardings,
        output_avals=avals(outs),
        output_shardings=tuple(x.sharding for x in outs),
        committed=True,
        name=name,
        unordered_effects=[],
        ordered_effects=[],
        keepalive=[],
        host_callbacks=[],
        kept_var_idx=set(range(len(ins))),
        mut=None,
        xla_in_layouts=in_layouts,
        dispatch_in_layouts=pxla.get_dispatch_layouts(in_layouts, in_shardings, in_avals),
        xla_out_layouts=layouts(code.get_output_layouts()),
        all_args_info=pxla.AllArgsInfo(in_avals, info),
        pgle_profiler=None,
    ).load()
    infos = tuple(
        jax.tree.map(lambda x, at=at: ArgInfo(core.ShapedArray(x.shape, x.dtype), at in donated), a)
        for at, a in enumerate(args)
    )
    return Compiled(executable, [], (infos, {}), jax.tree.structure(out), no_kwargs=True)
