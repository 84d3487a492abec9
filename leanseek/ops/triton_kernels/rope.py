"""RoPE on the latent key and on the queries' rotary part (report §2.1.1): pairs (x₀, x₁), (x₂, x₃), … turned.

N tokens · H heads (1 for the latent key) · R rotary width. The plain twin is `ops/heads.py · apply_rope`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanseek.ops.triton_kernels.common import cdiv, power_of_two

ROWS = 32


@triton.jit
def _turn(
    x, out, cos, sin, n, heads, x_token, x_head, half,
    BACK: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of N · H
    token, head = row // heads, row % heads
    column, pair = tl.arange(0, 2 * HALF), tl.arange(0, HALF)
    inside = (row < n * heads)[:, None]
    there = inside & (column < 2 * half)[None, :]
    source = x + token.to(tl.int64)[:, None] * x_token + head[:, None] * x_head + column[None, :]
    a, b = tl.split(tl.reshape(tl.load(source, there, other=0.0).to(tl.float32), (ROWS, HALF, 2)))
    turn = token[:, None] * half + pair[None, :]
    known = inside & (pair < half)[None, :]
    c = tl.load(cos + turn, known, other=0.0)
    s = tl.load(sin + turn, known, other=0.0)
    if BACK:
        s = -s
    turned = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (ROWS, 2 * HALF))
    tl.store(out + row.to(tl.int64)[:, None] * (2 * half) + column[None, :], turned, there)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [N, H, R], its last dim in one piece, cos and sin [N, R/2] FP32 → [N, H, R]; computed in FP32.

    Within 2 ulp of the pair's length in the precision of x.
    """
    return _Rope.apply(x, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _launch(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _launch(grad, cos, sin, back=True), None, None  # a turn's gradient is the turn back


def _launch(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    n, heads, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _turn[(cdiv(n * heads, ROWS),)](
            x, out, cos.contiguous(), sin.contiguous(), n, heads, x.stride(0), x.stride(1), width // 2,
            BACK=back, HALF=power_of_two(width // 2), ROWS=ROWS,
        )  # fmt: skip
    return out
