"""Tokens to their experts and back (report §2.1.2): rows copied to where they belong, and summed with weights again.

N tokens · K experts each · P rows sorted by expert · D width. `place` [N, K] is that of a `Layout` of `ops/experts.py`,
where the plain twins are. Copies are exact. Sums of K weighted rows are formed in FP32, in the order of choice: off by
at most (K + 1) · 2⁻²⁴ · Σ|w x| and the rounding of the result.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.ops.experts import Layout
from leanseek.ops.triton_kernels.common import cdiv

COLUMNS = 1024


@triton.jit
def _spread(
    x, place, weights, rows, out, weight_grad, choices, d, x_row, rows_row,
    WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    choice = tl.program_id(0)  # of N · K
    token, to = (choice // choices).to(tl.int64), tl.load(place + choice).to(tl.int64)
    along = tl.zeros((COLUMNS,), tl.float32)
    weight = tl.load(weights + choice).to(tl.float32) if WEIGHTED else 1.0
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        values = tl.load(x + token * x_row + column, column < d, other=0.0)
        if WEIGHTED:
            row = tl.load(rows + to * rows_row + column, column < d, other=0.0)
            along += values.to(tl.float32) * row.to(tl.float32)
            tl.store(out + to * d + column, values.to(tl.float32) * weight, column < d)
        else:
            tl.store(out + to * d + column, values, column < d)
    if WEIGHTED:
        tl.store(weight_grad + choice, tl.sum(along, axis=0))


@triton.jit
def _collect(rows, place, weights, out, choices, d, rows_row, WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for k in range(choices):
        at = tl.load(place + token * choices + k).to(tl.int64)
        row = tl.load(rows + at * rows_row + column, column < d, other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weights + token * choices + k).to(tl.float32)
        total += row
    tl.store(out + token * d + column, total, column < d)


def permute(x: Tensor, layout: Layout) -> Tensor:
    """x [N, D] → rows [P, D] sorted by expert; rows of padding are zeros."""
    return _Permute.apply(x, layout)


def unpermute(rows: Tensor, layout: Layout, weights: Tensor) -> Tensor:
    """Sorted rows [P, D] → weighted sums over each token's experts [N, D]; weights [N, K] at their own precision."""
    return _Unpermute.apply(rows, weights, layout)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return _spread_rows(x, layout)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _collected(grad, ctx.layout.place), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        ctx.save_for_backward(rows, weights)
        return _collected(rows, layout.place, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        rows, weights = ctx.saved_tensors
        grad_rows, grad_weights = _spread_rows(grad.to(rows.dtype), ctx.layout, weights, rows)
        return grad_rows, grad_weights, None


def _spread_rows(
    x: Tensor, layout: Layout, weights: Tensor | None = None, rows: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """x [N, D] → [P, D], each row times its weight; with weights also the products x · row [N, K]."""
    x, place = _in_one_piece(x), layout.place.contiguous()
    p, d = layout.source.shape[0], x.shape[1]
    out = (torch.empty if p == place.numel() else torch.zeros)(p, d, dtype=x.dtype, device=x.device)
    weight_grad = None if weights is None else torch.empty_like(weights, memory_format=torch.contiguous_format)
    rows = x if rows is None else _in_one_piece(rows)
    if place.numel() and d:
        _spread[(place.numel(),)](
            x, place, weights if weights is None else weights.contiguous(), rows, out, weight_grad, place.shape[1], d,
            x.stride(0), rows.stride(0), WEIGHTED=weights is not None, COLUMNS=COLUMNS,
        )  # fmt: skip
    return out, weight_grad


def _collected(rows: Tensor, place: Tensor, weights: Tensor | None = None) -> Tensor:
    """rows [P, D], place [N, K] → Σₖ weights[n, k] · rows[place[n, k]], [N, D]."""
    rows = _in_one_piece(rows)
    (n, choices), d = place.shape, rows.shape[1]
    out = torch.empty(n, d, dtype=rows.dtype, device=rows.device)
    if out.numel():
        _collect[(n, cdiv(d, COLUMNS))](
            rows, place.contiguous(), weights if weights is None else weights.contiguous(), out, choices, d,
            rows.stride(0), WEIGHTED=weights is not None, COLUMNS=COLUMNS,
        )  # fmt: skip
    return out


def _in_one_piece(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
