"""Grouped matmul of routed experts, forward and both gradients, where only the GPU knows how many rows each has.

P rows sorted by expert · E experts · D width in · F width out. Products are summed in FP32 over all of K: an element is
off from exact arithmetic on the same operands by at most K · 2⁻²⁴ · Σ |x w| and the rounding of the output. The plain
twin is `ops/experts.py · grouped_linear_reference`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.ops.triton_kernels.common import aligned, cdiv, described, power_of_two, processors
from leanseek.ops.triton_kernels.tiles import RAGGED, Tile, fitting, located, most_row_tiles, rows_of_group, swizzled

TILES = (Tile(128, 256, 8, 3), Tile(128, 128, 8, 4), Tile(64, 128, 4, 4), Tile(64, 64, 4, 4))
WGRAD_TILES = (Tile(128, 256, 8, 3), Tile(128, 128, 8, 4), Tile(64, 64, 4, 4))
DEPTH = 64  # values of K at once


@triton.jit
def _grouped(
    x, weight, out, counts, row_tiles, groups, rows, n, k, out_row,
    TRANSPOSED: tl.constexpr, FORM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = swizzled(tl.program_id(0), row_tiles, tl.cdiv(n, COLUMNS))
    group, first, end = located(row_tile, counts, groups, rows, FORM, ROWS, GROUPS)
    if first >= end:
        return
    left = column_tile * COLUMNS
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(0, k, DEPTH):
        a = x.load([first, at])
        if TRANSPOSED:  # weight [E, K, N]
            b = tl.reshape(weight.load([group, at, left]), (DEPTH, COLUMNS))
        else:  # weight [E, N, K]
            b = tl.reshape(weight.load([group, left, at]), (COLUMNS, DEPTH)).T
        total = tl.dot(a, b, total, input_precision="ieee")
    row, column = first + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS)
    target = out + row.to(tl.int64)[:, None] * out_row + column[None, :]
    tl.store(target, total, (row < end)[:, None] & (column < n)[None, :])


@triton.jit
def _weight_gradient(
    grad, x, out, counts, groups, f, d, grad_row, x_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    upper, left = swizzled(tl.program_id(0), tl.cdiv(f, ROWS), tl.cdiv(d, COLUMNS))
    first, end = rows_of_group(group, counts, groups, GROUPS)
    row, column = upper * ROWS + tl.arange(0, ROWS), left * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(first, end, DEPTH):
        token = (at + tl.arange(0, DEPTH)).to(tl.int64)
        there = (token < end)[:, None]
        a = tl.load(grad + token[:, None] * grad_row + row[None, :], there & (row < f)[None, :], other=0.0)
        b = tl.load(x + token[:, None] * x_row + column[None, :], there & (column < d)[None, :], other=0.0)
        total = tl.dot(a.T, b, total, input_precision="ieee")
    target = out + group.to(tl.int64) * f * d + row[:, None] * d + column[None, :]
    tl.store(target, total, (row < f)[:, None] & (column < d)[None, :])


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [P, D] sorted by expert, weight [E, F, D], counts [E] on the same device → [P, F], with both gradients.

    Rows behind the sum of the counts stay unwritten, and give no gradient.
    """
    return _GroupedLinear.apply(x, weight, counts)


def forward(x: Tensor, weight: Tensor, counts: Tensor, tile: Tile | None = None) -> Tensor:
    """x [P, D], weight [E, F, D] → [P, F]."""
    return _rows_times_weight(x, weight, counts, weight.shape[1], False, tile)


def input_gradient(grad: Tensor, weight: Tensor, counts: Tensor, tile: Tile | None = None) -> Tensor:
    """grad [P, F], weight [E, F, D] → [P, D]."""
    return _rows_times_weight(grad, weight, counts, weight.shape[2], True, tile)


def weight_gradient(
    grad: Tensor, x: Tensor, counts: Tensor, dtype: torch.dtype | None = None, tile: Tile | None = None
) -> Tensor:
    """grad [P, F], x [P, D] → [E, F, D] in `dtype`, that of x unless told; zeros for an expert without rows."""
    grad, x = aligned(grad), aligned(x)
    groups, f, d = counts.shape[0], grad.shape[1], x.shape[1]
    out = torch.empty(groups, f, d, dtype=dtype or x.dtype, device=x.device)
    if out.numel():
        tile = tile or fitting(WGRAD_TILES, groups * f, d, processors(out.device))
        _weight_gradient[(cdiv(f, tile.rows) * cdiv(d, tile.columns), groups)](
            grad, x, out, counts, groups, f, d, grad.stride(0), x.stride(0), ROWS=tile.rows, COLUMNS=tile.columns,
            DEPTH=DEPTH, GROUPS=power_of_two(groups), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def _rows_times_weight(
    x: Tensor, weight: Tensor, counts: Tensor, n: int, transposed: bool, tile: Tile | None
) -> Tensor:
    (m, k), groups = x.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    if not k:
        return out.zero_()
    tile = tile or fitting(TILES, m, n, processors(out.device))
    row_tiles = most_row_tiles(m, groups, tile.rows)
    block = [1, DEPTH, tile.columns] if transposed else [1, tile.columns, DEPTH]
    _grouped[(row_tiles * cdiv(n, tile.columns),)](
        described(x, [tile.rows, DEPTH]), described(weight, block), out, counts, row_tiles, groups, m, n, k,
        out.stride(0), TRANSPOSED=transposed, FORM=RAGGED, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=DEPTH,
        GROUPS=power_of_two(groups), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, counts)
        return forward(x, weight, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, counts = ctx.saved_tensors
        grad_x = input_gradient(grad, weight, counts) if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(grad, x, counts, weight.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None
