import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data import WORDS

from checkpoints.word_tokenizer import WordTokenizer
from data import BOS_ID, EOS_ID, PAD_ID, VIDEO_ID
from plumbing.options import BadInput


@given(
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.lists(st.sampled_from([*WORDS, " ", "\n"])).map("".join)
)
def test_decoding_an_encoding_gives_the_text_back(text):
    tokenizer = WordTokenizer(WORDS)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(4 <= i < tokenizer.vocab_size for i in ids)  # no text can spell a special token


def test_words_are_one_id_and_the_rest_is_bytes():
    tokenizer = WordTokenizer(WORDS)
    assert tokenizer.vocab_size == 260 + len(WORDS)
    assert tokenizer.encode("the cat, 1.5") == [260, 261, 4 + ord(","), 263]
    assert tokenizer.encode("cats") == [4 + byte for byte in b" cats"]
    ids = [BOS_ID, VIDEO_ID, 260, 261, EOS_ID, PAD_ID]
    assert tokenizer.decode(ids) == "the cat"
    assert tokenizer.decode([4 + 0xC3]) == "\ufffd"  # half a character


def test_saved_tokenizer_is_loaded_as_it_was(tmp_path):
    path = str(tmp_path / "tokenizer.json")
    WordTokenizer(WORDS).save(path)
    assert WordTokenizer.load(path).words == WORDS and os.listdir(tmp_path) == ["tokenizer.json"]
    assert json.load(open(path, encoding="utf-8")) == {"type": "words+bytes", "words": WORDS}
    (tmp_path / "tokenizer.json").write_text('{"type": "bpe"}')
    with pytest.raises(BadInput, match="field 'type'"):
        WordTokenizer.load(path)
