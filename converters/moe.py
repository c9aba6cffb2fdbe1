"""What families of experts read and name alike: the constants of their routers, and the tables."""

from collections.abc import Mapping
from typing import Any

from converters.config import Constants
from converters.errors import CheckpointError, listing
from converters.llama import LAYER
from converters.rules import Row
from xlinfer.config import MoE

# transformers reads either; files hold the name of their own version.
COUNTS = ("num_experts", "num_local_experts")
KEYS = frozenset({"num_experts_per_tok", *COUNTS})
# What training alone reads: a loss that balances experts, noise on the router's input.
HARMLESS = frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"})
# Of Qwen's families, which may leave out experts in some layers.
QWEN_ABSENT: Mapping[str, Any] = {
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}


def expert_rows(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """The router and the experts of the block of that name, whose matrices are named so."""
    expert = f"{LAYER}{block}.experts.{{expert}}."
    return (
        Row("layers.mlp.router_DR", f"{LAYER}{block}.gate.weight", "R D -> D R"),
        Row(
            "layers.mlp.gate_up_EID",
            f"{expert}{{part}}.weight",
            "I D -> E (P I) D",
            parts=(gate, up),
            inputs="D",
        ),
        Row("layers.mlp.down_EDI", f"{expert}{down}.weight", "D I -> E D I", inputs="I"),
    )


QWEN_EXPERTS = expert_rows("mlp", "gate_proj", "up_proj", "down_proj")


def read_moe(
    constants: Constants, *, size: str, norm_topk_prob: bool, shared: int | None, bias: bool
) -> MoE:
    """`size` is the key that holds the experts' ffw size."""
    given = [name for name in COUNTS if constants.values.get(name) is not None]
    experts = constants.integer(given[0] if given else COUNTS[0])
    for other in given[1:]:
        if constants.integer(other) != experts:
            raise CheckpointError(
                f"{constants.where}: {given[0]} is {experts} and {other} "
                f"{constants.values[other]}; both count the experts, so they must agree"
            )
    per_token = constants.integer("num_experts_per_tok")
    if per_token > experts:
        raise CheckpointError(
            f"{constants.where}: 'num_experts_per_tok' is {per_token}, but there are {experts} "
            "experts"
        )
    return MoE(
        num_experts=experts,
        num_experts_per_tok=per_token,
        intermediate_size=constants.integer(size),
        norm_topk_prob=norm_topk_prob,
        shared_intermediate_size=shared,
        bias=bias,
    )


def refuse_dense_layers(constants: Constants) -> None:
    """Raise CheckpointError where a layer has an MLP in place of experts: all layers are stacked,
    so all must be alike."""
    step, chosen = constants.integer("decoder_sparse_step"), constants.values["mlp_only_layers"]
    layers = constants.integer("num_hidden_layers")
    if chosen is not None and not (
        isinstance(chosen, list) and all(type(layer) is int for layer in chosen)
    ):
        raise CheckpointError(
            f"{constants.where}: 'mlp_only_layers' is {chosen!r}; it must be a list of layers or "
            "null"
        )
    dense = [i for i in range(layers) if i in (chosen or ()) or (i + 1) % step]
    if dense:
        raise CheckpointError(
            f"{constants.where}: mlp_only_layers {chosen} and decoder_sparse_step {step} leave "
            f"layers {listing([str(i) for i in dense])} without experts; xlinfer computes only "
            "models whose layers all have them"
        )
