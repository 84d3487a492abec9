"""FP8 with fine-grained scales (report §3.3): formats, products in plain PyTorch, and how weights rest.

A matrix is cut into tiles, and each tile is divided by a scale of its own before its values become E4M3 codes:

    ROW     1 × 128    what a product reads along a row: activations going forward, gradients going backward
    COLUMN  128 × 1    the same two where the sum runs over the tokens, in the gradient of a weight
    BLOCK   128 × 128  weights; released `weight_scale_inv` are these scales

value = code · scale: a scale gives the values back, as in released files, whatever their name there says. At the right
and lower edge tiles are smaller. A NaN makes its whole tile NaN, and so does an infinity: such a step is not taken.

R rows · C columns · r × c a tile · M, N, K the dims of a product, K the one it sums over · P rows sorted by E experts.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Tile = tuple[int, int]
SIDE = 128
ROW: Tile = (1, SIDE)
COLUMN: Tile = (SIDE, 1)
BLOCK: Tile = (SIDE, SIDE)

LARGEST = 448.0  # of float8_e4m3fn
SMALLEST_SCALE = 2.0**-112  # keeps code · scale, rounded as it is, among FP32's normal numbers
FP8 = torch.float8_e4m3fn
UE8M0 = torch.float8_e8m0fnu  # a power of two in a byte
SCALE = "_scale_inv"  # follows the name of a tensor in FP8, in released files and in ours

AT_ONCE = 32  # products that a Hopper tensor core adds in one go


# ── tiles and codes ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Quantised:
    """Matrices in FP8: codes [..., R, C] in E4M3 and FP32 scales [..., ⌈R/r⌉, ⌈C/c⌉], one for each tile."""

    codes: Tensor
    scales: Tensor
    tile: Tile

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if not self.codes.is_contiguous() and self.codes.mT.is_contiguous():
            return self.mT.values(dtype).mT  # read as they lie
        return dequantise(self.codes, self.scales, dtype, self.tile)

    @property
    def mT(self) -> "Quantised":  # as PyTorch calls it
        """The transposed matrices: the same codes and scales, read the other way."""
        return Quantised(self.codes.mT, self.scales.mT, (self.tile[1], self.tile[0]))


def quantised(values: Tensor, tile: Tile, power_of_two: bool = False) -> Quantised:
    """values [..., R, C] with scales taken from themselves, now: no history, no delay (report §3.3.2).

    What a value x of a tile with scale s becomes is off by at most max(|x| · 2⁻⁴, s · 2⁻¹⁰) · (1 + 2⁻²⁰): half a step
    of a code, which has three binary digits after the first and, near zero, steps of 2⁻⁹; the rest is rounding in FP32.
    No scale is below 2⁻¹¹²: the bound then holds for denormal values too, also where a machine takes them for zero.
    """
    scales = scales_of(values, tile, power_of_two)
    return Quantised(quantise(values, scales, tile), scales, tile)


def scale_shape(rows: int, columns: int, *, tile: Tile = BLOCK) -> tuple[int, int]:
    """[R, C] → [⌈R/r⌉, ⌈C/c⌉]."""
    return -(-rows // tile[0]), -(-columns // tile[1])


def scales_of(values: Tensor, tile: Tile = BLOCK, power_of_two: bool = False) -> Tensor:
    """The scale of each tile, its largest magnitude over 448: values [..., R, C] → FP32 [..., ⌈R/r⌉, ⌈C/c⌉].

    `power_of_two` (`scale_fmt: ue8m0`) rounds up to an integral power of two: what is quantised so can be quantised
    again in other such tiles and loses only what falls below the new tile's smallest code. A tile of zeros has scale 1.
    """
    largest = tiles_of(values.float().abs(), tile).amax(dim=(-3, -1))
    scales = (largest / LARGEST).clamp(min=SMALLEST_SCALE)
    if power_of_two:
        mantissa, exponent = torch.frexp(scales)  # scales = mantissa · 2^exponent, ½ ≤ mantissa < 1
        rounded = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
        scales = torch.where(scales.isfinite(), rounded, scales)
    return torch.where(largest == 0, 1.0, scales)


def quantise(values: Tensor, scales: Tensor, tile: Tile = BLOCK) -> Tensor:
    """The codes nearest to value / scale, ties to even: values [..., R, C], their scales → float8_e4m3fn [..., R, C].

    Larger magnitudes than 448 · scale become 448; NaN stays NaN.
    """
    # Clamped first: what a cast makes of values beyond the largest depends on the version of PyTorch.
    codes = (tiles_of(values.float(), tile) / spread(scales)).clamp_(-LARGEST, LARGEST).to(FP8)
    return whole(codes, values.shape)


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32, tile: Tile = BLOCK) -> Tensor:
    """code · scale in FP32, rounded to `dtype`: codes [..., R, C] and their scales → [..., R, C].

    With scales [n, …, …] the rows of codes [..., C] are those of n matrices, one below the other.
    """
    matrices = scales.shape[:-2]
    rows = math.prod(codes.shape[:-1]) // math.prod(matrices)
    values = _values(codes).view(*matrices, rows, codes.shape[-1])
    return whole(tiles_of(values, tile).mul_(spread(scales)), values.shape).to(dtype).view(codes.shape)


def _values(codes: Tensor) -> Tensor:
    """What the codes mean, in FP32, contiguous."""
    if codes.device.type != "cpu":
        return codes.float().contiguous()
    table = torch.arange(256, dtype=torch.uint8).view(FP8).float()  # a cast takes seven times as long on a CPU
    return table.index_select(0, codes.view(torch.uint8).int().flatten()).view(codes.shape)


def tiles_of(values: Tensor, tile: Tile) -> Tensor:
    """[..., R, C] → [..., ⌈R/r⌉, r, ⌈C/c⌉, c]; tiles at the edge are filled up with zeros."""
    (rows, columns), (r, c) = values.shape[-2:], tile
    down, across = scale_shape(rows, columns, tile=tile)
    if (down * r, across * c) != (rows, columns):
        values = F.pad(values, (0, across * c - columns, 0, down * r - rows))
    return values.unflatten(-1, (across, c)).unflatten(-3, (down, r))


def whole(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The matrices of this shape again, contiguous: what `tiles_of` took apart."""
    return tiles.flatten(-4, -3).flatten(-2)[..., : shape[-2], : shape[-1]].contiguous()


