"""Every static shape the engine will ever run, decided before compiling anything. No jax."""

from dataclasses import dataclass
from functools import partial


class PlanError(ValueError):
    """The numbers asked for do not go together, or do not fit."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    # Tokens of one sequence, prompt and answer; where an encoder reads the prompt, of each.
    max_model_len: int
    max_num_seqs: int  # rows that run at once
    max_num_batched_tokens: int  # tokens of one step
    page_size: int  # tokens
    num_pages: int  # the padding's included
    token_buckets: tuple[int, ...]  # ascending; the last is max_num_batched_tokens
    decode_buckets: tuple[int, ...]  # rows, ascending; the last is max_num_seqs
    # Tokens of an encoder's input, ascending; the last is max_model_len. Empty: there is none.
    encode_buckets: tuple[int, ...]
    decode_window: int  # most tokens a row gains in one decode call; 0: decode rows go by forward
    max_logprobs: int  # most likely tokens reported beside the chosen one

    def __post_init__(self):
        for name, least in (
            *(("max_model_len", 1), ("max_num_seqs", 1), ("max_num_batched_tokens", 1)),
            *(("page_size", 1), ("decode_window", 0), ("max_logprobs", 0)),
        ):
            if getattr(self, name) < least:
                raise PlanError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.num_pages < self.fewest_pages:
            pages, tables = self.num_pages - 1, 2 if self.encode_buckets else 1
            fitting = pages // tables * self.page_size
            raise PlanError(
                f"num_pages={self.num_pages} cannot hold one sequence of max_model_len="
                f"{self.max_model_len}{' and as long a prompt' if self.encode_buckets else ''}: "
                f"that takes {self.fewest_pages - 1} pages of {self.page_size} tokens and one for "
                f"padding. Raise num_pages (or hbm_utilization) to {self.fewest_pages} pages"
                + (f", or lower max_model_len to {fitting}." if fitting > 0 else ".")
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise PlanError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}: a step gives every running row a token."
            )

    @property
    def pages_per_seq(self) -> int:
        return pages_for(self.max_model_len, self.page_size)

    @property
    def fewest_pages(self) -> int:
        """That hold one sequence, and padding."""
        return self.pages_at(self.max_model_len) + 1

    def pages_at(self, tokens: int) -> int:
        """Of a sequence of so many tokens, and of as long a prompt where an encoder reads it."""
        return pages_for(tokens, self.page_size) * (2 if self.encode_buckets else 1)

    def encode_bucket(self, tokens: int) -> int:
        return next(size for size in self.encode_buckets if size >= tokens)

    def token_bucket(self, tokens: int) -> int:
        """The smallest compiled size that holds so many."""
        return next(size for size in self.token_buckets if size >= tokens)

    def decode_bucket(self, rows: int) -> int:
        return next(size for size in self.decode_buckets if size >= rows)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Where the bytes of one device go."""

    device_bytes: int
    hbm_utilization: float  # of them, for all that follows
    weight_bytes: int
    slot_bytes: int  # what sampling keeps of every running row
    temporary_bytes: int  # of the program that takes most
    page_bytes: int  # keys and values of one page, all layers

    @property
    def fixed_bytes(self) -> int:
        """What is not the cache."""
        return self.weight_bytes + self.slot_bytes + self.temporary_bytes

    @property
    def usable_bytes(self) -> int:
        return int(self.device_bytes * self.hbm_utilization)

    def cache_budget(self) -> int:
        """What is left for pages. Raises PlanError where that is nothing."""
        left = self.usable_bytes - self.fixed_bytes
        if left <= 0:
            gib = lambda n: f"{n / 2**30:.1f} GiB"
            raise PlanError(
                f"Weights {gib(self.weight_bytes)} + sampling {gib(self.slot_bytes)} + temporaries "
                f"{gib(self.temporary_bytes)} = {gib(self.fixed_bytes)} of each device, and "
                f"hbm_utilization={self.hbm_utilization} of {gib(self.device_bytes)} allows "
                f"{gib(self.usable_bytes)}: nothing is left for the KV cache. Use more devices "
                "(tensor_parallel_size) or a quantization."
            )
        return left


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)


def make_plan(
    *,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    page_size: int,
    num_pages: int,
    decode_window: int,
    max_logprobs: int,
    deterministic: bool,
    encodes: bool = False,
    bucket_ratio: int = 2,
    fewest_tokens: int = 32,
    fewest_rows: int = 1,
) -> Plan:
    """Each bucket is `bucket_ratio` times the one before: with 2 at most half of a step is
    padding, with 4 there are half as many programs to compile. The smallest buckets hold
    `fewest_tokens` and `fewest_rows`, or what the steps have at most.

    `encodes`: an encoder reads the prompts. `deterministic` leaves one program of each kind, so
    that every token of every request is computed by the same instructions whatever else runs.
    Raises PlanError.
    """
    tokens, rows = min(fewest_tokens, max_num_batched_tokens), min(fewest_rows, max_num_seqs)
    buckets = partial(_buckets, ratio=bucket_ratio, one=deterministic)
    return Plan(
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        page_size=page_size,
        num_pages=num_pages,
        token_buckets=buckets(tokens, max_num_batched_tokens),
        decode_buckets=() if deterministic else buckets(rows, max_num_seqs),
        encode_buckets=buckets(fewest_tokens, max_model_len) if encodes else (),
        decode_window=0 if deterministic else decode_window,
        max_logprobs=max_logprobs,
    )


def _buckets(first: int, last: int, *, ratio: int, one: bool) -> tuple[int, ...]:
    """From `last` down by `ratio`, and `first`; the step to that may be ratio²/2, so that no
    bucket is compiled for the sake of a few rows."""
    if one or last <= first:
        return (last,)
    sizes = [last]
    while sizes[0] > first * ratio**2 / 2:
        sizes.insert(0, sizes[0] // ratio)
    return (first, *sizes)
