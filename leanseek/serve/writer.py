"""Tokens to text that may be shown: whole characters, and nothing that a stop string may yet cut."""

from leanseek.data.tokenizer import Tokenizer


class Writer:
    """Tokens to text that may be shown: whole characters, and nothing that a stop string may yet cut."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.decoder, self.held = tokenizer.decode_stream(), StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self.held.found

    def push(self, token: int) -> str:
        return self.held.push(self.decoder.push(token))

    def finish(self) -> str:
        """What is left when no more tokens come."""
        return "" if self.stopped else self.held.push(self.decoder.finish()) + self.held.finish()


class StopStrings:
    """Passes text on but for the end that may yet become a stop string; the first to be complete cuts it there.

    The result does not depend on how the text came in pieces.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop = stop
        self.pending = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is now certain; nothing more once a stop string was `found`."""
        if self.found:
            return ""
        self.pending += text
        starts = [(self.pending.find(stop), len(stop)) for stop in self.stop]
        complete = [(start + length, start) for start, length in starts if start >= 0]
        if complete:
            self.found = True
            return self._release(min(complete)[1])
        return self._release(len(self.pending) - max((_overlap(self.pending, stop) for stop in self.stop), default=0))

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.found else self._release(len(self.pending))

    def _release(self, count: int) -> str:
        text, self.pending = self.pending[:count], self.pending[count:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
