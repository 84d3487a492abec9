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
from leanseek.ops.elementwise import over_rms


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
        values: Tensor | None = None,
    ) -> Tensor:
        """embedding of token i + k and hidden state i of the depth before, both [B, T, D] → [B, T, D].

        The result is normed: it goes to the head, and to the next depth, as the main model's own final state does.
        With value embeddings token i + k brings values [B, T, E].
        """
        return self.norm(self.block(self.join(embedding, hidden), rope, mask, cache, self.beside(embedding, values)))

    def remember(
        self,
        embedding: Tensor,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: LatentCache,
        values: Tensor | None = None,
    ) -> None:
        """Keeps what later tokens will look back to, and computes nothing else: most of a module's work is for its
        output, and in generation only the newest token's is asked for."""
        x, block = self.join(embedding, hidden), self.block
        values = block.beside(x, self.beside(embedding, values))
        cache.append(*block.self_attn.compress(block.input_layernorm(x), rope, values))

    def join(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        return self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(hidden)), dim=-1))

    def beside(self, embedding: Tensor, values: Tensor | None) -> Tensor | None:
        """The tokens' own values [B, T, E] divided as `enorm` divides their embedding [B, T, D]."""
        return None if values is None else over_rms(values, embedding, self.enorm.eps)
