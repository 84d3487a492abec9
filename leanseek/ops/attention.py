"""Softmax attention over explicit keys and values: the arithmetic core of MLA in its direct form (report §2.1.1).

B batch · H heads · T queries · S keys · dq query and key width · dv value width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.ops import cpu_kernels

# Up to this many keys a CPU holds all scores of a row of text in its cache, and a few large matmuls over them are
# faster than PyTorch's flash kernel there, above all backward.
FEW_KEYS = 512


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v, causal unless a mask says otherwise.

    q [B, H, T, dq], k [B, H, S, dq], v [B, H, S, dv], mask bool [B, 1, T, S] (True: may attend) or None for plain
    causal attention with T = S. Returns [B, H, T, dv].
    """
    width = v.shape[-1]
    if q.device.type == "cpu":
        if q.requires_grad and k.shape[-2] <= FEW_KEYS:
            return _FewKeys.apply(q, k, v, scale, mask)
        # PyTorch's flash kernel for CPU wants one width for all three; zero columns of v cost less than its slow path.
        v = F.pad(v, (0, max(q.shape[-1] - width, 0)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :width]


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """The same in the open, softmax in at least FP32; what `attention` is held against."""
    scores = masked_scores(q, k, scale, mask)
    return torch.softmax(scores, dim=-1).to(v.dtype) @ v


@torch.no_grad()
def largest_logits(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """The largest attention logit of each head over the batch, [H], −∞ where it has no row; what QK-clip watches."""
    if not q.shape[0]:
        return q.new_full((q.shape[1],), -math.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    return masked_scores(q, k, scale, mask).amax(dim=(0, 2, 3))


def masked_scores(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Attention logits [B, H, T, S] in at least FP32, minus infinity where a query may not attend."""
    scores = (q @ k.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, float("-inf"))


class _FewKeys(torch.autograd.Function):
    """Attention over the scores themselves, which are kept as probabilities for the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        heads = q.shape[:2]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [B·H, T or S, width]
        ctx.scale, ctx.causal = scale, mask is None
        if mask is None and cpu_kernels.takes(q):
            p = cpu_kernels.causal_softmax(torch.bmm(q, k.mT), scale)
            ctx.save_for_backward(q, k, v, p)
            return torch.bmm(p, v).unflatten(0, heads)
        if mask is None:
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
        closed = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
        closed = closed.expand(*heads, -1, -1).flatten(0, -3) if closed.dim() > 2 else closed
        p = torch.baddbmm(closed, q, k.mT, alpha=scale).softmax(dim=-1)  # [B·H, T, S]
        ctx.save_for_backward(q, k, v, p)
        return torch.bmm(p, v).unflatten(0, heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, p = ctx.saved_tensors
        heads, grad = grad.shape[:2], grad.flatten(0, 1)
        grad_p = torch.bmm(grad, v.mT)
        if ctx.causal and cpu_kernels.takes(grad_p, p):
            grad_scores = cpu_kernels.causal_softmax_backward(grad_p, p, ctx.scale)
            grads = grad_scores @ k, grad_scores.mT @ q, p.mT @ grad
            return *(g.unflatten(0, heads) for g in grads), None, None
        grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
        grads = (grad_scores @ k).mul_(ctx.scale), (grad_scores.mT @ q).mul_(ctx.scale), p.mT @ grad
        return *(g.unflatten(0, heads) for g in grads), None, None
