"""What tokens bring to every layer beside the stream: their embedding anew, and values of their own. Not V3's.

The stream soon is more than the token it began with. Dense speedruns let each layer have the token itself once more,
at the cost of a lookup and an addition; here its FFN reads a share of the embedding, and its attention adds a share of
values of the token's own, H · V of them, to those that it makes of the latent. Both are divided by the root mean
squares by which the norms on the way divide, so that a plain V3 can say the same (`model/unfold.py`).

B batch · T tokens · D hidden_size · E = H · V.
"""

from typing import NamedTuple

from torch import Tensor

from leanseek.ops.elementwise import inverse_rms


class Own(NamedTuple):
    embedding: Tensor | None = None  # [B, T, D]
    values: Tensor | None = None  # [B, T, E]
    scale: Tensor | None = None  # [B, T, 1] of the values, in at least FP32

    def over(self, x: Tensor, eps: float) -> "Own":
        """The values divided as a norm divides x [B, T, …]."""
        if self.values is None:
            return self
        scale = inverse_rms(x, eps)
        return self._replace(scale=scale if self.scale is None else self.scale * scale)

    def scaled(self) -> Tensor | None:
        """The values times their scale [B, T, E]."""
        if self.values is None or self.scale is None:
            return self.values
        return self.values * self.scale.to(self.values.dtype)


NOTHING = Own()
