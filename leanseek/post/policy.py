"""What a model thinks of answers that are there: log-probabilities of their tokens, and the experts these go to.

n answers · T places of the longest with its prompt · m tokens of answers in all · L layers with experts · K experts of
a token. Answers are padded on the right, where a causal model does not look.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from leanseek.model.moe import watched
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import token_logprobs
from leanseek.post.rollout import Answer


@dataclass(frozen=True)
class Padded:
    """Place i of a row holds a token, and predicts the target at i where `mask` says that this is an answer's."""

    ids: Tensor  # [n, T]
    targets: Tensor  # [n, T]
    mask: Tensor  # [n, T] bool
    drawn: Tensor  # [n, T] log-probabilities as the engine told them, 0 where there is no answer
    experts: Tensor | None  # [n, T, L, K] as the engine told them, −1 where there is no answer


def padded(answers: Sequence[Answer], device: torch.device) -> Padded:
    """Rows for answers, as long as the longest of them needs. There may be none: other ranks have some then."""
    longest = max((len(answer.question.prompt) + len(answer.tokens) for answer in answers), default=2) - 1
    shape = len(answers), longest
    ids, targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    mask, drawn = np.zeros(shape, np.bool_), np.zeros(shape, np.float32)
    told = [answer.experts for answer in answers if answer.experts is not None]
    experts = None
    if told and len(told) == len(answers):
        experts = np.full((*shape, *told[0].shape[1:]), -1, np.int64)
    for row, answer in enumerate(answers):
        first, end = len(answer.question.prompt) - 1, len(answer.question.prompt) + len(answer.tokens) - 1
        ids[row, : first + 1], ids[row, first + 1 : end] = answer.question.prompt, answer.tokens[:-1]
        targets[row, first:end], mask[row, first:end], drawn[row, first:end] = answer.tokens, True, answer.logprobs
        if experts is not None and answer.experts is not None:
            experts[row, first:end] = answer.experts

    def there(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    told_of = None if experts is None else there(experts)
    return Padded(there(ids), there(targets), there(mask), there(drawn), told_of)


@dataclass(frozen=True)
class Judged:
    logprobs: Tensor  # [n, T], 0 where there is no answer
    entropy: Tensor  # [m] nats, of the distribution that each token was drawn from
    experts: Tensor | None  # [m, L, K]


def judge(model: Transformer, rows: Padded, closed: Tensor, replay: bool = False) -> Judged:
    """What the model thinks of every answer's tokens, with gradients where those are on.

    closed: ids that are never drawn. replay: the answers' tokens go to the experts that the engine told, whatever the
    routers would choose.
    """
    assert model.lm_head is not None
    main = {name: router for name, router in model.routers().items() if name.startswith("layers.")}
    positions = torch.arange(rows.ids.shape[1], device=rows.ids.device).expand_as(rows.ids)
    try:
        if replay and rows.experts is not None:
            for router, given in zip(main.values(), rows.experts.unbind(2), strict=True):
                router.given = given.flatten(0, 1)
        with watched(main) as chosen:
            hidden = model(rows.ids, positions)
    finally:
        for router in main.values():
            router.given = None
    logprobs, entropy = token_logprobs(hidden[rows.mask], model.lm_head.weight, rows.targets[rows.mask], closed)
    spread = torch.zeros(rows.mask.shape, dtype=logprobs.dtype, device=logprobs.device)
    spread[rows.mask] = logprobs
    experts = None
    if chosen:
        every = torch.stack(list(chosen.values()), dim=1)  # [n · T, L, K]
        experts = every[rows.mask.flatten()]
    return Judged(spread, entropy, experts)


def differ(told: Tensor, here: Tensor) -> Tensor:
    """Tokens that meet another set of experts in any layer: two [m, L, K] → bool [m]."""
    return (told.sort(dim=-1).values != here.sort(dim=-1).values).flatten(1).any(dim=1)
