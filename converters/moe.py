"""What families of experts read and name alike: the constants of their routers, and the tables."""

from collections.abc import Mapping
from typing import Any

from converters.config import Constants
from converters.errors import CheckpointError
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


def expert_rows(
    block: str, gate: str, up: str, down: str, *, router: str = "gate"
) -> tuple[Row, ...]:
    """The router and the experts of the block of that name, whose matrices are named so."""
    expert = f"{LAYER}{block}.experts.{{expert}}."
    return (
        Row("layers.moe.router_DR", f"{LAYER}{block}.{router}.weight", "R D -> D R"),
        Row(
            "layers.moe.gate_up_EID",
            f"{expert}{{part}}.weight",
            "I D -> E (P I) D",
            parts=(gate, up),
            inputs="D",
        ),
        Row("layers.moe.down_EDI", f"{expert}{down}.weight", "D I -> E D I", inputs="I"),
    )


def shared_rows(name: str) -> tuple[Row, ...]:
    """The expert that every token passes, whose matrices' names begin so in a layer."""
    return tuple(
        Row(f"layers.moe.shared.{to}", f"{LAYER}{name}.{part}_proj.weight", axes, inputs=inputs)
        for to, part, axes, inputs in (
            ("gate_DF", "gate", "S D -> D S", "D"),
            ("up_DF", "up", "S D -> D S", "D"),
            ("down_FD", "down", "D S -> S D", "S"),
        )
    )


QWEN_EXPERTS = expert_rows("mlp", "gate_proj", "up_proj", "down_proj")


def read_moe(
    constants: Constants,
    *,
    size: str,
    norm_topk_prob: bool,
    shared: int | None,
    bias: bool,
    layers: tuple[int, ...] | None = None,
) -> MoE:
    """`size` is the key that holds the experts' ffw size; `layers` None: all have experts."""
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
    if layers is None:
        layers = tuple(range(constants.integer("num_hidden_layers")))
    return MoE(
        layers=layers,
        num_experts=experts,
        num_experts_per_tok=per_token,
        intermediate_size=constants.integer(size),
        scores="softmax",
        selection_bias=False,
        groups=None,
        norm_topk_prob=norm_topk_prob,
        weight_multiplier=1.0,
        shared_intermediate_size=shared,
        shared_gate=shared is not None,
        bias=bias,
        scaled_inputs=False,
    )


def sparse_layers(constants: Constants) -> tuple[int, ...]:
    """Those with experts, of Qwen's families. Raises CheckpointError where the file's are none."""
    step, dense = constants.integer("decoder_sparse_step"), constants.values["mlp_only_layers"]
    if dense is not None and not (
        isinstance(dense, list) and all(type(layer) is int for layer in dense)
    ):
        raise CheckpointError(
            f"{constants.where}: 'mlp_only_layers' is {dense!r}; it must be a list of layers, or "
            "null"
        )
    layers = range(constants.integer("num_hidden_layers"))
    return tuple(i for i in layers if i not in (dense or ()) and (i + 1) % step == 0)
