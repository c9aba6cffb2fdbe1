"""One request in flight: its tokens, how far its cache has got, and where it lies."""

from dataclasses import dataclass, field

from xlinfer.request import Request


@dataclass(eq=False, kw_only=True)
class Sequence:
    """Intervals of positions, each beginning at 0:

    [0, len(tokens))   prompt and answer known to the host
    [0, length)        also those sampled by steps in flight, whose values are on the device
    [0, computed)      KV is in the cache, or will be once the steps in flight are done
    """

    request: Request
    order: tuple  # smaller runs first and is preempted last
    max_length: int  # tokens at which the answer ends
    tokens: list[int]
    stop_ids: frozenset[int] = frozenset()  # tokens that end the answer
    pending: int = 0  # sampled, value not known to the host yet
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    encoder_pages: list[int] = field(default_factory=list)  # of what the encoder made of its prompt
    keys: list[bytes] = field(default_factory=list)  # of the full pages of `tokens`
    remembered: int = 0  # leading pages offered to the prefix cache
    slot: int | None = None  # its place in the device's per-request state, while it runs
    num_cached: int | None = None  # prompt tokens found in the prefix cache at first admission
    finished: bool = False
    seed: int | None = None  # drawn when it is first admitted, for requests that name none

    @property
    def length(self) -> int:
        return len(self.tokens) + self.pending

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_encoded(self) -> int:
        """Tokens that an encoder reads; 0 where there is none."""
        return len(self.request.encoder_token_ids)

    @property
    def held_slot(self) -> int:
        """The slot of one that runs."""
        assert self.slot is not None, f"request {self.request.request_id} does not run"
        return self.slot

    @property
    def remaining(self) -> int:
        """Tokens it may still gain."""
        return self.max_length - self.length

    @property
    def prefilling(self) -> bool:
        """More than the latest token awaits its KV, or that one's is all that is asked for."""
        scored_only = self.max_length == self.num_prompt
        return self.computed < self.length - (not scored_only)

    @property
    def schedulable(self) -> bool:
        """False while its last tokens are on their way."""
        return self.prefilling or self.remaining > 0
