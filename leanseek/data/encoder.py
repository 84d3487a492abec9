"""Text to ids, each word once.

Most of a text are words that came before, and the tokenizers library splits and encodes them anew each time. Here a
text is cut at its spaces, its words are numbered, only new ones are encoded, and the ids of a text are looked up.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from leanseek.config import BadInput
from leanseek.data.tokenizer import WORD, Tokenizer, token_dtype

MOST = 1 << 20  # words that are kept in mind, and an eighth of their ids
BETWEEN = "\0"  # no word of ours, and a token for itself wherever a space comes after it


class WordEncoder:
    """`Tokenizer.encode_batch` for much text, on one processor, with the same ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._forget()

    @classmethod
    def load(cls, folder: Path | str) -> "WordEncoder":
        """With the tokenizer of a folder. Raises BadInput."""
        return cls(Tokenizer.load(folder))

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text [tokens], in `token_dtype`. Raises BadInput for text that is not Unicode."""
        if not self.tokenizer.separates_words:
            return self._encoded(texts)
        if len(self._numbers) > MOST or len(self._ids) > 8 * MOST:  # where no spaces are, a word is a whole text
            self._forget()
        numbered = [np.fromiter(map(self._numbers.__getitem__, WORD.split(text)), np.int64) for text in texts]
        try:
            self._learn(self._numbers.new)
        except BadInput:
            self._forget()
            raise
        self._numbers.new = []
        return [self._joined(numbers) for numbers in numbered]

    def _forget(self) -> None:
        self._numbers = Numbers()
        # Of the word with each number: its ids lie behind one another from where they begin.
        self._ids, self._begins, self._lengths = np.empty(0, self._dtype), np.empty(0, np.int64), np.empty(0, np.int64)

    def _learn(self, words: list[str]) -> None:
        # Most go in one text, since a text of its own costs more than a word.
        alone = np.array([not _stands_apart(word) for word in words], bool)
        together = self._encoded([BETWEEN.join(word for word, one in zip(words, alone, strict=True) if not one)])[0]
        others = self._encoded([word for word, one in zip(words, alone, strict=True) if one])
        ends = np.append(np.flatnonzero(together == self._encoded([BETWEEN])[0]), len(together))
        lengths, begins = np.empty(len(words), np.int64), np.empty(len(words), np.int64)
        lengths[alone] = [len(ids) for ids in others]
        if not alone.all():
            lengths[~alone] = np.diff(ends, prepend=-1) - 1
            begins[~alone] = ends - lengths[~alone]
        begins[alone] = len(together) + lengths[alone].cumsum() - lengths[alone]
        self._begins = np.concatenate([self._begins, len(self._ids) + begins])
        self._lengths = np.concatenate([self._lengths, lengths])
        self._ids = np.concatenate([self._ids, together, *others])

    def _encoded(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, self._dtype) for ids in self.tokenizer.encode_batch(texts)]

    def _joined(self, numbers: np.ndarray) -> np.ndarray:
        lengths = self._lengths[numbers]
        ends = lengths.cumsum()
        before = self._begins[numbers] - (ends - lengths)  # how far ahead of a word's place in the text its ids lie
        return self._ids[np.arange(lengths.sum()) + np.repeat(before, lengths)]


def _stands_apart(word: str) -> bool:
    """Whether the splits part a word from a BETWEEN before and behind it."""
    return word[:1] == " " and word[-1] != " " and word[-1].isprintable() and BETWEEN not in word


class Numbers(dict[str, int]):
    """A number for each word, and which are `new`."""

    def __init__(self) -> None:
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        self.new.append(word)
        return number
