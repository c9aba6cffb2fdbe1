"""Text to token ids and back, from a checkpoint's tokenizer.json, or a GGUF's metadata. Code in
either is never run."""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import tokenizers

from converters.formats.gguf import find_gguf
from xlinfer.request import InvalidRequest
from xlinfer.serve.chat_template import ChatTemplate
from xlinfer.serve.gguf_tokenizer import read_gguf_tokenizer


class Tokenizer:
    """`tokenizers` with what serving needs beside it: special ids, each token's bytes, the chat
    template (None when the model has none)."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_template: ChatTemplate | None = None,
        special_tokens: Mapping[str, str] = MappingProxyType({}),  # "bos_token" and the like
    ):
        # A tokenizer.json may carry the truncation and padding of the training run.
        backend.no_truncation()
        backend.no_padding()
        self.chat_template, self.special_tokens = chat_template, special_tokens
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._added = {id: token.content for id, token in added.items()}
        self._backend = backend
        self._kinds = _decoder_kinds(backend)
        self.byte_fallback = "ByteFallback" in self._kinds  # a character may be several byte tokens
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def open(cls, folder: str | Path, *, chat_template: str | Path | None = None) -> "Tokenizer":
        """The tokenizer of a checkpoint folder or a GGUF; `chat_template` names a file to use
        instead of its own template. Raises ValueError saying what is missing or unreadable."""
        folder = Path(folder).expanduser()
        path = folder / "tokenizer.json"
        if not path.is_file() and (gguf := find_gguf(folder)) is not None:
            held = read_gguf_tokenizer(gguf)
            source = held.chat_template if chat_template is None else _read_template(chat_template)
            template = None if source is None else ChatTemplate(source, held.special_tokens)
            return cls(held.backend, template, held.special_tokens)
        if not path.is_file():
            raise ValueError(
                f"{folder} has no tokenizer.json. Make one with transformers: "
                f"AutoTokenizer.from_pretrained(folder).save_pretrained(folder); "
                f"or name another folder with --tokenizer."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a readable tokenizer: {error}") from None
        config = _read_json(folder / "tokenizer_config.json")
        source = _template_source(folder, config, chat_template)
        special = {name: text for name, value in config.items() if (text := _token(name, value))}
        template = None if source is None else ChatTemplate(source, special)
        return cls(backend, template, special)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> list[int]:
        """Token ids. Safe to call from any thread, and does not hold the interpreter meanwhile.

        Raises InvalidRequest naming `param` for text that is not valid Unicode.
        """
        check_unicode(text, param)
        # A batch of one: unlike `encode`, it releases the interpreter lock.
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of each, on all cores. The texts are valid Unicode (`check_unicode`)."""
        batch = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """Tokens as the vocabulary spells them ("Ġdef"); "" for an id it lacks."""
        return [self._backend.id_to_token(id) or "" for id in ids]

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes one token stands for: all of a text's tokens together make its bytes."""
        if id not in self._bytes:
            self._bytes[id] = self._find_bytes(id)
        return self._bytes[id]

    def token_text(self, id: int) -> str:
        """`token_bytes` as text; part of a character shows as U+FFFD."""
        return self.token_bytes(id).decode(errors="replace")

    @functools.cached_property
    def max_token_chars(self) -> int:
        """No text of more than `n * max_token_chars` characters fits in n tokens."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    def _find_bytes(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].encode()
        token = self._backend.id_to_token(id)
        if token is None:
            return b""
        if "ByteLevel" in self._kinds:
            table = _byte_of_char()
            return bytes(b for char in token for b in table.get(char, char.encode()))
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        if self._kinds & {"Metaspace", "Replace"}:
            return token.replace("\u2581", " ").encode()
        return self.decode([id], skip_special_tokens=False).encode()


def check_unicode(text: str, param: str) -> None:
    """Raises InvalidRequest naming `param` for a text that has no UTF-8."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            message = f"{param} is not valid Unicode: it holds half of a surrogate pair."
            raise InvalidRequest(param, message) from None


@functools.cache
def _byte_of_char() -> dict[str, bytes]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 is itself, the rest follow 255."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    chars = {chr(byte): bytes([byte]) for byte in shown}
    return chars | {chr(256 + n): bytes([byte]) for n, byte in enumerate(hidden)}


def _decoder_kinds(backend: tokenizers.Tokenizer) -> frozenset[str]:
    if backend.decoder is None:
        return frozenset()
    decoder = json.loads(backend.decoder.__getstate__())
    return frozenset(part["type"] for part in [decoder, *decoder.get("decoders", ())])


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return value


def _token(name: str, value: object) -> str | None:
    """A special token of tokenizer_config.json, as a string or as {"content": string}."""
    if not name.endswith("_token"):
        return None
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _read_template(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat_template={path} cannot be read: {error}") from None


def _template_source(folder: Path, config: Mapping, override: str | Path | None) -> str | None:
    """The template: the file asked for, chat_template.jinja, tokenizer_config.json's (a string
    or a list of named ones, of which "default" is meant), or chat_template.json's."""
    if override is not None:
        return _read_template(override)
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text()
    for source in (config, _read_json(folder / "chat_template.json")):
        match source.get("chat_template"):
            case str(template):
                return template
            case list(named):
                templates = {entry["name"]: entry["template"] for entry in named}
                if "default" in templates:
                    return templates["default"]
                raise ValueError(
                    f"{folder} has chat templates {', '.join(sorted(templates))} but none named "
                    "'default': save the one to use as chat_template.jinja, or name it with "
                    "--chat_template."
                )
    return None
