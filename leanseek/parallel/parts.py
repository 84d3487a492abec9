"""Tensors of which a rank has a part: what part it is, and sums, rows and whole tensors across the ranks that share it.

Whatever shares a tensor, expert groups or FSDP, a rank has some consecutive rows of it, along its first dim. All parts
of a tensor are on the ranks of one `shard` group: copies of the experts × ep for experts, FSDP's own for all else.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from leanseek.model.moe import Experts
from leanseek.parallel.expert import ParallelDispatcher
from leanseek.parallel.mesh import Ranks
from leanseek.parallel.tensor import cut


@dataclass(frozen=True)
class Part:
    """The rows first … first + rows − 1 of a tensor that is `shape` as a whole."""

    first: int
    rows: int
    shape: tuple[int, ...]

    @property
    def whole(self) -> bool:
        return self.shape == () or self.rows == self.shape[0]


def local(tensor: Tensor) -> Tensor:
    """This rank's own values of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parts(model: nn.Module, ranks: Ranks) -> dict[str, Part]:
    """By name, which part of every weight and persistent buffer of its stage this rank has."""
    spread = {
        f"{name}.{weight}"
        for name, module in model.named_modules()
        if isinstance(module, Experts) and isinstance(module.dispatcher, ParallelDispatcher)
        for weight, _ in module.named_parameters(recurse=False)
    }
    ep, place = ranks.division.ep, ranks.place["ep"]
    found = {}
    for name, tensor in model.state_dict().items():
        first, rows = _rows(tensor)
        shape = tuple(tensor.shape)
        if name in spread:
            first, shape = first + place * shape[0], (shape[0] * ep, *shape[1:])
        found[name] = Part(first, rows, shape)
    return found


def scale_rows(weight: Tensor, factors: Tensor) -> None:
    """Multiplies each row of a matrix [r, c], of which this rank may have some rows only, by its factor [r]."""
    first, rows = _rows(weight)
    local(weight).mul_(factors[first : first + rows, None])


def norm_of(gradients: dict[str, Tensor], ranks: Ranks) -> Tensor:
    """The norm of all gradients, by the parameters' names, of all ranks, each value counted once."""

    def square(names: list[str]) -> Tensor:
        return torch.nn.utils.get_total_norm([local(gradients[name]) for name in names]).square()

    cut_ones = [name for name in gradients if cut(name) and ranks.division.tp > 1]
    own = square([name for name in gradients if name not in cut_ones])
    if cut_ones:
        own = own + ranks.total(square(cut_ones), "tp")
    return ranks.total(ranks.total(own, "shard"), "pp").sqrt()


def gathered(tensors: dict[str, Tensor], own: dict[str, Part], ranks: Ranks, copied: bool = False) -> dict[str, Tensor]:
    """Whole tensors in CPU memory, each on one of the ranks that `write`; about equally many bytes on each.

    Those that nobody shares may be the tensors themselves unless they shall be `copied`. All ranks call it, those of a
    `shard` group with the same names in the same order.
    """
    if not ranks.writes:
        return {}
    group = ranks.group("shard")
    if group is None:
        return {name: local(tensor).detach().to("cpu", copy=copied) for name, tensor in tensors.items()}
    here, members = dist.get_rank(group), dist.get_process_group_ranks(group)
    parts_of = ranks.told(own, "shard")
    sizes = [math.prod(own[name].shape) * tensor.element_size() for name, tensor in tensors.items()]
    owner = dict(zip(tensors, _owners(sizes, len(members)), strict=True))
    whole = {}
    for name, tensor in tensors.items():
        mine = local(tensor).detach().cpu().contiguous()
        if _unshared(name, parts_of):
            if owner[name] == here:
                whole[name] = mine.clone() if copied else mine
        elif owner[name] != here:
            if own[name].rows:
                dist.send(mine, members[owner[name]])
        else:
            assembled = torch.empty(own[name].shape, dtype=mine.dtype)
            for member, part in enumerate(theirs[name] for theirs in parts_of):
                rows = assembled[part.first : part.first + part.rows]
                if member == here:
                    rows.copy_(mine)
                elif part.rows:
                    dist.recv(rows, members[member])
            whole[name] = assembled
    return whole


