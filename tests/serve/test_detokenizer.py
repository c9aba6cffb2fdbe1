import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from tests.serve.fake_engine import DATA
from xlinfer.serve.detokenizer import Detokenizer, StopStrings
from xlinfer.serve.tokenizer import Tokenizer

TOKENIZER = Tokenizer.open(DATA)
IDS = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=60)
# Texts that need several tokens a character, or several characters a token.
TEXTS = st.text(st.sampled_from("aé€🎉 \n\tdef中\ufffd") | st.characters(exclude_categories=["Cs"]))


def sentencepiece() -> Tokenizer:
    """A Llama-2-like tokenizer: spaces as ▁, unknown characters as bytes, first space dropped."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁the", "▁cat", "s", "a", "▁▁"]
    vocab = {
        word: n for n, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])
    }
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend)


SENTENCEPIECE = sentencepiece()


def stream(tokenizer, ids, sizes=(1,), prompt=(), **options) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, **options)
    deltas, start = [], 0
    while start < len(ids):
        size = sizes[len(deltas) % len(sizes)]
        deltas.append(detokenizer.add(ids[start : start + size]))
        start += size
    return [*deltas, detokenizer.flush()]


@given(IDS, st.lists(st.integers(1, 9), min_size=1), st.booleans())
@settings(deadline=None)
def test_deltas_are_the_decoded_whole(ids, sizes, skip):
    deltas = stream(TOKENIZER, ids, sizes, skip_special_tokens=skip)
    assert "".join(deltas) == TOKENIZER.decode(ids, skip_special_tokens=skip)


@given(TEXTS)
@settings(deadline=None)
def test_text_comes_back_and_no_part_of_a_character_is_shown(text):
    ids = TOKENIZER.encode(text)
    deltas = stream(TOKENIZER, ids)
    assert "".join(deltas) == text
    seen = ""
    for delta in deltas:
        seen += delta
        assert text.startswith(seen)


@given(TEXTS, TEXTS)
@settings(deadline=None)
def test_the_prompt_is_not_repeated(prompt, text):
    ids = TOKENIZER.encode(text)
    assert "".join(stream(TOKENIZER, ids, prompt=TOKENIZER.encode(prompt))) == text


def sentencepiece_ids(text: str) -> list[int]:
    """Whole characters as bytes, words as words."""
    pieces = {"▁": 3, "t": 4, "c": 5, "s": 6, "a": 7, "=": 8}
    ids = []
    for char in text:
        ids += [pieces[char]] if char in pieces else [9 + byte for byte in char.encode()]
    return ids


@given(st.text(st.sampled_from("▁tcsa=é€🎉")), st.lists(st.integers(1, 4), min_size=1))
@settings(deadline=None)
def test_sentencepiece_keeps_its_spaces_and_characters(text, sizes):
    ids = sentencepiece_ids(text)
    assert "".join(stream(SENTENCEPIECE, ids, sizes)) == SENTENCEPIECE.decode(ids)
    # After a prompt the first space is part of the answer.
    prompt = [1, 5, 6]
    whole = SENTENCEPIECE.decode([*prompt, *ids], skip_special_tokens=True)
    assert "".join(stream(SENTENCEPIECE, ids, sizes, prompt)) == whole.removeprefix("cats")


def test_a_skipped_token_does_not_eat_the_next_space():
    deltas = stream(SENTENCEPIECE, [4, 1, 5, 2, 4])
    assert "".join(deltas) == "the cat the"


def test_endless_broken_bytes_stay_cheap():
    broken = TOKENIZER.encode("\ufffd")[:1] * 5000  # the first byte of a character, again and again
    calls = []

    class Counting(Tokenizer):
        def decode(self, ids, **options):
            calls.append(len(ids))
            return super().decode(ids, **options)

    counting = Counting.open(DATA)
    text = "".join(stream(counting, broken))
    assert text == TOKENIZER.decode(broken) and max(calls) <= 66


@pytest.mark.parametrize("char", "é€🎉")
def test_a_character_is_held_until_it_is_whole(char):
    ids = [9 + byte for byte in char.encode()]
    deltas = stream(SENTENCEPIECE, ids)
    assert deltas == [""] * (len(ids) - 1) + [char, ""]


STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


@given(STOPS, st.lists(st.text("abc", max_size=4), max_size=12), st.booleans())
def test_stop_strings_equal_a_search_of_the_whole(stops, pieces, include):
    text = "".join(pieces)
    ends = [(text.find(stop) + len(stop), n) for n, stop in enumerate(stops) if stop in text]
    finder, shown, found = StopStrings(stops, include), "", None
    for n, piece in enumerate(pieces):
        certain, found = finder.add(piece)
        shown += certain
        if found is not None:
            break
        # What is shown is never taken back, and no more is held than could begin a stop string.
        held = "".join(pieces[: n + 1])[len(shown) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
    if found is None:
        assert not ends and shown + finder.flush() == text
    else:
        end, first = min(ends)
        assert found == stops[first]
        assert shown == text[: end if include else end - len(found)]


def test_many_long_stop_strings_are_linear():
    finder = StopStrings([f"{'a' * 1000}{n}" for n in range(10)])
    for _ in range(20):
        assert finder.add("a" * 100)[1] is None
    assert finder.add("7")[1] == "a" * 1000 + "7"
