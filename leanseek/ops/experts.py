"""The movement and arithmetic of routed experts: rows sorted by expert, one matmul over all groups (report §2.1.2).

N tokens · K experts each · E experts · D width in · F width out · P rows, N·K and the padding between experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops import cpu_kernels

# BF16 on a CPU: oneDNN makes code for every new shape, so shapes must recur, and it multiplies equal blocks in one call
# twice as fast as groups of any size. Rows of padding cost less than either.
BLOCK = 64
MOST_PADDING = 1.5  # rows for each row that is needed, above which equal blocks no longer pay


@dataclass(frozen=True)
class Layout:
    """Where each choice of each token lies among the sorted rows. Rows that nobody's place is are padding."""

    place: Tensor  # [N, K] row of each choice
    source: Tensor  # [P] token of each row; padding repeats token 0
    counts: Tensor  # [E] rows of each expert, its padding included


def lay_out(experts: Tensor, n_experts: int, padded: bool = False) -> Layout:
    """experts [N, K] → rows expert by expert, the tokens of each in their order.

    `padded` rounds each expert's rows up: all to one size where loads are even enough, else each to whole blocks.
    """
    flat = experts.flatten()
    order = flat.argsort(stable=True)  # [N·K] the flat choices, expert by expert
    counts = loads = torch.bincount(flat, minlength=n_experts)
    if padded:
        counts = -(-loads // BLOCK) * BLOCK
        largest = -(-loads.max() // 32) * 32
        if largest * n_experts <= MOST_PADDING * flat.numel():
            counts = largest.expand(n_experts)
    shift = (counts.cumsum(0) - counts) - (loads.cumsum(0) - loads)  # rows of padding before each expert
    rows = torch.arange(flat.numel(), device=flat.device)
    rows = rows + shift[flat[order]] if padded else rows
    place = torch.empty_like(flat).scatter_(0, order, rows).view_as(experts)
    source = order // experts.shape[1]
    if padded:
        source = flat.new_zeros(int(counts.sum())).scatter_(0, rows, source)
    return Layout(place, source, counts)


def wants_padding(x: Tensor, choices: int, n_experts: int) -> bool:
    """Whether rows of this kind are multiplied faster with padding between the experts."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and choices >= BLOCK * n_experts // 2


def permute(x: Tensor, layout: Layout) -> Tensor:
    """x [N, D] → rows [P, D] sorted by expert; each token appears K times. Gradients of padding go nowhere."""
    return _Permute.apply(x, layout)


def unpermute(rows: Tensor, layout: Layout, weights: Tensor) -> Tensor:
    """Sorted rows [P, D] → weighted sums over each token's experts [N, D]; weights [N, K] in the order of choice."""
    return _Unpermute.apply(rows, weights.to(rows.dtype), layout)


@torch.compiler.disable  # PyTorch's tracer takes the grouped matmul in BF16 alone, and the loop's sizes are data
def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each expert's rows times its own matrix: x [P, D] sorted by expert, weight [E, F, D], counts [E] → [P, F]."""
    aligned = all(width * x.element_size() % 16 == 0 for width in weight.shape[1:])
    if x.dtype == torch.float64 or not aligned or x.shape[0] == 0:  # what PyTorch's grouped matmul refuses
        return grouped_linear_reference(x, weight, counts)
    if x.device.type == "cpu" and bool((counts == counts[0]).all()):
        return _EqualGroups.apply(x, weight)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))


def grouped_linear_reference(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The same as a loop over the experts."""
    parts = [F.linear(rows, weight[e]) for e, rows in enumerate(x.split(counts.tolist()))]
    return torch.cat(parts)


class _EqualGroups(torch.autograd.Function):
    """`grouped_linear` where every expert has equally many rows: one batched matmul each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x.view(weight.shape[0], -1, x.shape[1]), weight.mT).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.view(weight.shape[0], -1, grad.shape[1])
        grad_x = torch.bmm(grad, weight).flatten(0, 1) if ctx.needs_input_grad[0] else None
        # Left to autograd, the weight's gradient would come out transposed in memory, and be copied at every use.
        grad_weight = torch.bmm(grad.mT, x.view(*grad.shape[:2], -1)) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


class _Permute(torch.autograd.Function):
    """Gather in both directions: the default backward would scatter, which is slower and adds in no fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_of_rows(grad, ctx.layout.place), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        ctx.save_for_backward(rows, weights)
        return _sum_of_rows(rows, layout.place, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights = ctx.saved_tensors
        place, source = ctx.layout.place, ctx.layout.source
        if cpu_kernels.takes(rows, weights, grad):
            return *cpu_kernels.unpermute_backward(grad, rows, weights, place), None
        by_row = weights.new_zeros(rows.shape[0]).scatter_(0, place.flatten(), weights.flatten())  # 0 for padding
        spread = grad.index_select(0, source)  # [P, D]
        along = torch.linalg.vecdot(spread, rows) if rows.dtype != torch.bfloat16 else (spread * rows).sum(dim=-1)
        return spread.mul_(by_row[:, None]), along[place], None


def _sum_of_rows(rows: Tensor, place: Tensor, weights: Tensor | None = None) -> Tensor:
    """rows [P, D], place [N, K] → Σₖ weights[n, k] · rows[place[n, k]], [N, D], in one pass over the rows."""
    return F.embedding_bag(place, rows, mode="sum", per_sample_weights=weights)
