"""An answer in OpenAI's shapes, whole or as the chunks of a stream.

A reply is fed pieces and gives the chunk of each; the whole is what the chunks add up to, so the two cannot differ.
"""

import secrets
import time
from typing import TYPE_CHECKING, Any, Literal

from leanseek.data.tokenizer import THINK, Tokenizer
from leanseek.serve.answers import Part, Reader
from leanseek.serve.prompts import Ask
from leanseek.serve.worker import Piece

if TYPE_CHECKING:
    from leanseek.serve.engine import TokenLogprobs

LEAST_LOGPROB = -9999.0  # what closed tokens show: JSON has no infinity


class Reply:
    """What both kinds have in common: the head, the count of tokens, the reasons of the end."""

    kind: Literal["chat.completion", "text_completion"]
    chunk_kind: str
    prefix: str

    def __init__(self, tokenizer: Tokenizer, model: str, prompts: list[list[int]], n: int) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.prompts, self.n = prompts, n
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        count = len(prompts) * n
        self.tokens, self.cached = [0] * count, [0] * count
        self.reasoning = [0] * count
        self.reasons: list[str | None] = [None] * count

    def count(self, piece: Piece) -> None:
        self.tokens[piece.index] += len(piece.tokens)
        self.cached[piece.index] = piece.cached

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def cached_tokens(self) -> int:
        """Of the prompts; the choices after the first of each share what that one has read."""
        return sum(self.cached[:: self.n])

    def usage(self) -> dict[str, Any]:
        prompt, cached, drawn = self.prompt_tokens, self.cached_tokens, sum(self.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
            "prompt_cache_hit_tokens": cached,
            "prompt_cache_miss_tokens": prompt - cached,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": sum(self.reasoning)},
        }

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first piece."""
        return []

    def push(self, piece: Piece) -> dict[str, Any] | None:
        """The chunk of a piece, None where nothing of it can be shown yet."""
        raise NotImplementedError

    def choices(self) -> list[dict[str, Any]]:
        """The whole, once every piece has come."""
        raise NotImplementedError

    def whole(self) -> dict[str, Any]:
        return {**self.head(self.kind), "choices": self.choices(), "usage": self.usage()}

    def last(self) -> dict[str, Any]:
        """The chunk that holds no choice but the usage of all."""
        return {**self.head(self.chunk_kind), "choices": [], "usage": self.usage()}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self.head(self.chunk_kind), "choices": [choice]}

    def _shown(self, token: int) -> str:
        return self.tokenizer.decode([token])


class ChatReply(Reply):
    """The answer to a chat: content, and beside it thoughts and tool calls."""

    kind: Literal["chat.completion", "text_completion"] = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, tokenizer: Tokenizer, model: str, ask: Ask, n: int, logprobs: bool) -> None:
        super().__init__(tokenizer, model, [ask.prompt], n)
        self.readers = [Reader(ask.thinking, ask.tools, ask.fenced) for _ in range(n)]
        self.logprobs = logprobs
        self.messages: list[dict[str, Any]] = [{"role": "assistant", "content": None} for _ in range(n)]
        self.scores: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        self.unsent: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        self.think_end = tokenizer.special.get(THINK[1], -1)

    def opening(self) -> list[dict[str, Any]]:
        begin = {"role": "assistant", "content": ""}
        return [
            self._chunk({"index": i, "delta": begin, "logprobs": None, "finish_reason": None}) for i in range(self.n)
        ]

    def push(self, piece: Piece) -> dict[str, Any] | None:
        i, reader = piece.index, self.readers[piece.index]
        self.count(piece)
        before = reader.thinking
        parts = reader.push(piece.text)
        if piece.finish_reason is not None:
            parts += reader.finish()
        self._count_thoughts(piece, before)
        delta = self._delta(i, parts)
        if self.logprobs:
            self.unsent[i] += [self._score(entry) for entry in piece.logprobs]
        if piece.finish_reason is not None:
            calls = piece.finish_reason == "stop" and reader.calls > 0
            self.reasons[i] = "tool_calls" if calls else piece.finish_reason
        if not delta and self.reasons[i] is None:
            return None
        scores = {"content": self.unsent[i]} if self.logprobs else None
        self.scores[i] += self.unsent[i]
        self.unsent[i] = []
        return self._chunk({"index": i, "delta": delta, "logprobs": scores, "finish_reason": self.reasons[i]})

    def choices(self) -> list[dict[str, Any]]:
        found = []
        for i, message in enumerate(self.messages):
            if message["content"] is None and "tool_calls" not in message:
                message = {**message, "content": ""}
            scores = {"content": self.scores[i]} if self.logprobs else None
            found.append({"index": i, "message": message, "logprobs": scores, "finish_reason": self.reasons[i]})
        return found

    def _delta(self, i: int, parts: list[Part]) -> dict[str, Any]:
        """What the parts add to the message; the message kept here grows by the same."""
        delta: dict[str, Any] = {}
        message = self.messages[i]
        for part in parts:
            if part.kind in ("reasoning", "content"):
                field = "content" if part.kind == "content" else "reasoning_content"
                delta[field] = delta.get(field, "") + part.text
                message[field] = (message.get(field) or "") + part.text
                continue
            calls, changes = message.setdefault("tool_calls", []), delta.setdefault("tool_calls", [])
            if part.kind == "call":
                call = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
                calls.append({**call, "function": {"name": part.text, "arguments": ""}})
                changes.append({"index": part.call, **call, "function": {"name": part.text, "arguments": ""}})
            else:
                if not changes or changes[-1]["index"] != part.call:
                    changes.append({"index": part.call, "function": {"arguments": ""}})
                changes[-1]["function"]["arguments"] += part.text
                calls[part.call]["function"]["arguments"] += part.text
        return delta

    def _count_thoughts(self, piece: Piece, before: bool) -> None:
        reader, i = self.readers[piece.index], piece.index
        if before and not reader.thinking and self.think_end in piece.tokens:
            self.reasoning[i] += piece.tokens.index(self.think_end) + 1
        elif before:
            self.reasoning[i] += len(piece.tokens)
        if not reader.thinking and not reader.thought:
            self.reasoning[i] = 0

    def _score(self, entry: "TokenLogprobs") -> dict[str, Any]:
        top = [self._one(token, logprob) for token, logprob in entry.top]
        return {**self._one(entry.token, entry.logprob), "top_logprobs": top}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        written = list(self.tokenizer.token_bytes(token))
        return {"token": self._shown(token), "logprob": max(logprob, LEAST_LOGPROB), "bytes": written}


class TextReply(Reply):
    """The continuation of texts."""

    kind: Literal["chat.completion", "text_completion"] = "text_completion"
    chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(
        self, tokenizer: Tokenizer, model: str, prompts: list[list[int]], n: int, logprobs: bool, echo: list[str]
    ) -> None:
        super().__init__(tokenizer, model, prompts, n)
        self.echo = [text for text in echo for _ in range(n)]
        count = len(prompts) * n
        self.texts = [""] * count
        self.logprobs = logprobs
        self.scores = [_no_scores() for _ in range(count)]
        self.unsent = [_no_scores() for _ in range(count)]
        self.offsets = [0] * count

    def opening(self) -> list[dict[str, Any]]:
        for i, text in enumerate(self.echo):
            self.texts[i] = text
        return [
            self._chunk({"index": i, "text": text, "logprobs": None, "finish_reason": None})
            for i, text in enumerate(self.echo)
        ]

    def push(self, piece: Piece) -> dict[str, Any] | None:
        i = piece.index
        self.count(piece)
        self.texts[i] += piece.text
        self.reasons[i] = piece.finish_reason
        for entry in piece.logprobs if self.logprobs else []:
            shown = self._shown(entry.token)
            top = {self._shown(token): max(logprob, LEAST_LOGPROB) for token, logprob in entry.top}
            values = (shown, max(entry.logprob, LEAST_LOGPROB), top, self.offsets[i])
            for column, value in zip(self.unsent[i].values(), values, strict=True):
                column.append(value)
            self.offsets[i] += len(shown)
        if not piece.text and piece.finish_reason is None:
            return None
        scores, self.unsent[i] = self.unsent[i], _no_scores()
        for name, column in scores.items():
            self.scores[i][name] += column
        shown_scores = scores if self.logprobs else None
        return self._chunk(
            {"index": i, "text": piece.text, "logprobs": shown_scores, "finish_reason": piece.finish_reason}
        )

    def choices(self) -> list[dict[str, Any]]:
        return [
            {
                "index": i,
                "text": text,
                "logprobs": self.scores[i] if self.logprobs else None,
                "finish_reason": self.reasons[i],
            }
            for i, text in enumerate(self.texts)
        ]


def _no_scores() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
