"""Multi-Token Prediction (report §2.2): module k sees hidden state i and token i + k, and predicts token i + k + 1.

Embedding and head are the main model's own; they are lent to the module, never copied. The concatenation puts the
embedding first, as the released `eh_proj` does (the report writes it the other way round).
"""

import torch
from torch import Tensor, nn

from leanseek.config import ModelConfig
from leanseek.model.block import Block
from leanseek.model.layers import Linear, RMSNorm
from leanseek.model.mla import LatentCache
from leanseek.model.own import NOTHING, Own


class MTPModule(nn.Module):
    """One prediction depth; a full block of its own, with its own router and bias."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = Block(config, layer)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)  # `shared_head.norm` in released files

    def forward(
        self,
        embedding: Tensor,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LatentCache | None = None,
        own: Own = NOTHING,
    ) -> Tensor:
        """embedding of token i + k and hidden state i of the depth before, both [B, T, D] → [B, T, D].

        The result is normed: it goes to the head, and to the next depth, as the main model's own final state does.
        `own` is what token i + k brings; its values are divided as its embedding is.
        """
        x, own = self.join(embedding, hidden, own)
        return self.norm(self.block(x, rope, mask, cache, own))

    def remember(
        self,
        embedding: Tensor,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: LatentCache,
        own: Own = NOTHING,
    ) -> None:
        """Keeps what later tokens will look back to, and computes nothing else: most of a module's work is for its
        output, and in generation only the newest token's is asked for."""
        x, own = self.join(embedding, hidden, own)
        normed, own = own.through(self.block.input_layernorm, x)
        cache.append(*self.block.self_attn.compress(normed, rope, own))

    def join(self, embedding: Tensor, hidden: Tensor, own: Own) -> tuple[Tensor, Own]:
        """What the block reads [B, T, D], and what is brought, its values divided as the embedding is."""
        embedded, own = own.through(self.enorm, embedding)
        return self.eh_proj(torch.cat((embedded, self.hnorm(hidden)), dim=-1)), own
