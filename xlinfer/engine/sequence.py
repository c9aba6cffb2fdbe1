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
    # Prompt positions whose hidden states no step has been given to read. What steps in flight read
    # arrives, even if the sequence is preempted meanwhile.
    unread: range = field(init=False)

    def __post_init__(self):
        self.unread = read_positions(self.request)

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
    def generates(self) -> bool:
        """Else all that is asked for is told by hidden states of its prompt."""
        return self.max_length > self.num_prompt

    @property
    def end(self) -> int:
        """Positions that are to be computed, as far as is known by now."""
        return self.length if self.generates else max(self.unread.stop, 1)

    @property
    def prefilling(self) -> bool:
        """More awaits its KV than the latest token of an answer."""
        return self.computed < self.end - self.generates

    @property
    def done(self) -> bool:
        """The step that ends it is scheduled, and it will not need another."""
        return not self.generates and self.computed >= self.end

    @property
    def schedulable(self) -> bool:
        """False while its last tokens are on their way."""
        return self.prefilling or self.remaining > 0


def read_positions(request: Request) -> range:
    """Prompt positions whose hidden states tell what is asked of the prompt: a token's
    log-probability is told by the one before it."""
    count = len(request.prompt_token_ids)
    match request.pooling:
        case "last":
            return range(count - 1, count)
        case "mean":
            return range(count)
        case "cls":
            return range(1)
    if request.sampling.prompt_logprobs is None:
        return range(0)
    return range(max(request.score_from - 1, 0), count - 1)
