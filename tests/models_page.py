"""docs/models.md, from the tables that the tests are made of: python -m tests.models_page"""

from collections.abc import Sequence
from pathlib import Path

from converters import open_checkpoint, read_config, read_model, read_scheme, weight_forms
from converters.families import FAMILIES
from tests.checkpoints import ENCODER_DECODERS, GOLDENS, MULTIMODAL, QUANTIZED, quantized_golden
from tests.checkpoints import FAMILIES as GOLDEN_NAMES
from tests.engine.test_encoded_prompts import QUICK as QUICK_ENCODERS
from tests.engine.test_engine import MULTIMODAL as ENGINE_MULTIMODAL
from tests.engine.test_engine import QUICK
from tests.engine.test_tensor_parallel import ATOL as SPLIT_ATOL
from tests.engine.test_tensor_parallel import DEVICE_COUNTS as ENGINE_DEVICES
from tests.models import test_quantized as quantized
from tests.models.test_transformer import ATOL, DEVICE_COUNTS
from xlinfer.config import ModelConfig

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
COMMAND = "python -m tests.models_page"
STYLES = {"config.json": "5", "config_v4.json": "4"}  # file of a golden -> whose style it has
INTRODUCTION = """\
# Models

What each family is tested with. `{command}` writes this page from the tables that the
tests are made of, and a test holds it to them.

A golden is a tiny random checkpoint that transformers wrote, with the logits and the greedy tokens
that transformers computes of it in float32 ([how](../tests/data/goldens/README.md)). Of each,

- every tensor has one place and none is left over;
- both styles of config.json, transformers 4's and 5's, say the same;
- the forward's logits are transformers' within {logits:g} (float32, logits of a few units), on
  {devices} devices;
- the engine's greedy tokens are transformers': alone, in a mixed batch of 16, with prefix hits,
  prefilled 8 tokens at a time, and after preemptions; always, or with `-m slow`, as the table says;
- so they are on {engine_devices} devices, most with `-m slow`, and the log-probabilities of the
  prompt within {scores:g}.
"""


FORMATS = """\
## Formats

Floats (F64, F32, F16, BF16) of every family. Quantized weights stay packed in memory, of every
family whose matrices the format holds; these are tested against checkpoints that the formats' own
libraries wrote ([how](../tests/data/quantized/README.md)), in both styles of config.json, and by
packers of our own with hypothesis. Where weights alone are quantized, logits are those of the
dequantized weights within {weights:g}; where inputs are rounded too, of inputs rounded alike,
within a root mean square of {rounded:g}.
"""


def page() -> str:
    """Raises AssertionError for a family without a golden."""
    names = (*GOLDEN_NAMES, *ENCODER_DECODERS)
    golden = {open_checkpoint(GOLDENS / name).config.model_type for name in names}
    assert golden == FAMILIES.keys(), f"without a golden: {FAMILIES.keys() - golden}"
    introduction = INTRODUCTION.format(
        command=COMMAND, logits=ATOL["golden"], scores=SPLIT_ATOL,
        devices=counted(DEVICE_COUNTS), engine_devices=counted(ENGINE_DEVICES),
    )  # fmt: skip
    families = [
        ("model_type", "golden", "config.json of", "has", "engine"),
        *sorted(map(of_golden, GOLDEN_NAMES), key=lambda row: (row[0].strip("`"), row[1])),
        *map(of_encoder_decoder, ENCODER_DECODERS),
        *(of_multimodal(name) for name in sorted(MULTIMODAL)),
    ]
    formats = [
        ("format", "golden", "of", "kept as", "logits", "engine", "devices"),
        *(of_format(name) for name in sorted(QUANTIZED, key=lambda name: QUANTIZED[name])),
    ]
    about = FORMATS.format(weights=quantized.ATOL, rounded=quantized.ATOL_RMS)
    return "\n".join((introduction, table(families), "", about, table(formats), ""))


