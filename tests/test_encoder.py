"""Text to ids, each word once: the ids are those of the tokenizers library."""

import random
import sys
import unicodedata
from itertools import pairwise

import numpy as np
import pytest

from leanseek.config import BadInput
from leanseek.data import encoder
from leanseek.data.encoder import WordEncoder
from leanseek.data.tokenizer import Tokenizer

PIECES = (
    *(
        "a",
        "ship",
        "Ship",
        "'ll",
        "é",
        "e\u0301",
        "語",
        "かな",
        "7",
        "12345",
        ".",
        "...",
        "“",
        "€",
        "🙂",
        "\0",
        "\ufffd",
    ),
    *(" ", " ", " ", " ", "  ", "\t", "\n", "\n\n", "\r\n", "\x1c", "\x85", "\u00a0", "\u180e", "\u2003"),
)


def soup(seed: int, pieces: int = 4000) -> str:
    return "".join(random.Random(seed).choices(PIECES, k=pieces))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([soup(seed) for seed in range(3)], 600)


def assert_same(encode: WordEncoder, texts: list[str]) -> None:
    found = encode(texts)
    assert [ids.tolist() for ids in found] == encode.tokenizer.encode_batch(texts)
    assert all(ids.dtype == np.uint16 for ids in found)


def test_the_ids_are_the_librarys(tokenizer: Tokenizer) -> None:
    encode = WordEncoder(tokenizer)
    assert_same(encode, ["", " ", "a", " a", "a ", "a  7", "\0", " \0 \0a", "a\n", "a \n 7 "])
    for seed in range(20):
        assert_same(encode, [soup(100 + seed, length) for length in (1, 2, 3, 5, 10, 30, 1000)])
    assert_same(encode, [])


def test_whatever_stands_before_a_space(tokenizer: Tokenizer) -> None:
    """Cut before the space or not, a text has the same ids."""
    characters = (chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
    odd = [c for i, c in enumerate(characters) if i < 0x3000 or i % 199 == 0 or unicodedata.category(c)[0] == "Z"]
    assert_same(WordEncoder(tokenizer), [f"a{c} 7b{c} {c}" for c in odd])


def test_a_word_is_encoded_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, text = WordEncoder(tokenizer), soup(1)
    encode([text])
    asked: list[str] = []
    encode_batch = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: asked.extend(texts) or encode_batch(texts))
    encode([text, text])
    assert not "".join(asked).strip("\0")
    encode([text + " words so far unheard"])
    assert "unheard" in "".join(asked)


def test_what_is_kept_in_mind_has_an_end(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "MOST", 50)
    for pieces in (PIECES, ["a", "語", "かな"]):  # of the second, without spaces, a text is one word
        encode, kept = WordEncoder(tokenizer), []
        for seed in range(12):
            assert_same(encode, ["".join(random.Random(seed).choices(pieces, k=200))])
            kept.append(len(encode._ids))
        assert any(later < before for before, later in pairwise(kept))
        assert max(kept) < 8 * 50 + 400


def test_other_splits_are_left_to_the_library(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "separates_words", False)
    encode = WordEncoder(tokenizer)
    assert_same(encode, [soup(1)])
    assert not encode._numbers


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    encode = WordEncoder(tokenizer)
    with pytest.raises(BadInput, match="half of a surrogate pair"):
        encode(["fine", "a \ud800 b"])
    assert_same(encode, ["fine", "all fine"])
