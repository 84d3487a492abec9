"""Online quantisation to FP8 (report §3.3.2) by the rules of `ops/fp8.py`, bit for bit: alone, or behind what made the
values, SwiGLU and RMSNorm, which are then never stored.

M rows (tokens) · K columns (channels) · E experts. Scales lie in memory with the M of one tile side by side, as the
matmul reads them, and codes in rows that begin at multiples of 16 bytes. In COLUMN tiles codes and scales lie
transposed, for that is how the gradient of a weight multiplies them.

Every function's error is that of `ops/fp8.py · quantised`; a NaN or an infinity makes its whole tile NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.ops.fp8 import BLOCK, COLUMN, ROW, SMALLEST_SCALE, Quantised, Tile
from leanseek.ops.triton_kernels.common import SIDE, cdiv, to_e4m3
from leanseek.ops.triton_kernels.common import power_of_two as next_power
from leanseek.ops.triton_kernels.tiles import DENSE, RAGGED, located, most_row_tiles

LEAST = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def _largest(x, axis: tl.constexpr):
    """Largest magnitudes along an axis; NaN where there is one."""
    poisoned = tl.max((x != x).to(tl.int32), axis=axis)
    return tl.where(poisoned != 0, float("nan"), tl.max(tl.abs(x), axis=axis))


@triton.jit
def _scale_of(largest, POWER_OF_TWO: tl.constexpr):
    """Largest magnitudes of tiles → their scales."""
    scale = tl.maximum(tl.div_rn(largest, 448.0), LEAST, propagate_nan=tl.PropagateNan.ALL)
    if POWER_OF_TWO:
        up = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000  # the next exponent, unless it is one already
        scale = tl.where(scale < float("inf"), up.to(tl.float32, bitcast=True), scale)
    return tl.where(largest == 0.0, 1.0, scale)


@triton.jit
def _codes_of(x, scale):
    return to_e4m3(tl.clamp(tl.div_rn(x, scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _tiles(
    x, codes, scales, m, k, x_row, codes_row, scales_tile,
    POWER_OF_TWO: tl.constexpr, SWIGLU: tl.constexpr, ROWS: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    column = tile * SIDE + tl.arange(0, SIDE)
    there = (row < m)[:, None] & (column < k)[None, :]
    source = x + row.to(tl.int64)[:, None] * x_row + column[None, :]
    values = tl.load(source, there, other=0.0).to(tl.float32)
    if SWIGLU:
        up = tl.load(source + k, there, other=0.0).to(tl.float32)
        values = values / (1.0 + tl.exp(-values)) * up
    scale = _scale_of(_largest(values, 1), POWER_OF_TWO)
    tl.store(scales + tile.to(tl.int64) * scales_tile + row, scale, row < m)
    target = codes + row.to(tl.int64)[:, None] * codes_row + column[None, :]
    tl.store(target, _codes_of(values, scale[:, None]), there)


@triton.jit
def _columns(
    x, codes, scales, counts, groups, m, k, x_row, codes_row, scales_tile,
    FORM: tl.constexpr, POWER_OF_TWO: tl.constexpr, COLUMNS: tl.constexpr, SIDE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    _, first, end = located(tile, counts, groups, m, FORM, SIDE, GROUPS)
    if first >= end:
        return
    row = first + tl.arange(0, SIDE)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < end)[:, None] & (column < k)[None, :]
    values = tl.load(x + row.to(tl.int64)[:, None] * x_row + column[None, :], there, other=0.0).to(tl.float32)
    values = tl.trans(values)
    scale = _scale_of(_largest(values, 1), POWER_OF_TWO)
    tl.store(scales + tile.to(tl.int64) * scales_tile + column, scale, column < k)
    target = codes + column.to(tl.int64)[:, None] * codes_row + (tile * SIDE + tl.arange(0, SIDE))[None, :]
    # Behind an expert's last row its tile is filled with zeros, which add nothing to a sum over tokens.
    tl.store(target, _codes_of(values, scale[:, None]), (column < k)[:, None])


@triton.jit
def _blocks(
    x, codes, scales, m, k, x_matrix, x_row, codes_matrix, codes_row, scales_matrix, scales_row,
    POWER_OF_TWO: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    there = (row < m)[:, None] & (column < k)[None, :]
    source = x + matrix * x_matrix + row.to(tl.int64)[:, None] * x_row + column[None, :]
    values = tl.load(source, there, other=0.0).to(tl.float32)
    scale = _scale_of(_largest(_largest(values, 1), 0), POWER_OF_TWO)
    tl.store(scales + matrix * scales_matrix + tl.program_id(1) * scales_row + tl.program_id(0), scale)
    target = codes + matrix * codes_matrix + row.to(tl.int64)[:, None] * codes_row + column[None, :]
    tl.store(target, _codes_of(values, scale), there)


@triton.jit
def _normed(
    x, weight, codes, scales, normed, lengths, k, x_row, codes_row, scales_tile, eps,
    KEEP: tl.constexpr, POWER_OF_TWO: tl.constexpr, TILES: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    tile = tl.arange(0, TILES)
    column = tile[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    there = column < k
    values = tl.load(x + row.to(tl.int64) * x_row + column, there, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(tl.sum(values * values, axis=1), axis=0) / k + eps)
    values = values * inverse * tl.load(weight + column, there, other=0.0).to(tl.float32)
    if KEEP:
        tl.store(normed + row.to(tl.int64) * k + column, values, there)
        tl.store(lengths + row, inverse)
    scale = _scale_of(_largest(values, 1), POWER_OF_TWO)
    tl.store(scales + tile.to(tl.int64) * scales_tile + row, scale, tile * SIDE < k)
    tl.store(codes + row.to(tl.int64) * codes_row + column, _codes_of(values, scale[:, None]), there)


def quantised(values: Tensor, tile: Tile, power_of_two: bool = False) -> Quantised:
    """`ops/fp8.py · quantised`: values [..., M, K]; in COLUMN tiles [M, K] alone."""
    if tile == ROW:
        q = _rows(values.flatten(0, -2), values.shape[-1], power_of_two, swiglu=False)
        return Quantised(q.codes.unflatten(0, values.shape[:-1]), q.scales.unflatten(0, values.shape[:-1]), ROW)
    if tile == COLUMN:
        return _in_columns(values, None, power_of_two)
    return _in_blocks(values, power_of_two)


def quantised_swiglu(gate_up: Tensor, power_of_two: bool = False) -> Quantised:
    """SiLU(gate) · up of [M, 2K], gate first, in FP32 → [M, K] in ROW tiles."""
    return _rows(gate_up, gate_up.shape[1] // 2, power_of_two, swiglu=True)


def quantised_by_expert(values: Tensor, counts: Tensor, power_of_two: bool = False) -> Quantised:
    """Rows [M, K] sorted by expert in COLUMN tiles that end where an expert's rows do, counts [E].

    Each expert begins at a new tile of codes [128 · t, K], t the most tiles that there can be; the rest of its last
    tile is zeros. Nothing here waits to hear from the GPU how many there are.
    """
    return _in_columns(values, counts, power_of_two)


def quantised_norm(
    x: Tensor, weight: Tensor, eps: float, power_of_two: bool = False, keep: bool = False
) -> tuple[Quantised, Tensor | None, Tensor | None]:
    """RMSNorm of x [M, K] with weight [K], in FP32 → [M, K] in ROW tiles.

    `keep` also returns the normed values [M, K] in the precision of x, which the gate wants, and the inverse lengths
    [M] FP32, which the backward pass wants.
    """
    x = _in_one_piece(x)
    m, k = x.shape
    codes, scales = _empty(m, k, x.device)
    normed = torch.empty(m, k, dtype=x.dtype, device=x.device) if keep else None
    inverse = torch.empty(m, device=x.device) if keep else None
    if x.numel():
        tiles = next_power(cdiv(k, SIDE))
        _normed[(m,)](
            x, weight.contiguous(), codes, scales, normed, inverse, k, x.stride(0), codes.stride(0), scales.stride(1),
            eps, KEEP=keep, POWER_OF_TWO=power_of_two, TILES=tiles, SIDE=SIDE, num_warps=min(max(tiles // 4, 1), 16),
        )  # fmt: skip
    return Quantised(codes, scales, ROW), normed, inverse


def _rows(x: Tensor, k: int, power_of_two: bool, swiglu: bool) -> Quantised:
    x, m = _in_one_piece(x), x.shape[0]
    codes, scales = _empty(m, k, x.device)
    if m and k:
        rows = 32
        _tiles[(cdiv(m, rows), cdiv(k, SIDE))](
            x, codes, scales, m, k, x.stride(0), codes.stride(0), scales.stride(1),
            POWER_OF_TWO=power_of_two, SWIGLU=swiglu, ROWS=rows, SIDE=SIDE,
        )  # fmt: skip
    return Quantised(codes, scales, ROW)


def _in_columns(x: Tensor, counts: Tensor | None, power_of_two: bool) -> Quantised:
    x = _in_one_piece(x)
    m, k = x.shape
    groups = 1 if counts is None else len(counts)
    tiles = cdiv(m, SIDE) if counts is None else most_row_tiles(m, groups, SIDE)
    codes = torch.empty(k, tiles * SIDE, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(tiles, cdiv(k, 4) * 4, device=x.device)[:, :k]
    if x.numel():
        _columns[(tiles, cdiv(k, 64))](
            x, codes, scales, counts, groups, m, k, x.stride(0), codes.stride(0), scales.stride(0),
            FORM=DENSE if counts is None else RAGGED, POWER_OF_TWO=power_of_two, COLUMNS=64, SIDE=SIDE,
            GROUPS=next_power(groups), num_warps=8,
        )  # fmt: skip
    return Quantised(codes.T[: m if counts is None else None], scales, COLUMN)


def _in_blocks(x: Tensor, power_of_two: bool) -> Quantised:
    m, k = x.shape[-2:]
    matrices = _in_one_piece(x).reshape(-1, m, k)
    codes = _codes(len(matrices), m, k, device=x.device)
    scales = torch.empty(len(matrices), cdiv(m, SIDE), cdiv(k, SIDE), device=x.device)
    if x.numel():
        _blocks[(cdiv(k, SIDE), cdiv(m, SIDE), len(matrices))](
            matrices, codes, scales, m, k, *matrices.stride()[:2], *codes.stride()[:2], *scales.stride()[:2],
            POWER_OF_TWO=power_of_two, SIDE=SIDE, num_warps=8,
        )  # fmt: skip
    shape = x.shape[:-2]
    return Quantised(codes.view(*shape, *codes.shape[1:]), scales.view(*shape, *scales.shape[1:]), BLOCK)


def _empty(m: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return _codes(m, k, device=device), torch.empty(cdiv(k, SIDE), cdiv(m, 4) * 4, device=device)[:, :m].T


def _codes(*shape: int, device: torch.device) -> Tensor:
    """Rows that begin at multiples of 16 bytes, as the GPU's copy engine wants them."""
    *rest, k = shape
    return torch.empty(*rest, cdiv(k, 16) * 16, dtype=torch.float8_e4m3fn, device=device)[..., :k]


def _in_one_piece(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
