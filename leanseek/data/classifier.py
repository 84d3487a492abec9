"""A small judge of quality: words and pairs of words, hashed, under a logistic regression (as fastText's classifiers).

It learns from two sets of examples, what is wanted and what is not, in a few seconds and without anything from
elsewhere. What it gives is a rank among documents; a threshold is a share of the text to keep.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np

from leanseek.config import BadInput
from leanseek.data.clean import mix
from leanseek.data.words import WordHashes, Words

BITS = 18  # 2^18 weights
EPOCHS, RATE = 5, 0.5
HELD_OUT = 10  # one example in so many tells how good the judge is


@dataclass(frozen=True)
class Classifier:
    weights: np.ndarray  # float32 [2^18 + 1], the last one for every text
    accuracy: float  # on the examples held out, both kinds weighing the same

    @classmethod
    def learn(cls, good: Iterable[str], bad: Iterable[str]) -> Self:
        """From at least twenty texts of each kind. Raises BadInput."""
        hashes = WordHashes()
        examples = [[features(Words(text, hashes)) for text in texts] for texts in (bad, good)]
        for name, some in zip(("bad", "good"), examples, strict=True):
            if len(some) < 2 * HELD_OUT:
                raise BadInput(f"{len(some)} {name} examples are too few to learn quality from: give {2 * HELD_OUT}")
        learnt = [(x, y) for y, some in enumerate(examples) for i, x in enumerate(some) if i % HELD_OUT]
        weights = np.zeros((1 << BITS) + 1, np.float32)
        squares = np.full(len(weights), 1e-8, np.float32)  # Adagrad: rare words take large steps
        share = [1 / sum(y == kind for _, y in learnt) for kind in (0, 1)]
        for epoch in range(EPOCHS):
            for i in mix(epoch, np.arange(len(learnt))).argsort(kind="stable"):
                (which, much), y = learnt[i]
                error = (1 / (1 + np.exp(-(weights[which] @ much))) - y) * share[y] / sum(share) * 2
                gradient = (error * much).astype(np.float32)
                squares[which] += gradient**2
                weights[which] -= RATE * gradient / np.sqrt(squares[which])
        right = [
            np.mean([(weights[which] @ much > 0) == bool(y) for which, much in some[::HELD_OUT]])
            for y, some in enumerate(examples)
        ]
        return cls(weights, float(np.mean(right)))

    def score(self, document: Words) -> float:
        """The logit of being one of the wanted: larger is better."""
        which, much = features(document)
        return float(self.weights[which] @ much)


def features(document: Words) -> tuple[np.ndarray, np.ndarray]:
    """Which weights a text touches and how much: words and pairs by their share, to a length of one; and the last."""
    numbers = document.numbers
    both = np.concatenate((mix(numbers), mix(numbers[:-1], numbers[1:]))) >> np.uint64(64 - BITS)
    which, counts = np.unique(both.astype(np.int64), return_counts=True)
    much = counts / max(np.sqrt((counts**2).sum()), 1.0)
    return np.append(which, 1 << BITS), np.append(much, 1.0).astype(np.float32)
