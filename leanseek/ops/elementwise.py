"""RMSNorm and its division alone, and SwiGLU, with gradients by hand: arithmetic that costs memory traffic, not FLOPs.

Left to autograd, each of their small steps would write, keep and read again a tensor of the size of the activations.
Each function has its plain twin beside it, `…_reference`, which is the specification.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean(x²) + eps) over the last dim, in at least FP32: x [..., D], weight [D] → [..., D]."""
    if not torch.is_grad_enabled():
        wide = x.to(_wide(x))
        return F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps).to(x.dtype)
    return _RMSNorm.apply(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(_wide(x))
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def over_rms(values: Tensor, x: Tensor, eps: float) -> Tensor:
    """values ÷ √(mean(x²) + eps), as rms_norm divides x itself: values [..., E], x [..., D] → [..., E]."""
    return _OverRMS.apply(values, x, eps)


def over_rms_reference(values: Tensor, x: Tensor, eps: float) -> Tensor:
    scale = torch.rsqrt(x.to(_wide(x)).square().mean(dim=-1, keepdim=True) + eps)
    return (values * scale).to(values.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) · up of [..., 2F], gate first → [..., F]."""
    if not torch.is_grad_enabled():
        return swiglu_reference(gate_up)
    return _SwiGLU.apply(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(_wide(x))
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, scale)
        normed = wide * scale if wide is x else wide.mul_(scale)
        return normed.mul_(weight.to(wide.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        factor = weight.to(scale.dtype)
        normed = x * scale if x.dtype == scale.dtype else x.to(scale.dtype).mul_(scale)
        along = grad * normed
        grad_weight = along.flatten(0, -2).sum(dim=0)
        # What points along x does not count: the norm takes it out again.
        share = (along @ factor)[..., None].div_(x.shape[-1])
        grad_x = torch.mul(grad, factor, out=along).addcmul_(normed, share, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class _OverRMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x)).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(values, x, scale)
        return (values * scale).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        values, x, scale = ctx.saved_tensors
        along = (grad * values).sum(dim=-1, keepdim=True, dtype=scale.dtype)
        grad_x = x * (along * scale.pow(3)).div_(-x.shape[-1])
        return (grad * scale).to(values.dtype), grad_x.to(x.dtype), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)  # both halves are written where they belong, not joined afterwards
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        torch.mul(F.silu(gate), grad, out=grad_up)
        return grad_gate_up


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
