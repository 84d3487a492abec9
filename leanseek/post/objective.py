"""GRPO's objective (report §5.2.2, eq. 26–28): advantages in a group, clipped ratios, the k3 estimate of the KL.

n answers of T places, padded; `mask` says which places are an answer's. A group is the answers to one question, one
behind the other. Everything is a pure function of tensors, in nats. The options are the corrections that were published
since: advantages without the division, a normalisation that does not favour short wrong answers (Dr. GRPO), loss by
token and more room above (DAPO), truncated importance weights for an engine that computes otherwise than the trainer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from leanseek.config import GRPOConfig

TINY = 1e-6  # beside a group's standard deviation; a group without one has advantages of 0


def advantages(rewards: Tensor, group: int, divide_by_std: bool = True) -> Tensor:
    """A = (r − mean of the group) ÷ its standard deviation (eq. 28): rewards [n] → [n]. The deviation is over G."""
    grouped = rewards.view(-1, group)
    apart = grouped - grouped.mean(dim=1, keepdim=True)
    if divide_by_std:
        apart = apart / (grouped.std(dim=1, keepdim=True, correction=0) + TINY)
    return apart.flatten()


def all_equal(rewards: Tensor, group: int) -> Tensor:
    """Which groups teach nothing, as all their answers earn the same: rewards [n] → bool [n ÷ G]."""
    grouped = rewards.view(-1, group)
    return (grouped == grouped[:, :1]).all(dim=1)


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """π_ref ÷ π − ln(π_ref ÷ π) − 1 (eq. 27), never negative, and the KL divergence in the mean over π's own draws."""
    log_ratio = reference - logprobs
    return log_ratio.exp() - log_ratio - 1


@dataclass(frozen=True)
class Terms:
    """Sums over some of a step's answers, so that micro-batches and ranks add up. Only `loss` carries a gradient."""

    loss: Tensor
    kl: Tensor
    clipped: Tensor  # tokens (answers, where the ratio is by sequence) whose gradient the clipping took


def policy_terms(
    logprobs: Tensor,
    old: Tensor,
    reference: Tensor | None,
    drawn: Tensor,
    advantage: Tensor,
    mask: Tensor,
    answers: int,
    tokens: int,
    config: GRPOConfig,
) -> Terms:
    """The objective to be minimised, as a sum over these answers that is already divided by the whole step's counts.

    logprobs, old, reference, drawn, mask [n, T]: of each token under the model, under the model that the step began
    with, under the reference (None: no KL), and as the engine saw it. advantage [n]. `answers` and `tokens` that are
    learnt from in the whole step, over all micro-batches and ranks.
    """
    learnt = mask.to(logprobs.dtype)
    own, old, drawn = (torch.where(mask, values, 0.0) for values in (logprobs, old, drawn.to(logprobs.dtype)))
    reference = None if reference is None else torch.where(mask, reference, 0.0)
    weight = learnt * shares(learnt, answers, tokens, config)
    if config.ratio == "sequence":  # probabilities of whole answers: those of their tokens multiply
        own, old, drawn = (values.sum(dim=1, keepdim=True) for values in (own, old, drawn))
        reference = None if reference is None else reference.sum(dim=1, keepdim=True)
        learnt = mask.any(dim=1, keepdim=True).to(logprobs.dtype)
        weight = learnt / max(answers, 1)
    gain = advantage[:, None]
    ratio = (own - old).exp()
    free, bounded = ratio * gain, ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * gain
    kl = torch.zeros_like(own) if reference is None else k3(own, reference)
    loss = config.kl_weight * kl - importance(old, drawn, config.importance_cap) * torch.minimum(free, bounded)
    return Terms((loss * weight).sum(), (kl.detach() * learnt).sum(), ((bounded < free) * learnt).sum())


def shares(learnt: Tensor, answers: int, tokens: int, config: GRPOConfig) -> Tensor:
    """What a token's term is multiplied by, [n, 1], from which tokens are learnt [n, T], 1 or 0."""
    match config.normalise:
        case "answer":  # the mean over an answer's tokens, then over answers: as published
            return 1 / (learnt.sum(dim=1, keepdim=True).clamp(min=1) * max(answers, 1))
        case "token":
            return torch.full_like(learnt[:, :1], 1 / max(tokens, 1))
        case "constant":
            return torch.full_like(learnt[:, :1], 1 / (config.max_tokens * max(answers, 1)))


def importance(old: Tensor, drawn: Tensor, cap: float | None) -> Tensor:
    """min(π_old ÷ π_engine, cap), which corrects for an engine that computes otherwise than the trainer; else 1."""
    return torch.ones_like(old) if cap is None else (old - drawn).exp().clamp(max=cap)
