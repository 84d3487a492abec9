"""Bytes to text, and random numbers that are the same everywhere: pure functions (report §4.1)."""

import re
import unicodedata

import numpy as np

from leanseek.config import BadInput

ESCAPED = re.compile("[\udc80-\udcff]")
# Control characters but tab and line feed, and the marks that only say how to show what stands beside them.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2060\ufeff]")


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


def decode_utf8(raw: bytes, offset: int = 0) -> tuple[str, int]:
    """Text of a file, or of its part from `offset`, that should be UTF-8; and the bytes replaced in it, at most 1%.

    Raises BadInput with the offset of the first offending byte when there are more, or when the file is UTF-16.
    """
    text, replaced, first = repair_utf8(raw)
    if too_damaged(raw[:2], len(raw), replaced):
        raise BadInput(
            f"not UTF-8: byte {offset + first} is the first of {replaced} that cannot be decoded; convert it first"
        )
    return text, replaced


def too_damaged(start: bytes, size: int, replaced: int) -> bool:
    """Whether `replaced` of `size` bytes is too much to be called UTF-8, or the file starts as UTF-16 does."""
    return replaced > 0.01 * size or start in (b"\xff\xfe", b"\xfe\xff")


def normalise(text: str) -> str:
    """Composed characters (NFC), line feeds alone at the ends of lines, no invisible characters."""
    text = unicodedata.normalize("NFC", text)
    return UNSEEN.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
