"""FP8 matmul with a scale for every 128 values of K, each 128 summed by the tensor core and promoted to FP32
(report §3.3.2): dense, over groups of rows, one behind the other or in fixed slots, and summed over the rows of groups.

M rows · N columns · K summed over · E experts. Operands are `ops/fp8.py`'s `Quantised`: a in ROW tiles, b in blocks or
in ROW tiles too.

out = Σ over tiles t of K: (Σ within t of codes) · scale_a · scale_b, the outer sum in FP32. Against exact arithmetic on
the same codes an element is off by at most (min(K, 128) + ⌈K/128⌉ + 4) · 2⁻²⁴ · Σ|a||b|, as `ops/fp8.py · matmul` is;
on Hopper, whose tensor core keeps about 14 bits within a tile, by 33 · 2⁻¹¹ · Σ|a||b| more; then the output is rounded.
NaN in a row or column of the operands makes NaN of that row or column, and of nothing else.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.ops.fp8 import BLOCK, Quantised
from leanseek.ops.triton_kernels.common import SIDE, cdiv, described, power_of_two, processors
from leanseek.ops.triton_kernels.tiles import (
    DENSE,
    RAGGED,
    SLOTS,
    Tile,
    fitting,
    located,
    most_row_tiles,
    swizzled,
    tiles_of_group,
)

TILES = (Tile(128, 128, 8, 4), Tile(64, 128, 4, 5), Tile(64, 64, 4, 6), Tile(64, 32, 4, 6))
TRIED = (*TILES, Tile(128, 128, 8, 3), Tile(64, 128, 4, 3), Tile(128, 64, 4, 5))  # by `bench kernels`
WGRAD_TILES = (Tile(128, 128, 8, 4), Tile(64, 64, 4, 6))


@triton.jit
def _fp8_matmul(
    a, b, a_scales, b_scales, out, counts, row_tiles, groups, rows, n, k,
    a_tile, b_group, b_row, b_tile, out_row,
    FORM: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIDE: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = swizzled(tl.program_id(0), row_tiles, tl.cdiv(n, COLUMNS))
    group, first, end = located(row_tile, counts, groups, rows, FORM, ROWS, GROUPS)
    if first >= end:
        return
    left = column_tile * COLUMNS
    row, column = first + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(tl.cdiv(k, SIDE)):
        x = a.load([first, tile * SIDE])
        w = tl.reshape(b.load([group, left, tile * SIDE]), (COLUMNS, SIDE))
        x_scale = tl.load(a_scales + tile * a_tile + row, row < end, other=0.0)
        part = tl.dot(x, w.T)
        if BLOCKS:
            w_scale = tl.load(b_scales + group * b_group + (left // SIDE) * b_row + tile * b_tile)
            total += part * (x_scale * w_scale)[:, None]
        else:
            w_scale = tl.load(b_scales + tile * b_tile + column * b_row, column < n, other=0.0)
            total += part * x_scale[:, None] * w_scale[None, :]
    target = out + row.to(tl.int64)[:, None] * out_row + column[None, :]
    tl.store(target, total, (row < end)[:, None] & (column < n)[None, :])


@triton.jit
def _fp8_weight_gradient(
    grad, x, grad_scales, x_scales, out, counts, groups, f, d, grad_tile, x_tile,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIDE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    upper, left = swizzled(tl.program_id(0), tl.cdiv(f, ROWS), tl.cdiv(d, COLUMNS))
    first, end = tiles_of_group(group, counts, groups, SIDE, GROUPS)
    row, column = upper * ROWS + tl.arange(0, ROWS), left * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(first, end):
        a = grad.load([upper * ROWS, tile * SIDE])
        b = x.load([left * COLUMNS, tile * SIDE])
        a_scale = tl.load(grad_scales + tile * grad_tile + row, row < f, other=0.0)
        b_scale = tl.load(x_scales + tile * x_tile + column, column < d, other=0.0)
        total += tl.dot(a, b.T) * a_scale[:, None] * b_scale[None, :]
    target = out + group.to(tl.int64) * f * d + row[:, None] * d + column[None, :]
    tl.store(target, total, (row < f)[:, None] & (column < d)[None, :])


def matmul(a: Quantised, b: Quantised, dtype: torch.dtype = torch.float32, tile: Tile | None = None) -> Tensor:
    """a bᵀ: a [M, K], b [N, K] → [M, N] in `dtype`."""
    b = Quantised(b.codes[None], b.scales[None], b.tile)
    return _launch(a, b, None, a.codes.shape[0], DENSE, dtype, tile)


def grouped_matmul(
    a: Quantised, b: Quantised, counts: Tensor, dtype: torch.dtype = torch.float32, tile: Tile | None = None
) -> Tensor:
    """Each expert's rows times its own matrix: a [M, K] sorted by expert, b [E, N, K], counts [E] → [M, N] in `dtype`.

    The counts need not be multiples of anything; rows behind their sum stay unwritten.
    """
    return _launch(a, b, counts, a.codes.shape[0], RAGGED, dtype, tile)


def slotted_matmul(
    a: Quantised, b: Quantised, counts: Tensor, dtype: torch.dtype = torch.float32, tile: Tile | None = None
) -> Tensor:
    """The same over fixed slots, of which the first counts[e] rows are filled: a [E, S, K], b [E, N, K] → [E, S, N].

    What decoding wants: shapes that never change. Rows that are not filled stay unwritten.
    """
    experts, slot, _ = a.codes.shape
    rows = Quantised(a.codes.flatten(0, 1), a.scales.flatten(0, 1), a.tile)
    return _launch(rows, b, counts, slot, SLOTS, dtype, tile).view(experts, slot, -1)


def grouped_wgrad(grad: Quantised, x: Quantised, counts: Tensor, tile: Tile | None = None) -> Tensor:
    """The gradient of each expert's matrix: grad [·, N] and x [·, K] from `quantised_by_expert` of `quantise.py`,
    counts [E] → FP32 [E, N, K]; zeros for an expert without rows."""
    f, d, experts = grad.codes.shape[1], x.codes.shape[1], counts.shape[0]
    out = torch.empty(experts, f, d, device=counts.device)
    if not x.codes.numel() or not grad.codes.numel():
        return out.zero_()
    tile = tile or fitting(WGRAD_TILES, experts * f, d, processors(out.device))
    _fp8_weight_gradient[(cdiv(f, tile.rows) * cdiv(d, tile.columns), experts)](
        described(grad.codes.mT, [tile.rows, SIDE]), described(x.codes.mT, [tile.columns, SIDE]), grad.scales, x.scales,
        out, counts, experts, f, d, grad.scales.stride(0), x.scales.stride(0), ROWS=tile.rows, COLUMNS=tile.columns,
        SIDE=SIDE, GROUPS=power_of_two(experts), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _launch(
    a: Quantised, b: Quantised, counts: Tensor | None, rows: int, form: tl.constexpr, dtype: torch.dtype,
    tile: Tile | None,
) -> Tensor:  # fmt: skip
    (m, k), (experts, n, _) = a.codes.shape, b.codes.shape
    out = torch.empty(m, n, dtype=dtype, device=a.codes.device)
    if not out.numel() or not k:
        return out.zero_()
    tile = tile or fitting(TILES, m, n, processors(out.device))
    if form == DENSE:
        row_tiles = cdiv(m, tile.rows)
    else:
        row_tiles = experts * cdiv(rows, tile.rows) if form == SLOTS else most_row_tiles(m, experts, tile.rows)
    scales = a.scales if a.scales.stride(0) == 1 else a.scales.T.contiguous().T
    _fp8_matmul[(row_tiles * cdiv(n, tile.columns),)](
        described(a.codes, [tile.rows, SIDE]), described(b.codes, [1, tile.columns, SIDE]), scales, b.scales, out,
        counts, row_tiles, experts, rows, n, k, scales.stride(1), *b.scales.stride(), out.stride(0),
        FORM=form, BLOCKS=b.tile == BLOCK, ROWS=tile.rows, COLUMNS=tile.columns, SIDE=SIDE,
        GROUPS=power_of_two(experts), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
