"""E5M6, twelve bits: how the output of attention is kept for the backward pass (report §3.3.3).

Attention's own backward pass reads this tensor too, so three binary digits are too few. Its tiles have the scales that
E4M3 would have, powers of two: becoming E4M3, or tiles of another direction, it is rounded once more and no oftener.
Five bits of exponent are FP16's and six of mantissa its first six: a code is an FP16 number without its last four bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops.fp8 import ROW, spread, tiles_of, whole

LOWEST_EXPONENT = -14  # of a normal number; below it steps stay 2^(−14 − 6)
MANTISSA = 6


def rounded(values: Tensor) -> Tensor:
    """The nearest E5M6 numbers, ties to even, in FP32: off by at most max(|x| · 2⁻⁷, 2⁻²¹) for |x| ≤ 448."""
    exponent = (torch.frexp(values).exponent - 1).clamp(min=LOWEST_EXPONENT)
    step = torch.ldexp(torch.ones_like(values), exponent - MANTISSA)
    return (values / step).round() * step


def pack(values: Tensor, scales: Tensor) -> Tensor:
    """values [..., R, C], scales [..., R, ⌈C/128⌉] of ROW tiles → uint8 [..., R, 3⌈C/2⌉]: two codes in three bytes."""
    wide = whole(rounded(tiles_of(values.float(), ROW) / spread(scales)), values.shape)
    codes = (wide.half().view(torch.int16) >> 4).int() & 0xFFF
    first, second = F.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2)).unbind(-1)
    both = torch.stack((first >> 4, (first & 0xF) << 4 | second >> 8, second & 0xFF), dim=-1)
    return both.flatten(-2).to(torch.uint8)


def unpack(packed: Tensor, scales: Tensor, columns: int) -> Tensor:
    """What `pack` made of [..., R, C], C = `columns` → FP32 [..., R, C]."""
    high, middle, low = packed.int().unflatten(-1, (-1, 3)).unbind(-1)
    codes = torch.stack((high << 4 | middle >> 4, (middle & 0xF) << 8 | low), dim=-1).flatten(-2)[..., :columns]
    values = (codes << 4).to(torch.int16).view(torch.float16).float()
    return whole(tiles_of(values, ROW) * spread(scales), values.shape)
