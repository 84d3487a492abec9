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

from leanseek.config import Config, GRPOConfig, ModelConfig
from leanseek.model.moe import max_violation
from leanseek.model.transformer import Transformer
from leanseek.parallel.apply import before_micro_batch
from leanseek.parallel.mesh import ALONE, Ranks
from leanseek.post.objective import Terms, advantages, policy_terms
from leanseek.post.policy import Judged, Padded, differ, judge, padded
from leanseek.post.rollout import Answer
from leanseek.train.schedule import Knobs
from leanseek.train.step import update


@dataclass(frozen=True)
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
    ranks: Ranks = ALONE,
) -> Learnt:
    """Updates the model on groups of answers, one group behind the other, and their rewards [n].

    closed: ids that are never drawn, whoever draws. All `ranks` are given the same answers; each reads its share.
    """
    model.eval()
    device, replay = next(model.parameters()).device, settings.router_replay
    gains = advantages(rewards, settings.group, settings.divide_by_std)
    # Without a KL term an answer that earns as much as its group does nothing but count.
    active = gains.ne(0).tolist() if reference is None else [True] * len(answers)
    parts = _divided(answers, active, config.train.micro_batch, settings, ranks)

    def rows_of(some: Sequence[int]) -> Padded:
        return padded([answers[i] for i in some], device)

    old: dict[tuple[int, ...], Tensor] = {}
    if len(parts) > 1:  # later updates begin with another model than drew the answers
        with torch.no_grad():
            for some in (some for part in parts for some in part.pieces):
                old[some] = judge(model, rows_of(some), closed, replay).logprobs
    tally = _Tally(model.config, ranks)
    for part in parts:
        for number, some in enumerate(part.pieces):
            before_micro_batch(model, number == len(part.pieces) - 1, config)
            rows = rows_of(some)
            here = judge(model, rows, closed, replay)
            with torch.no_grad():
                held_to = None if reference is None else judge(reference, rows, closed).logprobs
            before = old.get(some, here.logprobs.detach())
            terms = policy_terms(
                here.logprobs, before, held_to, rows.drawn, gains[list(some)].to(device, here.logprobs.dtype),
                rows.mask, part.answers, part.tokens, settings,
            )  # fmt: skip
            terms.loss.backward()
            tally.add(terms, here, rows, before)
        updated = update(model, optimizers, [tally.loss_of_all()], knobs, config, ranks)
        tally.grad_norm, tally.finite = updated.grad_norm, tally.finite and updated.finite
    return tally.told(len(parts), by_answer=settings.ratio == "sequence")


@dataclass(frozen=True)
class _Part:
    """What one update learns from: `answers` and their `tokens` that count, and those that this rank reads, in pieces.

    Equally many pieces on every rank, some of which may be empty: weights are gathered by all at once.
    """

    answers: int
    tokens: int
    pieces: list[tuple[int, ...]]


def _divided(
    answers: Sequence[Answer], active: Sequence[bool], at_once: int, settings: GRPOConfig, ranks: Ranks
) -> list[_Part]:
    """Whole groups, divided among the updates; in a piece are answers of about one length: padding is work in vain.

    Pieces are dealt to the ranks from the shortest to the longest, so that all have about as much to read.
    """
    readers, place = ranks.division.dp, ranks.place["dp"]
    groups = math.ceil(len(answers) / settings.group / settings.updates)
    parts = []
    for first in range(0, len(answers), groups * settings.group):
        own = range(first, min(first + groups * settings.group, len(answers)))
        counted = [i for i in own if not (answers[i].cut and settings.drop_cut)]
        order = sorted(
            (i for i in counted if active[i]), key=lambda i: len(answers[i].question.prompt) + len(answers[i].tokens)
        )
        if not order:
            continue
        size = min(at_once, math.ceil(len(order) / readers))
        pieces = [tuple(order[at : at + size]) for at in range(0, len(order), size)]
        pieces += [()] * (-len(pieces) % readers)
        parts.append(_Part(len(counted), sum(len(answers[i].tokens) for i in counted), pieces[place::readers]))
    return parts


class _Tally:
    """What a step tells, summed up as it goes: over this rank's answers, and by the methods over those of all."""

    def __init__(self, config: ModelConfig, ranks: Ranks) -> None:
        layers = max(0, config.num_hidden_layers - config.first_k_dense_replace)
        self.ranks, self.loads = ranks, torch.zeros((layers, config.n_routed_experts), dtype=torch.int64)
        self.loss = self.kl = self.clipped = self.entropy = self.gap = self.grad_norm = 0.0
        self.answers = self.tokens = self.compared = self.elsewhere = 0
        self.finite = True

    def add(self, terms: Terms, here: Judged, rows: Padded, before: Tensor) -> None:
        self.loss += terms.loss.item()
        self.kl += terms.kl.item()
        self.clipped += terms.clipped.item()
        self.entropy += here.entropy.sum().item()
        self.answers += len(rows.mask)
        self.tokens += int(rows.mask.sum())
        if not len(rows.mask):
            return
        self.gap = max(self.gap, ((before - rows.drawn) * rows.mask).abs().max().item())
        if here.experts is not None:
            for load, layer in zip(self.loads, here.experts.unbind(1), strict=True):
                load += torch.bincount(layer.flatten(), minlength=len(load)).cpu()
            if rows.experts is not None:
                self.compared += 1
                self.elsewhere += int(differ(rows.experts[rows.mask], here.experts).sum())

    def loss_of_all(self) -> float:
        return self._sums(self.loss)[0]

    def told(self, updates: int, by_answer: bool) -> Learnt:
        mine = self.loss, self.kl, self.clipped, self.entropy, self.answers, self.tokens, self.compared, self.elsewhere
        loss, kl, clipped, entropy, answers, tokens, compared, elsewhere = self._sums(*mine)
        loads = self.ranks.total(self.loads.to(self.ranks.device))
        gap = self.ranks.largest(torch.tensor(self.gap, dtype=torch.float64, device=self.ranks.device))
        units = max(answers if by_answer else tokens, 1)
        return Learnt(
            loss=loss / max(updates, 1),
            kl=kl / units,
            clip_share=clipped / units,
            entropy=entropy / max(tokens, 1),
            grad_norm=self.grad_norm,
            max_violation=max(map(max_violation, loads), default=0.0),
            logprob_gap=gap.item(),
            experts_differ=elsewhere / max(tokens, 1) if compared else None,
            tokens=int(tokens),
            finite=self.finite,
        )

    def _sums(self, *mine: float) -> list[float]:
        sums: list[float] = self.ranks.total(torch.tensor(mine, dtype=torch.float64, device=self.ranks.device)).tolist()
        return sums
