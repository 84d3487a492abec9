"""Cross-entropy and its gradient in place of the logits: what `ops/loss.py` does with each piece of its rows, in two
passes over memory that is there anyway.

N tokens of a piece · V vocabulary. In FP32: a loss is off by at most 2⁻²⁰ (1 + |logit of the target| + |log of the
sum|), an element of the gradient by 2⁻²² (2 + |logit| + |log of the sum|) of its probability, 2⁻²³ more at the target,
and by the rounding to the logits' precision. A NaN among a row's logits makes NaN of the row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.ops.loss import IGNORE

COLUMNS = 4096


@triton.jit
def _losses(
    logits, targets, losses, v, row_stride,
    GRADIENT: tl.constexpr, IGNORE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start, target = logits + row.to(tl.int64) * row_stride, tl.load(targets + row)
    valid = target != IGNORE
    picked = tl.load(start + tl.where(valid, target, 0)).to(tl.float32)  # before the sums: they wait for every thread
    largest = tl.full((COLUMNS,), float("-inf"), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, v, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        x = tl.load(start + column, column < v, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, x)
        against = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - against) + tl.exp(x - against)
        largest = higher
    most = tl.max(largest, axis=0)
    log_sum = most + tl.log(tl.sum(total * tl.exp(largest - most), axis=0))
    tl.store(losses + row, tl.where(valid, log_sum - picked, 0.0))
    if GRADIENT:
        for first in range(0, v, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            x = tl.load(start + column, column < v, other=0.0).to(tl.float32)
            error = tl.exp(x - log_sum) - tl.where(column == target, 1.0, 0.0)
            tl.store(start + column, tl.where(valid, error, 0.0), column < v)


def losses_and_error(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """`ops/loss.py · losses_and_error`: logits [N, V] are overwritten by their gradient, where it is asked for."""
    n, v = logits.shape
    losses = torch.empty(n, device=logits.device)
    if n:
        _losses[(n,)](
            logits, targets, losses, v, logits.stride(0), GRADIENT=gradient, IGNORE=IGNORE, COLUMNS=COLUMNS, num_warps=8
        )
    return losses, logits
