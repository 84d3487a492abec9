"""The latent cache: all that MLA keeps of the tokens it has seen, C + R values per token and layer (report §2.1.1).

L layers, with that of the MTP module where it drafts · P pages of Z tokens · B rows · T new tokens of each · S tokens
of the longest row · C latent_width · R qk_rope_head_dim. In V3 that is 61 · 576 values, 70,272 bytes per token in BF16,
and 71,424 with the MTP module's. Which page is whose is the scheduler's to say.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from leanseek.config import ModelConfig

PAGE = 16  # tokens
LARGE_PAGE = 64  # what kernels that read pages themselves want


class Cache:
    """`layers`, L of them, hold the places of all pages [(1 + P) · Z, C + R]; page 0 is nobody's, it takes padding."""

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        drafts: bool = False,
        size: int = PAGE,
    ) -> None:
        self.latent, self.size, self.pages = config.latent_width, size, pages
        layers = config.num_hidden_layers + (1 if drafts else 0)
        self.width = self.latent + config.qk_rope_head_dim
        self.values = _zeros((layers, (1 + pages) * size, self.width), dtype, device)
        self.layers = self.values.unbind()

    def emptied(self) -> Self:
        """Another of the same shape: zeroing this one would take all the memory that it may grow to."""
        other = copy(self)
        other.values = _zeros(tuple(self.values.shape), self.values.dtype, self.values.device)
        other.layers = other.values.unbind()
        return other

    @property
    def bytes_per_token(self) -> int:
        return len(self.layers) * self.width * self.values.itemsize

    def at(self, pages: Sequence[Sequence[int]], starts: Sequence[int], counts: Sequence[int]) -> "Places":
        """Places for the next counts[b] tokens of rows that hold starts[b] tokens on these pages.

        What lies beyond a row's count, or beyond its pages, is padding: it goes to page 0.
        """
        width, size = max(counts), self.size
        ends = [min(start + count, len(own) * size) for own, start, count in zip(pages, starts, counts, strict=True)]
        length, most = max(ends), max(map(len, pages))
        positions: list[int] = []
        slots: list[int] = []
        table: list[int] = []
        for own, start, end in zip(pages, starts, ends, strict=True):
            positions += [min(place, length - 1) for place in range(start, start + width)]
            slots += self._slots(own, start, end)
            slots += [0] * (width - (end - start))
            table += own
            table += [0] * (most - len(own))
        one_piece = len(pages) == 1 and table == list(range(table[0], table[0] + most))
        device = self.values.device
        return Places(
            torch.tensor(positions, device=device).view(len(pages), width),
            torch.tensor(slots, device=device),
            torch.tensor(table, device=device),
            size,
            length,
            width == 1 and min(ends) == length,
            table[0] * size if one_piece else None,
        )

    def copy(self, rows: Sequence[tuple[Sequence[int], Sequence[int], int, int]]) -> None:
        """For each (pages, other pages, start, count): so many places from a start on are copied to the other pages."""
        here: list[int] = []
        there: list[int] = []
        for own, other, start, count in rows:
            here += self._slots(own, start, start + count)
            there += self._slots(other, start, start + count)
        device = self.values.device
        found = self.values.index_select(1, torch.tensor(here, device=device))
        self.values.index_copy_(1, torch.tensor(there, device=device), found)

    def _slots(self, pages: Sequence[int], start: int, end: int) -> list[int]:
        """Where the places from start to before end of a text lie that has these pages."""
        return [pages[place // self.size] * self.size + place % self.size for place in range(start, end)]

    def views(self, places: "Places") -> list["LayerCache"]:
        """The layers' parts for one pass of the model."""
        return [LayerCache(layer, self.latent, places) for layer in self.layers]


@dataclass(frozen=True)
class Places:
    """Where the new tokens of a pass lie, and what came before them."""

    positions: Tensor  # [B, T] in the row's text, below S for padding too
    slots: Tensor  # [B · T] in the cache, counted over all pages
    table: Tensor  # [B · N] each row's pages in order, 0 behind its last
    size: int  # Z
    length: int  # S, the new tokens included
    even: bool  # whether every row has one new token and S in all, so that it may see everything
    start: int | None  # the first slot of an only row whose pages follow one another

    def seen(self, layer: Tensor) -> Tensor:
        """Every row's tokens in one layer [(1 + P) · Z, W] → [B, S, W], a view where `start` is known."""
        if self.start is not None:
            return layer.narrow(0, self.start, self.length)[None]
        rows, width = len(self.positions), layer.shape[1]
        pages = layer.view(-1, self.size * width).index_select(0, self.table)
        return pages.view(rows, -1, width).narrow(1, 0, self.length)


class LayerCache:
    """What `model.mla.LatentCache` asks for."""

    def __init__(self, layer: Tensor, latent: int, places: Places) -> None:
        self.layer, self.latent, self.places = layer, latent, places

    def append(self, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the new tokens' latent [B, T, C] and key [B, T, R]; returns all tokens' in the precision of these."""
        new = torch.cat((latent, rope_key), dim=-1).flatten(0, 1)
        self.layer.index_copy_(0, self.places.slots, new.to(self.layer.dtype))
        seen = self.places.seen(self.layer).to(latent.dtype)
        return seen[..., : self.latent], seen[..., self.latent :]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros, for a place that nobody wrote is read with weight 0, and 0 · NaN is not 0.

    On a CPU the system hands memory out when it is first written: a large cache costs nothing until it is used.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = int(np.prod(shape))
    return torch.from_numpy(np.zeros(count * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
