"""The output head's losses without the full logits, always a sum: means are taken once, over the global batch.

N tokens · D width · V vocabulary · k likeliest tokens. A target of IGNORE adds nothing to the sum.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops import cpu_kernels

IGNORE = -100
_LOGITS_AT_ONCE = 1 << 27  # values of the logits held at a time: 256 MiB in BF16, 1,000 rows of V3's vocabulary
_LOGITS_IN_CACHE = 1 << 20  # and on a CPU, where several passes go over them


def losses_and_error(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """logits [N, V], targets [N] → −log p of each target in nats [N] in at least FP32, 0 where it is IGNORE; and, where
    a `gradient` is asked for, d loss / d logits [N, V] in the logits' precision. The logits may be overwritten."""
    if gradient and cpu_kernels.takes(logits):
        return cpu_kernels.cross_entropy(logits, targets), logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    valid, index = (targets != IGNORE)[:, None], targets.clamp(min=0)[:, None]
    if not gradient:
        return ((wide.logsumexp(dim=-1, keepdim=True) - wide.gather(1, index)) * valid).squeeze(1), logits
    total, error = _total_and_softmax(wide)
    losses = ((total - wide.gather(1, index)) * valid).squeeze(1)
    error.scatter_add_(1, index, wide.new_full(index.shape, -1.0)).mul_(valid)
    return losses, error.to(logits.dtype)


def _total_and_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ exp of each row [n, 1] and its softmax [n, V], with one exponential for both: what the softmax makes of the
    largest logit, which it cannot make small, says what it divided by."""
    softmax = logits.softmax(dim=-1)
    return logits.amax(dim=-1, keepdim=True) - softmax.amax(dim=-1, keepdim=True).log(), softmax


LossesAndError = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
OfLogits = Callable[[Tensor, bool], tuple[Tensor, Tensor]]  # losses [n] and error [n, S] of logits [n, S]
# Of which ids [S] some rows need the logits, and what is added to each of these, if anything; None: all, and nothing.
OfRows = Callable[[slice], tuple[tuple[Tensor, Tensor | None] | None, OfLogits]]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, of_logits: LossesAndError = losses_and_error
) -> Tensor:
    """−Σ log softmax(hidden weightᵀ)[target] over the valid targets, a scalar in at least FP32.

    hidden [N, D], weight [V, D], targets [N]. Works through the rows in pieces and takes each piece's gradient while
    its logits are at hand, so that memory does not grow with N·V and nothing is computed twice.
    """
    return head_loss(hidden, weight, lambda rows: (None, lambda logits, grad: of_logits(logits, targets[rows], grad)))


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """−log p of each target in nats, [N] in at least FP32; 0 where the target is IGNORE."""
    weight = weight.to(hidden.dtype)
    pieces = _pieces(hidden, weight.shape[0])
    return torch.cat([losses_and_error(hidden[rows] @ weight.T, targets[rows], False)[0] for rows in pieces])


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, closed: Tensor) -> tuple[Tensor, Tensor]:
    """log p of each target, with its gradient, and the entropy of each distribution, without: nats, [N] each.

    hidden [N, D], weight [V, D], targets [N], all valid; closed: ids that are never drawn, so that the others share the
    probability. At least FP32. The logits are worked out piece by piece and, for the gradient, once more, so that
    memory does not grow with N·V.
    """
    return _TokenLogprobs.apply(hidden, weight, targets, closed)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, closed: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, targets, closed)
        picked, entropies, narrow = [], [], weight.to(hidden.dtype)
        for rows in _pieces(hidden, weight.shape[0]):
            logits = _logits(hidden[rows], narrow).index_fill_(1, closed, -math.inf)
            picked.append(logits.gather(1, targets[rows, None]).squeeze(1) - logits.logsumexp(dim=-1))
            entropies.append(torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1))
        logprob, entropy = torch.cat(picked), torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets, closed = ctx.saved_tensors
        narrow, grad_hidden, grad_weight = weight.to(hidden.dtype), torch.empty_like(hidden), torch.zeros_like(weight)
        for rows in _pieces(hidden, weight.shape[0]):
            index, scale = targets[rows, None], grad[rows, None]
            chances = _logits(hidden[rows], narrow).index_fill_(1, closed, -math.inf).softmax(dim=-1)
            error = chances.mul_(-scale).scatter_add_(1, index, scale).to(hidden.dtype)  # d (grad · log p) / d logits
            grad_hidden[rows] = error @ narrow
            grad_weight += error.T @ hidden[rows]
        return grad_hidden, grad_weight, None, None


@torch.no_grad()
def likeliest(hidden: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row and their log-probabilities among all: hidden [N, D], weight [V, D] → [N, k]
    twice, in at least FP32."""
    ids, logprobs, weight = [], [], weight.to(hidden.dtype)
    for rows in _pieces(hidden, weight.shape[0]):
        best = _logits(hidden[rows], weight).log_softmax(dim=-1).topk(k, dim=-1)
        ids.append(best.indices)
        logprobs.append(best.values)
    return torch.cat(ids), torch.cat(logprobs)


