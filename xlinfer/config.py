"""What a model is. Plain frozen data, read from a checkpoint; no field that shapes the result
has a default, so a converter cannot forget one."""

from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True, kw_only=True)
class DefaultRope:
    theta: float


@dataclass(frozen=True, kw_only=True)
class LinearRope:
    """Positions divided by `factor` (position interpolation, arXiv 2306.15595)."""

    theta: float
    factor: float


@dataclass(frozen=True, kw_only=True)
class DynamicRope:
    """NTK-aware base, grown with the context once it passes the trained one."""

    theta: float
    factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Low frequencies slowed by `factor`, high ones kept, a ramp between (Llama 3.1)."""

    theta: float
    factor: float
    low_freq_factor: float
    high_freq_factor: float  # at least low_freq_factor; as much: there is no ramp
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class YarnRope:
    """NTK-by-parts (YaRN, arXiv 2309.00071). `attention_factor` scales cos and sin."""

    theta: float
    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool  # round the ramp's ends to whole dimensions


@dataclass(frozen=True, kw_only=True)
class LongRope:
    """A divisor for each frequency (LongRoPE, arXiv 2402.13753): the `long` ones where the context
    may pass the trained one, for all of its tokens. `attention_factor` scales cos and sin."""

    theta: float
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float


Rope = DefaultRope | LinearRope | DynamicRope | Llama3Rope | YarnRope | LongRope


@dataclass(frozen=True, kw_only=True)
class ClampedSwiGLU:
    """gate * sigmoid(alpha * gate) * (up + 1), of a gate that is at most `limit` and an up that is
    within -limit and limit (gpt-oss)."""

    alpha: float
    limit: float


Activation = Literal["silu", "gelu", "gelu_tanh", "relu"] | ClampedSwiGLU


@dataclass(frozen=True, kw_only=True)
class ExpertGroups:
    """Experts are chosen among those of the best groups alone."""

    count: int  # of equal size, one after the other
    chosen: int
    best: int  # so many of its experts' largest scores add up to a group's


@dataclass(frozen=True, kw_only=True)
class MoE:
    """A mixture of experts in place of a layer's MLP: a router scores them and chooses some for
    each token, and their outputs are added by their weights, which are their scores."""

    layers: tuple[int, ...]  # those that have one, in order; the others have an MLP
    num_experts: int
    num_experts_per_tok: int  # at most num_experts
    intermediate_size: int  # of one expert
    scores: Literal["softmax", "sigmoid"]
    selection_bias: bool  # float32, added to the scores that choose, not to the weights
    groups: ExpertGroups | None  # None: experts are chosen among all
    norm_topk_prob: bool  # the weights of those chosen are divided by their sum
    weight_multiplier: float
    shared_intermediate_size: int | None  # of an expert that every token passes; None: none
    shared_gate: bool  # its output is multiplied by a sigmoid of the token's own
    bias: bool  # of the router and of the experts' matrices
    scaled_inputs: bool  # a weight multiplies what its expert reads, not what the expert returns


@dataclass(frozen=True, kw_only=True)
class MLA:
    """Attention to latents (arXiv 2405.04434): of a token the cache holds one latent, from which
    each head's matrices make its key and value, and one rotated part of the key for all heads."""

    query_rank: int | None  # of the two matrices that make the query; None: it is one
    latent_dim: int
    nope_dim: int  # of a head's query and key, what is not rotated: head_dim - rotary_dim
    value_dim: int
    norm_eps: float  # of the latents' norms


@dataclass(frozen=True, kw_only=True)
class TemperatureTuning:
    """The query at position p is multiplied by 1 + attn_scale * log(1 + floor((p + 1) /
    floor_scale)), so that softmax stays as sharp over a long context (arXiv 2501.19399)."""

    attn_scale: float
    floor_scale: float  # tokens


class LayerKind(NamedTuple):
    """What layers must have in common to be stacked."""

    experts: bool  # in place of an MLP
    rope: Rope | None
    window: int | None
    attention_chunk_size: int | None
    form: int  # of its weights


