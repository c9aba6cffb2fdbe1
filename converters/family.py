"""What a family of models says of itself: how to read its config.json and place its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from converters.config import Constants
from converters.rules import Row
from xlinfer.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    model_type: str  # as config.json has it
    read: Callable[[Constants], ModelConfig]
    rows: Callable[[ModelConfig], tuple[Row, ...]]
    # The same of a checkpoint in one of quantization.APART, where float ones hold all experts of a
    # layer in one tensor; None: they do not.
    rows_apart: Callable[[ModelConfig], tuple[Row, ...]] | None = None
    # What some files leave out before every name, as those do that were saved without a head.
    prefix: str = ""
    ignored: tuple[str, ...]  # patterns of tensors that carry no weight of the model
    # The layers after the last predict more tokens at once (MTP); their tensors are ignored.
    has_mtp_layers: bool = False
    # Tensors that a checkpoint may hold a second time where they have no place of their own, as a
    # tied head has none; and what each must equal.
    copies: Mapping[str, str] = field(default_factory=dict)
    zeros: tuple[str, ...] = ()  # tensors that are zeros where a checkpoint leaves them out
