"""The latent cache: all that MLA keeps of the tokens it has seen, C + R values per token and layer (report §2.1.1).

L layers · B rows · S tokens · C kv_lora_rank · R qk_rope_head_dim. In V3 that is 61 · 576 values: 70,272 bytes
per token in BF16.
"""

import torch
from torch import Tensor

from leanseek.config import ModelConfig


class LayerCache:
    """One layer's part, a view of the whole: what `model.mla.LatentCache` asks for."""

    def __init__(self, values: Tensor, latent: int) -> None:
        self.values = values  # [B, S, C + R]
        self.latent = latent
        self.length = 0

    def append(self, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the new tokens' latent [B, T, C] and key [B, T, R]; returns all tokens', as views, not as copies.

        Raises ValueError when the tokens do not fit.
        """
        end = self.length + latent.shape[1]
        if end > self.values.shape[1]:
            raise ValueError(
                f"the cache is full: {end} tokens do not fit into the {self.values.shape[1]} it was made for"
            )
        self.values[:, self.length : end, : self.latent] = latent
        self.values[:, self.length : end, self.latent :] = rope_key
        self.length = end
        return self.values[:, :end, : self.latent], self.values[:, :end, self.latent :]


class Cache:
    """Contiguous and of fixed size; every row holds equally many tokens. `layers` goes to the model's `cache`."""

    def __init__(
        self, config: ModelConfig, rows: int, tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.values = torch.empty(config.num_hidden_layers, rows, tokens, width, dtype=dtype, device=device)
        self.layers = [LayerCache(values, config.kv_lora_rank) for values in self.values]

    @property
    def length(self) -> int:
        """Tokens per row that have passed through every layer."""
        return min(layer.length for layer in self.layers)
