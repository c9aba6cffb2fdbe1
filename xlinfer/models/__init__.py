"""nnx modules built from parts; what differs between families is data in ModelConfig."""

from xlinfer.kvcache import Attend
from xlinfer.models.causal_lm import CausalLM, causal_attend, check_model
from xlinfer.models.transformer import Transformer

__all__ = ["Attend", "CausalLM", "Transformer", "causal_attend", "check_model"]
