"""One layer: attention, then the FFN, each behind a norm and beside a residual (report figure 2)."""

import torch
from torch import Tensor, nn

from leanseek.config import ModelConfig
from leanseek.model.layers import RMSNorm, SwiGLU
from leanseek.model.mla import MLA, LatentCache
from leanseek.model.moe import MoE
from leanseek.model.own import NOTHING, Own


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.is_moe(layer) else SwiGLU(config.hidden_size, config.intermediate_size)
        # An MTP module has just read the embedding.
        shares = config.embedding_shares and layer < config.num_hidden_layers
        self.embedding_share = nn.Parameter(torch.empty(1)) if shares else None

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LatentCache | None = None,
        own: Own = NOTHING,
    ) -> Tensor:
        """x [B, T, D], and what its tokens bring → [B, T, D]."""
        normed, divided = own.through(self.input_layernorm, x)
        x = x + self.self_attn(normed, rope, mask, cache, divided)
        return x + self.mlp(self.post_attention_layernorm(x, own.embedding, self.embedding_share))
