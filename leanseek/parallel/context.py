"""Context parallelism for the long stages (report §4.3): every row of tokens is cut over the ranks of the cp axis.

A rank holds two of 2·cp equal pieces of a row, the r-th from the front and the r-th from the back: with causal
attention all ranks then have equally many pairs of tokens. It computes everything of its own tokens, and of the others
it asks, layer by layer, for what MLA keeps of a token: the latent and one rotary key, C + R values. That is little, 576
in V3, where keys and values of all heads would be 40,960. The model takes them for a cache.

Exact: each rank has the loss, and the gradient of every weight, of its own tokens; their sums over the ranks are the
row's. Only the balance loss needs more of the whole row than a sum, the counts of its choices.

B rows · T tokens of a row · t of them here · C latent width · R rotary width.
"""

from bisect import bisect_left
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from leanseek.config import BadInput
from leanseek.model.transformer import Transformer
from leanseek.parallel.mesh import Ranks


def pieces_of(length: int, rank: int, ways: int) -> Tensor:
    """The positions that a rank holds, ascending, [T/ways]. Raises BadInput where a row cannot be cut evenly."""
    size, rest = divmod(length, 2 * ways)
    if rest or not size:
        raise BadInput(f"mesh.cp {ways}: rows of {length} tokens are not cut evenly into {2 * ways} pieces")
    pieces = torch.arange(length).unflatten(0, (2 * ways, size))
    return torch.cat((pieces[rank], pieces[2 * ways - 1 - rank]))


class Context:
    """This rank's share of rows of `length` tokens, over the ranks of a group; the LatentCache of every layer."""

    def __init__(self, length: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.ways = group, group.size()
        own = pieces_of(length, group.rank(), self.ways)
        held = torch.cat([pieces_of(length, rank, self.ways) for rank in range(self.ways)])
        self.positions, self.own = own.tolist(), own.to(device)  # [t] that are here, ascending
        self.place = held.argsort().to(device)  # [T] where each position lies when the ranks' tokens are side by side

    def take(self, rows: Tensor) -> Tensor:
        """rows [B, ≤ T, …] of whole rows, or of their beginnings → what this rank holds of them, [B, ≤ t, …]."""
        return rows[:, self.own[: bisect_left(self.positions, rows.shape[1])]]

    def append(self, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor]:
        """latent [B, ≤ t, C] and key [B, ≤ t, R] of this rank's first tokens → all tokens' up to its own last one.

        An MTP module leaves out the last tokens of a row, so that one rank has fewer than the others.
        """
        here = latent.shape[1]
        kept = torch.cat((latent, rope_key), dim=-1)
        missing = len(self.positions) - here
        if missing:
            kept = torch.cat((kept, kept.new_zeros(len(kept), missing, kept.shape[-1])), dim=1)
        everyone = _Gather.apply(kept, self.group, self.ways)  # [ways, B, t, C + R]
        seen = self.place[: self.positions[here - 1] + 1]
        row = everyone.transpose(0, 1).flatten(1, 2).index_select(1, seen)  # [B, ≤ T, C + R]
        return row[..., : latent.shape[-1]], row[..., latent.shape[-1] :]


def context_of(length: int, ranks: Ranks) -> Context | None:
    """This rank's share of rows of so many tokens; None where it has them whole."""
    group = ranks.group("cp")
    return None if group is None else Context(length, group, ranks.device)


def cut_rows(model: Transformer, group: dist.ProcessGroup) -> Transformer:
    """Has the model's balance losses be of whole rows, though each rank sees a share of them."""

    def complete(counts: Tensor) -> Tensor:
        total = counts.clone()
        dist.all_reduce(total, group=group)
        return total

    for router in model.routers().values():
        router.complete = complete
    return model


class _Gather(torch.autograd.Function):
    """Everyone's tensor on everyone; backward, the sum of what everyone's losses say of one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, ways: int) -> Tensor:
        ctx.group = group
        everyone = x.new_empty(ways, *x.shape)
        dist.all_gather(list(everyone.unbind()), x.contiguous(), group=group)
        return everyone

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        own = torch.empty_like(grad[0])
        dist.reduce_scatter(own, list(grad.contiguous().unbind()), group=ctx.group)
        return own, None, None
