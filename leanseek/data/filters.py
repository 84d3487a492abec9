"""What a text goes through before it may be trained on: one pure function, whoever calls it (report §4.1).

Normalise → language → rules of quality → text of evaluations → personal data; the judge's score comes last. A process
pool (`data.prepare`) and datatrove (`data.cluster`) run the same.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from leanseek.config import BadInput
from leanseek.data.classifier import Classifier
from leanseek.data.clean import normalise
from leanseek.data.duplicates import Forbidden
from leanseek.data.personal import mask
from leanseek.data.quality import complaint
from leanseek.data.words import WordHashes, Words

LANGUAGE_CHARACTERS = 2000  # of a text that are looked at for its language


@dataclass(frozen=True)
class Filters:
    """Which of the steps to take; none by default. What is by source holds for all sources under the name ""."""

    normalise: bool = False
    languages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by source: two-letter codes to keep
    quality: frozenset[str] = frozenset()  # sources whose texts must keep the rules
    forbidden: Forbidden | None = None
    personal: bool = False
    classifier: Classifier | None = None

    def __post_init__(self) -> None:
        if self.languages:
            _identifier()  # says so where it is not installed, before work begins

    def names(self) -> list[str]:
        """The steps that may drop a text, in order."""
        asked = {"language": self.languages, "quality": self.quality, "evaluation text": self.forbidden}
        return [name for name, wanted in asked.items() if wanted]


@dataclass(frozen=True)
class Judged:
    """What became of a text: dropped by a step, for a reason, or kept, as it is trained on."""

    words: Words
    dropped_by: str | None = None
    reason: str = ""
    masked: Mapping[str, int] = field(default_factory=dict)  # by kind of personal data
    score: float = 0.0


def judge(text: str, source: str, filters: Filters, hashes: WordHashes) -> Judged:
    """Takes a text through the steps. A pure function; `hashes` may be kept between calls, it only saves time."""
    text = normalise(text) if filters.normalise else text
    words = Words(text, hashes)
    language = None
    if allowed := filters.languages.get(source, filters.languages.get("")):
        language = language_of(text)
        if language not in allowed:
            return Judged(words, "language", language)
    if filters.quality & {"", source} and (broken := complaint(words, language)):
        return Judged(words, "quality", broken)
    if filters.forbidden is not None and filters.forbidden.stand_in(words):
        return Judged(words, "evaluation text", "thirteen words in a row")
    masked: dict[str, int] = {}
    if filters.personal:
        text, masked = mask(text)
        words = Words(text, hashes) if masked else words
    return Judged(words, masked=masked, score=filters.classifier.score(words) if filters.classifier else 0.0)


def language_of(text: str) -> str:
    """The two-letter code of the language that a text, by its beginning, is most likely written in."""
    return str(_identifier().classify(text[:LANGUAGE_CHARACTERS])[0])


def _identifier() -> Any:
    try:
        return importlib.import_module("py3langid.langid")
    except ImportError:
        raise BadInput("telling languages apart needs py3langid: pip install 'leanseek[data]'") from None
