"""From logits to the next token: penalties, temperature, then top-k, then top-p, then min-p, then a draw.

B rows · V vocabulary. Each filter sees what the one before it left, as a distribution of its own. Filters close tokens
with a logit of minus infinity. Everything is a pure function, chance too: it is a function of the seed and of the place
in the text. So a text does not depend on what else is in the batch, and a place that is drawn twice, for a draft and
for its verification, meets the same chance.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanseek.config import BadInput

FEW = 256  # tokens among which top-p looks first


@dataclass(frozen=True)
class Sampling:
    """How to draw, and when to stop; the defaults draw from the model's own distribution. Raises BadInput.

    temperature: divides the logits; 0 always takes the likeliest token, whatever the filters say.
    top_k: only the k likeliest tokens; 0 is no limit.
    top_p: only the fewest likeliest tokens that have this probability together; 1 is no limit.
    min_p: only tokens at least this fraction as likely as the likeliest; 0 is no limit.
    max_tokens: at most so many tokens; None: to the context's end. stop: ends the text before the first of these.
    seed: the same seed, the same text.
    repetition_penalty: divides the logits above 0 and multiplies those below of every token of the prompt and the text.
    presence_penalty, frequency_penalty: taken from the logit of a token that was drawn, once and for each time.
    logit_bias: (token, what is added to its logit), …
    logprobs: tell the log-probability of each drawn token, and of so many of the likeliest in its place; None: neither.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int | None = 200
    stop: tuple[str, ...] = ()
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise BadInput(f"temperature must be 0 or a positive number, got {self.temperature}")
        if self.top_k < 0:
            raise BadInput(f"top_k must be at least 1, or 0 for no limit, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise BadInput(f"min_p must be between 0 and 1, got {self.min_p}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise BadInput(f"max_tokens must be at least 1, got {self.max_tokens}")
        if isinstance(self.stop, str) or "" in self.stop:
            raise BadInput("stop takes strings that are not empty: an empty one would stop everything")
        if not -(2**63) <= self.seed < 2**63:
            raise BadInput(f"seed must be a 64-bit integer, got {self.seed}")
        if not 0 < self.repetition_penalty < math.inf:
            raise BadInput(f"repetition_penalty must be a positive number, got {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise BadInput(f"{name} must be a number, got {getattr(self, name)}")
        for token, bias in self.logit_bias:
            if token < 0 or not math.isfinite(bias):
                raise BadInput(f"logit_bias needs token ids and numbers, got {token}: {bias}")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise BadInput(f"logprobs must be between 0 and 20, got {self.logprobs}")

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed by what was said before, or by the bias."""
        plain = self.repetition_penalty == 1 and self.presence_penalty == 0 and self.frequency_penalty == 0
        return not plain or bool(self.logit_bias)


def draw(logits: Tensor, samplings: Sequence[Sampling], times: Callable[[list[int]], Tensor]) -> list[int]:
    """logits [B, V], each row's sampling, and what gives the times [n, V] of n rows, as `race` does → B token ids.

    A token is the winner of a race: each arrives after an exponential time divided by its probability. So is a draft,
    and because both meet the same times in the same place, a draft is right whenever its distribution is about right.
    """
    tokens = [0] * len(samplings)
    alike: dict[tuple[float, ...], list[int]] = {}
    for row, one in enumerate(samplings):
        alike.setdefault((one.temperature, one.top_k, one.top_p, one.min_p), []).append(row)
    for rows in alike.values():
        some, sampling = logits if len(rows) == len(samplings) else logits[rows], samplings[rows[0]]
        if sampling.temperature > 0:
            some = probabilities(some, sampling).div_(times(rows))
        for row, token in zip(rows, some.argmax(dim=-1).tolist(), strict=True):
            tokens[row] = token
    return tokens


def race(seed: int, place: int, size: int) -> Tensor:
    """Exponential times [V], FP64, never 0: the numbers at this place of the seed's own stream."""
    key = np.array([seed % 2**64, place], dtype=np.uint64)
    times = np.random.Generator(np.random.Philox(key=key)).standard_exponential(size)
    return torch.from_numpy(np.maximum(times, np.finfo(np.float64).tiny))


class Races:
    """`race` for many rows and a fifth as dear: one generator is wound to each place's numbers. For one thread."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=0)
        self.generator = np.random.Generator(self.philox)
        self.wound: Any = dict(self.philox.state)

    def __call__(self, keys: Sequence[tuple[int, int]], size: int) -> Tensor:
        """For n seeds, each with a place, times [n, V]."""
        times, key = np.empty((len(keys), size)), np.empty(2, dtype=np.uint64)
        self.wound["state"] = {"counter": np.zeros(4, dtype=np.uint64), "key": key}
        for row, (seed, place) in zip(times, keys, strict=True):
            key[:] = seed % 2**64, place
            self.philox.state = self.wound
            self.generator.standard_exponential(out=row)
        return torch.from_numpy(np.maximum(times, np.finfo(np.float64).tiny, out=times))


def adjust(logits: Tensor, sampling: Sampling, prompt: Sequence[int], drawn: Sequence[int]) -> None:
    """Penalties and bias, in place on one row [V]."""
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *drawn}), dtype=torch.int64)
        values = logits[seen]
        factor = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if (sampling.presence_penalty or sampling.frequency_penalty) and drawn:
        tokens, counts = torch.tensor(drawn, dtype=torch.int64).unique(return_counts=True)
        logits[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts.to(logits.dtype)
    for token, bias in sampling.logit_bias:
        logits[token] += bias


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that `draw` draws from, FP64, [V] or [B, V]; the temperature must be above 0."""
    logits = with_temperature(logits.double(), sampling.temperature)
    logits = min_p(top_p(top_k(logits, sampling.top_k), sampling.top_p), sampling.min_p)
    return logits.softmax(dim=-1)


def with_temperature(logits: Tensor, temperature: float) -> Tensor:
    """logits ÷ temperature, the largest moved to 0 first so that no temperature, however small, overflows."""
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def top_k(logits: Tensor, k: int) -> Tensor:
    """Closes all but the k largest; tokens that tie with the k-th stay. 0 closes none."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k, dim=-1).values[..., -1:], -math.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Closes all but the fewest likeliest tokens whose probabilities sum to at least p. 1 closes none."""
    if p == 1:
        return logits
    chances = logits.softmax(dim=-1)
    # Almost always a few tokens are enough, and need not be found by sorting all.
    few = chances.topk(min(FEW, chances.shape[-1]), dim=-1)
    if bool((few.values.sum(dim=-1) >= p).all()):
        chances, order = few
        closed = torch.ones_like(logits, dtype=torch.bool)
    else:
        chances, order = chances.sort(dim=-1, descending=True, stable=True)
        closed = torch.empty_like(logits, dtype=torch.bool)
    before = chances.cumsum(dim=-1) - chances  # what the likelier ones have together
    return logits.masked_fill(closed.scatter_(-1, order, before >= p), -math.inf)


def min_p(logits: Tensor, fraction: float) -> Tensor:
    """Closes tokens less than `fraction` times as likely as the likeliest. 0 closes none."""
    if fraction == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(fraction), -math.inf)
