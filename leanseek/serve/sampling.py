"""From logits to the next token: temperature, then top-k, then top-p, then min-p, then a draw.

B rows · V vocabulary. Each filter sees what the one before it left, as a distribution of its own. Filters close tokens
with a logit of minus infinity. Everything is a pure function; chance comes from the generator given.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from leanseek.config import BadInput


@dataclass(frozen=True)
class Sampling:
    """How to draw, and when to stop; the defaults draw from the model's own distribution. Raises BadInput.

    temperature: divides the logits; 0 always takes the likeliest token, whatever the filters say.
    top_k: only the k likeliest tokens; 0 is no limit.
    top_p: only the fewest likeliest tokens that have this probability together; 1 is no limit.
    min_p: only tokens at least this fraction as likely as the likeliest; 0 is no limit.
    max_tokens: at most so many tokens. stop: the text ends before the first of these strings.
    seed: the same seed, the same text.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 200
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise BadInput(f"temperature must be 0 or a positive number, got {self.temperature}")
        if self.top_k < 0:
            raise BadInput(f"top_k must be at least 1, or 0 for no limit, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise BadInput(f"min_p must be between 0 and 1, got {self.min_p}")
        if self.max_tokens < 1:
            raise BadInput(f"max_tokens must be at least 1, got {self.max_tokens}")
        if isinstance(self.stop, str) or "" in self.stop:
            raise BadInput("stop takes strings that are not empty: an empty one would stop everything")
        if not -(2**63) <= self.seed < 2**63:
            raise BadInput(f"seed must be a 64-bit integer, got {self.seed}")


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """logits [V] or [B, V] → token ids [] or [B]."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(probabilities(logits, sampling), 1, generator=generator).squeeze(-1)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that `sample` draws from, FP64, [V] or [B, V]; the temperature must be above 0."""
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
    chances, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = chances.cumsum(dim=-1) - chances  # what the likelier ones have together
    return logits.masked_fill(torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before >= p), -math.inf)


def min_p(logits: Tensor, fraction: float) -> Tensor:
    """Closes tokens less than `fraction` times as likely as the likeliest. 0 closes none."""
    if fraction == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(fraction), -math.inf)
