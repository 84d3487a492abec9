"""Rules of thumb that tell prose from wreckage, with the thresholds of Gopher (Rae et al. 2021, appendix A.1.1).

Its upper limit of 100,000 words is left out: a book is no worse for its length. A text in a script without spaces
counts every character as a word: nothing is asked of the length of its words, and two make one where runs are counted.
"""

import re
from collections.abc import Iterator

import numpy as np

from leanseek.data.clean import mix
from leanseek.data.words import UNSPACED, Words

FEWEST_WORDS = 50
WORD_LENGTH = (3.0, 10.0)  # letters, in the mean
SYMBOLS = 0.1  # hash signs, or ellipses, for each word
BULLETS, ELLIPSES = 0.9, 0.3  # of the lines
WITH_A_LETTER = 0.8  # of the words
STOP_WORDS, STOP_WORDS_NEEDED = {"the", "be", "to", "of", "and", "that", "have", "with"}, 2  # asked of English alone
REPEATED_LINES, IN_REPEATED_LINES = 0.3, 0.2  # of the lines, and of their characters; so of paragraphs
# Of the letters: in the most frequent run of n words, and in runs of n words that stood there before.
MOST_FREQUENT = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

SYMBOL = re.compile(r"#|\.\.\.|…")
UNSPACED_WORD = re.compile(f"[{UNSPACED}]")


def complaint(document: Words, language: str | None = None) -> str | None:
    """The first rule that a text breaks, or None; `language` is a two-letter code where it is known."""
    return next(_complaints(document, language), None)


def _complaints(document: Words, language: str | None) -> Iterator[str]:
    words, lines = document.words, [line.strip() for line in document.text.splitlines() if line.strip()]
    if len(words) < FEWEST_WORDS:
        yield f"fewer than {FEWEST_WORDS} words"
        return  # the shares below say nothing of so few
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    spaced = len(UNSPACED_WORD.findall(document.text)) < len(words) / 2
    if spaced and not WORD_LENGTH[0] <= lengths.mean() <= WORD_LENGTH[1]:
        yield "words too short or too long"
    if len(SYMBOL.findall(document.text)) > SYMBOLS * len(words):
        yield "many hash signs or ellipses"
    if sum(line.startswith(("-", "*", "•", "·")) for line in lines) > BULLETS * len(lines):
        yield "nearly all lines are bullets"
    if sum(line.endswith(("...", "…")) for line in lines) > ELLIPSES * len(lines):
        yield "many lines end with an ellipsis"
    if sum(any(map(str.isalpha, word)) for word in words) < WITH_A_LETTER * len(words):
        yield "many words without a letter"
    if language == "en" and len(STOP_WORDS.intersection(words)) < STOP_WORDS_NEEDED:
        yield "hardly one of the commonest words"
    for what, parts in (("lines", lines), ("paragraphs", re.split(r"\n\s*\n", document.text.strip()))):
        again = _seen_before(parts)
        characters = sum(map(len, parts))
        if len(again) > REPEATED_LINES * len(parts) or sum(map(len, again)) > IN_REPEATED_LINES * characters:
            yield f"repeated {what}"
    yield from _repetitions(document.numbers, lengths, 1 if spaced else 2)


def _seen_before(parts: list[str]) -> list[str]:
    seen: set[str] = set()
    return [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]


def _repetitions(numbers: np.ndarray, lengths: np.ndarray, a_word: int) -> Iterator[str]:
    """numbers uint64 [W] and lengths int64 [W] of the words, of which `a_word` count as one."""
    letters, ends = lengths.sum(), np.concatenate(([0], lengths.cumsum()))
    run = numbers
    for size in range(2, a_word * max(REPEATED) + 1):
        run = mix(run[:-1], numbers[size - 1 :])  # [W − size + 1]: each run of so many words as one number
        n, rest = divmod(size, a_word)
        if rest or n < min(MOST_FREQUENT):
            continue
        _, first, which, counts = np.unique(run, return_index=True, return_inverse=True, return_counts=True)
        if n in MOST_FREQUENT:
            most = counts.argmax()
            in_most = counts[most] * (ends[first[most] + size] - ends[first[most]])
            if counts[most] > 1 and in_most > MOST_FREQUENT[n] * letters:
                yield f"one run of {n} words over and over"
        if n in REPEATED:
            again = np.flatnonzero(first[which] != np.arange(len(run)))
            covered = np.zeros(len(numbers) + 1, np.int64)
            np.add.at(covered, again, 1)
            np.add.at(covered, again + size, -1)
            if lengths[covered.cumsum()[:-1] > 0].sum() > REPEATED[n] * letters:
                yield f"runs of {n} words again and again"
