"""Tokenizers in the metadata of GGUF files: as their tokenizer.json, as sentencepiece, as
llama.cpp."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import GOLDENS
from tests.gguf_convert import to_gguf, tokenizer_keys
from tests.gguf_files import write_gguf
from tests.serve.fake_engine import DATA
from xlinfer.serve.gguf_tokenizer import PRE, read_gguf_tokenizer
from xlinfer.serve.tokenizer import Tokenizer

SENTENCEPIECE = json.loads((DATA.parent / "sentencepiece.json").read_text())
# What text is made of: words, numbers, spaces, other scripts, and the special tokens.
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.text("abAB19 \n\t'", max_size=12),
        st.sampled_from(["def f(self):\n    ", "naïve ", "東京", "🎉", "<|im_end|>", "I'LL 2026"]),
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return Tokenizer.open(to_gguf(GOLDENS / "llama", path, tokenizer_keys(DATA)))


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_bytes_and_merges_as_tokenizer_json(text, demo, tokenizer):
    for special in (True, False):
        ids = tokenizer.encode(text, add_special_tokens=special)
        assert demo.encode(text, add_special_tokens=special) == ids
        assert demo.decode(ids, skip_special_tokens=special) == tokenizer.decode(
            ids, skip_special_tokens=special
        )
    assert [demo.token_bytes(id) for id in ids] == [tokenizer.token_bytes(id) for id in ids]


def test_everything_beside_the_text_as_tokenizer_json(demo, tokenizer):
    assert demo.special_ids == tokenizer.special_ids and demo.vocab_size == tokenizer.vocab_size
    conversation = [{"role": "user", "content": "hi"}]
    assert demo.chat_template.render(conversation) == tokenizer.chat_template.render(conversation)


def spm(folder: Path, name: str, **changes) -> Path:
    made = SENTENCEPIECE[name]
    keys = {
        "model": "llama",
        "tokens": made["tokens"],
        "scores": made["scores"],
        "token_type": made["token_types"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_space_prefix": name == "llama",
        **changes,
    }
    metadata = {f"tokenizer.ggml.{k}": v for k, v in keys.items() if v is not ...}
    return write_gguf(folder / "m.gguf", metadata, {})


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_as_sentencepiece(name, tmp_path):
    tokenizer = Tokenizer.open(spm(tmp_path, name))
    for text, ids, back in SENTENCEPIECE[name]["cases"]:
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(ids) == back
    assert tokenizer.byte_fallback and tokenizer.special_ids == {0, 1, 2}


@pytest.mark.parametrize("name", ["q4_0", "q4_k_m", "q8_0"])
def test_as_llama_cpp(name):
    tokenizer = Tokenizer.open(GOLDENS / f"gguf-{name}")
    for text, ids in {
        "the and that": [86, 100, 114, 156],
        "Hello, in the other!": [42, 71, 120, 81, 14, 131, 101, 116, 86, 100, 84, 3],
        "a\nb  c": [67, 98, 68, 97, 121],
        "x=1;y=2": [90, 31, 19, 29, 91, 31, 20],
    }.items():
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.encode(text) == [1, *ids] and tokenizer.decode(ids) == text


# Hand-made from each pattern's definition.
PIECES = {
    "gpt-2": "I|'ll| go|2| x|1234| | y|!?|\n\n| z",
    "starcoder": "x|1|2|3|4| | y",
    "llama-bpe": "I|'LL| go|2| x|123|4| | y|!?\n\n| z",
    "smaug-bpe": "(foo|)| |12",
    "qwen2": "I|'LL| x|1|2|3|4|\n\n",
    "stablelm2": "a|1|2",
    "tekken": "hello|WORLDfoo| it|'s| |1|2| a|//\n",
    "gpt-4o": "hello|WORLD| It's| |123|4| a|//\n",
    "default": "x|=|123|4|;| don|'|t",
}


@pytest.mark.parametrize("pre", PIECES)
def test_text_is_split_as_the_file_says(pre, tmp_path):
    path = to_gguf(GOLDENS / "llama", tmp_path / "m.gguf", tokenizer_keys(DATA, pre))
    splitter = read_gguf_tokenizer(path).backend.pre_tokenizer
    assert splitter is not None
    want = PIECES[pre].split("|")
    text = "".join(want)
    ends = [end for _, (_, end) in splitter.pre_tokenize_str(text)]
    assert [text[a:b] for a, b in zip([0, *ends], ends, strict=False)] == want


def bpe(folder: Path, **changes) -> Path:
    keys = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["a", "b", "ab", "abb", "<s>", "</s>", "Ġ"],
        "token_type": [1, 1, 1, 1, 3, 3, 1],
        "merges": ["a b"],
        "bos_token_id": 4,
        "eos_token_id": 5,
        **changes,
    }
    metadata = {f"tokenizer.ggml.{k}": v for k, v in keys.items() if v is not ...}
    return write_gguf(folder / "m.gguf", metadata, {})


@pytest.mark.parametrize(
    "keys, ids",
    [
        ({}, [2, 1]),
        ({"add_bos_token": True}, [4, 2, 1]),
        ({"add_bos_token": True, "add_eos_token": True}, [4, 2, 1, 5]),
        ({"add_eos_token": True}, [2, 1, 5]),
        ({"pre": "llama-bpe"}, [4, 3]),  # a word that is a token, and the token before
        ({"pre": "llama-bpe", "add_bos_token": False}, [3]),
        ({"pre": "tekken"}, [4, 3]),
    ],
)
def test_special_tokens_and_whole_words(keys, ids, tmp_path):
    assert Tokenizer.open(bpe(tmp_path, **keys)).encode("abb") == ids


def test_qwen_normalizes_unicode(tmp_path):
    tokens = ["e", "Ã©", "Ã", "©", "Ì", "ģ"]
    keys = {"tokens": tokens, "token_type": [1] * 6, "merges": ["Ã ©"]}
    keys |= {"bos_token_id": ..., "eos_token_id": ...}
    decomposed = "e\u0301"
    assert Tokenizer.open(bpe(tmp_path, **keys, pre="qwen2")).encode(decomposed) == [1]
    assert Tokenizer.open(bpe(tmp_path, **keys)).encode(decomposed) == [0, 4, 5]


def test_padding_of_the_vocabulary_is_no_token(tmp_path):
    keys = {"tokens": ["a", "[PAD1]", "[PAD1]", "<s>"], "token_type": [1, 5, 5, 3], "merges": []}
    keys |= {"bos_token_id": 3, "eos_token_id": ...}
    with pytest.raises(ValueError, match=r"has '\[PAD1\]' twice"):
        Tokenizer.open(bpe(tmp_path, **{**keys, "token_type": [1, 1, 5, 3]}))
    keys["tokens"] = ["a", "[PAD1]", "[PAD2]", "<s>"]
    tokenizer = Tokenizer.open(bpe(tmp_path, **keys))
    assert tokenizer.token_strings([0, 1, 2, 3]) == ["a", "", "", "<s>"]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; xlinfer reads gpt2 and llama"),
        ({"model": ...}, "tokenizer.ggml.model is missing"),
        ({"pre": ...}, "tokenizer.ggml.pre is missing"),
        ({"pre": "poro-chat"}, "tokenizer.ggml.pre is 'poro-chat'; xlinfer knows how default, "),
        ({"tokens": ...}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": [1, 2]}, "tokens must hold str"),
        ({"tokens": ["a", "a", "c", "d", "e", "f", "g"]}, "tokens has 'a' twice"),
        ({"token_type": [1]}, "token_type has 1 entries for 7 tokens"),
        ({"merges": ["ab"]}, "merges has 'ab', no two tokens"),
        ({"merges": ["b a"]}, "merges has 'b a', no two tokens"),
        ({"bos_token_id": 9}, "bos_token_id is 9; there are 7 tokens"),
        ({"bos_token_id": True}, "bos_token_id is 'True'; it must be int"),
        ({"add_bos_token": True, "bos_token_id": ...}, "adds a bos token, and names none"),
        ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
    ],
)
def test_what_is_refused(keys, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.open(bpe(tmp_path, **keys))
    assert "m.gguf" in str(caught.value)


def test_a_tokenizer_json_or_a_template_beside_it_goes_first(demo, tokenizer, tmp_path):
    path = to_gguf(GOLDENS / "llama", tmp_path / "m.gguf", tokenizer_keys(DATA))
    (tmp_path / "own.jinja").write_text("own")
    own = Tokenizer.open(path, chat_template=tmp_path / "own.jinja").chat_template
    assert own is not None and own.render([{"role": "user", "content": "hi"}]) == "own"
    (tmp_path / "tokenizer.json").write_text((DATA / "tokenizer.json").read_text())
    assert Tokenizer.open(tmp_path).chat_template is None  # of the folder, which has none
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.open(path, chat_template=tmp_path / "none")


def test_patterns_are_named_once():
    assert {"default", "gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o"} <= PRE.keys()