def linear_divergence(hidden: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    """Σ KL(p ‖ softmax(hidden weightᵀ)) where of p only the k likeliest tokens are known, a scalar in at least FP32.

    hidden [N, D], weight [V, D], ids and logprobs [N, k]. All other tokens are taken as one, whose probability is what
    the known ones leave: a bound from below of the divergence over all of them, which is 0 where the two agree, and
    the divergence itself when k is V. Were p made to sum to one over its k, the student would learn to close the rest.
    """
    return head_loss(
        hidden, weight, lambda rows: (None, lambda logits, _: _divergence(logits, ids[rows], logprobs[rows]))
    )


def _divergence(logits: Tensor, ids: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """logits [N, V], ids and logprobs [N, k] → the divergences [N] and d divergence / d logits [N, V]."""
    own = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    known = logprobs.to(own.dtype)
    p = known.exp()
    beyond_p = (1 - p.sum(dim=-1, keepdim=True)).clamp(min=0)  # [N, 1]
    beyond = own.exp().scatter(1, ids, 0.0)  # the student's probabilities of all other tokens
    beyond_q = beyond.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(own.dtype).tiny)
    losses = (p * (known - own.gather(1, ids))).sum(dim=-1)
    losses = losses + (torch.xlogy(beyond_p, beyond_p) - beyond_p * beyond_q.log()).squeeze(1)
    # It is q − p, where beyond the known ones p is shared out as q is.
    error = own.exp() - (beyond * (beyond_p / beyond_q)).scatter_add_(1, ids, p)
    return losses, error.to(logits.dtype)


def head_loss(hidden: Tensor, weight: Tensor, of_rows: OfRows, ids: float | None = None, pieces: int = 1) -> Tensor:
    """The sum of what `of_rows` makes of the logits of rows, in so many pieces at least, of about so many `ids` each;
    None: of all."""
    return _HeadLoss.apply(hidden, weight, of_rows, round(ids or weight.shape[0]), pieces)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, of_rows: OfRows, many: int, pieces: int) -> Tensor:
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        narrow = weight.to(hidden.dtype)
        gradient = grad_hidden is not None or grad_weight is not None
        for rows in _pieces(hidden, many, pieces):
            chosen, of_logits = of_rows(rows)
            ids, added = chosen or (None, None)
            part = narrow if ids is None else narrow.index_select(0, ids)
            logits = hidden[rows] @ part.T if added is None else _product_and(added, hidden[rows], part)
            losses, error = of_logits(logits, gradient)
            total = total + losses.sum()
            if grad_hidden is not None:
                grad_hidden[rows] = error @ part
            if grad_weight is not None:
                grad = error.T @ hidden[rows]
                if ids is None:
                    grad_weight += grad
                else:
                    grad_weight.index_add_(0, ids, grad.to(grad_weight.dtype))
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None, None


def _product_and(added: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [n, D] weight [S, D]ᵀ + added [S], rounded once.

    Rounded before and after, a logit in BF16 would err to one side for all that is added alike. So it is two more
    columns of the product, the second with what the first has rounded off, filled up to eight: GPUs ask for that.
    """
    high = added.to(weight.dtype)
    low = torch.where(high.isfinite(), added - high, 0.0)
    columns = F.pad(torch.stack((high, low.to(weight.dtype)), dim=1), (0, 6))
    return F.pad(hidden, (0, 8), value=1.0) @ torch.cat((weight, columns), dim=1).T


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))


def _pieces(hidden: Tensor, vocabulary: int, at_least: int = 1) -> list[slice]:
    values = min(_LOGITS_AT_ONCE, _LOGITS_IN_CACHE) if hidden.device.type == "cpu" else _LOGITS_AT_ONCE
    rows, step = hidden.shape[0], max(1, min(values // vocabulary, -(-hidden.shape[0] // at_least)))
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]
