"""A text as its words, in the form in which duplicates, rules and the quality classifier look at it."""

import hashlib
import re
from functools import cached_property

import numpy as np

# Scripts that write no spaces between words count every character as a word.
UNSPACED = "぀-ヿ㐀-鿿가-힣"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


def content_hash(text: str) -> bytes:
    """SHA-256 of the text's UTF-8: equal texts and no others share it."""
    return hashlib.sha256(text.encode()).digest()


class WordHashes(dict[str, int]):
    """Words to 64-bit hashes, each computed once. It only saves time, and is emptied when it grows large."""

    def __missing__(self, word: str) -> int:
        if len(self) > 1 << 18:
            self.clear()
        self[word] = value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return value


class Words:
    """The words of a text in small letters, without what stands between them, found once for all who ask."""

    def __init__(self, text: str, hashes: WordHashes) -> None:
        self.text, self._hashes = text, hashes

    @cached_property
    def words(self) -> list[str]:
        return WORD.findall(self.text.lower())

    @cached_property
    def numbers(self) -> np.ndarray:
        """Their hashes, uint64 [W]."""
        return np.fromiter(map(self._hashes.__getitem__, self.words), np.uint64, len(self.words))
