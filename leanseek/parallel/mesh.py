"""How a run lies on its ranks (report §3.2): from `[mesh]` and the number of processes to groups of ranks.

    rank = ((pp · DP + dp) · CP + cp) · TP + tp        small letters: where a rank is; capitals: how many there are

- A **stage** of the pipeline is on the ranks of one pp; which stages a pp holds is its schedule's.
- A **row** of the batch is on one dp, the same on all its pp and tp; each of its cp holds a part of the row's tokens.
- An **expert** e of E is on the ranks with ep = e ÷ (E ÷ EP), where ep = (dp · CP + cp) mod EP: an expert group is
  EP neighbours, so that it fills as few machines as it can. What copies of it there are, one for each group, share it
  by FSDP.
- An attention **head** h of H is on the ranks with tp = h ÷ (H ÷ TP).
- Everything else of a stage is shared by FSDP among its dp × cp ranks, or lies there `replicate` times, each shared.

The rest of the code is handed a `Ranks` and finds nothing by itself. One process is a mesh like any other: no group,
and every sum is what it was.
"""

import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from leanseek.config import BadInput, Config, MeshConfig, ModelConfig
from leanseek.parallel.timetable import stages_of
from leanseek.parallel.watch import record_collectives, watching

T = TypeVar("T")


@dataclass(frozen=True)
class Division:
    """How many ranks each axis has."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    replicate: int = 1
    node: int = 1  # ranks in a machine

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def shard(self) -> int:
        """Ranks that share one copy of what is no expert."""
        return self.dp * self.cp // self.replicate

    @property
    def local(self) -> int:
        """Ranks of an expert group that are in one machine."""
        return min(self.ep, max(1, self.node // self.tp))

    def place(self, rank: int) -> dict[str, int]:
        """Where a rank is on pp, dp, cp, tp and ep."""
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return {"pp": pp, "dp": dp, "cp": cp, "tp": tp, "ep": (dp * self.cp + cp) % self.ep}


def divide(config: Config, world: int) -> Division:
    """The division that `config.mesh` asks for. Raises BadInput with the reason and the nearest possible one."""
    asked = config.mesh
    others = asked.pp * asked.cp * asked.tp
    dp = asked.dp or max(1, world // others)
    division = Division(asked.pp, dp, asked.cp, asked.tp, asked.ep, asked.replicate, asked.node)
    reason = wrong_with(division, config, world)
    if reason is None:
        stages, cuts = stages_in(division.pp, config), asked.cuts
        if stages > 1 and cuts is not None and (wrong := wrong_with_cuts(cuts, stages, config.model)) is not None:
            raise BadInput(f"mesh.cuts {list(cuts)}: {wrong}")
        return division
    nearest = _nearest(division, config, world)
    changed = [axis for axis in ("pp", "dp", "cp", "tp", "ep", "replicate", "node") if axis != "dp" or asked.dp]
    keys = [
        f"mesh.{axis}={getattr(nearest, axis)}" for axis in changed if getattr(nearest, axis) != getattr(asked, axis)
    ]
    raise BadInput(f"mesh: {reason}; the nearest that fits {world} processes: {' '.join(keys) or 'mesh.dp left out'}")


def wrong_with(division: Division, config: Config, world: int) -> str | None:
    """Why so many processes and such a model cannot be divided that way, or None."""
    d, model = division, config.model
    if d.world != world:
        return f"pp {d.pp} × dp {d.dp} × cp {d.cp} × tp {d.tp} are {d.world} ranks, and {world} processes run"
    if d.dp % d.replicate:
        return f"replicate {d.replicate} does not divide dp {d.dp}"
    if d.shard % d.ep:
        return f"ep {d.ep} does not divide the {d.shard} ranks (dp × cp ÷ replicate) that its experts are spread over"
    if model.n_routed_experts % d.ep:
        return f"ep {d.ep} does not divide model.n_routed_experts {model.n_routed_experts}"
    if model.num_attention_heads % d.tp:
        return f"tp {d.tp} does not divide model.num_attention_heads {model.num_attention_heads}"
    if d.node > d.tp and (d.node % d.tp or max(d.ep, d.local) % d.local):
        return f"machines of node {d.node} ranks do not divide an expert group of ep {d.ep} (tp {d.tp})"
    if stages_in(d.pp, config) > model.num_hidden_layers:
        return f"pp {d.pp} makes {stages_in(d.pp, config)} stages of {model.num_hidden_layers} layers"
    if d.pp > 1 and d.cp > 1:
        return f"pp {d.pp} and cp {d.cp} do not go together yet: one of them must be 1"
    odd = [stage.sequence_length for stage in config.stages if stage.sequence_length % (2 * d.cp) and d.cp > 1]
    if odd:
        return f"cp {d.cp} makes no {2 * d.cp} equal pieces of rows of {odd[0]} tokens"
    return None


def stages_in(pp: int, config: Config) -> int:
    """How many stages the layers are cut into."""
    return pp * len(stages_of(config.mesh.schedule, pp, 0, config.mesh.chunks)) if pp > 1 else 1


def wrong_with_cuts(cuts: tuple[int, ...], stages: int, model: ModelConfig) -> str | None:
    """Why a model, a row of pieces (embedding, layers, MTP modules, head), cannot be cut into stages of so many."""
    end = model.num_nextn_predict_layers + 1
    whole = 1 + model.num_hidden_layers + end
    if len(cuts) == stages and sum(cuts) == whole and min(cuts) > 0 and cuts[-1] >= end:
        return None
    return (
        f"{stages} stages share the embedding, {model.num_hidden_layers} layers, MTP modules and head, {whole} pieces: "
        f"at least one each, and {end} for the last, which has all from the MTP modules on"
    )


def _nearest(asked: Division, config: Config, world: int) -> Division:
    """Of all that fit, the one with the fewest axes changed, and those by the least factor."""
    divisors = [n for n in range(1, world + 1) if world % n == 0]

    def distance(other: Division) -> tuple[int, float]:
        pairs = [(getattr(asked, axis), getattr(other, axis)) for axis in ("pp", "cp", "tp", "ep", "replicate", "node")]
        return sum(a != b for a, b in pairs), sum(abs(math.log(a / b)) for a, b in pairs)

    best: Division | None = None
    for pp, cp, tp in itertools.product(divisors, repeat=3):
        if world % (pp * cp * tp):
            continue
        dp = world // (pp * cp * tp)
        for ep, copies in itertools.product(*[[n for n in divisors if dp * cp % n == 0]] * 2):
            for node in {asked.node, tp}:
                other = Division(pp, dp, cp, tp, ep, copies, node)
                if wrong_with(other, config, world) is None and (best is None or distance(other) < distance(best)):
                    best = other
    assert best is not None  # dp alone always fits
    return best


# ── the ranks of a run ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, as one of them sees them. `meshes` is empty where there is one process."""

    division: Division = Division()
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    meshes: dict[str, DeviceMesh] = field(default_factory=dict)
    files: dist.ProcessGroup | None = None  # all ranks once more, for a thread that writes beside the training

    @property
    def world(self) -> int:
        return self.division.world

    @property
    def first(self) -> bool:
        """Whether this one logs, locks and writes for all."""
        return self.rank == 0

    @property
    def place(self) -> dict[str, int]:
        return self.division.place(self.rank)

    @property
    def writes(self) -> bool:
        """Whether it is one of those whose parts make up the model once: no copies, of replicate or tp."""
        place = self.place
        return place["tp"] == 0 and place["dp"] * self.division.cp + place["cp"] < self.division.shard

    def named(self) -> str:
        """The division in words for people, nothing where there is one rank."""
        axes = {axis: getattr(self.division, axis) for axis in ("pp", "dp", "cp", "tp", "ep")}
        several = " · ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1)
        return f", {self.world} ranks: {several}" if several else ""

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one on an axis only; None where it has one rank.

        Axes: world, pp, dp, cp, tp, ep; `batch`: dp × cp, who share the tokens of a batch; `node` and `local`: of an
        expert group those of the same place in every machine, and those of the same machine.
        """
        if not self.meshes:
            return None
        for mesh in self.meshes.values():
            if axis in (mesh.mesh_dim_names or ()):
                return mesh.get_group(axis) if mesh[axis].size() > 1 else None
        raise KeyError(axis)

    def total(self, tensor: Tensor, axis: str = "world") -> Tensor:
        """The sum over the ranks of an axis, in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM, axis)

    def largest(self, tensor: Tensor, axis: str = "world") -> Tensor:
        """The largest value over the ranks of an axis, element by element, in place."""
        return self._reduce(tensor, dist.ReduceOp.MAX, axis)

    def each(self, value: float) -> list[float]:
        """Every rank's value, by rank."""
        told = torch.zeros(self.world, dtype=torch.float64, device=self.device)
        told[self.rank] = value
        values: list[float] = self.total(told).tolist()
        return values

    def any(self, answer: bool) -> bool:
        """Whether any rank says yes: what all then act on."""
        return bool(self.largest(torch.tensor(int(answer), device=self.device)))

    def told(self, answer: T, axis: str = "world") -> list[T]:
        """What each rank of an axis says."""
        return everyones(answer, self.group(axis))

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType, axis: str) -> Tensor:
        group = self.group(axis)
        if group is not None:
            dist.all_reduce(tensor, operation, group=group)
        return tensor


