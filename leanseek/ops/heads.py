"""Queries, keys and values as attention reads them: heads first, positions turned into what needs them (report §2.1.1).

What projections write lies token by token, with the heads of a token side by side, and a key's rotary part once for all
of them. Turning, joining and laying out are many small passes; on a CPU they are one where `cpu_kernels` takes them.
The plain way is the specification.

B batch · H heads · T tokens · N nope width · R rope width · V value width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leanseek.ops import cpu_kernels


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x₀, x₁), (x₂, x₃), … of x [..., R] by cos, sin [..., R/2]; the released weights' own layout."""
    wide = x.to(torch.promote_types(x.dtype, cos.dtype)).contiguous()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # turning a pair is multiplying a complex number
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, W], the last R values of each head turned by cos, sin [B or 1, T, R/2] in FP32 → [B, H, T, W]."""
    x = cpu_kernels.packed(x)
    if cpu_kernels.suit(x, cos, sin) and cos.dtype == sin.dtype == torch.float32:
        return _Turned.apply(x, cos, sin)
    return turned_reference(x, cos, sin)


def turned_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = 2 * cos.shape[-1]
    nope, rope = x.split([x.shape[-1] - width, width], dim=-1)
    rope = apply_rope(rope, cos[:, :, None], sin[:, :, None])
    return torch.cat((nope.transpose(1, 2), rope.transpose(1, 2)), dim=-1)


def keys_and_values(
    kv: Tensor, rope: Tensor, width: int, own: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """kv [B, T, H, N + V] and one turned key for all heads [B, T, R] → k [B, H, T, N + R] and v [B, H, T, V].

    `width` is V. To the values are added `own` ones of the tokens [B, T, H · V] times a share [B, T, 1] or [1].
    """
    values, share = (None, None) if own is None else (own[0], own[1].expand(*kv.shape[:2], 1))
    given = [x for x in (kv, rope, values) if x is not None]
    if cpu_kernels.suit(*given) and all(x.dtype == kv.dtype for x in given):
        return _KeysAndValues.apply(kv, rope, width, values, share)
    return keys_and_values_reference(kv, rope, width, own)


def keys_and_values_reference(
    kv: Tensor, rope: Tensor, width: int, own: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    nope, v = kv.split([kv.shape[-1] - width, width], dim=-1)
    if own is not None:
        v = torch.addcmul(v, own[0].unflatten(-1, (-1, width)), own[1][..., None].to(v.dtype))
    k = torch.cat((nope.transpose(1, 2), rope[:, None].expand(-1, kv.shape[2], -1, -1)), dim=-1)
    return k, v.transpose(1, 2)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return cpu_kernels.turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return cpu_kernels.turned_backward(grad.contiguous(), *ctx.saved_tensors), None, None


class _KeysAndValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kv: Tensor, rope: Tensor, width: int, own: Tensor | None, share: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(own, share)
        ctx.nope = kv.shape[-1] - width
        return cpu_kernels.keys_and_values(kv, rope, width, own, share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        own, share = ctx.saved_tensors
        given = grad_k.contiguous(), grad_v.contiguous(), own, share, ctx.nope
        grad_kv, grad_rope, grad_own, grad_share = cpu_kernels.keys_and_values_backward(*given)
        return grad_kv, grad_rope, None, grad_own, None if share is None else grad_share.to(share.dtype)
