"""Tokens that join punctuation and line breaks, taken apart now and then (report §4.1).

A vocabulary of V3's kind has tokens such as ".\\n\\n". A prompt that ends with the full stop alone is then something a
model has hardly ever seen. So in training a part of such tokens comes as two.
"""

import re

import numpy as np

from leanseek.data.tokenizer import Tokenizer

JOINED = re.compile(rb"( ?[!-/:-@\[-`{-~]+)([\r\n]+)")


class Splitter:
    """Splits a share `rate` of the joined tokens, each by its own chance: uniform uint64, as `clean.mix` makes them."""

    def __init__(self, tokenizer: Tokenizer, rate: float) -> None:
        special = set(tokenizer.special.values())
        self._parts: dict[int, list[int]] = {}
        for token in range(tokenizer.vocab_size):
            joined = None if token in special else JOINED.fullmatch(tokenizer.token_bytes(token))
            if joined:
                both = tokenizer.encode_batch([part.decode() for part in joined.groups()])
                self._parts[token] = both[0] + both[1]
        self._more = np.zeros(tokenizer.vocab_size, np.int64)  # tokens more than one
        for token, parts in self._parts.items():
            self._more[token] = len(parts) - 1
        self._joined = self._more > 0
        self._below = np.uint64(min(int(rate * 2**64), 2**64 - 1))

    def places(self, ids: np.ndarray) -> np.ndarray:
        """Where joined tokens stand among ids [n]."""
        return np.flatnonzero(self._joined[ids])

    def more(self, ids: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """How many tokens each of ids [n] becomes beside itself [n]."""
        return np.where(chance < self._below, self._more[ids], 0)

    def split(self, ids: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """ids int64 [n] with the chosen tokens taken apart [m ≥ n]."""
        places = np.flatnonzero(self.more(ids, chance))
        pieces, last = [], 0
        for place in places.tolist():
            pieces += [ids[last:place], np.array(self._parts[int(ids[place])], np.int64)]
            last = place + 1
        return np.concatenate([*pieces, ids[last:]])
