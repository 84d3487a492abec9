"""The movement and arithmetic of routed experts: rows sorted by expert, one matmul over all groups (report §2.1.2).

N tokens · K experts each · E experts · D width in · F width out. Row r of the sorted rows belongs to token order[r] //
K.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def sort_by_expert(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """experts [N, K] → order [N·K], which lists the flat choices expert by expert, and counts [E]."""
    flat = experts.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=n_experts)


def permute(x: Tensor, order: Tensor, k: int) -> Tensor:
    """x [N, D] → rows [N·K, D] sorted by expert; each token appears K times."""
    return _Permute.apply(x, order, k)


def unpermute(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Sorted rows [N·K, D] → weighted sums over each token's experts [N, D]; weights [N, K] in the order of choice."""
    chosen = _Restore.apply(rows, order).unflatten(0, weights.shape)  # [N, K, D]
    return (weights.to(rows.dtype)[:, None, :] @ chosen).squeeze(1)


@torch.compiler.disable  # PyTorch's tracer takes the grouped matmul in BF16 alone, and the loop's sizes are data
def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each expert's rows times its own matrix: x [M, D] sorted by expert, weight [E, F, D], counts [E] → [M, F]."""
    aligned = all(width * x.element_size() % 16 == 0 for width in weight.shape[1:])
    if x.dtype == torch.float64 or not aligned or x.shape[0] == 0:  # what PyTorch's grouped matmul refuses
        return grouped_linear_reference(x, weight, counts)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))


def grouped_linear_reference(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The same as a loop over the experts."""
    parts = [F.linear(rows, weight[e]) for e, rows in enumerate(x.split(counts.tolist()))]
    return torch.cat(parts)


class _Permute(torch.autograd.Function):
    """Gather in both directions: the default backward would scatter, which is slower and adds in no fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, _inverse(order)).unflatten(0, (-1, ctx.k)).sum(dim=1), None, None


class _Restore(torch.autograd.Function):
    """Sorted rows back in the order of choice, [N·K, D]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, _inverse(order))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
