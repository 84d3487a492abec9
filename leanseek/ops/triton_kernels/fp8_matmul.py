"""FP8 matmul with a scale for every 128 values of K, each 128 summed by the tensor core and promoted to FP32
(report §3.3.2): dense, over groups of rows one behind the other, and over groups in fixed slots.

M rows · N columns · K summed over · k = ⌈K/128⌉ · n = ⌈N/128⌉ · G groups (experts). Operands are those of
`quantise.py`: a [M, K] in tiles of 1 × 128; b [N, K] in blocks of 128 × 128 (weights) or in tiles too (Wgrad).

out = Σ over tiles t of K: (Σ within t of codes) · scale_a · scale_b, the outer sum in FP32. Against exact arithmetic on
the same codes an element is off by at most (k + 12) · 2⁻²⁴ · Σ |a b| where the tensor core sums 128 products exactly, and
Hopper's, which keeps about 14 bits of them, adds 2⁻¹³ · Σ |a b|; then comes the rounding of the output. NaN or an
infinite scale in a row or column of the operands makes NaN of that row or column, and of nothing else.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.ops.triton_kernels.common import TILE, cdiv, described, power_of_two, processors
from leanseek.ops.triton_kernels.quantise import Quantised
from leanseek.ops.triton_kernels.tiles import DENSE, RAGGED, SLOTS, Tile, fitting, located, most_row_tiles, swizzled

TILES = (Tile(128, 128, 8, 4), Tile(64, 128, 4, 5), Tile(64, 64, 4, 6), Tile(64, 32, 4, 6))


@triton.jit
def _fp8_matmul(
    a, b, a_scales, b_scales, out, counts, row_tiles, groups, rows, n, k,
    a_tile, b_group, b_row, b_tile, out_row,
    FORM: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = swizzled(tl.program_id(0), row_tiles, tl.cdiv(n, COLUMNS))
    group, first, end = located(row_tile, counts, groups, rows, FORM, ROWS, GROUPS)
    if first >= end:
        return
    left = column_tile * COLUMNS
    row, column = first + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(tl.cdiv(k, TILE)):
        x = a.load([first, tile * TILE])
        w = tl.reshape(b.load([group, left, tile * TILE]), (COLUMNS, TILE))
        x_scale = tl.load(a_scales + tile * a_tile + row, row < end, other=0.0)
        part = tl.dot(x, w.T)
        if BLOCKS:
            w_scale = tl.load(b_scales + group * b_group + (left // TILE) * b_row + tile * b_tile)
            total += part * (x_scale * w_scale)[:, None]
        else:
            w_scale = tl.load(b_scales + tile * b_tile + column * b_row, column < n, other=0.0)
            total += part * x_scale[:, None] * w_scale[None, :]
    target = out + row.to(tl.int64)[:, None] * out_row + column[None, :]
    tl.store(target, total, (row < end)[:, None] & (column < n)[None, :])


def fp8_matmul(a: Quantised, b: Quantised, dtype: torch.dtype = torch.bfloat16, tile: Tile | None = None) -> Tensor:
    """a [M, K] · bᵀ, b [N, K] → [M, N]. b's scales [n, k] are those of blocks, [N, k] those of tiles."""
    b = Quantised(b.codes[None], b.scales[None])
    return _launch(a, b, None, a.codes.shape[0], DENSE, dtype, tile)


def fp8_grouped(
    a: Quantised, b: Quantised, counts: Tensor, dtype: torch.dtype = torch.bfloat16, tile: Tile | None = None
) -> Tensor:
    """Each group's rows times its own matrix: a [M, K] group by group, b [G, N, K] with scales [G, n, k], counts [G].

    Returns [M, N]; the counts need not be multiples of anything, and rows behind their sum stay unwritten.
    """
    return _launch(a, b, counts, a.codes.shape[0], RAGGED, dtype, tile)


def fp8_slots(
    a: Quantised, b: Quantised, counts: Tensor, dtype: torch.dtype = torch.bfloat16, tile: Tile | None = None
) -> Tensor:
    """The same over fixed slots, of which the first counts[g] rows are filled: a [G, S, K], scales [G, S, k] → [G, S, N].

    What decoding wants: shapes that never change. Rows that are not filled stay unwritten.
    """
    groups, slot, k = a.codes.shape
    rows = Quantised(a.codes.view(-1, k), a.scales.view(-1, a.scales.shape[-1]))
    return _launch(rows, b, counts, slot, SLOTS, dtype, tile).view(groups, slot, -1)


def _launch(
    a: Quantised, b: Quantised, counts: Tensor | None, rows: int, form: tl.constexpr, dtype: torch.dtype,
    tile: Tile | None,
) -> Tensor:  # fmt: skip
    (m, k), (groups, n, _) = a.codes.shape, b.codes.shape
    out = torch.empty(m, n, dtype=dtype, device=a.codes.device)
    if not out.numel():
        return out
    tile = tile or fitting(TILES, m if form == DENSE else max(m // groups, 1) * groups, n, processors(out.device))
    row_tiles = {
        DENSE: cdiv(m, tile.rows), RAGGED: most_row_tiles(m, groups, tile.rows), SLOTS: groups * cdiv(rows, tile.rows)
    }[form]  # fmt: skip
    scales = a.scales if a.scales.stride(0) == 1 else a.scales.T.contiguous().T
    _fp8_matmul[(row_tiles * cdiv(n, tile.columns),)](
        described(a.codes, [tile.rows, TILE]), described(b.codes, [1, tile.columns, TILE]), scales, b.scales, out,
        counts, row_tiles, groups, rows, n, k, scales.stride(1), *b.scales.stride(), out.stride(0),
        FORM=form, BLOCKS=b.scales.shape[1] == cdiv(n, TILE), ROWS=tile.rows, COLUMNS=tile.columns, TILE=TILE,
        GROUPS=power_of_two(groups), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
