"""WordPiece against the pieces that the library `tokenizers` (BertWordPieceTokenizer, lower case) finds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.errors import InvalidArgument
from fastdiff.text import WordPiece

# fmt: off
VOCABULARY = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "white", "dog", "##s", "sit", "##ting", "##t", "on", "grass", "!", "'",
    "-", "cafe", "7", "##7", "cat", "\u732b", "\u03c3", "##\u03c3", "un", "##afford", "##able", ".",
]
# fmt: on
PIECES = [
    ("A white dog sitting on grass", "a white dog sit ##ting on grass"),
    ("WHITE\tdogs!", "white dog ##s !"),
    ("Caf\u00e9 cafe\u0301", "cafe cafe"),
    ("unaffordable 77", "un ##afford ##able 7 ##7"),
    ("dog-cat's", "dog - cat ' [UNK]"),
    ("", ""),
    ("   ", ""),
    ("dog\u3000cat", "dog cat"),
    ("\u732b\u732bdog", "\u732b \u732b dog"),
    ("xyz dog", "[UNK] dog"),
    ("dog\u200bcat", "[UNK]"),
    ("\u03a3\u03c3", "\u03c3 ##\u03c3"),
    ("a" * 101, "[UNK]"),
    ("dog\x00cat", "[UNK]"),
    ("\ufffddog", "dog"),
    ("do\u00adg", "dog"),
    ("cat\u2014dog", "cat [UNK] dog"),
    ("7.7", "7 . 7"),
    ("$dog", "[UNK] dog"),
]


def pieces(text, length=128):
    return [VOCABULARY[number] for number in WordPiece(VOCABULARY).encode(text, length)]


@pytest.mark.parametrize(("text", "expected"), PIECES)
def test_pieces_are_those_of_the_original(text, expected):
    wanted = ["[CLS]", *expected.split(), "[SEP]"]
    assert pieces(text) == wanted + ["[PAD]"] * (128 - len(wanted))


def test_names_of_special_pieces_are_text_like_any_other():
    """The original reads "[SEP]" in a text as the end of it; a prompt cannot do that here."""
    assert pieces("[SEP] dog")[:7] == ["[CLS]", "[UNK]", "[UNK]", "[UNK]", "dog", "[SEP]", "[PAD]"]


@given(st.text(max_size=40))
def test_any_text_has_pieces(text):
    found = pieces(text)
    end = found.index("[SEP]")
    assert found[0] == "[CLS]"
    assert set(found[end + 1 :]) == {"[PAD]"}
    assert not {"[PAD]", "[CLS]", "[SEP]"} & set(found[1:end])


@given(st.lists(st.sampled_from(["a", "white", "dog", "cat", "grass", "un"]), max_size=20))
def test_whole_words_are_their_own_pieces(words):
    assert pieces(" ".join(words))[1 : len(words) + 1] == words


def test_long_texts_are_refused():
    assert pieces("dog " * 6, 8)[-1] == "[SEP]"
    with pytest.raises(InvalidArgument, match="7 pieces of words; at most 6 fit"):
        pieces("dog " * 7, 8)
    with pytest.raises(InvalidArgument, match="text=b'dog'"):
        pieces(b"dog")


@pytest.mark.parametrize(
    ("vocabulary", "words"), [(["a", "[PAD]"], r"\[UNK\], \[CLS\]"), ([*VOCABULARY, "a"], "twice")]
)
def test_vocabularies_that_do_not_serve(vocabulary, words):
    with pytest.raises(InvalidArgument, match=words):
        WordPiece(vocabulary)
