"""Layers in FP8, forward and backward (report §3.3): what is quantised when, and what is kept for the backward pass.

    y = x Wᵀ        x in ROW tiles, W in blocks                                              → activations' precision
    dx = dy W       dy in ROW tiles, the same W                                              → activations' precision
    dW = dyᵀ x      dy in COLUMN tiles, and x, given back from what was kept, in COLUMN tiles    → FP32

Kept are codes and scales, never the input itself. Of SwiGLU the input is kept, and its output is computed again. The
output of attention is kept in E5M6. Scales are powers of two where the report says so: there, and for what expert
parallelism sends, which is the input of the experts going forward and the gradient of their output going backward.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from leanseek.ops import e5m6
from leanseek.ops.backend import PLAIN, Kernels
from leanseek.ops.elementwise import swiglu
from leanseek.ops.fp8 import BLOCK, COLUMN, ROW, SIDE, Quantised
from leanseek.ops.precision import Plain


class Fp8:
    """The `Precision` of a model's layers in FP8; its layers share one.

    Weights are quantised anew at each use, but within `weights_kept` once: that is for the micro-batches of a step.
    `power_of_two_weights` gives weights the scales of releases that say `scale_fmt: ue8m0`. Products of shapes for
    which FP8 was measured to lose stay in the activations' precision.
    """

    def __init__(self, power_of_two_weights: bool = False, kernels: Kernels = PLAIN) -> None:
        self.power_of_two_weights, self.kernels, self.plain = power_of_two_weights, kernels, Plain(kernels)
        self._weights: dict[Tensor, Quantised] | None = None
        self._newest: tuple[weakref.ref[Tensor], int, Quantised] | None = None

    @torch.compiler.disable
    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.pays("dense", x, weight):
            return self.plain.linear(x, weight)
        return _Linear.apply(x, weight, self.input(x), self.weight(weight), self.kernels)

    @torch.compiler.disable
    def after_swiglu(self, gate_up: Tensor, weight: Tensor) -> Tensor:
        if not self.pays("dense", gate_up, weight):
            return self.plain.after_swiglu(gate_up, weight)
        return _AfterSwiGLU.apply(gate_up, weight, self.weight(weight), self.kernels)

    @torch.compiler.disable
    def experts(self, rows: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
        if not self.pays("grouped", rows, gate_up):
            return self.plain.experts(rows, gate_up, down, counts)
        weights = self.weight(gate_up, parts=2), self.weight(down)
        return _Experts.apply(rows, gate_up, down, counts, *weights, self.kernels)

    def pays(self, kind: str, x: Tensor, weight: Tensor) -> bool:
        """Whether x [..., K] times weight [..., N, K] is faster in FP8."""
        return self.kernels.fp8_pays(kind, x[..., 0].numel(), *weight.shape[-2:])

    @contextmanager
    def weights_kept(self) -> Iterator[None]:
        """Within, each weight is quantised at its first use and must not change."""
        self._weights = {}
        try:
            yield
        finally:
            self._weights = None

    def weight(self, weight: Tensor, parts: int = 1) -> Quantised:
        """weight [..., N, K] in blocks; with `parts`, of each of so many matrices [N/parts, K] that lie one above the
        other: [..., parts, N/parts, K]. An export makes the same codes of the same weights."""
        if self._weights is not None and weight in self._weights:
            return self._weights[weight]
        matrices = weight.detach().unflatten(-2, (parts, -1)) if parts > 1 else weight.detach()
        quantised = self.kernels.quantised(matrices, BLOCK, self.power_of_two_weights)
        if self._weights is not None:
            self._weights[weight] = quantised
        return quantised

    def input(self, x: Tensor) -> Quantised:
        """x [..., K] as rows [M, K] in ROW tiles. One input often goes into two matrices, gate and up or the
        compressions of query and key: quantised once, it is also kept once."""
        if self._newest is not None:
            newest, version, quantised = self._newest
            if newest() is x and version == x._version:
                return quantised
        quantised = self.kernels.quantised(x.detach().flatten(0, -2), ROW)
        self._newest = weakref.ref(x), x._version, quantised
        return quantised


class AfterAttention(Fp8):
    """The `Precision` of the matrix after attention: its input is kept in E5M6."""

    @torch.compiler.disable
    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.pays("dense", x, weight):
            return self.plain.linear(x, weight)
        return _AfterAttention.apply(x, weight, self.weight(weight), self.kernels)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: Quantised, w: Quantised, kernels: Kernels) -> Tensor:
        _keep(ctx, kernels, rows, w)
        return kernels.matmul(rows, w, x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        rows, w = _kept(ctx)
        dx = _input_gradient(ctx.kernels, grad, w) if ctx.needs_input_grad[0] else None
        dw = _weight_gradient(ctx.kernels, grad, rows.values()) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None, None


class _AfterAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, w: Quantised, kernels: Kernels) -> Tensor:
        rows = x.flatten(0, -2)
        quantised = kernels.quantised(rows, ROW, power_of_two=True)
        ctx.kernels = kernels
        ctx.save_for_backward(e5m6.pack(rows, quantised.scales), quantised.scales, w.codes, w.scales)
        return kernels.matmul(quantised, w, x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        packed, scales, codes, w_scales = ctx.saved_tensors
        rows = e5m6.unpack(packed, scales, codes.shape[-1])
        dw = _weight_gradient(ctx.kernels, grad, rows, power_of_two=True) if ctx.needs_input_grad[1] else None
        return _input_gradient(ctx.kernels, grad, Quantised(codes, w_scales, BLOCK)), dw, None, None


class _AfterSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor, w: Quantised, kernels: Kernels) -> Tensor:
        rows = gate_up.flatten(0, -2)
        _keep(ctx, kernels, kernels.quantised(rows, ROW), w)
        return kernels.matmul(kernels.quantised_swiglu(rows), w, gate_up.dtype).unflatten(0, gate_up.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        kept, w = _kept(ctx)
        with torch.enable_grad():
            gate_up = kept.values(grad.dtype).requires_grad_()
            hidden = swiglu(gate_up)
        dw = _weight_gradient(ctx.kernels, grad, hidden.detach()) if ctx.needs_input_grad[1] else None
        (d_gate_up,) = torch.autograd.grad(hidden, gate_up, _input_gradient(ctx.kernels, grad.flatten(0, -2), w))
        return d_gate_up.unflatten(0, grad.shape[:-1]), dw, None, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor, w_gate_up: Quantised, w_down: Quantised,
        kernels: Kernels,
    ) -> Tensor:  # fmt: skip
        x, multiply = kernels.quantised(rows, ROW, power_of_two=True), kernels.grouped_matmul
        inner = torch.cat([multiply(x, w, counts, rows.dtype) for w in _halves(w_gate_up)], dim=-1)
        _keep(ctx, kernels, x, kernels.quantised(inner, ROW), w_gate_up, w_down)
        ctx.counts = counts
        return multiply(kernels.quantised_swiglu(inner), w_down, counts, rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        (x, inner, w_gate_up, w_down), counts, kernels = _kept(ctx), ctx.counts, ctx.kernels
        with torch.enable_grad():
            gate_up = inner.values(grad.dtype).requires_grad_()
            hidden = swiglu(gate_up)
        d_out = kernels.quantised(grad, ROW, power_of_two=True)
        d_hidden = kernels.grouped_matmul(d_out, w_down.mT, counts, grad.dtype)
        d_down = kernels.grouped_wgrad(
            kernels.quantised_by_expert(grad, counts, power_of_two=True),
            kernels.quantised_by_expert(hidden.detach(), counts),
            counts,
        )
        (d_inner,) = torch.autograd.grad(hidden, gate_up, d_hidden)
        columns = kernels.quantised_by_expert(x.values(), counts, power_of_two=True)
        d_rows, d_gate_up = torch.zeros(x.codes.shape, device=grad.device), []
        for w, d in zip(halves := _halves(w_gate_up), d_inner.chunk(len(halves), dim=-1), strict=True):
            d_rows += kernels.grouped_matmul(kernels.quantised(d, ROW), w.mT, counts)
            d_gate_up.append(kernels.grouped_wgrad(kernels.quantised_by_expert(d, counts), columns, counts))
        return d_rows.to(grad.dtype), torch.cat(d_gate_up, dim=1), d_down, None, None, None, None


def _input_gradient(kernels: Kernels, grad: Tensor, w: Quantised) -> Tensor:
    """grad [..., N], w [N, K] in blocks → [..., K] in the gradient's precision."""
    rows = kernels.quantised(grad.flatten(0, -2), ROW)
    return kernels.matmul(rows, w.mT, grad.dtype).unflatten(0, grad.shape[:-1])


