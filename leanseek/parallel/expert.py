"""Expert parallelism (report §3.2.2): tokens travel to the ranks of their experts and back, and none is dropped.

N tokens here · M tokens that arrived here · K choices of each · E experts · P rows of the experts here · D width.

A token crosses to a machine once, to the rank there with this rank's place in it (V3: over InfiniBand), and from there
to each rank of that machine that has one of its experts (over NVLink). Coming back, what its experts on one rank made
of it is added up there, then what comes from one machine, and last what comes from all: one copy per machine each way.
With `mesh.node` = 1 every rank is a machine and the second hop falls away; with a machine as large as the expert group
the first one does.

A hop is one all-to-all with uneven splits; backward it is the same hop the other way round. It sets out before the
shared experts are computed and is awaited after them, in both directions. Where experts compute in FP8, what goes to
them travels in FP8, tokens forward and gradients backward; what is added up on arrival travels in BF16 (report §3.3.3).
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from leanseek.model.moe import MoE
from leanseek.ops.experts import lay_out, wants_padding
from leanseek.ops.fp8 import ROW, from_bytes, to_bytes
from leanseek.ops.fp8_linear import Fp8
from leanseek.parallel.mesh import Ranks

# ── copies of rows, and sums of copies ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Fan:
    """Copies of rows: copy p is of row source[p]; the copies of row n are place[starts[n]], place[starts[n] + 1], …

    Copies that nobody's place is are padding.
    """

    source: Tensor  # [P]
    place: Tensor  # [C]
    starts: Tensor  # [N]


def fan_of(chosen: Tensor) -> Fan:
    """chosen [N, parts] bool → a copy of each row for each part it chose, part by part, in the order of the rows."""
    part, source = chosen.t().nonzero(as_tuple=True)
    number = torch.zeros_like(chosen, dtype=torch.int64)  # of the copy
    number[source, part] = torch.arange(len(source), device=source.device)
    per_row = chosen.sum(dim=1)
    return Fan(source, number[chosen], per_row.cumsum(0) - per_row)


def copies(x: Tensor, fan: Fan) -> Tensor:
    """x [N, D] → its copies [P, D]."""
    return _Copies.apply(x, fan)


def sums(rows: Tensor, fan: Fan, weights: Tensor | None = None) -> Tensor:
    """Copies [P, D] → the sum of each row's copies [N, D], each times its weight [C], in the order of `fan.place`."""
    return _Sums.apply(rows, None if weights is None else weights.to(rows.dtype), fan)


class _Copies(torch.autograd.Function):
    """Gather in both directions, so that gradients are added in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fan: Fan) -> Tensor:
        ctx.fan = fan
        return x.index_select(0, fan.source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.fan), None


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor | None, fan: Fan) -> Tensor:
        ctx.fan, ctx.weighted = fan, weights is not None
        if weights is not None:
            ctx.save_for_backward(rows, weights)
        return _summed(rows, fan, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        spread = grad.index_select(0, ctx.fan.source)
        if not ctx.weighted:
            return spread, None, None
        rows, weights = ctx.saved_tensors
        along = (spread * rows).sum(dim=-1)[ctx.fan.place]
        by_row = weights.new_zeros(rows.shape[0]).scatter_(0, ctx.fan.place, weights)  # 0 for padding
        return spread.mul_(by_row[:, None]), along, None


def _summed(rows: Tensor, fan: Fan, weights: Tensor | None = None) -> Tensor:
    return F.embedding_bag(fan.place, rows, fan.starts, mode="sum", per_sample_weights=weights)


# ── one hop ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Traffic(Counter[tuple[str, str]]):
    """Bytes that left this rank for another one since the last `clear`, forward and backward, by hop and by what it is.

    Hops are `node` and `local`; what travels are the `tokens`, the `routing` that goes with them, their `weights`, and
    the `sums` that come back. A gradient counts as what it is the gradient of.
    """


@dataclass(frozen=True)
class Hop:
    """From this rank's rows to the rows that the ranks of a group send it."""

    fan: Fan  # the copies that leave, sorted by the rank they go to
    leaving: list[int]  # rows for each rank of the group
    arriving: list[int]  # rows from each rank
    group: dist.ProcessGroup
    rank: int  # in the group
    name: str
    traffic: Traffic
    narrow: bool = False  # what goes to experts travels in FP8

    def start(self, x: Tensor, what: str) -> "Flight":
        """x [N, …] sets out."""
        return Flight(self, what).start(copies(x, self.fan) if x.is_floating_point() else x[self.fan.source])

    def back(self, y: Tensor) -> Tensor:
        """y [M, D], one row for each that arrived → their sums where they came from, [N, D]."""
        return sums(Flight(self, "sums", backwards=True).start(y).finish(), self.fan)

    def exchange(self, rows: Tensor, what: str, backwards: bool) -> Tensor:
        """Starts the collective: rows sorted by the rank they go to → those that come, once they are awaited."""
        leaving, arriving = (self.arriving, self.leaving) if backwards else (self.leaving, self.arriving)
        others = sum(leaving) - leaving[self.rank]
        self.traffic[self.name, what] += others * math.prod(rows.shape[1:]) * rows.element_size()
        return _all_to_all(rows, leaving, arriving, self.group)


