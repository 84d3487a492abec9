"""One layer: attention, then the FFN, each behind a norm and beside a residual (report figure 2)."""

from torch import Tensor, nn

from leanseek.config import ModelConfig
from leanseek.model.layers import RMSNorm, SwiGLU
from leanseek.model.mla import MLA, LatentCache
from leanseek.model.moe import MoE
from leanseek.ops.elementwise import over_rms


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MLA(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.is_moe(layer) else SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LatentCache | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, D], and the tokens' own values [B, T, E] where there are value embeddings → [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, self.beside(x, values))
        return x + self.mlp(self.post_attention_layernorm(x))

    def beside(self, x: Tensor, values: Tensor | None) -> Tensor | None:
        """The tokens' own values [B, T, E] divided as the first norm divides x [B, T, D]."""
        return None if values is None else over_rms(values, x, self.input_layernorm.eps)
