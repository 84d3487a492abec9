"""One optimizer step (report §2, §4.2): the gradients of a batch, then the update and the bias update after it.

Every loss is a sum divided once by its count over the whole batch, that of all ranks, so that neither accumulation over
micro-batches nor the number of ranks changes anything, but where the softmax is sampled (`ops/sampled.py`). B sequences
of the batch on this rank · b in a micro-batch · T tokens in a sequence.

Where samples are packed that may not see each other, `segments` says whose each token is and `positions` where in it; a
target is then of the same sample as the token at its place.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from leanseek.config import BadInput, Config
from leanseek.model.moe import Router, max_violation, updated_bias
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import IGNORE, linear_cross_entropy, linear_divergence
from leanseek.parallel.apply import before_micro_batch
from leanseek.parallel.context import Context, context_of
from leanseek.parallel.mesh import ALONE, Ranks
from leanseek.parallel.parts import local, norm_of
from leanseek.parallel.pipeline import Pipeline
from leanseek.train.counts import Counts
from leanseek.train.optim import forget_logits, qk_clip, set_learning_rate
from leanseek.train.precision import weights_quantised_once
from leanseek.train.schedule import Knobs
from leanseek.train.teacher import Teacher


@dataclass(frozen=True)
class StepResult:
    loss: float  # nats per token of the main model
    mtp_loss: float  # nats per token, mean over the depths; 0 while they are at rest
    balance_loss: float
    grad_norm: float  # before clipping
    max_violation: float  # of the least balanced layer
    finite: bool  # a step with a non-finite loss or gradient leaves the model as it was
    spike: bool = False  # so does one beyond the limits
    divergence: float | None = None  # from the teacher, nats per token; None without one


@dataclass(frozen=True)
class Limits:
    """The largest loss and gradient norm that the model learns from."""

    loss: float = math.inf
    grad_norm: float = math.inf


ANY = Limits()


class Rows(NamedTuple):
    """The rows of a batch that are on this rank's dp, or some of them; all [B, T], B perhaps 0."""

    ids: Tensor
    targets: Tensor
    positions: Tensor | None = None
    segments: Tensor | None = None

    def part(self, which: slice | tuple[slice, slice]) -> "Rows":
        positions, segments = (None if each is None else each[which] for each in (self.positions, self.segments))
        return Rows(self.ids[which], self.targets[which], positions, segments)

    def beginnings(self, length: int | None) -> "Rows":
        """The first tokens of every row, all where `length` is None."""
        return self.part((slice(None), slice(length)))


# Leaves in `.grad` this rank's part of the gradients of the whole batch; returns its losses, the same on all ranks: of
# the main model, then of each MTP depth.
Gradients = Callable[[Transformer, Rows, Knobs, Config, Ranks], list[float]]


def train_step(
    model: Transformer,
    optimizers: list[Optimizer],
    ids: Tensor,
    targets: Tensor,
    knobs: Knobs,
    config: Config,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    ranks: Ranks = ALONE,
    limits: Limits = ANY,
    pipeline: Pipeline | None = None,
    teacher: Teacher | None = None,
    counts: Counts | None = None,
) -> StepResult:
    """ids, targets, positions, segments [B, T] of this rank's rows; updates the model unless a value is not finite, or
    beyond the limits."""
    model.train()
    model.awake = knobs.layers
    make: Gradients = partial(gradients, teacher=teacher, counts=counts) if pipeline is None else pipelined(pipeline)
    with weights_quantised_once(model):
        losses = make(model, Rows(ids, targets, positions, segments), knobs, config, ranks)
    divergence = None if teacher is None else losses.pop()
    return update(model, optimizers, losses, knobs, config, ranks, limits, divergence)


def gradients(
    model: Transformer,
    rows: Rows,
    knobs: Knobs,
    config: Config,
    ranks: Ranks,
    teacher: Teacher | None = None,
    counts: Counts | None = None,
) -> list[float]:
    """`Gradients` where every rank has the whole model: one micro-batch after the other, equally many on all ranks.

    With a teacher, the last of the losses is the main model's divergence from it. With counts the main model learns in
    part from them, while the loss told is that of the text. While their loss has no weight the MTP modules are at rest:
    they compute nothing and have no loss.
    """
    depths, micro_batch = len(model.mtp) if knobs.mtp_weight else 0, config.train.micro_batch
    further = config.train.mtp_length if depths else 0
    valid = valid_targets(rows.targets, rows.segments, depths, ranks, further)
    context = context_of(rows.ids.shape[1], ranks)
    micro_batches = micro_batches_of(rows.ids, config, ranks)
    balance_sequences(model, rows.ids, config, ranks)
    taught = 0.0 if teacher is None else teacher.config.weight
    counted = counts if knobs.count_weight else None
    if teacher is not None:
        valid.append(valid[0])
    sums = torch.zeros(len(valid), dtype=torch.float64, device=rows.ids.device)
    for number in range(micro_batches):
        before_micro_batch(model, number == micro_batches - 1, config)
        part = rows.part(slice(number * micro_batch, (number + 1) * micro_batch))
        losses = loss_sums(model, *part, context, teacher, further, counted, knobs.count_weight)
        sums += torch.stack(losses).detach()
        means = [loss / count for loss, count in zip(losses, valid, strict=True)]
        own = means[0] if teacher is None else (1 - taught) * means[0] + taught * means[-1]
        (own + knobs.mtp_weight / max(depths, 1) * sum(means[1 : depths + 1])).backward()
    return _means(sums, valid, ranks)


