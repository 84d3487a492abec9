"""One optimizer step (report §2, §4.2): losses, gradients, clipping, update, and the bias update after it.

Every loss is a sum divided once by its count over the whole global batch, so that accumulation over micro-batches
changes nothing. B sequences in the batch · b in a micro-batch · T tokens in a sequence.

Where samples are packed that may not see each other, `segments` says whose each token is and `positions` where in it; a
target is then of the same sample as the token at its place.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from leanseek.config import Config
from leanseek.model.moe import max_violation, updated_bias
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import IGNORE, linear_cross_entropy, linear_divergence
from leanseek.train.optim import forget_logits, qk_clip, set_learning_rate
from leanseek.train.schedule import Knobs
from leanseek.train.teacher import Teacher


@dataclass(frozen=True)
class StepResult:
    loss: float  # nats per token of the main model
    mtp_loss: float  # nats per token, mean over the depths
    balance_loss: float
    grad_norm: float  # before clipping
    max_violation: float  # of the least balanced layer
    finite: bool  # a step with a non-finite loss or gradient leaves the model as it was
    divergence: float | None = None  # from the teacher, nats per token; None without one


def train_step(
    model: Transformer,
    optimizers: list[Optimizer],
    ids: Tensor,
    targets: Tensor,
    knobs: Knobs,
    config: Config,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    teacher: Teacher | None = None,
) -> StepResult:
    """ids, targets, positions, segments [B, T] of the whole batch; updates the model unless a value is not finite."""
    model.train()
    routers = model.routers().values()
    depths = len(model.mtp)
    valid = [int((targets_of_depth(targets, segments, k) != IGNORE).sum()) for k in range(depths + 1)]
    counts = [max(count, 1) for count in valid]  # a depth that no document reaches adds nothing
    taught = 0.0 if teacher is None else teacher.config.weight
    if teacher is not None:
        counts.append(counts[0])
    for router in routers:
        router.balance_weight.fill_(config.train.balance_loss_alpha / ids.shape[0])
    sums = torch.zeros(len(counts), dtype=torch.float64)
    for first in range(0, ids.shape[0], config.train.micro_batch):
        rows = slice(first, first + config.train.micro_batch)
        places, samples = (None if tensor is None else tensor[rows] for tensor in (positions, segments))
        losses = loss_sums(model, ids[rows], targets[rows], places, samples, teacher)
        sums += torch.stack(losses).detach().cpu()
        means = [loss / count for loss, count in zip(losses, counts, strict=True)]
        own = means[0] if teacher is None else (1 - taught) * means[0] + taught * means[-1]
        (own + knobs.mtp_weight / max(depths, 1) * sum(means[1 : depths + 1])).backward()
    loss, *further = (sums / torch.tensor(counts)).tolist()
    divergence = None if teacher is None else further.pop()
    return update(model, optimizers, knobs, config, loss, sum(further) / max(depths, 1), divergence)


def update(
    model: Transformer,
    optimizers: list[Optimizer],
    knobs: Knobs,
    config: Config,
    loss: float,
    mtp_loss: float = 0.0,
    divergence: float | None = None,
) -> StepResult:
    """Takes the step that the gradients at hand ask for, unless one of them or a loss is not finite.

    Whatever belongs to the step alone, gradients and counts, is cleared.
    """
    routers = model.routers().values()
    parameters = [p for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    finite = math.isfinite(loss + mtp_loss + (divergence or 0.0)) and math.isfinite(norm.item())
    if finite:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.optimizer.clip, norm)
        set_learning_rate(optimizers, knobs.learning_rate)
        for optimizer in optimizers:
            optimizer.step()
        for router in routers:
            if router.e_score_correction_bias is not None:
                bias = updated_bias(
                    router.e_score_correction_bias, router.load, knobs.bias_speed, config.train.bias_centred
                )
                router.e_score_correction_bias.copy_(bias)
        if config.optimizer.qk_clip is not None:
            qk_clip(model, config.optimizer.qk_clip)
    result = StepResult(
        loss=loss,
        mtp_loss=mtp_loss,
        balance_loss=sum(router.balance_loss.item() for router in routers),
        grad_norm=norm.item(),
        max_violation=max((max_violation(router.load) for router in routers), default=0.0),
        finite=finite,
        divergence=divergence,
    )
    for router in routers:
        router.load.zero_()
        router.balance_loss.zero_()
    forget_logits(model)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return result


def loss_sums(
    model: Transformer,
    ids: Tensor,
    targets: Tensor,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
    teacher: Teacher | None = None,
) -> list[Tensor]:
    """Cross-entropy summed over the valid targets, of the main model and of each MTP depth; all tensors [b, T].

    With a teacher, last, the main model's divergence from it at the same places.
    """
    assert model.lm_head is not None
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    hidden = model(ids, positions, segments)
    losses = []
    for k, state in enumerate([hidden, *model.predict_further(hidden, ids, positions, segments)]):
        wanted = targets_of_depth(targets, segments, k)
        if segments is None:
            state, wanted = state.flatten(0, 1), wanted.flatten()
        else:  # of a chat only the answers are learnt, so much of the head's work would be for nothing
            state, wanted = state[wanted != IGNORE], wanted[wanted != IGNORE]
        losses.append(linear_cross_entropy(state, model.lm_head.weight, wanted))
    if teacher is not None:
        asked = targets != IGNORE
        known = teacher.likeliest(ids, positions, segments, asked)
        losses.append(linear_divergence(hidden[asked], model.lm_head.weight, *known))
    return losses


def targets_of_depth(targets: Tensor, segments: Tensor | None, depth: int) -> Tensor:
    """What position i predicts at an MTP depth k, token i + k + 1, where it is of i's own sample: [b, T] → [b, T − k].

    Every position that reaches past its sample's end is left out, and no other position attends to it that is not: so
    what an MTP module makes of two samples' tokens together reaches no loss.
    """
    wanted = targets[:, depth:]
    if segments is None:
        return wanted
    return wanted.masked_fill(segments[:, depth:] != segments[:, : wanted.shape[1]], IGNORE)