def spread(scales: Tensor) -> Tensor:
    """Scales as `tiles_of` wants them: one for each tile, whatever its rows and columns."""
    return scales.float()[..., :, None, :, None]


# ── rows on the wire ──────────────────────────────────────────────────────────────────────────────────────────────


def to_bytes(rows: Tensor) -> Tensor:
    """Rows [N, D] in FP8 as expert parallelism sends them (report §3.3.3): uint8 [N, D + ⌈D/128⌉], to be sent as such.

    The D codes of a row are followed by its scales, powers of two, of which a byte holds the exponent (UE8M0).
    """
    sent = quantised(rows, ROW, power_of_two=True)
    return torch.cat((sent.codes.view(torch.uint8), sent.scales.to(UE8M0).view(torch.uint8)), dim=-1)


def from_bytes(sent: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The rows [N, D] of D = `width` values that `to_bytes` made: exact in BF16, and quantised again just as they were.

    The receiver's expert quantises its input with such scales as well: nothing is rounded twice.
    """
    codes, scales = sent.split([width, sent.shape[-1] - width], dim=-1)
    codes, scales = codes.contiguous().view(FP8), scales.contiguous().view(UE8M0).float()
    return dequantise(codes, scales, dtype, ROW)


# ── products ──────────────────────────────────────────────────────────────────────────────────────────────────────


def matmul(a: Quantised, b: Quantised, accumulator_bits: int | None = None) -> Tensor:
    """a bᵀ with sums promoted to FP32 after every 128 of K: a [M, K], b [N, K] → FP32 [M, N].

    The three products of y = x Wᵀ are matmul(x, W), matmul(dy, W.mT) and matmul(dy.mT, x.mT): x and dy in ROW tiles
    for the first two, in COLUMN tiles for the last. Off by at most (min(K, 128) + ⌈K/128⌉ + 4) · 2⁻²⁴ · Σ|a||b| from
    exact sums over the values: an FP32 rounding of each value, of each addition within 128 of K, of each promotion.
    (Plus K · 2⁻¹²⁵: what falls below FP32's normal numbers may be taken for zero.)

    `accumulator_bits` models a tensor core that keeps so few bits between two promotions (14 on Hopper, report §3.3.2):
    slow, and not for training. The bound then grows by 33 · 2^(3 − bits) · Σ|a||b|; see `accumulate`.
    """
    if accumulator_bits is not None:
        return _tensor_core_matmul(a, b, accumulator_bits)
    pairs = zip(a.values().split(SIDE, dim=-1), b.values().split(SIDE, dim=-1), strict=True)
    first, second = next(pairs)
    total = first @ second.T
    for x, y in pairs:
        total += x @ y.T
    return total


def _tensor_core_matmul(a: Quantised, b: Quantised, bits: int) -> Tensor:
    """`matmul` as the hardware does it: codes are multiplied and added, and each 128 of them scaled afterwards."""
    a_scales = a.scales.repeat_interleave(a.tile[0], dim=0)[: a.codes.shape[0]]  # [M, ⌈K/128⌉]
    b_scales = b.scales.repeat_interleave(b.tile[0], dim=0)[: b.codes.shape[0]]
    total = torch.zeros(len(a_scales), len(b_scales), device=a_scales.device)
    for k, (x, y) in enumerate(zip(a.codes.split(SIDE, dim=-1), b.codes.split(SIDE, dim=-1), strict=True)):
        total += accumulate(x, y, bits) * (a_scales[:, k, None] * b_scales[None, :, k])
    return total


def accumulate(a: Tensor, b: Tensor, bits: int) -> Tensor:
    """Codes [M, K], [N, K] → sums of products [M, N] as Hopper's tensor cores form them, over all of K (report §3.5.2).

    32 products at a time are shifted to the largest exponent among them and the sum so far, cut off after `bits`
    binary digits, and added: each time up to 33 · 2^(1 − bits) of the largest magnitude is lost.
    """
    total = torch.zeros(a.shape[0], b.shape[0], device=a.device)
    for x, y in zip(a.float().split(AT_ONCE, dim=-1), b.float().split(AT_ONCE, dim=-1), strict=True):
        terms = torch.cat((x[:, None] * y[None], total[..., None]), dim=-1)  # [M, N, 33]
        exponent = torch.frexp(terms.abs().amax(dim=-1, keepdim=True)).exponent
        unit = torch.ldexp(torch.ones_like(terms[..., :1]), exponent - bits)
        total = ((terms / unit).trunc() * unit).sum(dim=-1)
    return total


# ── products of experts ───────────────────────────────────────────────────────────────────────────────────────────


def quantised_by_expert(values: Tensor, counts: Tensor, power_of_two: bool = False) -> Quantised:
    """Rows [P, C] sorted by expert in COLUMN tiles that end where an expert's rows do, counts [E].

    Its scales are [Σₑ ⌈countsₑ/128⌉, C]; `of_experts` takes it apart. An expert without rows has no tile.
    """
    parts = [quantised(rows, COLUMN, power_of_two) for rows in values.split(counts.tolist())]
    return Quantised(torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]), COLUMN)


def of_experts(rows: Quantised, counts: Tensor) -> list[Quantised]:
    """The rows of each expert, counts [E]: what `quantised_by_expert` made, or any rows in ROW tiles."""
    sizes: list[int] = counts.tolist()
    tiles = [-(-size // rows.tile[0]) for size in sizes]
    pairs = zip(rows.codes.split(sizes), rows.scales.split(tiles), strict=True)
    return [Quantised(codes, scales, rows.tile) for codes, scales in pairs]


def grouped_matmul(x: Quantised, weight: Quantised, counts: Tensor) -> Tensor:
    """Each expert's rows times its own matrix: x [P, K] in ROW tiles, weight [E, N, K], counts [E] → FP32 [P, N].

    Going backward, `weight.mT` with gradients for x. The bound is that of `matmul`.
    """
    each = zip(weight.codes, weight.scales, of_experts(x, counts), strict=True)
    return torch.cat([matmul(rows, Quantised(codes, scales, weight.tile)) for codes, scales, rows in each])


def grouped_wgrad(grad: Quantised, x: Quantised, counts: Tensor) -> Tensor:
    """The gradient of each expert's matrix, summed over its own rows: grad [P, N] and x [P, K], both from
    `quantised_by_expert`, counts [E] → FP32 [E, N, K]; zero for an expert without rows."""
    pairs = zip(of_experts(grad, counts), of_experts(x, counts), strict=True)
    return torch.stack([matmul(g.mT, rows.mT) for g, rows in pairs])