def pipelined(pipeline: Pipeline) -> Gradients:
    """`Gradients` where the layers are on several ranks: all micro-batches go through the stages by their schedule."""

    def gradients(model: Transformer, rows: Rows, knobs: Knobs, config: Config, ranks: Ranks) -> list[float]:
        ids, targets, *packed = rows
        depths = config.model.num_nextn_predict_layers
        counts = valid_targets(targets, rows.segments, depths, ranks)
        balance_sequences(model, ids, config, ranks)
        weights = [1.0, *[knobs.mtp_weight / max(depths, 1)] * depths]
        factors = [weight / count for weight, count in zip(weights, counts, strict=True)]
        micro_batches = micro_batches_of(ids, config, ranks)
        sums = pipeline.backward(ids, targets, factors, config.train.micro_batch, micro_batches, *packed)
        return _means(sums, counts, ranks)

    return gradients


def _means(sums: Tensor, counts: list[int], ranks: Ranks) -> list[float]:
    """The losses of the whole batch, of this rank's sums."""
    means: list[float] = (ranks.total(sums, "batch").cpu() / torch.tensor(counts)).tolist()
    return means


def valid_targets(
    targets: Tensor, segments: Tensor | None, depths: int, ranks: Ranks, mtp_length: int | None = None
) -> list[int]:
    """How many targets the whole batch has for the main model and, in the first `mtp_length` tokens of its rows, for
    each MTP depth; 1 where there is none."""
    found = [(targets != IGNORE).sum()]
    targets, segments = targets[:, :mtp_length], None if segments is None else segments[:, :mtp_length]
    found += [(targets_of_depth(targets, segments, k) != IGNORE).sum() for k in range(1, depths + 1)]
    counts: list[int] = ranks.total(torch.stack(found), "dp").clamp(min=1).tolist()
    return counts


