"""What a model wrote, told apart as it comes: thoughts, content, tool calls (V3's and R1's ways of writing them).

Thoughts stand between <think> and </think>; where the prompt already ends in <think>, the answer begins inside. Tool
calls stand between V3's own tokens, which the tokenizer spells out in the text.
"""

from dataclasses import dataclass
from typing import Literal

from leanseek.data.tokenizer import THINK

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
FENCE_OPENS = "\n```json\n"
AROUND_FENCE = "` \t\r\n"


@dataclass(frozen=True)
class Part:
    """A stretch of an answer. A call begins with its name; its arguments follow, in pieces."""

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str
    call: int = 0


class Reader:
    """Cuts one answer into parts. The parts, joined, do not depend on how the text came in pieces.

    thinking: the answer begins inside the thoughts. tools: calls are looked for; `fenced`: they are written as in V3,
    a type before the separator and the arguments in a code block, else as in V3.1, only the name and bare arguments.
    """

    def __init__(self, thinking: bool, tools: bool, fenced: bool = True) -> None:
        self.thought = thinking  # whether there are thoughts at all
        self.calls = 0
        self._tools, self._fenced = tools, fenced
        self._state: Literal["opening", "thinking", "content", "between", "head", "arguments"]
        self._state = "thinking" if thinking else "opening"
        self._pending = ""
        self._strip = thinking  # newlines before the first letter are dropped
        self._said = False  # anything of the current call's arguments

    @property
    def thinking(self) -> bool:
        """Whether what comes next may be thoughts."""
        return self._state in ("opening", "thinking")

    def push(self, text: str) -> list[Part]:
        """The parts that are now certain."""
        self._pending += text
        parts: list[Part] = []
        while getattr(self, f"_{self._state}")(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """What was held back, when no more text comes."""
        rest, self._pending = self._pending, ""
        if self._state == "arguments":
            rest = rest.rstrip(AROUND_FENCE)
            return [Part("arguments", rest, self.calls - 1)] if rest else []
        if self._state == "head":  # cut off before it said what it calls
            rest = CALL_BEGIN + rest
        elif self._state == "between":
            rest = rest.strip()
        if self._strip:
            rest = rest.lstrip("\n")
        return [Part("reasoning" if self._state == "thinking" else "content", rest)] if rest else []

    # Each state takes what it can off `_pending`, and says whether another should go on at once.

    def _opening(self, parts: list[Part]) -> bool:
        text = self._pending.lstrip()
        if text.startswith(THINK[0]):
            self._pending, self._state = text[len(THINK[0]) :], "thinking"
            self.thought = self._strip = True
        elif THINK[0].startswith(text):
            return False  # not yet known
        else:
            self._state = "content"
        return True

    def _thinking(self, parts: list[Part]) -> bool:
        if not self._until(THINK[1], "reasoning", parts):
            return False
        self._state, self._strip = "content", True
        return True

    def _content(self, parts: list[Part]) -> bool:
        if not self._tools:
            self._release(len(self._pending), "content", parts)
            return False
        if not self._until(CALLS_BEGIN, "content", parts):
            return False
        self._state = "between"
        return True

    def _between(self, parts: list[Part]) -> bool:
        text = self._pending.lstrip()
        for mark, state in ((CALL_BEGIN, "head"), (CALLS_END, "content")):
            if text.startswith(mark):
                self._pending, self._state, self._strip = text[len(mark) :], state, True  # type: ignore[assignment]
                return True
            if mark.startswith(text):
                return False
        self._state = "content"  # neither a call nor their end: shown as it is
        return True

    def _head(self, parts: list[Part]) -> bool:
        end = self._pending.find(CALL_END)
        head = self._pending if end < 0 else self._pending[:end]
        before, separator, after = head.partition(SEPARATOR)
        if self._fenced:
            name, opened, _ = after.partition(FENCE_OPENS)
            length = len(before + SEPARATOR + name + FENCE_OPENS)
        else:
            name, opened, length = before, separator, len(before + SEPARATOR)
        if separator and opened and name.strip():
            parts.append(Part("call", name.strip(), self.calls))
            self._pending, self._state, self._said = self._pending[length:], "arguments", False
            self.calls += 1
            return True
        if end < 0:
            return False
        parts.append(Part("content", CALL_BEGIN + head + CALL_END))  # not a call, so it is shown
        self._pending, self._state = self._pending[end + len(CALL_END) :], "between"
        return True

    def _arguments(self, parts: list[Part]) -> bool:
        end = self._pending.find(CALL_END)
        certain = (
            self._pending[:end] if end >= 0 else self._pending[: len(self._pending) - _overlap(self._pending, CALL_END)]
        )
        text = certain.rstrip(AROUND_FENCE)  # JSON ends in neither
        self._pending = self._pending[len(text) :] if end < 0 else self._pending[end + len(CALL_END) :]
        if end >= 0 and not self._said:
            text = text or "{}"
        if text:
            parts.append(Part("arguments", text, self.calls - 1))
            self._said = True
        if end >= 0:
            self._state = "between"
        return end >= 0

    def _until(self, mark: str, kind: Literal["reasoning", "content"], parts: list[Part]) -> bool:
        """Releases what stands before `mark`, and drops that; without it, all that cannot be its beginning."""
        start = self._pending.find(mark)
        if start < 0:
            self._release(len(self._pending) - _overlap(self._pending, mark), kind, parts)
            return False
        self._release(start, kind, parts)
        self._pending = self._pending[len(mark) :]
        return True

    def _release(self, count: int, kind: Literal["reasoning", "content"], parts: list[Part]) -> None:
        text, self._pending = self._pending[:count], self._pending[count:]
        if self._strip:
            text = text.lstrip("\n")
        if text:
            self._strip = False
            parts.append(Part(kind, text))


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
