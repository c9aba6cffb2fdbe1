import json
import shutil

import pytest

from tests.serve.fake_engine import DATA
from tests.serve.test_detokenizer import SENTENCEPIECE
from xlinfer.request import InvalidRequest
from xlinfer.serve.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(DATA, tmp_path / "model")
    return tmp_path / "model"


def test_bytes_of_tokens_are_the_bytes_of_the_text(tokenizer):
    text = "def f():\n\treturn 'naïve 🎉 中'<|im_end|>"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    assert len(ids) < len(text) and 2 in tokenizer.special_ids


def test_sentencepiece_tokens_keep_their_space():
    assert [SENTENCEPIECE.token_bytes(id) for id in (4, 9 + 0xC3, 1)] == [b" the", b"\xc3", b"<s>"]
    assert SENTENCEPIECE.token_text(9 + 0xC3) == "\ufffd"


def test_ids_beyond_the_vocabulary_have_no_text(tokenizer):
    assert tokenizer.token_bytes(4095 + 100) == b"" and tokenizer.token_strings([9999]) == [""]


def test_invalid_unicode_is_refused(tokenizer):
    with pytest.raises(InvalidRequest, match="surrogate") as caught:
        tokenizer.encode("a\udc00", param="messages")
    assert caught.value.param == "messages"


def test_stored_truncation_is_ignored(folder):
    data = json.loads((folder / "tokenizer.json").read_text())
    data["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert len(Tokenizer.open(folder).encode("one two three four five")) > 2


def test_missing_and_broken_files_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json.*save_pretrained"):
        Tokenizer.open(tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.open(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable tokenizer"):
        Tokenizer.open(folder)


def rendered(folder, **options) -> str | None:
    template = Tokenizer.open(folder, **options).chat_template
    return template and template.render([{"role": "user", "content": "x"}])


def test_where_a_template_is_found(folder, tmp_path):
    config = json.loads((folder / "tokenizer_config.json").read_text())

    def put(name, value):
        (folder / name).write_text(json.dumps(value))

    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "named"}]
    put("chat_template.json", {"chat_template": "json"})
    put("tokenizer_config.json", {**config, "chat_template": named})
    (folder / "chat_template.jinja").write_text("jinja {{ eos_token }}")
    (tmp_path / "mine").write_text("mine")
    assert rendered(folder, chat_template=tmp_path / "mine") == "mine"
    assert rendered(folder) == "jinja <|endoftext|>"
    (folder / "chat_template.jinja").unlink()
    assert rendered(folder) == "named"
    put("tokenizer_config.json", {**config, "chat_template": "text"})
    assert rendered(folder) == "text"
    put("tokenizer_config.json", {**config, "chat_template": named[:1]})
    with pytest.raises(ValueError, match="templates rag but none named 'default'"):
        Tokenizer.open(folder)
    put("tokenizer_config.json", {**config, "eos_token": {"content": "</s>"}})
    put("chat_template.json", {"chat_template": "json {{ eos_token }}"})
    assert rendered(folder) == "json </s>"
    (folder / "chat_template.json").unlink()
    assert rendered(folder) is None
    with pytest.raises(ValueError, match=r"--chat_template=.*none cannot be read"):
        Tokenizer.open(folder, chat_template=tmp_path / "none")
    (tmp_path / "mine").write_text("{% for %}")
    with pytest.raises(ValueError, match="does not parse"):
        Tokenizer.open(folder, chat_template=tmp_path / "mine")
