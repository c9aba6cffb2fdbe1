"""What the served APIs define beyond the fields that are honoured, as tables.

A field that OpenAI or vLLM defines is honoured or refused by name, never ignored. A field that
none of them defines is a client's own: it is named in the response header `x-ignored-fields`.
"""

from collections.abc import Mapping

from xlinfer.serve.errors import ServingError
from xlinfer.serve.protocol import Body

# These leave every answer as it is, whatever their value: they bill, store, label or speed up.
_INERT = frozenset({"user", "metadata", "safety_identifier", "parallel_tool_calls"}) | {
    "prompt_cache_key",
    "prompt_cache_retention",
    "include_reasoning",
}

# Defined, and not done: accepted at null and at the values that ask for nothing.
_UNDONE: Mapping[str, tuple[object, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "response_format": ({"type": "text"},),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "best_of": (1,),  # and n
    "suffix": ("",),
    "modalities": (["text"],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "echo": (False,),  # of chat; completions honour it
    "stream_interval": (1,),
    "vllm_xargs": ({},),
    "logits_processors": ([],),
    "chat_template": (),
    "documents": (),
    "tools": (),
    "functions": (),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "moderation": (),
    "structured_outputs": (),
    "structural_tag": (),
    "logprob_token_ids": (),
    "prompt_embeds": (),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
    "mm_processor_kwargs": (),
    "media_io_kwargs": (),
    "thinking_token_budget": (),
    "repetition_detection": (),
    "data_parallel_rank": (),
}
# Why, where the name alone does not say it.
_REASONS: Mapping[str, str] = {
    "chat_template": "Templates from requests are never run; start the server with "
    "--chat_template.",
    "tools": "Tool calling is not supported yet.",
    "tool_choice": "Tool calling is not supported yet.",
    "functions": "Tool calling is not supported yet.",
    "response_format": 'Only {"type": "text"} is supported yet.',
    "best_of": "best_of must be 1 or equal to n.",
}


def check_fields(body: Body, *, strict: bool) -> list[str]:
    """The names of fields no API defines. Raises ServingError 400 naming a field that is defined
    and not done, or, when `strict`, one that is not defined."""
    unknown = []
    for name, value in (body.model_extra or {}).items():
        neutral = _neutral(name)
        if name in _INERT:
            continue
        if neutral is None:
            unknown.append(name)
        elif value is not None and not any(_same(value, other) for other in neutral):
            if name == "best_of" and value == getattr(body, "n", None):
                continue
            reason = _REASONS.get(name, "The field is not supported yet.")
            raise ServingError(400, f"{name}: {reason}", param=name)
    if strict and unknown:
        raise ServingError(
            400, f"{unknown[0]}: no served API defines this field.", param=unknown[0]
        )
    return unknown


def _neutral(name: str) -> tuple[object, ...] | None:
    """Values of a defined field that ask for nothing; None for a field no API defines."""
    return () if name.startswith("guided_") else _UNDONE.get(name)


def _same(value: object, neutral: object) -> bool:
    """Equal, and not by 1 == True."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def header_value(names: list[str]) -> str:
    """Names for a header: ASCII without control characters, at most 1,000 of them."""
    safe = ("".join(c if " " < c <= "~" and c != "," else "?" for c in name) for name in names)
    return ", ".join(safe)[:1000]
