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
        self.places: Tensor | None = None  # [B] where each row's next token goes, once rows differ in length

    def append(self, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the new tokens' latent [B, T, C] and key [B, T, R]; returns all tokens', as views, not as copies.

        Raises ValueError when the tokens do not fit.
        """
        end = self.length + latent.shape[1]
        if end > self.values.shape[1]:
            raise ValueError(
                f"the cache is full: {end} tokens do not fit into the {self.values.shape[1]} it was made for"
            )
        if self.places is None:
            self.values[:, self.length : end, : self.latent] = latent
            self.values[:, self.length : end, self.latent :] = rope_key
        else:
            rows = torch.arange(len(self.places), device=self.places.device)
            self.values[rows, self.places] = torch.cat((latent, rope_key), dim=-1)[:, 0]
            self.places = self.places + 1
        self.length = end
        return self.values[:, :end, : self.latent], self.values[:, :end, self.latent :]


class Cache:
    """Contiguous and of fixed size; `layers` goes to the model's `cache`. Rows are equally long until `ragged`."""

    def __init__(
        self, config: ModelConfig, rows: int, tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        # Zeros: where rows differ in length, a place that nobody wrote is read with weight 0, and 0 · NaN is not 0.
        self.values = torch.zeros(config.num_hidden_layers, rows, tokens, width, dtype=dtype, device=device)
        self.layers = [LayerCache(values, config.kv_lora_rank) for values in self.values]

    @property
    def length(self) -> int:
        """Tokens per row that have passed through every layer; of the longest row."""
        return min(layer.length for layer in self.layers)

    def ragged(self, lengths: Tensor) -> None:
        """Only the first lengths[b] tokens of row b count, the rest was padding: the next one takes their place [B]."""
        for layer in self.layers:
            layer.places = lengths.clone()
