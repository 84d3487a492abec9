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
        """Takes the new tokens' latent [B, T, C] and key [B, T, R]; returns all tokens', as views in one precision.

        Raises ValueError when the tokens do not fit.
        """
        start, end = self.length, self.length + latent.shape[1]
        _check(end, self.values)
        self.values[:, start:end, : self.latent] = latent
        self.values[:, start:end, self.latent :] = rope_key
        self.length = end
        seen = self.values[:, :end].to(latent.dtype)
        return seen[..., : self.latent], seen[..., self.latent :]


class Cache:
    """Contiguous and of fixed size; `layers` goes to the model's `cache`. Rows are equally long until `ragged`."""

    def __init__(
        self, config: ModelConfig, rows: int, tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        # Zeros: where rows differ in length, a place that nobody wrote is read with weight 0, and 0 · NaN is not 0.
        self.values = torch.zeros(config.num_hidden_layers, rows, tokens, width, dtype=dtype, device=device)
        self.layers = [LayerCache(values, config.kv_lora_rank) for values in self.values]
        self.lengths: Tensor | None = None  # [B] tokens of each row, once they differ

    @property
    def length(self) -> int:
        """Tokens per row that have passed through every layer; of the longest row."""
        return min(layer.length for layer in self.layers)

    def ragged(self, lengths: Tensor) -> None:
        """Only the first lengths[b] tokens of row b count, the rest was padding: the next one takes their place [B]."""
        self.lengths = lengths.clone()

    def advance(self) -> tuple[int | Tensor, int]:
        """Makes room for one more token in every row; where it goes, [B] if rows differ, and the longest row's length.

        Raises ValueError when rows of one length are full. Of rows that differ, one that is full stays at its last
        place: it is done, and goes on unread beside those that are not.
        """
        end, capacity = self.length + 1, self.values.shape[2]
        if self.lengths is None:
            _check(end, self.values[0])
            at: int | Tensor = end - 1
        else:
            end = min(end, capacity)
            self.lengths = (self.lengths + 1).clamp(max=capacity)
            at = self.lengths - 1
        for layer in self.layers:
            layer.length = end
        return at, end


def _check(end: int, values: Tensor) -> None:
    if end > values.shape[1]:
        raise ValueError(f"the cache is full: {end} tokens do not fit into the {values.shape[1]} it was made for")
