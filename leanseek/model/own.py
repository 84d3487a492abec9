"""What tokens bring to every layer beside the stream: their embedding anew, and values of their own. Not V3's.

The stream soon is more than the token it began with. Dense speedruns let each layer have the token itself once more,
at the cost of a lookup and an addition; here its FFN reads a share of the embedding, and its attention adds a share of
values of the token's own, H · V of them, to those that it makes of the latent. Both are divided by the root mean
squares by which the norms on the way divide, so that a plain V3 can say the same (`model/unfold.py`).

B batch · T tokens · D hidden_size · E = H · V.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from leanseek.model.layers import RMSNorm


class Own(NamedTuple):
    embedding: Tensor | None = None  # [B, T, D]
    values: Tensor | None = None  # [B, T, E]
    scale: Tensor | None = None  # [B, T, 1] of the values, in at least FP32

    def through(self, norm: RMSNorm, x: Tensor) -> tuple[Tensor, "Own"]:
        """x [B, T, …] normed, and the values divided as it is."""
        if self.values is None:
            return norm(x), self
        normed, scale = norm.and_scale(x)
        return normed, self._replace(scale=scale if self.scale is None else self.scale * scale)

    def behind(self, latent: Tensor) -> Tensor:
        """latent [B, T, C] and behind it the values times their scale [B, T, C + E], as they are kept."""
        if self.values is None:
            return latent
        assert self.scale is not None  # they have been through the latent's norm
        return torch.cat((latent, self.values * self.scale.to(self.values.dtype)), dim=-1)


NOTHING = Own()
