"""In which arithmetic activations meet weights: the seam through which FP8 enters a model (report §3.3.1).

A layer holds a `Precision` and hands it activations and its own weights; which one it holds is decided outside, as the
dispatcher of the experts is. `ops.fp8_linear` has the other one.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from leanseek.ops.backend import PLAIN, Kernels
from leanseek.ops.elementwise import swiglu


class Precision(Protocol):
    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., K], weight [N, K] → x Wᵀ [..., N]."""
        ...

    def after_swiglu(self, gate_up: Tensor, weight: Tensor) -> Tensor:
        """gate_up [..., 2F], gate first, weight [N, F] → SwiGLU(gate_up) Wᵀ [..., N]."""
        ...

    def experts(self, rows: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
        """Each expert's FFN on its rows: rows [P, D] sorted by expert, gate_up [E, 2F, D], down [E, D, F], counts [E]
        → [P, D]."""
        ...


class Plain:
    """The activations' own precision, whatever the weights rest in."""

    def __init__(self, kernels: Kernels = PLAIN) -> None:
        self.kernels = kernels

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.to(x.dtype))

    def after_swiglu(self, gate_up: Tensor, weight: Tensor) -> Tensor:
        return self.linear(swiglu(gate_up), weight)

    def experts(self, rows: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
        hidden = swiglu(self.kernels.grouped_linear(rows, gate_up.to(rows.dtype), counts))
        return self.kernels.grouped_linear(hidden, down.to(rows.dtype), counts)