def _unshared(name: str, parts_of: list[dict[str, Part]]) -> bool:
    """Whether all ranks have a tensor whole. Of one with a single row, which they share, one rank has all."""
    return all(theirs[name].whole for theirs in parts_of)


def everywhere(tensors: dict[str, Tensor], own: dict[str, Part], ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors on every rank, where they are, by name and one after the other.

    Those that nobody shares are the tensors themselves. All ranks of a `shard` group take them, in the same order.
    """
    group = ranks.group("shard")
    parts_of = ranks.told(own, "shard")
    for name, tensor in tensors.items():
        mine = local(tensor).detach()
        if group is None or _unshared(name, parts_of):
            yield name, mine
            continue
        assembled = mine.new_empty(own[name].shape)
        for member, part in enumerate(theirs[name] for theirs in parts_of):
            rows = assembled[part.first : part.first + part.rows]
            if member == dist.get_rank(group):
                rows.copy_(mine)
            if part.rows:
                dist.broadcast(rows, dist.get_global_rank(group, member), group=group)
        yield name, assembled


def on_one_rank_each(
    rows: list[Tensor], heights: list[int], work: Callable[[list[Tensor]], list[Tensor]], ranks: Ranks
) -> list[Tensor]:
    """Work that needs whole matrices, done for each on one rank of the `shard` group: this rank's rows of the results.

    rows [r of this rank, c] of matrices that are `heights` high, shared as FSDP does. `work` turns matrices into
    others of the same shapes.
    """
    group = ranks.group("shard")
    if group is None or not rows:
        return work(rows)
    here, members = dist.get_rank(group), dist.get_world_size(group)
    widths = [matrix.shape[1] for matrix in rows]
    owner = _owners([h * w * min(h, w) for h, w in zip(heights, widths, strict=True)], members)
    order = sorted(range(len(rows)), key=lambda i: owner[i])  # as they travel, by where they go
    mine = [i for i in order if owner[i] == here]

    def size(i: int, member: int) -> int:
        return _chunk(heights[i], members, member) * widths[i]

    leaving = [sum(size(i, here) for i in order if owner[i] == to) for to in range(members)]
    arriving = [sum(size(i, of) for i in mine) for of in range(members)]
    came = rows[0].new_empty(sum(arriving))
    dist.all_to_all_single(came, torch.cat([rows[i].flatten() for i in order]), arriving, leaving, group=group)
    pieces = [list(part.split([size(i, of) for i in mine])) for of, part in enumerate(came.split(arriving))]
    done = work([torch.cat([part[k] for part in pieces]).view(heights[i], widths[i]) for k, i in enumerate(mine)])
    split = [
        list(matrix.split([_chunk(heights[i], members, to) for to in range(members)]))
        for i, matrix in zip(mine, done, strict=True)
    ]
    back = torch.cat([split[k][to].flatten() for to in range(members) for k in range(len(mine))]) if mine else came
    flat = rows[0].new_empty(sum(leaving))
    dist.all_to_all_single(flat, back, leaving, arriving, group=group)
    results = dict(zip(order, flat.split([size(i, here) for i in order]), strict=True))
    return [results[i].view(rows[i].shape) for i in range(len(rows))]


def _owners(costs: list[int], members: int) -> list[int]:
    """Who does what, the dearest first, each to whoever has least so far."""
    load, owner = [0] * members, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[i] = load.index(min(load))
        load[owner[i]] += costs[i]
    return owner


def _chunk(rows: int, members: int, member: int) -> int:
    """How many of so many rows FSDP leaves a member of its group."""
    most = -(-rows // members)
    return max(0, min(most, rows - member * most))


def _rows(tensor: Tensor) -> tuple[int, int]:
    """The first row that this rank has of a tensor that FSDP may share, and how many."""
    if tensor.dim() == 0:
        return 0, 1
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0]
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0], shape[0]
