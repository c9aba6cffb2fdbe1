"""The tokenizer in a GGUF file's metadata -> what its tokenizer.json would have been.

Two of llama.cpp's kinds: "gpt2", BPE over bytes with merges, whose text is first split by the
pattern that `tokenizer.ggml.pre` names; and "llama", SentencePiece's BPE, whose merges follow
from the scores, with bytes for characters that it lacks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from converters.formats.gguf import read_gguf

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
SPACE = "\u2581"  # SentencePiece's

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_WITH_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*")
LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_REST}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}|{_REST_WITH_SLASH}"
)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}"
)
# llama.cpp's own, for files that say so: each splits what those before it left.
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class Pre:
    """How text is split before merges, and what comes with that."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a piece that is a token is not merged from its bytes
    add_bos: bool = False  # where the file does not say
    nfc: bool = False


_LLAMA3 = Pre((LLAMA3,), whole_words=True, add_bos=True)
PRE: Mapping[str, Pre] = {
    "default": Pre(DEFAULT),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), Pre((GPT2,))),
    **dict.fromkeys(("starcoder", "refact", "smollm", "codeshell"), Pre((r"\p{N}", GPT2))),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Pre((LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Pre((QWEN2,), nfc=True)),
    "stablelm2": Pre((QWEN2,)),
    "tekken": Pre((TEKKEN,), whole_words=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Pre((GPT4O,))),
}


@dataclass(frozen=True, kw_only=True)
class GGUFTokenizer:
    backend: Tokenizer
    chat_template: str | None
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # "bos_token" and the like


def read_gguf_tokenizer(path: Path) -> GGUFTokenizer:
    """Raises ValueError naming what of the tokenizer is missing, malformed or not known."""
    metadata = read_gguf(path).metadata
    keys = _Keys(path, metadata)
    kind = keys.get("model", str)
    if kind not in KINDS:
        raise ValueError(
            f"{path}: tokenizer.ggml.model is {kind!r}; xlinfer reads {' and '.join(KINDS)}. Name "
            "a folder that holds the model's tokenizer.json with --tokenizer."
        )
    vocabulary = _Vocabulary(keys)
    backend, add_bos = KINDS[kind](keys, vocabulary)
    vocabulary.add_to(backend)
    _frame(keys, vocabulary, backend, add_bos)
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {f"{short}_token": keys.id(name) for name, short in names.items()}
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{path}: tokenizer.chat_template must be text")
    return GGUFTokenizer(
        backend=backend,
        chat_template=template,
        special_tokens={n: vocabulary.tokens[id] for n, id in ids.items() if id is not None},
    )


