"""nnx modules built from parts; what differs between families is data in ModelConfig."""

from typing import Any

from xlinfer.kvcache import Attend, LatentAttend, Latents
from xlinfer.models.causal_lm import (
    CausalLM,
    EncoderDecoderLM,
    causal_attend,
    causal_latent_attend,
    check_model,
)
from xlinfer.models.encoder_decoder import EncoderDecoder
from xlinfer.models.transformer import Transformer

# What a checkpoint becomes: a Transformer, or an EncoderDecoder where its config has an encoder.
Model = Any

__all__ = [
    "Attend", "CausalLM", "EncoderDecoder", "EncoderDecoderLM", "LatentAttend", "Latents", "Model",
    "Transformer", "causal_attend", "causal_latent_attend", "check_model",
]  # fmt: skip
