"""Online quantisation to FP8 in tiles of 1 × 128 and blocks of 128 × 128 (report §3.3.2), alone or behind what made the
values: SwiGLU, RMSNorm.

M rows (tokens) · K columns (channels) · k = ⌈K/128⌉ tiles of a row. value ≈ code · scale; scale = largest magnitude
of the tile ÷ 448, or that rounded up to a power of two. A code is the E4M3 value nearest to value ÷ scale, so its error
is at most 2⁻⁴ of the value or 2⁻¹⁰ of the scale, whichever is larger. Scales lie column by column in memory, the M of
one tile side by side, as the matmul reads them.

A tile of zeros has scale 1. NaN becomes the code NaN and leaves its tile's scale alone; an infinity makes the scale
infinite, and so NaN of the tile.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.ops.triton_kernels.common import TILE, cdiv, to_e4m3
from leanseek.ops.triton_kernels.common import power_of_two as _power_of_two


class Quantised(NamedTuple):
    codes: Tensor  # float8_e4m3fn
    scales: Tensor  # FP32


@triton.jit
def _scale_of(largest, POWER_OF_TWO: tl.constexpr):
    """Largest magnitudes of tiles → their scales."""
    scale = tl.div_rn(largest, 448.0)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        up = (bits + 0x7FFFFF) & 0x7F800000  # the next exponent, unless the mantissa is zero
        scale = tl.where(scale == float("inf"), scale, up.to(tl.float32, bitcast=True))
    return tl.where(largest == 0.0, 1.0, scale)


@triton.jit
def _codes_of(x, scale):
    return to_e4m3(tl.clamp(tl.div_rn(x, scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _tiles(
    x, codes, scales, m, k, x_row, codes_row, scales_tile,
    POWER_OF_TWO: tl.constexpr, SWIGLU: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    column = tile * TILE + tl.arange(0, TILE)
    there = (row < m)[:, None] & (column < k)[None, :]
    source = x + row.to(tl.int64)[:, None] * x_row + column[None, :]
    values = tl.load(source, there, other=0.0).to(tl.float32)
    if SWIGLU:
        up = tl.load(source + k, there, other=0.0).to(tl.float32)
        values = values / (1.0 + tl.exp(-values)) * up
    scale = _scale_of(tl.max(tl.abs(values), axis=1), POWER_OF_TWO)
    tl.store(scales + tile.to(tl.int64) * scales_tile + row, scale, row < m)
    target = codes + row.to(tl.int64)[:, None] * codes_row + column[None, :]
    tl.store(target, _codes_of(values, scale[:, None]), there)


@triton.jit
def _columns(
    x, codes, scales, m, k, x_row, codes_row, scales_tile,
    POWER_OF_TWO: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < m)[:, None] & (column < k)[None, :]
    values = tl.load(x + row.to(tl.int64)[:, None] * x_row + column[None, :], there, other=0.0).to(tl.float32)
    values = tl.trans(values)
    scale = _scale_of(tl.max(tl.abs(values), axis=1), POWER_OF_TWO)
    tl.store(scales + tl.program_id(0).to(tl.int64) * scales_tile + column, scale, column < k)
    target = codes + column.to(tl.int64)[:, None] * codes_row + row[None, :]
    tl.store(target, _codes_of(values, scale[:, None]), (column < k)[:, None] & (row < m)[None, :])


@triton.jit
def _blocks(
    x, codes, scales, m, k, x_row, codes_row, scales_row,
    POWER_OF_TWO: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = (row < m)[:, None] & (column < k)[None, :]
    values = tl.load(x + row.to(tl.int64)[:, None] * x_row + column[None, :], there, other=0.0).to(tl.float32)
    scale = _scale_of(tl.max(tl.max(tl.abs(values), axis=1), axis=0), POWER_OF_TWO)
    tl.store(scales + tl.program_id(0) * scales_row + tl.program_id(1), scale)
    tl.store(codes + row.to(tl.int64)[:, None] * codes_row + column[None, :], _codes_of(values, scale), there)


@triton.jit
def _normed(
    x, weight, codes, scales, normed, lengths, k, x_row, codes_row, scales_tile, eps,
    KEEP: tl.constexpr, POWER_OF_TWO: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    tile = tl.arange(0, TILES)
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    there = column < k
    values = tl.load(x + row.to(tl.int64) * x_row + column, there, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(tl.sum(values * values, axis=1), axis=0) / k + eps)
    values = values * inverse * tl.load(weight + column, there, other=0.0).to(tl.float32)
    if KEEP:
        tl.store(normed + row.to(tl.int64) * k + column, values, there)
        tl.store(lengths + row, inverse)
    scale = _scale_of(tl.max(tl.abs(values), axis=1), POWER_OF_TWO)
    tl.store(scales + tile.to(tl.int64) * scales_tile + row, scale, tile * TILE < k)
    tl.store(codes + row.to(tl.int64) * codes_row + column, _codes_of(values, scale[:, None]), there)


def quantise_tiles(x: Tensor, power_of_two: bool = False) -> Quantised:
    """x [M, K] → codes [M, K], scales [M, k]: a scale for each 1 × 128 values of a row."""
    return _quantise_rows(x, x.shape[1], power_of_two, swiglu=False)


def quantise_swiglu(gate_up: Tensor, power_of_two: bool = False) -> Quantised:
    """SiLU(gate) · up of [M, 2K], gate first, in FP32 → codes [M, K], scales [M, k]; the product is never stored."""
    return _quantise_rows(gate_up, gate_up.shape[1] // 2, power_of_two, swiglu=True)


def quantise_columns(x: Tensor, power_of_two: bool = False) -> Quantised:
    """x [M, K] → codes of its transpose [K, M], scales [K, ⌈M/128⌉]: 128 tokens of a channel share one, for Wgrad."""
    x = _rows(x)
    m, k = x.shape
    out = _empty(k, m, x.device)
    if x.numel():
        grid = (cdiv(m, TILE), cdiv(k, 64))
        _columns[grid](
            x, *out, m, k, x.stride(0), out.codes.stride(0), out.scales.stride(1),
            POWER_OF_TWO=power_of_two, COLUMNS=64, TILE=TILE, num_warps=8,
        )  # fmt: skip
    return out


def quantise_blocks(x: Tensor, power_of_two: bool = False) -> Quantised:
    """x [M, K] → codes [M, K], scales [⌈M/128⌉, k]: a scale for each block of 128 × 128; for weights."""
    x = _rows(x)
    m, k = x.shape
    codes = _codes(m, k, x.device)
    scales = torch.empty(cdiv(m, TILE), cdiv(k, TILE), device=x.device)
    if x.numel():
        _blocks[scales.shape](
            x, codes, scales, m, k, x.stride(0), codes.stride(0), scales.stride(0),
            POWER_OF_TWO=power_of_two, TILE=TILE, num_warps=8,
        )  # fmt: skip
    return Quantised(codes, scales)


def quantise_normed(
    x: Tensor, weight: Tensor, eps: float, power_of_two: bool = False, keep: bool = False
) -> tuple[Quantised, Tensor | None, Tensor | None]:
    """RMSNorm of x [M, K] with weight [K], in FP32 → codes [M, K] and scales [M, k].

    `keep` also returns the normed values [M, K] in the precision of x, which the gate wants unrounded, and the inverse
    lengths [M] FP32, which the backward pass wants.
    """
    x = _rows(x)
    m, k = x.shape
    out = _empty(m, k, x.device)
    normed = torch.empty(m, k, dtype=x.dtype, device=x.device) if keep else None
    inverse = torch.empty(m, device=x.device) if keep else None
    if x.numel():
        tiles = _power_of_two(cdiv(k, TILE))
        _normed[(m,)](
            x, weight.contiguous(), *out, normed, inverse, k, x.stride(0), out.codes.stride(0), out.scales.stride(1),
            eps, KEEP=keep, POWER_OF_TWO=power_of_two, TILES=tiles, TILE=TILE, num_warps=min(max(tiles // 4, 1), 16),
        )  # fmt: skip
    return out, normed, inverse


def _quantise_rows(x: Tensor, k: int, power_of_two: bool, swiglu: bool) -> Quantised:
    x, m = _rows(x), x.shape[0]
    out = _empty(m, k, x.device)
    if m and k:
        rows = 32
        _tiles[(cdiv(m, rows), cdiv(k, TILE))](
            x, *out, m, k, x.stride(0), out.codes.stride(0), out.scales.stride(1),
            POWER_OF_TWO=power_of_two, SWIGLU=swiglu, ROWS=rows, TILE=TILE,
        )  # fmt: skip
    return out


def _empty(m: int, k: int, device: torch.device) -> Quantised:
    scales = torch.empty(cdiv(k, TILE), cdiv(m, 4) * 4, device=device)
    return Quantised(_codes(m, k, device), scales[:, :m].T)


def _codes(m: int, k: int, device: torch.device) -> Tensor:
    """Rows that begin at multiples of 16 bytes, as the GPU's copy engine wants them."""
    return torch.empty(m, cdiv(k, 16) * 16, dtype=torch.float8_e4m3fn, device=device)[:, :k]


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
