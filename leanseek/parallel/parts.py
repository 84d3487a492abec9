"""Tensors of which a rank has a part: what part it is, and sums, rows and whole tensors across the ranks that share it.

Whatever shares a tensor, expert groups or FSDP, a rank has some consecutive rows of it, along its first dim. All parts
of a tensor are on the ranks of one `shard` group: copies of the experts × ep for experts, FSDP's own for all else.
"""

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
        return self.rows == self.shape[0]


def local(tensor: Tensor) -> Tensor:
    """This rank's own values of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def parts(model: nn.Module, ranks: Ranks) -> dict[str, Part]:
    """By name, which part of every weight and persistent buffer this rank has."""
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


def gathered(
    tensors: dict[str, Tensor], own: dict[str, Part], owner: dict[str, int], ranks: Ranks
) -> dict[str, Tensor]:
    """Whole tensors in CPU memory, each on one rank of the `shard` group: those whose owner this rank is.

    All ranks of the group call it with the same names in the same order.
    """
    group = ranks.group("shard")
    if group is None:
        return {name: local(tensor).detach().cpu() for name, tensor in tensors.items()}
    here, members = dist.get_rank(group), dist.get_process_group_ranks(group)
    parts_of: list[dict[str, Part]] = [{} for _ in members]
    dist.all_gather_object(parts_of, own, group=group)
    whole = {}
    for name, tensor in tensors.items():
        mine = local(tensor).detach().cpu().contiguous()
        if own[name].whole:
            if owner[name] == here:
                whole[name] = mine
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


def _rows(tensor: Tensor) -> tuple[int, int]:
    """The first row that this rank has of a tensor that FSDP may share, and how many."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0]
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0], shape[0]
