"""Cleaning and duplicate removal: pure functions over documents (report §4.1).

Near duplicates are found by MinHash: documents as sets of five-word shingles, 112 permutations in 14 bands of 8, every
candidate verified by the Jaccard similarity that its whole signature estimates.
"""

import hashlib
import re
from collections import defaultdict

import numpy as np

from leanseek.config import BadInput

SHINGLE, BANDS, ROWS = 5, 14, 8
PERMUTATIONS = BANDS * ROWS
# Scripts that write no spaces between words count every character as a word.
WORD = re.compile(r"[぀-ヿ㐀-鿿가-힣]|[^\W぀-ヿ㐀-鿿가-힣]+")
ESCAPED = re.compile("[\udc80-\udcff]")
BLOCK = 4096  # shingles hashed at once: the [112, 4096] table stays in the processor's cache


def mix(*words: int | np.ndarray) -> np.ndarray:
    """Counter-based random numbers: integers (broadcast together) to uniform uint64, the same on every machine.

    The finaliser of splitmix64 after each word.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            state = (state ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def repair_utf8(raw: bytes) -> tuple[str, int, int]:
    """Decode, with U+FFFD for each byte that is no UTF-8; a byte order mark goes.

    Returns the text, the number of bytes replaced and the offset of the first one (-1 when there is none).
    """
    skipped = 3 if raw.startswith(b"\xef\xbb\xbf") else 0
    text = raw[skipped:].decode("utf-8", errors="surrogateescape")
    bad = ESCAPED.search(text)
    if bad is None:
        return text, 0, -1
    first = skipped + len(text[: bad.start()].encode())
    text, replaced = ESCAPED.subn("�", text)
    return text, replaced, first


def decode_utf8(raw: bytes) -> tuple[str, int]:
    """Text of a file that should be UTF-8 and the number of bytes replaced in it, at most 1%.

    Raises BadInput with the offset of the first offending byte when there are more, or when the file is UTF-16.
    """
    text, replaced, first = repair_utf8(raw)
    if too_damaged(raw[:2], len(raw), replaced):
        raise BadInput(f"not UTF-8: byte {first} is the first of {replaced} that cannot be decoded; convert it first")
    return text, replaced


def too_damaged(start: bytes, size: int, replaced: int) -> bool:
    """Whether `replaced` of `size` bytes is too much to be called UTF-8, or the file starts as UTF-16 does."""
    return replaced > 0.01 * size or start in (b"\xff\xfe", b"\xfe\xff")


def content_hash(text: str) -> bytes:
    """SHA-256 of the text's UTF-8: equal texts and no others share it."""
    return hashlib.sha256(text.encode()).digest()


class WordHashes(dict[str, int]):
    """Words to 64-bit hashes, each computed once."""

    def __missing__(self, word: str) -> int:
        self[word] = value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return value


def minhash(text: str, hashes: WordHashes | None = None) -> np.ndarray:
    """MinHash signature [112] uint32 of a text's five-word shingles, letter case and punctuation aside.

    Fewer than five words have no shingle; such a text is its own only one, so that "1 + 2" is no duplicate of "1 - 2".
    `hashes` may be kept between calls: it only saves time.
    """
    hashes = WordHashes() if hashes is None else hashes
    words = WORD.findall(text.lower())
    if len(words) < SHINGLE:
        shingles = mix(int.from_bytes(content_hash(text)[:8], "little")).reshape(1)
    else:
        numbers = np.fromiter(map(hashes.__getitem__, words), np.uint64, len(words))
        count = len(words) - SHINGLE + 1
        shingles = mix(*(numbers[i : i + count] for i in range(SHINGLE)))
    factors, terms = _permutations()
    smallest = np.full(PERMUTATIONS, np.iinfo(np.uint64).max)
    for start in range(0, len(shingles), BLOCK):
        permuted = factors * shingles[None, start : start + BLOCK]  # [112, ≤4096], modulo 2^64
        permuted += terms
        np.minimum(smallest, permuted.min(axis=1), out=smallest)
    return (smallest >> np.uint64(32)).astype(np.uint32)


def near_duplicates(signatures: np.ndarray, threshold: float = 0.8) -> np.ndarray:
    """Which documents to keep [D] bool, given their signatures [D, 112] uint32: the first of its like, in order.

    A document goes when one that is kept shares a band with it and at least `threshold` of the whole signature.
    """
    keep = np.ones(len(signatures), bool)
    bands = np.ascontiguousarray(signatures).reshape(len(signatures), BANDS, ROWS)
    seen: list[defaultdict[bytes, list[int]]] = [defaultdict(list) for _ in range(BANDS)]
    for i, signature in enumerate(bands):
        buckets = [table[band.tobytes()] for table, band in zip(seen, signature, strict=True)]
        candidates = np.array(sorted({j for bucket in buckets for j in bucket}), np.int64)
        if len(candidates) and (signatures[candidates] == signatures[i]).mean(axis=1).max() >= threshold:
            keep[i] = False
            continue
        for bucket in buckets:
            bucket.append(i)
    return keep


def _permutations() -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and terms [112, 1] of the maps x → a·x + b modulo 2^64, of which the upper half is kept."""
    numbers = np.arange(PERMUTATIONS)[:, None]
    return mix(1, numbers) | np.uint64(1), mix(2, numbers)
