"""Which format a checkpoint's weights are in, by its quantization_config."""

from collections.abc import Callable, Mapping
from typing import Any

from converters.errors import CheckpointError
from converters.formats.awq import read_awq
from converters.formats.bitsandbytes import read_bitsandbytes
from converters.formats.compressed_tensors import read_compressed_tensors
from converters.formats.fp8 import read_fbgemm_fp8, read_fp8, read_modelopt
from converters.formats.gguf_blocks import read_gguf_blocks
from converters.formats.gptq import read_gptq
from converters.formats.mxfp4 import read_mxfp4
from converters.formats.packing import Scheme
from converters.kv_scales import has_kv_scales

# Where config.json says it; compression_config is compressed-tensors' old name.
KEYS = ("quantization_config", "compression_config")
# Files beside config.json that old writers put it into, and the method that they are of.
BESIDE: Mapping[str, str] = {"quantize_config.json": "gptq", "hf_quant_config.json": "modelopt"}

METHODS: Mapping[str, Callable[[str, Mapping[str, Any]], Scheme]] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fbgemm_fp8,
    "modelopt": read_modelopt,
    "bitsandbytes": read_bitsandbytes,
    "mxfp4": read_mxfp4,
    "gguf": read_gguf_blocks,
}
# Formats of linear layers alone: what writes them makes such layers of each expert first.
APART = frozenset({"gptq", "awq", "compressed-tensors"})
REFUSED: Mapping[str, str] = {
    "quark": "AMD's Quark has layouts of its own",
    "torchao": "its tensors are pickled Python objects",
    "hqq": "its weights are optimized together with a zero for each group in layouts of its own",
    "aqlm": "additive codebooks are not computed",
    "vptq": "vector codebooks are not computed",
    "spqr": "its sparse outliers are not computed",
    "quip": "its incoherence transforms are not computed",
    "higgs": "its Hadamard transforms are not computed",
    "exl2": "it is read by ExLlama alone",
    "exl3": "it is read by ExLlama alone",
    "marlin": "it is laid out for one kernel; use the GPTQ checkpoint that it was made of",
    "bitblas": "it is laid out for one kernel; use the GPTQ checkpoint that it was made of",
    "gptq_marlin": "it is laid out for one kernel; use the GPTQ checkpoint that it was made of",
    "eetq": "it is laid out for one kernel; use --quantization=int8 on the float checkpoint",
    "quanto": "its tensors are pickled Python objects",
    "bitnet": "ternary weights are not computed",
    "fp_quant": "its Hadamard transforms are not computed",
    "auto-round": "export it as GPTQ, AWQ or compressed-tensors",
}


def read_kv_scales(where: str, config: Mapping[str, Any]) -> bool:
    """Whether the quantization_config of the object `config` says that there are scales of a KV
    cache. Raises CheckpointError, beginning with `where`, for a cache that is not of e4m3."""
    values, where = _given(where, config)
    if values is None:
        return False
    inner = values.get("quantization")  # where hf_quant_config.json has it
    return has_kv_scales(where, inner if isinstance(inner, dict) else values)


def _given(where: str, config: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str]:
    """The quantization_config, None where there is none, and what begins its errors."""
    for name in KEYS:
        if (values := config.get(name)) is not None:
            where = f"{where}: {name}"
            if not isinstance(values, dict):
                raise CheckpointError(f"{where} is {values!r}; it must be an object")
            return values, where
    return None, where


def read_scheme(where: str, config: Mapping[str, Any]) -> Scheme | None:
    """What the quantization_config of the object `config` describes; None: the weights are floats.

    Raises CheckpointError, beginning with `where`, for a format that is not read.
    """
    values, where = _given(where, config)
    if values is None:
        return None
    method = values.get("quant_method")
    if method is None and where.endswith("compression_config"):
        method = "compressed-tensors"
    if method is None and values.get("quant_algo") is not None:
        method = "modelopt"
    if method is None and (values.get("load_in_4bit") or values.get("load_in_8bit")):
        method = "bitsandbytes"  # old files do not name it
    if method is None:
        raise CheckpointError(f"{where} names no quant_method; xlinfer reads {', '.join(METHODS)}")
    method = str(method)
    if method in METHODS:
        return METHODS[method](where, values)
    reason = f": {REFUSED[method]}" if method in REFUSED else ""
    raise CheckpointError(
        f"{where}: quant_method {method!r} is not read{reason}. xlinfer reads {', '.join(METHODS)}"
    )
