"""Softmax attention over explicit keys and values: the arithmetic core of MLA in its direct form (report §2.1.1).

B batch · H heads · T queries · S keys · dq query and key width · dv value width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ · scale) v, causal unless a mask says otherwise.

    q [B, H, T, dq], k [B, H, S, dq], v [B, H, S, dv], mask bool [B, 1, T, S] (True: may attend) or None for plain
    causal attention with T = S. Returns [B, H, T, dv].
    """
    width = v.shape[-1]
    if q.device.type == "cpu" and width < q.shape[-1]:
        # PyTorch's flash kernel for CPU wants one width for all three; zero columns of v cost less than its slow path.
        v = F.pad(v, (0, q.shape[-1] - width))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[..., :width]


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """The same in the open, softmax in at least FP32; what `attention` is held against."""
    scores = masked_scores(q, k, scale, mask)
    return torch.softmax(scores, dim=-1).to(v.dtype) @ v


@torch.no_grad()
def largest_logits(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """The largest attention logit of each head over the batch, [H]; what QK-clip watches."""
    return masked_scores(q, k, scale, mask).amax(dim=(0, 2, 3))


def masked_scores(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Attention logits [B, H, T, S] in at least FP32, minus infinity where a query may not attend."""
    scores = (q @ k.transpose(-2, -1)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, float("-inf"))