ALONE = Ranks()


def meshes_of(division: Division, device_type: str) -> dict[str, DeviceMesh]:
    """The process groups of a division; every rank makes them in the same order.

    `data`: pp, dp, cp, tp. `dense`: what FSDP shares all but the experts over, its dims replicate and shard. `experts`:
    replicate, `copies` of an expert group, and within one node × local. Each is the same row of ranks, cut otherwise.
    """
    d = division
    whole = {
        "data": {"pp": d.pp, "dp": d.dp, "cp": d.cp, "tp": d.tp},
        "dense": {"dense_pp": d.pp, "replicate": d.replicate, "shard": d.shard, "dense_tp": d.tp},
        "experts": {
            "experts_pp": d.pp,
            "experts_replicate": d.replicate,
            "copies": d.shard // d.ep,
            "node": d.ep // d.local,
            "local": d.local,
            "experts_tp": d.tp,
        },
        "groups": {"groups_before": d.world // (d.ep * d.tp), "ep": d.ep, "groups_tp": d.tp},
        "batch": {"batch_pp": d.pp, "batch": d.dp * d.cp, "batch_tp": d.tp},
        "world": {"world": d.world},
    }
    return {
        name: init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
        for name, axes in whole.items()
    }


# ── the processes ─────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def joined(timeout: float) -> Iterator[dist.ProcessGroup | None]:
    """Joins the processes that torchrun started for this command, for as long as the block runs; None where one runs.

    A collective that takes longer than `timeout` seconds raises. Processes that are joined already stay so.
    """
    if dist.is_initialized():
        yield dist.group.WORLD if dist.get_world_size() > 1 else None
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    record_collectives()
    limit = timedelta(seconds=timeout)
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=limit)))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        # torchrun keeps its store through restarts: processes would find the addresses of those before them. Over
        # several machines, whose counts may differ, launch/node.sh has it make a new one.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    try:
        with watching(timeout, lambda line: print(f"leanseek: rank {rank}: {line}", file=sys.stderr, flush=True)):
            yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def refuse_many(verb: str) -> None:
    """Raises BadInput where torchrun started several processes for what one does alone."""
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        error = BadInput(f"{verb}: one process does this, here are {processes}: start it without torchrun")
        if os.environ.get("RANK") != "0":
            error.add_note("raised by every process")
        raise error


