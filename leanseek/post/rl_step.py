"""One step of GRPO: what the optimizers make of answers and what these earned (report §5.2.2).

Every sum is divided by a count over the whole step, so that micro-batches, and ranks that each bring answers of an
engine of their own, change nothing. The model is in evaluation mode throughout: it has no dropout, and its routers then
count nothing and add no balance loss, so that the bias stays as pre-training left it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from leanseek.config import Config, GRPOConfig
from leanseek.model.moe import max_violation
from leanseek.model.transformer import Transformer
from leanseek.post.objective import advantages, policy_terms
from leanseek.post.policy import differ, judge, padded
from leanseek.post.rollout import Answer
from leanseek.train.schedule import Knobs
from leanseek.train.step import update


@dataclass
class Learnt:
    """Of one step; means are over the tokens that were learnt from, in nats."""

    loss: float = 0.0
    kl: float = 0.0  # to the reference, as k3 estimates it
    clip_share: float = 0.0
    entropy: float = 0.0
    grad_norm: float = 0.0  # of the last update, before clipping
    max_violation: float = 0.0  # of the least balanced layer, over the answers' tokens
    logprob_gap: float = 0.0  # the largest between engine and trainer, before the first update
    experts_differ: float | None = None  # share of tokens that the engine sent to other experts than the trainer
    tokens: int = 0
    finite: bool = True


def learn(
    model: Transformer,
    optimizers: list[Optimizer],
    reference: Transformer | None,
    answers: Sequence[Answer],
    rewards: Tensor,
    closed: Tensor,
    knobs: Knobs,
    config: Config,
    settings: GRPOConfig,
) -> Learnt:
    """Updates the model on groups of answers, one group behind the other, and their rewards [n].

    closed: ids that are never drawn, whoever draws.
    """
    model.eval()
    gains = advantages(rewards, settings.group, settings.divide_by_std)
    numbers = [i for i, answer in enumerate(answers) if not (answer.cut and settings.drop_cut)]
    per_update = math.ceil(len(answers) / settings.group / settings.updates) * settings.group
    parts = [[i for i in numbers if i // per_update == k] for k in range(settings.updates)]
    parts = [part for part in parts if part]
    # Without a KL term an answer that earns as much as its group does nothing but count.
    still = reference is None
    micro = [_alike([i for i in part if gains[i] or not still], answers, config.train.micro_batch) for part in parts]
    device = next(model.parameters()).device
    old: dict[tuple[int, ...], Tensor] = {}
    if len(parts) > 1:  # later updates begin with another model than drew the answers
        with torch.no_grad():
            for some in (some for part in micro for some in part):
                rows = padded([answers[i] for i in some], device)
                old[some] = judge(model, rows, closed, settings.router_replay).logprobs
    told, seen = Learnt(), _Seen(model.config.n_routed_experts)
    for part, pieces in zip(parts, micro, strict=True):
        counted = sum(len(answers[i].tokens) for i in part)
        for some in pieces:
            rows = padded([answers[i] for i in some], device)
            here = judge(model, rows, closed, settings.router_replay)
            with torch.no_grad():
                held_to = None if reference is None else judge(reference, rows, closed).logprobs
            before = old.get(some, here.logprobs.detach())
            terms = policy_terms(
                here.logprobs, before, held_to, rows.drawn, gains[list(some)].to(device, here.logprobs.dtype),
                rows.mask, len(part), counted, settings,
            )  # fmt: skip
            terms.loss.backward()
            told.loss += terms.loss.item() / len(parts)
            told.kl += terms.kl.item()
            told.clip_share += terms.clipped.item()
            told.entropy += here.entropy.sum().item()
            told.tokens += int(rows.mask.sum())
            told.logprob_gap = max(told.logprob_gap, ((before - rows.drawn) * rows.mask).abs().max().item())
            if here.experts is not None:
                seen.add(here.experts, None if rows.experts is None else rows.experts[rows.mask])
        updated = update(model, optimizers, knobs, config, told.loss)
        told.grad_norm, told.finite = updated.grad_norm, told.finite and updated.finite
    units = max(len(numbers) if settings.ratio == "sequence" else told.tokens, 1)
    told.kl, told.clip_share, told.entropy = (
        told.kl / units,
        told.clip_share / units,
        told.entropy / max(told.tokens, 1),
    )
    told.max_violation = max(map(max_violation, seen.loads), default=0.0)
    told.experts_differ = seen.other / told.tokens if seen.compared else None
    return told


class _Seen:
    """Where the answers' tokens went: how many to each expert, and how many elsewhere than the engine says."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.loads: list[Tensor] = []  # [E] of each layer
        self.other, self.compared = 0, False

    def add(self, here: Tensor, told: Tensor | None) -> None:
        """Both [m, L, K]."""
        counts = [torch.bincount(layer.flatten(), minlength=self.experts).cpu() for layer in here.unbind(1)]
        self.loads = [a + b for a, b in zip(self.loads, counts, strict=True)] if self.loads else counts
        if told is not None:
            self.other, self.compared = self.other + int(differ(told, here).sum()), True


def _alike(part: Sequence[int], answers: Sequence[Answer], most: int) -> list[tuple[int, ...]]:
    """At most so many at a time, of about one length: padding is work for nothing."""
    order = sorted(part, key=lambda i: len(answers[i].question.prompt) + len(answers[i].tokens))
    return [tuple(order[first : first + most]) for first in range(0, len(order), most)]
