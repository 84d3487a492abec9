"""RMSNorm and SwiGLU with their gradients by hand: arithmetic that costs memory traffic, not FLOPs.

Left to autograd, each of their small steps would write, keep and read again a tensor of the size of the activations.
On a CPU they are `cpu_kernels` where those take them. Beside them stand their plain twins, `…_reference`, which are the
specification.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops import cpu_kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean(x²) + eps) over the last dim, in at least FP32: x [..., D], weight [D] → [..., D]."""
    x = cpu_kernels.packed(x)
    if not torch.is_grad_enabled():
        if cpu_kernels.takes(x):
            return cpu_kernels.rms_norm(x, weight, eps)[0]
        wide = x.to(_wide(x))
        return F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps).to(x.dtype)
    return _RMSNorm.apply(x, weight, eps)[0]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(_wide(x))
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def rms_norm_beside(x: Tensor, weight: Tensor, beside: Tensor, share: Tensor, eps: float) -> Tensor:
    """weight · (x + share · beside) / √(mean(x²) + eps): x and beside [..., D], share [1] → [..., D].

    The root mean square is that of x alone.
    """
    return _RMSNormBeside.apply(x, weight, beside, share, eps)


def rms_norm_beside_reference(x: Tensor, weight: Tensor, beside: Tensor, share: Tensor, eps: float) -> Tensor:
    both = x.to(_wide(x)) + share.to(_wide(x)) * beside
    return (both * inverse_rms_reference(x, eps) * weight.to(both.dtype)).to(x.dtype)


def rms_norm_and_scale(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm(x) [..., D] and what it multiplies by, 1 / √(mean(x²) + eps) [..., 1], in at least FP32."""
    return _RMSNorm.apply(cpu_kernels.packed(x), weight, eps)


def inverse_rms_reference(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.to(_wide(x)).square().mean(dim=-1, keepdim=True) + eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU(gate) · up of [..., 2F], gate first → [..., F]."""
    return _SwiGLU.apply(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if cpu_kernels.takes(x):
            normed, scale = cpu_kernels.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, scale)
            return normed, scale
        wide = x.to(_wide(x))
        scale = _inverse_rms(wide, eps)  # [..., 1]
        ctx.save_for_backward(x, weight, scale)
        normed = wide * scale if wide is x else wide.mul_(scale)
        return normed.mul_(weight.to(wide.dtype)).to(x.dtype), scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_scale: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        if cpu_kernels.takes(x, grad):
            return *cpu_kernels.rms_norm_backward(grad, grad_scale, x, weight, scale)[:2], None
        factor, grad = weight.to(scale.dtype), grad.to(scale.dtype)  # two precisions in one operation are slow on a CPU
        normed = x * scale if x.dtype == scale.dtype else x.to(scale.dtype).mul_(scale)
        along = grad * normed
        grad_weight = along.flatten(0, -2).sum(dim=0)
        # What points along x does not count: the norm takes it out again.
        share = (along @ factor)[..., None].addcmul_(grad_scale, scale).div_(x.shape[-1])
        grad_x = torch.mul(grad, factor, out=along).addcmul_(normed, share, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class _RMSNormBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, beside: Tensor, share: Tensor, eps: float) -> Tensor:
        if cpu_kernels.takes(x, beside):
            normed, scale = cpu_kernels.rms_norm(x, weight, eps, beside, share.item())
            ctx.save_for_backward(x, weight, beside, share, scale)
            return normed
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, beside, share, scale)
        normed = (beside * share.to(scale.dtype)).add_(x).mul_(scale)
        return normed.mul_(weight.to(scale.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, beside, share, scale = ctx.saved_tensors
        if cpu_kernels.takes(x, beside, grad):
            *grads, grad_share = cpu_kernels.rms_norm_backward(grad, None, x, weight, scale, beside, share.item())
            return *grads, grad_share.to(share.dtype), None
        factor, part, grad = weight.to(scale.dtype), share.to(scale.dtype), grad.to(scale.dtype)
        wide, wide_beside = x.to(scale.dtype), beside.to(scale.dtype)
        along = torch.mul(wide_beside, part).add_(wide).mul_(scale).mul_(grad)
        grad_weight = along.flatten(0, -2).sum(dim=0)
        of_scale = (along @ factor)[..., None].mul_(scale.square()).div_(x.shape[-1])
        of_both = torch.mul(grad, factor, out=along).mul_(scale)
        grad_share = torch.dot(of_both.flatten(), wide_beside.flatten()).to(share.dtype).view_as(share)
        grad_beside = (of_both * part).to(beside.dtype)
        grad_x = of_both.addcmul_(wide, of_scale, value=-1)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_beside, grad_share, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x)).square_()
    return square.div_(x.shape[-1]).add_(eps).rsqrt_()


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return cpu_kernels.swiglu(gate_up) if cpu_kernels.takes(gate_up) else swiglu_reference(gate_up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        if cpu_kernels.takes(gate_up, grad):
            return cpu_kernels.swiglu_backward(grad, gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)  # both halves are written where they belong, not joined afterwards
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        torch.mul(F.silu(gate), grad, out=grad_up)
        return grad_gate_up


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
