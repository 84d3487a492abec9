"""Multi-head Latent Attention (report §2.1.1): keys and values of all heads live in one latent of kv_lora_rank values.

B batch · T queries · S keys · H heads · N nope width · R rope width · V value width · C latent width.

Direct form, for training and long prefills: expand the latent to keys and values, attend as usual.
Absorbed form, for decoding: fold the expansion into query and output, attend over the latent itself; the cache then
holds C + R values per token, and nothing is expanded.

With value embeddings (`model.own`, not V3's) a token has E = H · V values of its own. They are kept behind its latent,
which is then C + E wide, and a share of them is added to what the latent is expanded to.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanseek.config import ModelConfig
from leanseek.model.layers import Linear, RMSNorm
from leanseek.model.own import NOTHING, Own
from leanseek.model.rope import softmax_scale
from leanseek.ops.attention import attention, largest_logits, masked_scores
from leanseek.ops.heads import keys_and_values, turned

LATENT_NORM_EPS = 1e-6  # the released code gives its latent norms this constant, whatever rms_norm_eps says


class LatentCache(Protocol):
    """What one layer knows of a row's other tokens: those it has seen, or those that other ranks hold."""

    def append(self, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the new tokens' latent [B, T, C] and key [B, T, R]; returns all tokens', [B, S, C] and [B, S, R]."""
        ...


class MLA(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.qk_nope_head_dim, self.qk_rope_head_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.v_head_dim, self.kv_lora_rank = config.v_head_dim, config.kv_lora_rank
        self.scale = softmax_scale(config)
        self.heads = config.num_attention_heads  # those whose weights are here: all, unless the model is cut
        queries = self.heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.hidden_size, queries)
        else:
            self.q_a_proj = Linear(config.hidden_size, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, queries)
        self.compresses_queries = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(config.hidden_size, self.kv_lora_rank + self.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(self.kv_lora_rank, self.heads * (self.qk_nope_head_dim + self.v_head_dim))
        self.o_proj = Linear(self.heads * self.v_head_dim, config.hidden_size)
        self.value_width, self.latent_width = config.value_width, config.latent_width
        if config.value_embeddings:
            self.value_share = nn.Parameter(torch.empty(1))
        # Step-scoped, read and cleared by QK-clip; nothing is measured while it is None.
        self.largest_logits: Tensor | None = None

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LatentCache | None = None,
        own: Own = NOTHING,
    ) -> Tensor:
        """x [B, T, D], rope = cos, sin [B, T, R/2], mask bool [B, 1, T, S] or None for plain causal → [B, T, D]."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.compresses_queries else self.q_proj(x)
        q = turned(q.unflatten(-1, (self.heads, -1)), *rope)
        latent, k_rope, own = self.latent(x, rope, own)
        if cache is None:
            heads = self.direct(q, latent, k_rope, mask, own)
        else:
            latent, k_rope = cache.append(own.behind(latent), k_rope)
            absorb = not self.training and self.absorbing_is_cheaper(x.shape[1], latent.shape[1])
            heads = (self.absorbed if absorb else self.direct)(q, latent, k_rope, mask)
        return self.o_proj(heads.flatten(2))

    def latent(self, x: Tensor, rope: tuple[Tensor, Tensor], own: Own = NOTHING) -> tuple[Tensor, Tensor, Own]:
        """Of tokens x [B, T, D] the normed latent [B, T, C], one key for all heads [B, T, R], and what they bring."""
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent, own = own.through(self.kv_a_layernorm, latent)
        return latent, turned(k_rope[:, :, None], *rope)[:, 0], own

    def compress(self, x: Tensor, rope: tuple[Tensor, Tensor], own: Own = NOTHING) -> tuple[Tensor, Tensor]:
        """All that is kept of tokens x [B, T, D]: the normed latent [B, T, C], and one key for all heads [B, T, R].

        With value embeddings the latent is [B, T, C + E].
        """
        latent, k_rope, own = self.latent(x, rope, own)
        return own.behind(latent), k_rope

    def direct(self, q: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None, own: Own = NOTHING) -> Tensor:
        """q [B, H, T, N + R], latent [B, S, C + E], k_rope [B, S, R] → [B, T, H, V].

        Where the keys' `own` values are given apart, latent [B, S, C].
        """
        if self.value_width and own.values is None:
            latent, values = latent.split([self.kv_lora_rank, self.value_width], dim=-1)
            own = Own(values=values)
        more = None
        if own.values is not None:
            more = own.values, self.value_share if own.scale is None else own.scale * self.value_share
        kv = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1))
        k, v = keys_and_values(kv, k_rope, self.v_head_dim, more)
        if self.largest_logits is not None and self.training:
            torch.maximum(self.largest_logits, largest_logits(q, k, self.scale, mask), out=self.largest_logits)
        return attention(q, k, v, self.scale, mask).transpose(1, 2)

    def absorbed(self, q: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None) -> Tensor:
        """The same values without expanding the latent: one shared key of width C + R, one shared value of width C.

        With value embeddings C + E for C.
        """
        w_uk, w_uv = self.expansion(latent.dtype).split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        q = torch.cat((torch.einsum("bhtn,hnc->bhtc", q_nope, w_uk), q_rope), dim=-1)  # [B, H, T, C + R]
        k = torch.cat((latent, k_rope), dim=-1)[:, None]  # [B, 1, S, C + R]
        weights = masked_scores(q, k, self.scale, mask).softmax(dim=-1).to(latent.dtype)
        return torch.einsum("bhtc,hvc->bthv", weights @ latent[:, None], w_uv)

    def expansion(self, dtype: torch.dtype) -> Tensor:
        """What makes every head's keys and values of what is kept, [H, N + V, C + E]: `kv_b_proj`, beside a share of a
        token's own values."""
        kv_b = self.kv_b_proj.weight.to(dtype).unflatten(0, (self.heads, -1))
        if not self.value_width:
            return kv_b
        own = torch.eye(self.value_width, dtype=dtype, device=kv_b.device).unflatten(0, (self.heads, -1))  # [H, V, E]
        own = F.pad(own * self.value_share.to(dtype), (0, 0, self.qk_nope_head_dim, 0))
        return torch.cat((kv_b, own), dim=-1)

    def absorbing_is_cheaper(self, queries: int, keys: int) -> bool:
        """Expanding costs C (N + V) multiplications for each key and head, absorbing as many for each query; and then
        2C + R instead of N + R + V for each pair of them. With value embeddings absorbing has C + E for C."""
        width = self.qk_nope_head_dim + self.v_head_dim
        return (
            queries * (self.latent_width * width + keys * (2 * self.latent_width - width))
            < keys * self.kv_lora_rank * width
        )