class _Keys:
    """Those that begin with tokenizer.ggml, by type."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]):
        self.path, self._metadata = path, metadata

    def get[T](self, name: str, kind: type[T], absent: T | None = None) -> T:
        value = self._metadata.get(f"tokenizer.ggml.{name}", absent)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            what = "is missing" if value is None else f"is {str(value)[:50]!r}"
            raise ValueError(
                f"{self.path}: tokenizer.ggml.{name} {what}; it must be {kind.__name__}. A folder "
                "that holds the model's tokenizer.json can be named with --tokenizer."
            )
        return value

    def items[T](self, name: str, kind: type[T], count: int | None = None) -> list[T]:
        values = self.get(name, list)
        if count is not None and len(values) != count:
            raise ValueError(
                f"{self.path}: tokenizer.ggml.{name} has {len(values)} entries for {count} tokens"
            )
        if not all(isinstance(value, kind) for value in values):
            raise ValueError(f"{self.path}: tokenizer.ggml.{name} must hold {kind.__name__}")
        return values

    def id(self, name: str) -> int | None:
        if f"tokenizer.ggml.{name}_token_id" not in self._metadata:
            return None
        id, count = self.get(f"{name}_token_id", int), len(self.get("tokens", list))
        if not 0 <= id < count:
            raise ValueError(f"{self.path}: {name}_token_id is {id}; there are {count} tokens")
        return id


class _Vocabulary:
    def __init__(self, keys: _Keys):
        self.tokens = keys.items("tokens", str)
        self.kinds = keys.items("token_type", int, len(self.tokens))
        # The converter fills up a vocabulary that is smaller than the embedding.
        held = [id for id, token in enumerate(self.tokens)
                if not (self.kinds[id] == UNUSED and token == f"[PAD{id}]")]  # fmt: skip
        self.ids = {self.tokens[id]: id for id in held}
        if len(self.ids) < len(held):
            twice = next(self.tokens[id] for id in held if self.ids[self.tokens[id]] != id)
            raise ValueError(f"{keys.path}: tokenizer.ggml.tokens has {twice!r} twice")

    def add_to(self, backend: Tokenizer) -> None:
        """The tokens that are found in text before anything else is done to it."""
        for kinds, special in (((CONTROL, UNKNOWN), True), ((USER_DEFINED,), False)):
            found = [token for id, token in enumerate(self.tokens) if self.kinds[id] in kinds]
            added = [AddedToken(t, special=special, normalized=False) for t in found if t]
            (backend.add_special_tokens if special else backend.add_tokens)(added)


def _bpe(keys: _Keys, vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    name = keys.get("pre", str)
    if name not in PRE:
        raise ValueError(
            f"{keys.path}: tokenizer.ggml.pre is {name!r}; xlinfer knows how {', '.join(PRE)} "
            "split text. Name a folder that holds the model's tokenizer.json with --tokenizer."
        )
    pre, merges = PRE[name], []
    for merge in keys.items("merges", str):
        at = merge.find(" ", 1)
        left, right = merge[:at], merge[at + 1 :]
        if at < 0 or not {left, right, left + right} <= vocabulary.ids.keys():
            raise ValueError(f"{keys.path}: tokenizer.ggml.merges has {merge!r}, no two tokens")
        merges.append((left, right))
    backend = Tokenizer(BPE(vocabulary.ids, merges, ignore_merges=pre.whole_words))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece(keys: _Keys, vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    tokens, kinds = vocabulary.tokens, vocabulary.kinds
    scores = keys.items("scores", float, len(tokens))
    normal = {token for id, token in enumerate(tokens) if kinds[id] == NORMAL}
    # SentencePiece joins the two neighbours that make the piece of the highest score. Of ways to
    # make the same piece, tokenizer.json has those of the longer left part first.
    ranked = sorted(
        (-scores[id], -at, at - len(token), id)
        for id, token in enumerate(tokens)
        if kinds[id] == NORMAL
        for at in range(1, len(token))
        if token[:at] in normal and token[at:] in normal
    )
    merges = [(tokens[id][:-minus], tokens[id][-minus:]) for _, minus, _, id in ranked]
    unknown = next((token for id, token in enumerate(tokens) if kinds[id] == UNKNOWN), None)
    model = BPE(vocabulary.ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend, prefix = Tokenizer(model), keys.get("add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return backend, True


KINDS: Mapping[str, Callable[[_Keys, _Vocabulary], tuple[Tokenizer, bool]]] = {
    "gpt2": _bpe,
    "llama": _sentencepiece,
}


def _frame(keys: _Keys, vocabulary: _Vocabulary, backend: Tokenizer, add_bos: bool) -> None:
    """The token before and the one after a text that is asked for with special tokens."""
    given = []
    for name, absent in (("bos", add_bos), ("eos", False)):
        if keys.get(f"add_{name}_token", bool, absent):
            if (id := keys.id(name)) is None:
                raise ValueError(f"{keys.path}: it adds a {name} token, and names none")
            given.append({"id": name, "ids": [id], "tokens": [vocabulary.tokens[id]]})
    names = [token["id"] for token in given]
    single = [*(n for n in names if n == "bos"), "$A", *(n for n in names if n == "eos")]
    backend.post_processor = TemplateProcessing(single=single, special_tokens=given)
