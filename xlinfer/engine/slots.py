"""A request's sampling parameters as the device's fixed-size tables hold them."""

import hashlib

import numpy as np

from xlinfer.engine.sequence import Sequence
from xlinfer.plan import Plan
from xlinfer.request import (
    MAX_LOGIT_BIAS,
    POOLINGS,
    InvalidRequest,
    Request,
    SamplingParams,
)
from xlinfer.sampling import BAD_WORD_LENGTH, BAD_WORDS, NO_TOKEN, STOP_IDS, SlotParams, Wanted


def stop_ids(request: Request) -> tuple[int, ...]:
    """Every token that ends the answer."""
    eos = () if request.sampling.ignore_eos else request.eos_token_ids
    return tuple(dict.fromkeys((*eos, *(request.sampling.stop_token_ids or ()))))


def check_request(request: Request, vocab_size: int, plan: Plan) -> None:
    """Raise InvalidRequest for what only the model and its sizes can tell."""
    prompt, sampling = request.prompt_token_ids, request.sampling
    max_model_len, max_logprobs = plan.max_model_len, plan.max_logprobs
    _check_encoder(request, plan)
    if not prompt:
        raise InvalidRequest("prompt", "The prompt must hold at least one token.")
    generates = request.pooling is None and sampling.max_tokens != 0
    room = max_model_len - generates
    if len(prompt) > room:
        raise InvalidRequest(
            "prompt",
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt "
            f"contains {len(prompt)} input tokens. Please reduce the length of the prompt.",
        )
    for name, tokens in (
        ("prompt", prompt),
        ("prompt", request.encoder_token_ids),
        ("logit_bias", sampling.logit_bias or ()),
        ("stop_token_ids", sampling.stop_token_ids or ()),
        ("allowed_token_ids", sampling.allowed_token_ids or ()),
        ("bad_words", [token for word in request.bad_words_token_ids for token in word]),
    ):
        for token in tokens:
            if not isinstance(token, int | np.integer) or not 0 <= token < vocab_size:
                raise InvalidRequest(
                    name,
                    f"{name} holds token id {token!r}, which is outside the vocabulary of "
                    f"{vocab_size} tokens.",
                )
    for name in ("logprobs", "prompt_logprobs"):
        asked = getattr(sampling, name)
        if asked is not None and not 0 <= (vocab_size if asked == -1 else asked) <= max_logprobs:
            raise InvalidRequest(
                name, f"{name} may ask for at most {max_logprobs} tokens here, got {asked}."
            )
    _check_reads(request)
    if not all(0 < len(word) <= BAD_WORD_LENGTH for word in request.bad_words_token_ids):
        message = f"A bad word must have 1 to {BAD_WORD_LENGTH} tokens."
        raise InvalidRequest("bad_words", message)
    if len(request.bad_words_token_ids) > BAD_WORDS:
        raise InvalidRequest("bad_words", f"At most {BAD_WORDS} token sequences may be banned.")
    if len(stop_ids(request)) > STOP_IDS:
        message = f"At most {STOP_IDS} tokens may end an answer, the model's own included."
        raise InvalidRequest("stop_token_ids", message)


def _check_reads(request: Request) -> None:
    if request.pooling not in (None, *POOLINGS):
        known = ", ".join(POOLINGS)
        raise InvalidRequest("pooling", f"pooling must be one of {known}; got {request.pooling!r}.")
    if request.sampling.prompt_logprobs is None and request.score_from:
        message = "score_from is of prompt_logprobs, and none are asked for."
        raise InvalidRequest("score_from", message)
    last = len(request.prompt_token_ids) - 1
    if not 0 <= request.score_from <= last:
        raise InvalidRequest(
            "score_from",
            f"score_from must be a position of the prompt, 0 to {last}, got {request.score_from}.",
        )