def of_format(name: str) -> tuple[str, ...]:
    """Of a quantized golden."""
    path, (written, family) = quantized_golden(name), QUANTIZED[name]
    document = read_config(path)
    config = read_model(path / "config.json", document)
    forms = weight_forms(config, read_scheme("config.json", document), "config.json")
    kept = dict.fromkeys(form.describe() for form in forms.values())
    if name not in quantized.WEIGHTS_ONLY:
        engine = "no"
    else:
        engine = "always" if name in quantized.QUICK else "slow"
    return (
        written, name, f"`{family}`", "; ".join(kept),
        "inputs rounded" if name in quantized.ROUNDED_INPUTS else "weights alone", engine,
        counted((1, *quantized.DEVICE_COUNTS)) if name in quantized.SPLIT else "1",
    )  # fmt: skip


def of_golden(name: str) -> tuple[str, ...]:
    config = open_checkpoint(GOLDENS / name).config
    styles = [style for file, style in STYLES.items() if (GOLDENS / name / file).is_file()]
    engine = "always" if name in QUICK else "slow"
    return f"`{config.model_type}`", name, " and ".join(sorted(styles)), features(config), engine


def of_encoder_decoder(name: str) -> tuple[str, ...]:
    config = open_checkpoint(GOLDENS / name).config
    styles = [style for file, style in STYLES.items() if (GOLDENS / name / file).is_file()]
    has = f"an encoder, {features(config)}"
    engine = "always" if any(name == quick for quick, _ in QUICK_ENCODERS) else "slow"
    return f"`{config.model_type}`", name, " and ".join(sorted(styles)), has, engine


def of_multimodal(name: str) -> tuple[str, ...]:
    checkpoint = open_checkpoint(GOLDENS / name, text_only=True)
    kind = f"`{checkpoint.config.model_type}`, the text of `{name.split('-')[0]}`"
    return (
        kind,
        name,
        "5",
        features(checkpoint.config),
        "always" if name in ENGINE_MULTIMODAL else "no",
    )


def features(config: ModelConfig) -> str:
    """What sets it apart from Llama."""
    ropes = {type(rope).__name__.removesuffix("Rope").lower() for rope in config.ropes if rope}
    grouped = 1 < config.num_kv_heads < config.num_heads
    heads = "one kv head" if config.num_kv_heads == 1 else "all kv heads"
    said = {
        f"{' and '.join(sorted(ropes))} rope": ropes,
        "no rope in some layers": ropes and None in config.ropes,
        "of a part of each head": ropes and config.rotary_dim < config.head_dim,
        "learned positions": config.learned_positions,
        "ALiBi": config.alibi_scale is not None,
        "windows": any(config.windows) and None not in config.windows,
        "windows in some layers": any(config.windows) and None in config.windows,
        "attention in chunks in some layers": any(config.attention_chunk_sizes),
        "temperature tuning": config.temperature_tuning,
        heads: not grouped and config.mla is None,
        "latent attention": config.mla,
        "q, k, v biases": config.qkv_bias,
        "q and k normalized": config.qk_norm,
        "sinks": config.sinks,
        "soft caps": config.attention_softcap or config.logit_softcap,
        "LayerNorm": config.norm == "layer",
        "norms by 1 + w": config.norm == "rms_offset",
        "norms after": config.post_norm,
        "embedding normalized": config.embedding_norm,
        "attention and MLP side by side": config.parallel,
        "no gate": not config.gated_mlp,
        "experts": config.moe and len(config.moe.layers) == config.num_layers,
        "experts in some layers": config.moe and len(config.moe.layers) < config.num_layers,
        "multipliers": config.residual_multiplier != 1 or config.logits_divisor != 1,
        "tied head": config.tie_word_embeddings,
    }
    return ", ".join(name for name, there in said.items() if there)


def counted(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join((lines[0], "|---" * len(rows[0]) + "|", *lines[1:]))


if __name__ == "__main__":
    PAGE.write_text(page())