def hop_of(part: Tensor, group: dist.ProcessGroup, name: str, traffic: Traffic, narrow: bool = False) -> Hop:
    """part [N, K]: the rank of the group that each choice of each token is at, or lies behind; −1 for none."""
    ranks = dist.get_world_size(group)
    chosen = torch.zeros(part.shape[0], ranks + 1, dtype=torch.bool, device=part.device)
    chosen = chosen.scatter_(1, part + 1, True)[:, 1:]
    counts = chosen.sum(dim=0)
    told = _await(_all_to_all(counts, [1] * ranks, [1] * ranks, group))
    leaving, arriving = torch.stack((counts, told)).tolist()
    return Hop(fan_of(chosen), leaving, arriving, group, dist.get_rank(group), name, traffic, narrow)


@dataclass
class Flight:
    """Rows on their way, and backward their gradients on the way back."""

    hop: Hop
    what: str
    backwards: bool = False
    width: int = 0  # values of a row
    dtype: torch.dtype = torch.float32
    rows: Tensor | None = None
    gradients: Tensor | None = None

    def sends(self, rows: Tensor, gradients: bool) -> Tensor:
        """Starts the collective for rows, or for the gradients of those that arrived."""
        backwards = self.backwards != gradients
        return self.hop.exchange(packed(rows) if self._narrow(backwards) else rows, self.what, backwards)

    def receives(self, under_way: Tensor, width: int, dtype: torch.dtype, gradients: bool) -> Tensor:
        """Awaits what `sends` sent, rows of `width` values."""
        rows = _await(under_way)
        return unpacked(rows, width, dtype) if self._narrow(self.backwards != gradients) else rows

    def _narrow(self, backwards: bool) -> bool:
        return self.hop.narrow and not backwards and self.what in ("tokens", "sums")

    def start(self, rows: Tensor) -> Self:
        self.rows = _Start.apply(rows, self)
        return self

    def finish(self) -> Tensor:
        """What arrived, [M, …]."""
        rows, self.rows = self.rows, None
        return _Finish.apply(rows, self)