@dataclass(frozen=True, kw_only=True)
class RelativePositions:
    """A score gains a number of its head's and of the bucket that the distance falls in
    (arXiv 1910.10683): half of the buckets hold one distance each, the others grow."""

    num_buckets: int  # of a decoder; an encoder has half of them for each direction
    max_distance: int  # all from here on fall in the last bucket


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """What reads the prompt, where the sequences are a decoder's that attends to its output in each
    layer. Its layers have the decoder's sizes, and so have its positions.

    Where `pre_norm` is false, the encoder and the decoder normalize the residual itself after each
    addition to it.
    """

    num_layers: int
    decoder_start_token_id: int  # what the decoder's sequences begin with
    relative_positions: RelativePositions | None  # a table for the encoder, one for the decoder
    fits_float16: bool  # the residual stays below 65504


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer; what differs between families is data here."""

    model_type: str  # the family's name in its config.json
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the MLP, where a layer has one
    num_layers: int
    num_heads: int
    num_kv_heads: int  # divides num_heads
    head_dim: int
    hidden_act: Activation
    gated_mlp: bool  # act(gate) * up; else act(up)
    norm: Literal[
        "rms", "rms_offset", "layer"
    ]  # rms_offset: the weight is 1 + w; layer: a bias too
    norm_eps: float
    pre_norm: bool  # attention and MLP read a norm of the residual
    post_norm: bool  # what they add to it is normalized
    parallel: bool  # the MLP reads the layer's input, as attention does
    shared_norm: bool  # with `parallel`: and by the same norm
    ropes: tuple[Rope | None, ...]  # per layer; None: q and k are not rotated
    # Even; of each head, the dimensions that are rotated: its first, or with `mla` its last.
    rotary_dim: int
    rope_interleaved: bool  # pairs are neighbours; else one half and the other
    # A score falls with the distance, by a slope of each head's (arXiv 2108.12409) times this one
    # number; None: by none.
    alibi_scale: float | None
    learned_positions: bool  # max_position_embeddings vectors, added to the embedding
    windows: tuple[int | None, ...]  # per layer: tokens seen, itself included; None sees all
    # Per layer: a sequence is cut into chunks of so many tokens, and a token sees those of its own
    # chunk; None: it is not cut.
    attention_chunk_sizes: tuple[int | None, ...]
    mla: MLA | None  # None: keys and values have matrices of their own
    attention_scale: float  # multiplies q·k
    temperature_tuning: TemperatureTuning | None  # of the layers that have no rope
    attention_softcap: float | None  # of a score s: softcap * tanh(s / softcap)
    sinks: bool  # a logit of each head joins the softmax's denominator
    qkv_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    moe: MoE | None  # of the layers that have one; None: every layer has an MLP
    encoder: Encoder | None  # None: it is a decoder alone
    # RMSNorm of q and k before rope: over each head, or over all heads together; or after rope, in
    # the layers that have one: over each head, without a weight.
    qk_norm: Literal["head", "all", "after_rope"] | None
    embedding_norm: bool  # the embedding is normalized
    embedding_multiplier: float  # rounded to the dtype
    residual_multiplier: float  # of what attention and MLP add
    logits_divisor: float
    logit_softcap: float | None  # after the divisor
    head_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    # Per layer: those of one number have their weights in the same forms (see converters.packed).
    weight_forms: tuple[int, ...]
    kv_scales: bool  # each layer has scales of k and v for a KV cache of 8 bits

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Of each layer."""
        experts = frozenset(self.moe.layers if self.moe else ())
        return tuple(
            LayerKind(layer in experts, *of_layer)
            for layer, of_layer in enumerate(
                zip(
                    self.ropes,
                    self.windows,
                    self.attention_chunk_sizes,
                    self.weight_forms,
                    strict=True,
                )
            )
        )


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What generation_config.json asks for where a request is silent. None: it is silent too."""

    eos_token_ids: tuple[int, ...]  # any of them ends an answer
    bos_token_id: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    # Of an encoder-decoder model: what its decoder begins with, before the answer.
    decoder_start_token_ids: tuple[int, ...] = ()
