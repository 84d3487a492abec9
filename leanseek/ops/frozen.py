"""Weights that are not trained: they rest in 8 bits and are wide only while they are multiplied.

As released weights rest (report §3.3, figure 7b), blocks of 128 × 128 codes share a scale, FP8 codes and INT8 ones
alike: value = code · scale. Autograd would keep a wide copy of every matrix until the backward pass; here it keeps the
codes, and makes the copy again. R rows · C columns · r = ⌈R/128⌉ and c = ⌈C/128⌉ blocks · n matrices of a stack.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops.experts import grouped_linear
from leanseek.ops.fp8 import FP8, LARGEST, SIDE, scale_shape

LARGEST_CODE = {FP8: LARGEST, torch.int8: 127.0}


def at_rest(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes in float8_e4m3fn or int8, and scales: values [..., R, C] → [..., R, C] and FP32 [..., r, c]."""
    if values.ndim > 2:  # one matrix at a time: FP32 is four times as wide as what comes of it
        parts = [at_rest(matrix, dtype) for matrix in values]
        return torch.stack([codes for codes, _ in parts]), torch.stack([scales for _, scales in parts])
    rows, columns = values.shape
    r, c = scale_shape(rows, columns)
    padded = F.pad(values.float(), (0, c * SIDE - columns, 0, r * SIDE - rows))
    largest = padded.view(r, SIDE, c, SIDE).abs().amax(dim=(1, 3))  # [r, c]
    scales = torch.where(largest == 0, 1.0, largest / LARGEST_CODE[dtype])
    codes = values.float() / _spread(scales, rows, columns)
    codes = codes if dtype == FP8 else codes.round()
    # Clamped first: what a cast makes of values beyond the largest depends on the version of PyTorch.
    return codes.clamp(-LARGEST_CODE[dtype], LARGEST_CODE[dtype]).to(dtype), scales


def wide(codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The values in `dtype`: codes [..., C], and scales [r, c], or [n, r, c] where the rows are those of n matrices.

    Without scales the codes are the values.
    """
    if scales is None:
        return codes.to(dtype)
    matrices = codes.reshape(-1 if scales.ndim == 2 else scales.shape[0], *_last_two(codes, scales))
    values = torch.empty(matrices.shape, dtype=dtype, device=codes.device)
    for matrix, scale, out in zip(matrices, scales.view(-1, *scales.shape[-2:]), values, strict=True):
        out.copy_(matrix.float() * _spread(scale, *matrix.shape))  # one at a time: FP32 is wider still
    return values.view(codes.shape)


def frozen_linear(x: Tensor, codes: Tensor, scales: Tensor | None, counts: Tensor | None = None) -> Tensor:
    """x times a matrix at rest, [..., C] → [..., R]; with `counts` [E] times those of a stack, as `grouped_linear`."""
    return _FrozenLinear.apply(x, codes, scales, counts)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor | None, counts: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scales, counts)
        weight = wide(codes, scales, x.dtype)
        return F.linear(x, weight) if counts is None else grouped_linear(x, weight, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        codes, scales, counts = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        weight = wide(codes, scales, grad.dtype)
        grad = grad @ weight if counts is None else grouped_linear(grad.contiguous(), weight.mT, counts)
        return grad, None, None, None


def _last_two(codes: Tensor, scales: Tensor) -> tuple[int, int]:
    matrices = 1 if scales.ndim == 2 else scales.shape[0]
    return codes.numel() // codes.shape[-1] // matrices, codes.shape[-1]


def _spread(scales: Tensor, rows: int, columns: int) -> Tensor:
    """A scale for every value: [..., r, c] → FP32 [..., R, C]."""
    tall = scales.float().repeat_interleave(SIDE, dim=-2)[..., :rows, :]
    return tall.repeat_interleave(SIDE, dim=-1)[..., :columns]
