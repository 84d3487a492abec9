"""Duplicates, exact and near, and text that stands in an evaluation: pure functions over documents (report §4.1).

Near duplicates are found by MinHash: documents as sets of five-word shingles, 112 permutations in 14 bands of 8, every
candidate verified by the Jaccard similarity that its whole signature estimates.
"""

import itertools
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from leanseek.data.clean import mix
from leanseek.data.words import WordHashes, Words, content_hash

SHINGLE, BANDS, ROWS = 5, 14, 8
PERMUTATIONS = BANDS * ROWS
OVERLAP = 13  # words in a row that a document may not share with an evaluation (Brown et al. 2020, appendix C)
BLOCK = 4096  # shingles hashed at once: the [112, 4096] table stays in the processor's cache


class Signatures(Protocol):
    """MinHash signatures [D, 112] uint32: an array, or a file that is read where it is asked."""

    def __len__(self) -> int: ...
    def __getitem__(self, which: slice | np.ndarray, /) -> np.ndarray: ...


def shingles(numbers: np.ndarray, size: int) -> np.ndarray:
    """Every run of `size` words as one number: words' hashes uint64 [W] → uint64 [W − size + 1], none of fewer."""
    count = max(len(numbers) - size + 1, 0)
    return mix(*(numbers[i : i + count] for i in range(size)))


def minhash(text: str, hashes: WordHashes | None = None) -> np.ndarray:
    """MinHash signature [112] uint32 of a text's five-word shingles, letter case and punctuation aside.

    Fewer than five words have no shingle; such a text is its own only one, so that "1 + 2" is no duplicate of "1 - 2".
    """
    return signature(Words(text, WordHashes() if hashes is None else hashes))


def signature(words: Words) -> np.ndarray:
    """`minhash` of a text whose words are known."""
    of_text = shingles(words.numbers, SHINGLE)
    if not len(of_text):
        of_text = mix(int.from_bytes(content_hash(words.text)[:8], "little")).reshape(1)
    factors, terms = _permutations()
    smallest = np.full(PERMUTATIONS, np.iinfo(np.uint64).max)
    for start in range(0, len(of_text), BLOCK):
        permuted = factors * of_text[None, start : start + BLOCK]  # [112, ≤4096], modulo 2^64
        permuted += terms
        np.minimum(smallest, permuted.min(axis=1), out=smallest)
    return (smallest >> np.uint64(32)).astype(np.uint32)


def first_of_equals(hashes: np.ndarray) -> np.ndarray:
    """For each document the number of the first one with the same content: hashes [D, n] uint64 → [D] int64."""
    order = np.lexsort(hashes.T)  # stable: equals stay in their order
    ordered = hashes[order]
    begins = np.concatenate(([True], (ordered[1:] != ordered[:-1]).any(axis=1)))[: len(order)]
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    return first


def near_duplicates(signatures: Signatures, threshold: float = 0.8, among: np.ndarray | None = None) -> np.ndarray:
    """Which documents to keep [D] bool, given their signatures [D, 112] uint32: the first of its like, in order.

    A document goes when one that is kept shares a band with it and at least `threshold` of the whole signature. Only
    those are looked at that are `among` [D] bool; the others are kept, whatever they are like.
    """
    asked = np.arange(len(signatures)) if among is None else np.flatnonzero(among)
    documents, buckets = _shared_bands(signatures, asked)
    keep = np.ones(len(signatures), bool)
    kept_in: dict[int, list[int]] = {}  # by bucket
    starts = np.flatnonzero(np.diff(documents, prepend=-1)).tolist()
    for start, end in itertools.pairwise([*starts, len(documents)]):
        i, mine = int(documents[start]), buckets[start:end].tolist()
        candidates = np.array(sorted({j for bucket in mine for j in kept_in.get(bucket, ())}), np.int64)
        if len(candidates):
            similar = (signatures[candidates] == signatures[documents[start : start + 1]]).mean(axis=1)
            keep[i] = similar.max() < threshold
        if keep[i]:
            for bucket in mine:
                kept_in.setdefault(bucket, []).append(i)
    return keep


def _shared_bands(signatures: Signatures, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the documents `asked` those that share a band with another, and the bands' buckets: both int64 [n].

    By document. One band at a time is in memory.
    """
    documents, buckets = [], []
    for band in range(BANDS):
        keys = np.empty(len(signatures), np.uint64)
        for start in range(0, len(keys), BLOCK):
            block = signatures[start : start + BLOCK]
            keys[start : start + BLOCK] = mix(*block[:, band * ROWS : (band + 1) * ROWS].T)
        _, bucket, members = np.unique(keys[asked], return_inverse=True, return_counts=True)
        shared = members[bucket] > 1
        documents.append(asked[shared])
        buckets.append(bucket[shared] * BANDS + band)
    every = np.concatenate(documents)
    order = every.argsort(kind="stable")
    return every[order], np.concatenate(buckets)[order]


class Forbidden:
    """Runs of thirteen words that stand in evaluations. A document that has one of them is not trained on."""

    def __init__(self, runs: np.ndarray) -> None:
        self.runs = runs  # [n] uint64, ascending

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Forbidden":
        """All runs of the texts; one shorter than thirteen words has none."""
        hashes = WordHashes()
        runs = [shingles(Words(text, hashes).numbers, OVERLAP) for text in texts]
        return cls(np.unique(np.concatenate([np.empty(0, np.uint64), *runs])))

    def stand_in(self, document: Words) -> bool:
        """Whether a document has one of the runs."""
        if not len(self.runs):
            return False
        mine = shingles(document.numbers, OVERLAP)
        places = np.searchsorted(self.runs, mine).clip(max=len(self.runs) - 1)
        return bool((self.runs[places] == mine).any())


def _permutations() -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and terms [112, 1] of the maps x → a·x + b modulo 2^64, of which the upper half is kept."""
    numbers = np.arange(PERMUTATIONS)[:, None]
    return mix(1, numbers) | np.uint64(1), mix(2, numbers)
