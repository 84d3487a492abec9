"""A judge (report §5.2.1): another model, behind any OpenAI-compatible endpoint, says what an answer is worth.

With a free-form reference it says whether the answer agrees with it; without one it gives a grade. An endpoint that is
busy or gone is asked again, later each time; an answer it never judges is skipped and counted, and a judge that judges
nothing at all is an error of its own.
"""

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from threading import Lock
from typing import Any

from leanseek.config import BadInput

AGREES = (
    "Compare an answer with a reference. They agree if they say the same thing, in whatever words; what else the "
    'answer says does not matter unless it contradicts. End with a line "Grade: 10" if they agree, else "Grade: 0".'
)
GRADES = (
    "Judge how good an answer to a question is: right, helpful, clear, harmless. A long answer is not better for its "
    'length. Give your reason in a sentence or two, then end with a line "Grade: N", N from 0 to 10.'
)
GRADE = re.compile(r"grade\W*(\d+(?:\.\d+)?)", re.IGNORECASE)
AGAIN = (408, 409, 425, 429)  # and everything from 500 on
LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class Question:
    prompt: str
    answer: str
    reference: str | None = None


class Busy(Exception):
    """The endpoint may answer later; `after`: the seconds it asked for."""

    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


@dataclass
class Judge:
    """`url`: the API's base, as http://127.0.0.1:8000/v1. `key`: sent with every request, where there is one.

    attempts: how often one answer is put to it; between them `wait` seconds pass, twice as many each time.
    dead_after: answers skipped in a row, none ever judged, that make a dead judge. at_once: requests side by side.
    """

    url: str
    model: str
    key: str | None = None
    attempts: int = 5
    wait: float = 1.0
    seconds: float = 60.0  # that one request may take
    max_tokens: int = 512
    at_once: int = 8
    dead_after: int = 16
    judged: int = 0
    skipped: int = 0
    last_error: str = ""
    _lock: Lock = field(default_factory=Lock, repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise BadInput(f"judge {self.url!r}: write its base address, as http://127.0.0.1:8000/v1")

    def __call__(self, questions: Sequence[Question]) -> list[float | None]:
        """What each answer is worth, 0 to 1; None where the judge did not say. Raises BadInput for a dead judge."""
        with ThreadPoolExecutor(self.at_once) as pool:
            try:
                return list(pool.map(self._grade, questions))
            except BadInput:
                pool.shutdown(cancel_futures=True)
                raise

    def _grade(self, question: Question) -> float | None:
        for attempt in range(self.attempts):
            try:
                said = GRADE.findall(self._ask(question))
            except Busy as busy:
                self.last_error = str(busy)
                if attempt + 1 < self.attempts:
                    time.sleep(min(busy.after or self.wait * 2**attempt, LONGEST_WAIT))
                continue
            if said and 0 <= float(said[-1]) <= 10:
                with self._lock:
                    self.judged += 1
                return float(said[-1]) / 10
            self.last_error = "its answer ends with no grade from 0 to 10"
        with self._lock:
            self.skipped += 1
            if not self.judged and self.skipped >= self.dead_after:
                raise BadInput(
                    f"judge {self.url}: gave no grade to any of {self.skipped} answers ({self.last_error}): "
                    "see whether it is up, and whether it is the right address and model"
                )
        return None

    def _ask(self, question: Question) -> str:
        """One request. Raises Busy, and BadInput where asking again is in vain."""
        parts = [("Question", question.prompt), ("Reference", question.reference), ("Answer", question.answer)]
        messages = [
            {"role": "system", "content": GRADES if question.reference is None else AGREES},
            {"role": "user", "content": "\n\n".join(f"{name}:\n{text}" for name, text in parts if text is not None)},
        ]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as response:
                return _content(json.loads(response.read()))
        except urllib.error.HTTPError as error:
            with error:
                told = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
            if error.code in AGAIN or error.code >= 500:
                raise Busy(f"HTTP {error.code}", _seconds(error.headers.get("Retry-After"))) from None
            raise BadInput(f"judge {self.url}: refuses what it is asked: HTTP {error.code} {told}") from None
        except (OSError, HTTPException) as error:
            raise Busy(f"{type(error).__name__}: {error}") from None
        except (ValueError, KeyError, IndexError, TypeError):
            raise Busy("its reply is no chat completion") from None


def _content(reply: dict[str, Any]) -> str:
    content = reply["choices"][0]["message"]["content"]
    if not isinstance(content, str):
        raise TypeError("no text")
    return content


def _seconds(text: str | None) -> float | None:
    """A Retry-After in seconds; its other form, a date, is not read."""
    try:
        return max(float(text or ""), 0.0) or None
    except ValueError:
        return None