def _check_encoder(request: Request, plan: Plan) -> None:
    read = request.encoder_token_ids
    if not plan.encode_buckets:
        if read:
            message = "The model has no encoder: give the prompt's tokens as prompt_token_ids."
            raise InvalidRequest("encoder_token_ids", message)
        return
    if request.pooling is not None:
        message = "Embeddings are of models without an encoder; this one has one."
        raise InvalidRequest("pooling", message)
    if not read:
        message = "The prompt, which the model's encoder reads, must hold at least one token."
        raise InvalidRequest("prompt", message)
    if len(read) > plan.max_model_len:
        raise InvalidRequest(
            "prompt",
            f"This model's encoder reads at most {plan.max_model_len} tokens. However, your prompt "
            f"contains {len(read)} input tokens. Please reduce the length of the prompt.",
        )
    if request.sampling.prompt_logprobs is not None:
        raise InvalidRequest(
            "prompt_logprobs",
            "prompt_logprobs is set, but this model's prompt is what its encoder reads, and an "
            "encoder gives no probabilities.",
        )


def needs(sampling: SamplingParams) -> np.ndarray:
    """Which parts of the sampler the request wants: booleans in the order of `Wanted`."""
    wanted = Wanted(
        random=not sampling.greedy,
        filters=sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0,
        penalties=bool(sampling.presence_penalty or sampling.frequency_penalty)
        or sampling.repetition_penalty != 1,
        constraints=bool(sampling.logit_bias or sampling.bad_words or sampling.min_tokens)
        or sampling.allowed_token_ids is not None,
        logprobs=sampling.logprobs is not None,
    )
    return np.array(wanted, bool)


def slot_params(seq: Sequence, vocab_size: int, seed: int) -> SlotParams:
    """One slot's row of SlotParams. `seed` is used when the request names none."""
    request, sampling = seq.request, seq.request.sampling
    allowed = range(vocab_size) if (ids := sampling.allowed_token_ids) is None else ids
    bias = sampling.logit_bias or {}
    words = np.full((BAD_WORDS, BAD_WORD_LENGTH), NO_TOKEN, np.int32)
    for i, word in enumerate(request.bad_words_token_ids):
        words[i, -len(word) :] = word
    return SlotParams(
        temperature_Z=np.float32(sampling.temperature),
        top_k_Z=np.int32(min(sampling.top_k or vocab_size, vocab_size)),
        top_p_Z=np.float32(sampling.top_p),
        min_p_Z=np.float32(sampling.min_p),
        presence_Z=np.float32(sampling.presence_penalty),
        frequency_Z=np.float32(sampling.frequency_penalty),
        repetition_Z=np.float32(sampling.repetition_penalty),
        seed_Z2=_key(sampling.seed if sampling.seed is not None else seed, request.answer_index),
        min_length_Z=np.int32(seq.num_prompt + sampling.min_tokens),
        max_length_Z=np.int32(seq.max_length),
        stop_ZE=_table(stop_ids(request), STOP_IDS, NO_TOKEN),
        bias_token_ZA=_table(list(bias), MAX_LOGIT_BIAS, 0),
        bias_ZA=_table(list(bias.values()), MAX_LOGIT_BIAS, 0.0),
        bad_words_ZBC=words,
        allowed_Zv=_bits(allowed, vocab_size),
        prompt_Zv=_bits(request.prompt_token_ids, vocab_size),
    )


def recent_tokens(seq: Sequence) -> np.ndarray:
    """The latest of the answer, as bad words see it."""
    tail = seq.tokens[seq.num_prompt :][-BAD_WORD_LENGTH:]
    return np.array([NO_TOKEN] * (BAD_WORD_LENGTH - len(tail)) + tail, np.int32)


def output_counts(seq: Sequence, vocab_size: int) -> np.ndarray:
    answer = seq.tokens[seq.num_prompt :]
    return np.bincount(np.array(answer, np.int64), minlength=vocab_size).astype(np.int32)


def _key(seed: int, answer_index: int) -> np.ndarray:
    """threefry's key for the seed; the answers of one request have keys of their own."""
    if answer_index:
        digest = hashlib.sha256(f"{seed}:{answer_index}".encode()).digest()
        seed = int.from_bytes(digest[:8], "big")
    return np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


def _table(values, size: int, fill: int | float) -> np.ndarray:
    row = np.full(size, fill, np.float32 if isinstance(fill, float) else np.int32)
    row[: len(values)] = values
    return row


def _bits(tokens, vocab_size: int) -> np.ndarray:
    """uint32 words with the tokens' bits set, token t in bit t % 32 of word t // 32."""
    members = np.zeros(-(-vocab_size // 32) * 32, bool)
    members[np.fromiter(tokens, np.int64)] = True
    return np.packbits(members, bitorder="little").view(np.uint32)
