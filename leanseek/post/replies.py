"""What makes a reply fit to learn from, whatever it says: its form, its language, its length (R1 report §2.3.3).

Pure functions of text, for rejection sampling and for rewards alike.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from leanseek.data.tokenizer import LAST_TOKENS, THINK

SPECIAL = re.compile("|".join(map(re.escape, ("<｜", "<|EOT|>", *LAST_TOKENS))))
FENCE = "```"


@dataclass(frozen=True)
class Parts:
    """`thoughts`: None where the reply has none."""

    thoughts: str | None
    answer: str


def parts_of(reply: str) -> Parts | None:
    """Thoughts and answer of a reply; None where it is ill formed.

    Well formed: an answer that says something, before it thoughts between <think> and </think> or none, and no other
    token of the template spelt out.
    """
    begin, end = THINK
    thoughts, answer = None, reply.strip()
    if answer.startswith(begin):
        inside, closed, answer = answer[len(begin) :].partition(end)
        if not closed:
            return None
        thoughts, answer = inside.strip(), answer.strip()
    if not answer or SPECIAL.search(answer) or SPECIAL.search(thoughts or "") or "\ufffd" in reply:
        return None
    return Parts(thoughts, answer)


def language_share(text: str, like: str) -> float:
    """The share of a text's words that are in the script most of `like` is in; 1 where either has no words.

    A word is a run of letters of one script; in a script without spaces each letter counts as one.
    """
    wanted, found = _words(like), _words(text)
    if not wanted or not found:
        return 1.0
    main = max(wanted, key=lambda script: wanted[script])
    return found.get(main, 0) / sum(found.values())


def longest_paragraph(text: str) -> int:
    """In characters; paragraphs end at an empty line."""
    return max(map(len, re.split(r"\n\s*\n", text)))


def _words(text: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    before = ""
    for letter in text:
        script = _script(letter)
        if script and (script != before or script == "CJK"):
            counts[script] = counts.get(script, 0) + 1
        before = script
    return counts


@lru_cache(maxsize=1 << 14)
def _script(letter: str) -> str:
    """LATIN, CYRILLIC, GREEK, …; CJK for Chinese and Japanese; nothing for what is no letter."""
    if not letter.isalpha():
        return ""
    script = unicodedata.name(letter, "").partition(" ")[0]
    return "CJK" if script in ("HIRAGANA", "KATAKANA", "CJK") else script