def micro_batches_of(ids: Tensor, config: Config, ranks: Ranks) -> int:
    """How many micro-batches each rank takes its rows in: as many as the one that has most needs."""
    rows = ranks.largest(torch.tensor(ids.shape[0], device=ids.device), "batch")
    return -(-int(rows) // config.train.micro_batch)


def balance_sequences(model: Transformer, ids: Tensor, config: Config, ranks: Ranks) -> None:
    """Weighs the balance loss of a sequence, one of all in the whole batch."""
    sequences = ranks.total(torch.tensor(ids.shape[0], device=ids.device), "dp")
    for router in model.routers().values():
        router.balance_weight.fill_(config.train.balance_loss_alpha / max(int(sequences), 1))


def update(
    model: Transformer,
    optimizers: list[Optimizer],
    losses: list[float],
    knobs: Knobs,
    config: Config,
    ranks: Ranks = ALONE,
    limits: Limits = ANY,
    divergence: float | None = None,
) -> StepResult:
    """What the gradients and the load of the whole batch do to the model; both are forgotten then.

    `losses` are the main one and those of the MTP depths, if any; `divergence`, from a teacher, is only told.
    """
    routers = list(model.routers().values())
    loads, balance = load_of_all(routers, ranks)
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    norm = norm_of(grads, ranks)
    loss, *further = losses
    grad_norm = norm.item()
    finite = math.isfinite(loss + sum(further) + (divergence or 0.0)) and math.isfinite(grad_norm)
    spike = finite and (loss > limits.loss or grad_norm > limits.grad_norm)
    if finite and not spike:
        if (scale := config.optimizer.clip / (grad_norm + 1e-6)) < 1:
            for grad in grads.values():
                local(grad).mul_(scale)
        set_learning_rate(optimizers, knobs.learning_rate)
        for optimizer in optimizers:
            optimizer.step()
        for router, load in zip(routers, loads, strict=True):
            if router.e_score_correction_bias is not None:
                bias = updated_bias(router.e_score_correction_bias, load, knobs.bias_speed, config.train.bias_centred)
                router.e_score_correction_bias.copy_(bias)
        if config.optimizer.qk_clip is not None:
            qk_clip(model, config.optimizer.qk_clip, ranks)
    violation = torch.tensor(max((max_violation(load) for load in loads), default=0.0), device=norm.device)
    result = StepResult(
        loss=loss,
        mtp_loss=sum(further) / max(len(further), 1),
        balance_loss=balance,
        grad_norm=grad_norm,
        max_violation=ranks.largest(violation, "pp").item(),
        finite=finite,
        spike=spike,
        divergence=divergence,
    )
    for router in routers:
        router.load.zero_()
        router.balance_loss.zero_()
    forget_logits(model)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return result


def load_of_all(routers: list[Router], ranks: Ranks) -> tuple[list[Tensor], float]:
    """The tokens [E] that each router of this rank's layers sent to each expert in the whole batch, and the balance
    loss of all layers."""
    if not routers:  # of this stage
        return [], ranks.total(torch.zeros((), dtype=torch.float64, device=ranks.device), "pp").item()
    loads = ranks.total(torch.stack([router.load for router in routers]), "batch")
    balance = ranks.total(torch.stack([router.balance_loss for router in routers]).sum().double(), "batch")
    return list(loads), ranks.total(balance, "pp").item()


def loss_sums(
    model: Transformer,
    ids: Tensor,
    targets: Tensor,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    context: Context | None = None,
    teacher: Teacher | None = None,
    mtp_length: int | None = None,
    counts: Counts | None = None,
    count_weight: float = 0.0,
) -> list[Tensor]:
    """Cross-entropy summed over the valid targets, of the main model and each MTP depth; all tensors [b, T].

    MTP learns from the first `mtp_length` tokens of every row, from all where it is None, and rests where it is 0. With
    `context`, over those of this rank's share of the rows. Raises BadInput where samples are packed that may not
    see each other. With a teacher, last, the main model's divergence from it at the same places. With counts the main
    model's has the gradient of one from what they expect, to `count_weight`.
    """
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if context is None:
        hidden = model(ids, positions, segments)
        if counts is not None:
            assert model.lm_head is not None
            loss = counts.loss(hidden, model.lm_head.weight, ids, targets, count_weight)
            rows = Rows(ids, targets, positions, segments).beginnings(mtp_length)
            return [loss, *_further_losses(model, hidden, rows)]
        losses = losses_of(model, hidden, ids, targets, positions, segments, mtp_length)
        if teacher is not None:
            assert model.lm_head is not None
            asked = targets != IGNORE
            known = teacher.likeliest(ids, positions, segments, asked)
            losses.append(linear_divergence(hidden[asked], model.lm_head.weight, *known))
        return losses
    if segments is not None:
        raise BadInput("mesh.cp: rows of samples that may not see each other are not cut: take mesh.cp=1")
    depths = range(1 if mtp_length == 0 else len(model.mtp) + 1)
    wanted, where = [context.take(targets_of_depth(targets, None, k)) for k in depths], context.take(positions)
    hidden = model(context.take(ids), where, cache=[context] * model.config.num_hidden_layers)
    following = [context.take(ids[:, k:]) for k in depths[1:]]
    further = [] if mtp_length == 0 else model.predict_further(hidden, following, where, cache=context)
    return [_cross_entropy(model, *of_depth, None) for of_depth in zip([hidden, *further], wanted, strict=True)]


def losses_of(
    model: Transformer,
    hidden: Tensor,
    ids: Tensor,
    targets: Tensor,
    positions: Tensor,
    segments: Tensor | None,
    mtp_length: int | None = None,
) -> list[Tensor]:
    """The same from the final hidden states [b, T, D]."""
    main = _cross_entropy(model, hidden, targets, segments)
    rows = Rows(ids, targets, positions, segments).beginnings(mtp_length)
    return [main, *_further_losses(model, hidden, rows)]


def _further_losses(model: Transformer, hidden: Tensor, rows: Rows) -> list[Tensor]:
    """Those of the MTP depths. `rows` may have but the first tokens of hidden [b, T, D]; of none there is no loss."""
    ids, targets, positions, segments = rows
    if not ids.shape[1]:
        return []
    assert positions is not None
    further = model.predict_further(hidden[:, : ids.shape[1]], ids, positions, segments)
    return [
        _cross_entropy(model, state, targets_of_depth(targets, segments, k), segments)
        for k, state in enumerate(further, start=1)
    ]


def _cross_entropy(model: Transformer, state: Tensor, targets: Tensor, segments: Tensor | None) -> Tensor:
    assert model.lm_head is not None
    if segments is None:
        state, targets = state.flatten(0, 1), targets.flatten()
    else:  # of a chat only the answers are learnt, so much of the head's work would be for nothing
        state, targets = state[targets != IGNORE], targets[targets != IGNORE]
    return linear_cross_entropy(state, model.lm_head.weight, targets, model.kernels.losses_and_error)


def targets_of_depth(targets: Tensor, segments: Tensor | None, depth: int) -> Tensor:
    """What position i predicts at an MTP depth k, token i + k + 1, where it is of i's own sample: [b, T] → [b, T − k].

    Every position that reaches past its sample's end is left out, and no other position attends to it that is not: so
    what an MTP module makes of two samples' tokens together reaches no loss.
    """
    wanted = targets[:, depth:]
    if segments is None:
        return wanted
    return wanted.masked_fill(segments[:, depth:] != segments[:, : wanted.shape[1]], IGNORE)
