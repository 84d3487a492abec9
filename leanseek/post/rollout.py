"""Questions to answers: what the policy is asked, and what it draws, by our engine on the weights at hand.

The engine shares the trainer's model, so new weights cost it a copy of what it repacks; each draw brings its own
log-probability, and the experts that the token before it went to. Every rank has an engine of its own; where ranks
share the trainer's weights, each brings them together in a model that only the engine reads.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from leanseek.config import BadInput
from leanseek.data.loader import ORDER, shuffled
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.tasks import Task, as_chat, as_text
from leanseek.model.transformer import Transformer
from leanseek.serve.engine import Engine, Request
from leanseek.serve.sampling import Sampling

PROMPTS_READ = 4096  # tokens of prompts that are read between two steps


@dataclass(frozen=True)
class Question:
    """`row`: what a reward needs to know. `source`: under what its answers' rewards are told."""

    prompt: list[int]
    row: dict[str, Any]
    source: str


@dataclass(frozen=True)
class Answer:
    """`tokens` are all that were drawn, the end of the text included, and `logprobs` [n] theirs as drawn.

    experts [n, L, K]: where the token before each went, in the layers that have experts; None where nobody told.
    """

    question: Question
    text: str
    tokens: list[int]
    logprobs: list[float]
    experts: Tensor | None
    cut: bool  # by max_tokens or the context's end


class Interrupted(Exception):
    """Somebody asked to stop while answers were drawn."""


class Rollouts(Protocol):
    @property
    def closed(self) -> Tensor:
        """Ids that it never draws: the others share their probability."""

    def refresh(self) -> None:
        """From here on, answers are drawn from the weights as they are now."""

    def draw(
        self, questions: Sequence[Question], seeds: Sequence[int], temperature: float, asked_to_stop: Callable[[], bool]
    ) -> list[Answer]:
        """One answer to each question, in order, by its seed. Raises Interrupted."""


class Questions:
    """A task's questions in an order of their own in each epoch: question `place` is a function of (seed, place).

    Left out, as `left_out` tells, are those whose prompt leaves no room for `max_tokens`. Raises BadInput when none is
    left.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, chat: bool, context: int, max_tokens: int, seed: int) -> None:
        read = [self._read(item, tokenizer, chat) for item in task.items]
        self.items = [question for question in read if len(question.prompt) + max_tokens <= context]
        self.left_out = []
        if task.left_out:
            self.left_out.append(f"{task.name}: left out {len(task.left_out)} rows; the first, {task.left_out[0]}")
        if too_long := len(read) - len(self.items):
            self.left_out.append(
                f"{task.name}: left out {too_long:,} questions that leave no room for {max_tokens} tokens of answer in "
                f"the context of {context}"
            )
        self.stop = () if chat else task.format.stop
        self.seed = seed
        if not self.items:
            shortest = min(len(question.prompt) for question in read)
            raise BadInput(
                f"{task.name}: the shortest prompt has {shortest} tokens: with grpo.max_tokens={max_tokens} none fits "
                f"the context of {context}: ask for fewer"
            )
        self._order = lru_cache(maxsize=2)(self._permutation)

    def __len__(self) -> int:
        return len(self.items)

    def at(self, place: int) -> Question:
        epoch, offset = divmod(place, len(self.items))
        return self.items[self._order(epoch)[offset]]

    def seeds(self, place: int, count: int) -> list[int]:
        """Of `count` answers to the question at a place: of no other's."""
        named = (f"{self.seed}:{place}:{number}".encode() for number in range(count))
        return [int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1 for name in named]

    def _permutation(self, epoch: int) -> Any:
        return shuffled(len(self.items), self.seed, ORDER, 0, epoch)

    @staticmethod
    def _read(item: Any, tokenizer: Tokenizer, chat: bool) -> Question:
        if chat:
            prompt = tokenizer.encode_chat(as_chat(item, []))
        else:
            prompt = [tokenizer.bos_id, *tokenizer.encode(as_text(item, []))]
        return Question(prompt, item.row, str(item.row.get("source", item.row["verify"])))


class EngineRollouts:
    """Our engine over the trainer's own model, or over one that is filled with the `trained` weights, by name."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        max_tokens: int,
        stop: tuple[str, ...],
        at_once: int,
        trained: Callable[[], Iterable[tuple[str, Tensor]]] = lambda: (),
    ) -> None:
        self.model, self.max_tokens, self.stop, self.trained = model, max_tokens, stop, trained
        self.engine = Engine(
            model, tokenizer, max_running=at_once, chunk=PROMPTS_READ, speculate=False, tell_experts=True
        )

    @property
    def closed(self) -> Tensor:
        return self.engine.closed

    def refresh(self) -> None:
        own = self.model.state_dict()
        for name, weight in self.trained():
            own[name].copy_(weight)
        self.engine.take_over(own)

    def draw(
        self, questions: Sequence[Question], seeds: Sequence[int], temperature: float, asked_to_stop: Callable[[], bool]
    ) -> list[Answer]:
        self.model.eval()
        requests: list[Request] = []
        try:
            for question, seed in zip(questions, seeds, strict=True):
                sampling = Sampling(temperature, max_tokens=self.max_tokens, stop=self.stop, seed=seed, logprobs=0)
                requests.append(self.engine.submit(question.prompt, sampling))
            while self.engine.busy:
                if asked_to_stop():
                    raise Interrupted
                self.engine.step()
        finally:
            for request in requests:
                self.engine.cancel(request)
        return [_answer(question, request) for question, request in zip(questions, requests, strict=True)]


def _answer(question: Question, request: Request) -> Answer:
    tokens = [told.token for told in request.logprobs]
    logprobs = [told.logprob for told in request.logprobs]
    experts = torch.from_numpy(np.stack(request.experts).astype(np.int16)) if request.experts else None
    return Answer(question, request.read(), tokens, logprobs, experts, request.finish_reason == "length")
