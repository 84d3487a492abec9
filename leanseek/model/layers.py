"""The small parts every block is made of: Linear, RMSNorm, SwiGLU.

Precision follows the activations: weights rest in their own precision (FP32 masters in training, BF16 or FP8 when
served) and are cast where they are used, so that no part of the model asks for a dtype. Training in FP8 puts another
`precision` into layers.
"""

import torch
from torch import Tensor, nn

from leanseek.ops.elementwise import rms_norm, rms_norm_and_scale, rms_norm_beside
from leanseek.ops.precision import Plain, Precision


class Linear(nn.Module):
    """y = x Wᵀ, no bias: weight [out, in]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.precision: Precision = Plain()

    def forward(self, x: Tensor, after_swiglu: bool = False) -> Tensor:
        """x [..., in], or the two inputs of a SwiGLU before it [..., 2 · in] → [..., out]."""
        return (self.precision.after_swiglu if after_swiglu else self.precision.linear)(x, self.weight)


class RMSNorm(nn.Module):
    """y = w · x / √(mean(x²) + eps), computed in at least FP32; of something beside x a share, divided as x is."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, beside: Tensor | None = None, share: Tensor | None = None) -> Tensor:
        if beside is None or share is None:
            return rms_norm(x, self.weight, self.eps)
        return rms_norm_beside(x, self.weight, beside, share, self.eps)

    def and_scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y, and what x was multiplied by, [..., 1]."""
        return rms_norm_and_scale(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) · up(x)): the dense FFN, and the shared experts as one."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.cat((self.gate_proj(x), self.up_proj(x)), dim=-1), after_swiglu=True)