def ranks_of(config: Config) -> Ranks:
    """The ranks of a run among the joined processes; `config.train.device` is settled. Raises BadInput."""
    joined = dist.is_initialized()
    division = divide(config, dist.get_world_size() if joined else 1)
    device = torch.device(config.train.device)
    if not joined or division.world == 1:
        return Ranks(device=device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    files = dist.new_group(backend="gloo")
    return Ranks(division, dist.get_rank(), device, meshes_of(division, device.type), files)


def serving_ranks(config: Config) -> Ranks:
    """All joined processes as one tp axis, for a model that one device cannot hold. Raises BadInput."""
    mesh = MeshConfig(tp=dist.get_world_size() if dist.is_initialized() else 1)
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    train = config.train.model_copy(update={"device": device})
    return ranks_of(config.model_copy(update={"mesh": mesh, "train": train}))


def lead(work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """What the first process of a group makes of `work`, which it does alone: its answer, or its error, is everybody's.

    Nobody goes on before it is done. Without a group there is nobody else.
    """
    if group is None:
        return work()
    told: list[Any] = [None, None]  # the answer, or the error
    if dist.get_rank(group) == 0:
        try:
            told[0] = work()
        except (BadInput, OSError) as error:
            told[1] = error
    dist.broadcast_object_list(told, src=dist.get_global_rank(group, 0), group=group)
    if told[1] is not None:
        raise _noted(told[1], group)
    answer: T = told[0]
    return answer


def together(work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """What `work` gives on this process; an error on any of them is everybody's."""
    mine: tuple[T | None, Exception | None]
    try:
        mine = work(), None
    except (BadInput, OSError) as error:
        mine = None, error
    for raised in everyones(mine[1], group):
        if raised is not None:
            raise _noted(raised, group)
    return mine[0]  # type: ignore[return-value]


def _noted(error: Exception, group: dist.ProcessGroup | None) -> Exception:
    """An error that every process of a group raises: a note on all but the first says that it is told already."""
    if group is not None and dist.get_rank(group) != 0:
        error.add_note("raised by every process")
    return error


def size_of(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def everyones(answer: T, group: dist.ProcessGroup | None) -> list[T]:
    """What each process of a group says."""
    if group is None:
        return [answer]
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, answer, group=group)
    return told
