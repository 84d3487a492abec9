"""FP8 in blocks of 128 × 128 values, each with a scale of its own (report §3.3, figure 7b): how released weights rest.

A released `weight_scale_inv` is the factor that gives the values back: value = code · scale. At the right and lower
edge blocks are smaller. R rows · C columns · r = ⌈R/128⌉ and c = ⌈C/128⌉ blocks of them.
"""

import torch
from torch import Tensor

BLOCK = 128
LARGEST = 448.0  # of float8_e4m3fn
FP8 = torch.float8_e4m3fn
SCALE = "_scale_inv"  # follows the name of a tensor in FP8, in released files and in ours


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """[R, C] → [r, c]."""
    return -(-rows // BLOCK), -(-columns // BLOCK)


def block_scales(values: Tensor, power_of_two: bool = False) -> Tensor:
    """The scale of each block, its largest magnitude over 448: values [R, C] → FP32 [r, c].

    `power_of_two` (`scale_fmt: ue8m0`) rounds up to an integral power of two. A block of zeros has scale 1.
    """
    rows = [strip.float().abs().amax(dim=0) for strip in values.split(BLOCK)]  # a row of block rows at a time
    largest = torch.stack([torch.stack([part.amax() for part in row.split(BLOCK)]) for row in rows])
    scales = largest / LARGEST
    if power_of_two:
        mantissa, exponent = torch.frexp(scales)  # scales = mantissa · 2^exponent, ½ ≤ mantissa < 1
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
    return torch.where(largest == 0, 1.0, scales)


def quantise(values: Tensor, scales: Tensor) -> Tensor:
    """The codes nearest to value / scale: values [R, C], scales [r, c] → float8_e4m3fn [R, C]."""
    codes = torch.empty(values.shape, dtype=FP8)
    for i, strip in enumerate(values.split(BLOCK)):
        # Clamped first: what a cast makes of values beyond the largest depends on the version of PyTorch.
        codes[i * BLOCK : (i + 1) * BLOCK] = (
            (strip.float() / _spread(scales[i], values)).clamp(-LARGEST, LARGEST).to(FP8)
        )
    return codes


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """code · scale in FP32, rounded to `dtype`: codes [R, C], scales [r, c] → [R, C].

    With scales [n, r, c] the rows of codes [..., C] are those of n matrices, one below the other.
    """
    if scales.ndim == 3:
        matrices = codes.reshape(scales.shape[0], -1, codes.shape[-1])
        return torch.stack([dequantise(*pair, dtype) for pair in zip(matrices, scales, strict=True)]).view(codes.shape)
    values = torch.empty(codes.shape, dtype=dtype)
    for i, strip in enumerate(codes.split(BLOCK)):
        values[i * BLOCK : (i + 1) * BLOCK] = _over_256(strip) * (256 * _spread(scales[i], codes))
    return values


def _over_256(codes: Tensor) -> Tensor:
    """value / 256 in FP32, exactly: moved into the bits of FP16, codes mean that. A cast takes three times as long."""
    bits = codes.view(torch.uint8)
    if (bits & 0x7F).amax() == 0x7F:  # NaN, which FP16 would take for a number
        return codes.float() / 256
    bits = bits.to(torch.int16)
    return (((bits << 8) >> 1) & ~0x4000).view(torch.float16).float()  # the sign stays in front


def _spread(scales: Tensor, matrix: Tensor) -> Tensor:
    """The scales of one row of blocks, one per column: [c] → [C]."""
    return scales.float().repeat_interleave(BLOCK)[: matrix.shape[1]]
