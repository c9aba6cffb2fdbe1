"""nnx modules built from parts; what differs between families is data in ModelConfig."""

from xlinfer.kvcache import Attend
from xlinfer.models.causal_lm import CausalLM, EncoderDecoderLM, causal_attend, check_model
from xlinfer.models.encoder_decoder import EncoderDecoder
from xlinfer.models.transformer import Transformer

Model = Transformer | EncoderDecoder  # what a checkpoint becomes

__all__ = [
    "Attend", "CausalLM", "EncoderDecoder", "EncoderDecoderLM", "Model", "Transformer",
    "causal_attend", "check_model",
]  # fmt: skip