def _weight_gradient(kernels: Kernels, grad: Tensor, rows: Tensor, power_of_two: bool = False) -> Tensor:
    """grad [..., N], the input rows [M, K] → FP32 [N, K]. `power_of_two` is for the scales of the rows."""
    dy = kernels.quantised(grad.flatten(0, -2), COLUMN)
    return kernels.matmul(dy.mT, kernels.quantised(rows, COLUMN, power_of_two).mT)


def _halves(gate_up: Quantised) -> list[Quantised]:
    """[E, 2, F, D] in blocks → matrices [E, …, D] to multiply by: one of gate and up together where blocks end between
    the two, else two."""
    codes, scales = gate_up.codes, gate_up.scales
    if codes.shape[2] % SIDE == 0:
        return [Quantised(codes.flatten(1, 2), scales.flatten(1, 2), BLOCK)]
    return [Quantised(codes[:, half], scales[:, half], BLOCK) for half in (0, 1)]


def _keep(ctx: Any, kernels: Kernels, *quantised: Quantised) -> None:
    ctx.kernels = kernels
    ctx.tiles = [q.tile for q in quantised]
    ctx.save_for_backward(*(tensor for q in quantised for tensor in (q.codes, q.scales)))


def _kept(ctx: Any) -> list[Quantised]:
    tensors = ctx.saved_tensors
    return [Quantised(*pair) for pair in zip(tensors[::2], tensors[1::2], ctx.tiles, strict=True)]