class _Start(torch.autograd.Function):
    """Rows set out. Backward, their gradients are awaited, which set out in `_Finish`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: Flight) -> Tensor:
        ctx.flight, flight.width, flight.dtype = flight, rows.shape[-1], rows.dtype
        return flight.sends(rows, gradients=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        gradients, flight.gradients = flight.gradients, None
        return flight.receives(gradients, flight.width, flight.dtype, gradients=True), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, under_way: Tensor, flight: Flight) -> Tensor:
        ctx.flight, ctx.shape, ctx.dtype = flight, under_way.shape, under_way.dtype
        rows = flight.receives(under_way, flight.width, flight.dtype, gradients=False)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # They are as many as set out, not as arrived: no gradient that autograd could carry between the two.
        flight = ctx.flight
        flight.gradients = flight.sends(grad.contiguous(), gradients=True)
        return grad.new_empty(ctx.shape, dtype=ctx.dtype), None


def packed(rows: Tensor) -> Tensor:
    """Rows [N, D] as FP8 codes and scales; pairs of their bytes pass for BF16, which collectives and autograd carry."""
    sent = to_bytes(rows)
    return F.pad(sent, (0, sent.shape[1] % 2)).view(torch.bfloat16)


def unpacked(rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The rows [N, D] of D = `width` values that `packed` made."""
    return from_bytes(rows.contiguous().view(torch.uint8)[:, : width + -(-width // ROW[1])], width, dtype)


# PyTorch's functional collectives: plain ops, which a policy of recomputation can keep the results of.
def _all_to_all(rows: Tensor, leaving: list[int], arriving: list[int], group: dist.ProcessGroup) -> Tensor:
    return torch.ops._c10d_functional.all_to_all_single(rows, arriving, leaving, group.group_name)


def _await(under_way: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(under_way)


# ── the dispatcher ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class WayBack:
    way: Any  # how the tokens came
    fan: Fan  # from the tokens that arrived to rows sorted by expert
    weights: Tensor  # [C] of the choices that are experts of this rank, token by token


@dataclass(frozen=True)
class Beside:
    """What goes with the tokens of one call, and what is computed while they travel."""

    weights: Tensor  # [N, K]
    compute: Callable[[], None] = lambda: None


class ParallelDispatcher:
    """`dispatch` and `combine` of `model.moe`, where the experts are spread over the ranks of ep.

    `beside` is set for each call. How tokens travel is `there` and `back`: here by hops of all-to-all, in
    `parallel.deepep` by DeepEP's kernels.
    """

    def __init__(self, n_experts: int, ranks: Ranks, traffic: Traffic) -> None:
        division = ranks.division
        self.n_experts, self.traffic = n_experts, traffic
        self.may_pad = True  # between experts, where that is faster
        self.narrow = False  # what goes to experts travels in FP8
        self.here = n_experts // division.ep  # experts of a rank
        self.first = ranks.place["ep"] * self.here
        self.local = division.local
        self.groups = {axis: group for axis in ("node", "local") if (group := ranks.group(axis)) is not None}
        self.beside: Beside | None = None

    def dispatch(self, x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, WayBack]:
        """x [N, D], experts [N, K] → rows [P, D] of this rank's experts, sorted by expert, and counts [E ÷ EP]."""
        assert self.beside is not None
        x, own, weights, way = self.there(x, experts, self.beside)
        mine = own >= 0
        chosen, token = own[mine], mine.nonzero()[:, 0]  # [C] choices of this rank's experts, token by token
        padded = self.may_pad and wants_padding(x, len(chosen), self.here)
        layout = lay_out(chosen[:, None], self.here, padded)
        source = token[layout.source] if len(token) else token
        per_token = mine.sum(dim=1)
        fan = Fan(source, layout.place[:, 0], per_token.cumsum(0) - per_token)
        return copies(x, fan), layout.counts, WayBack(way, fan, weights[mine])

    def combine(self, rows: Tensor, weights: Tensor, way_back: WayBack) -> Tensor:
        """rows [P, D] → weighted sums [N, D]; the weights [N, K] went ahead with the tokens."""
        return self.back(sums(rows, way_back.fan, way_back.weights), way_back.way)

    def there(self, x: Tensor, experts: Tensor, beside: Beside) -> tuple[Tensor, Tensor, Tensor, Any]:
        """x [N, D], experts [N, K] → of the tokens that arrive: x [M, D]; which experts of this rank they chose, −1 for
        those of others, [M, K]; their weights [M, K]; and their way."""
        weights = beside.weights
        hops: list[Hop] = []
        for axis, group in self.groups.items():
            hop = hop_of(self._part(experts, axis), group, axis, self.traffic, self.narrow)
            flights = hop.start(experts.int(), "routing"), hop.start(weights, "weights"), hop.start(x, "tokens")
            if not hops:
                beside.compute()
            experts, weights, x = (flight.finish() for flight in flights)
            experts = experts.long()
            hops.append(hop)
        own = experts - self.first
        return x, own.masked_fill((own < 0) | (own >= self.here), -1), weights, hops

    def back(self, y: Tensor, way: Any) -> Tensor:
        """y [M, D] of the tokens that arrived → their sums where they came from, [N, D]."""
        for hop in reversed(way):
            y = hop.back(y)
        return y

    def _part(self, experts: Tensor, axis: str) -> Tensor:
        """Where in a group each choice lies: its machine, or within this machine its rank; −1 if it does not."""
        rank = experts // self.here
        if axis == "node":
            return rank // self.local
        own = self.first // self.here // self.local  # this machine
        return torch.where(rank // self.local == own, rank % self.local, -1)


def spread_experts(moe: MoE, dispatcher: ParallelDispatcher, ranks: Ranks, most_load: float | None) -> None:
    """Leaves this rank its part of the experts, and puts the way to the others in their dispatcher's place."""
    experts = moe.experts
    own = slice(dispatcher.first, dispatcher.first + dispatcher.here)
    for name, parameter in list(experts.named_parameters(recurse=False)):
        setattr(experts, name, torch.nn.Parameter(parameter.detach()[own].clone()))
    dispatcher.may_pad, dispatcher.narrow = experts.dispatcher.may_pad, isinstance(experts.precision, Fp8)
    experts.dispatcher = dispatcher  # type: ignore[assignment]
    limit = None if most_load is None else most_load / ranks.division.ep

    def routed(x: Tensor, chosen: Tensor, weights: Tensor, compute: Callable[[], None] = lambda: None) -> Tensor:
        dispatcher.beside = Beside(weights, compute)
        result: Tensor = experts(x, chosen, weights)
        dispatcher.beside = None
        return result

    def forward(x: Tensor) -> Tensor:
        """As `MoE.forward`, with the shared experts computed while tokens travel."""
        chosen, weights = moe.gate(x)
        tokens, shared = x.flatten(0, 1), []

        def compute_shared() -> None:
            if moe.shared_experts is not None:
                shared.append(moe.shared_experts(x))

        pieces = 1 if limit is None else _pieces(chosen, dispatcher, limit, ranks)
        if pieces == 1:
            y = routed(tokens, chosen, weights, compute_shared)
        else:
            parts = zip(*(tensor.tensor_split(pieces) for tensor in (tokens, chosen, weights)), strict=True)
            y = torch.cat([checkpoint(routed, *part, use_reentrant=False) for part in parts])
            compute_shared()
        return sum(shared, y.view_as(x))

    moe.forward = forward  # type: ignore[method-assign]


def _pieces(experts: Tensor, dispatcher: ParallelDispatcher, limit: float, ranks: Ranks) -> int:
    """In how many pieces the tokens travel so that no rank is sent more than its share of choices at once.

    At the start of training routing is uneven, and all tokens of a group may want one rank. In pieces, each computed
    again backward, a rank keeps the rows of one piece instead. All ranks take as many: they share weights.
    """
    load = torch.bincount(experts.flatten() // dispatcher.here, minlength=ranks.division.ep)  # [ep]
    ranks.total(load, "ep")
    fullest = ranks.largest(load.max() / load.sum().clamp(min=1), "batch")
    return max(1, math.ceil(fullest.item() / limit))
