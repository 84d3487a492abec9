"""One process against many: whatever the mesh, a run computes what the plain model computes."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

import leanseek.ops.fp8 as fp8
import leanseek.parallel.apply as apply
import leanseek.parallel.expert as expert
import leanseek.train.step as step
from leanseek.config import BadInput, Config, read_recipe
from leanseek.data.loader import part_of
from leanseek.model.moe import MoE, Router
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import IGNORE
from leanseek.ops.precision import Plain
from leanseek.ops.routing import choose
from leanseek.parallel.apply import parallelize
from leanseek.parallel.mesh import Division, Ranks, divide, lead, ranks_of
from leanseek.parallel.parts import gathered, parts
from leanseek.train.optim import build_optimizers, watch_logits
from leanseek.train.schedule import Knobs
from leanseek.train.step import train_step
from tests.pool import Pool, RanksFailed
from tests.tiny import RECIPE


def config_of(*overrides: str) -> Config:
    return read_recipe(str(RECIPE), ("train.dtype=fp32", "train.device=cpu", *overrides))


# ── the mesh ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_rank_has_a_place_of_its_own() -> None:
    division = Division(pp=2, dp=4, cp=2, tp=2, ep=4)
    places = [division.place(rank) for rank in range(division.world)]
    assert len({tuple(place.values()) for place in places}) == 32
    assert places[0] == {"pp": 0, "dp": 0, "cp": 0, "tp": 0, "ep": 0}
    assert places[-1] == {"pp": 1, "dp": 3, "cp": 1, "tp": 1, "ep": 3}
    # an expert group is neighbours: ranks of dp 0 and 1
    assert [place["ep"] for place in places[:16:2]] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_dp_is_what_the_other_axes_leave() -> None:
    assert divide(config_of("mesh.tp=2"), 8) == Division(dp=4, tp=2)
    assert divide(config_of(), 1) == Division()


@pytest.mark.parametrize(
    ("overrides", "world", "reason", "nearest"),
    [
        (["mesh.tp=3"], 8, "are 6 ranks, and 8 processes run", "mesh.tp=2"),
        (["mesh.dp=3"], 4, "are 3 ranks, and 4 processes run", "mesh.dp=4"),
        (["mesh.ep=3"], 6, "does not divide model.n_routed_experts 8", "mesh.ep=2"),
        (["mesh.ep=8"], 4, "ep 8 does not divide the 4 ranks", "mesh.ep=4"),
        (["mesh.tp=4"], 4, "does not divide model.num_attention_heads 2", "mesh.tp=2"),
        (["mesh.pp=4"], 4, "makes 4 stages of 3 layers", "mesh.pp=2"),
        (["mesh.replicate=3"], 4, "replicate 3 does not divide dp 4", "mesh.replicate="),
        (["mesh.ep=4", "mesh.replicate=2"], 4, "the 2 ranks", "mesh.ep=2"),
    ],
)
def test_impossible_divisions_are_refused_with_the_nearest(
    overrides: list[str], world: int, reason: str, nearest: str
) -> None:
    with pytest.raises(BadInput) as refused:
        divide(config_of(*overrides), world)
    assert reason in str(refused.value)
    assert nearest in str(refused.value)


def groups(rank: int, world: int, *overrides: str) -> dict[str, list[int]]:
    """By axis, the ranks of this rank's group."""
    ranks = ranks_of(config_of(*overrides))
    axes = ("pp", "dp", "cp", "tp", "ep", "batch", "node", "local")
    found = {axis: ranks.group(axis) for axis in axes}
    assert ranks.total(torch.tensor(rank)) == sum(range(world))
    assert ranks.any(rank == 1)
    assert lead(lambda: rank + 0.5, ranks.group("world")) == 0.5
    return {axis: [rank] if group is None else dist.get_process_group_ranks(group) for axis, group in found.items()}


@pytest.mark.parametrize(
    "config", [("mesh.pp=2", "mesh.ep=4", "mesh.node=2"), ("mesh.cp=2", "mesh.ep=8", "mesh.node=2")]
)
def test_groups_are_as_the_place_says(pool: Pool, config: tuple[str, ...]) -> None:
    division = divide(config_of(*config), 8)
    places = [division.place(rank) for rank in range(8)]
    for rank, found in enumerate(pool.run(8, groups, *config)):
        for axis in ("pp", "dp", "cp", "tp"):
            others = {key: value for key, value in places[rank].items() if key not in (axis, "ep")}
            assert found[axis] == [r for r in range(8) if others.items() <= places[r].items()]
        stage = [r for r in range(8) if places[r]["pp"] == places[rank]["pp"]]
        assert found["batch"] == found["ep"] == stage
        assert found["local"] == [r for r in stage if r // 2 == rank // 2]
        assert found["node"] == [r for r in stage if r % 2 == rank % 2]


# ── the pool ──────────────────────────────────────────────────────────────────────────────────────────────────────


def fails(rank: int, world: int, how: str) -> None:
    if rank == 1:
        if how == "raises":
            raise ValueError("a planted fault")
        while True:
            time.sleep(1)
    dist.barrier()


def test_a_failing_rank_is_named_with_its_traceback(pool: Pool) -> None:
    with pytest.raises(RanksFailed, match=r"(?s)^── rank 1 of 3: Traceback.*in fails.*a planted fault"):
        pool.run(3, fails, "raises")


def test_a_hanging_rank_is_named_with_where_it_hangs(pool: Pool) -> None:
    with pytest.raises(RanksFailed, match=r"(?s)rank 1 of 2: no answer in 5 seconds.*in fails"):
        pool.run(2, fails, "hangs", seconds=5)  # so that a busy machine has made the group by then


# ── one process against many ──────────────────────────────────────────────────────────────────────────────────────

NOW = Knobs(learning_rate=0.003, batch_tokens=0, bias_speed=0.01, mtp_weight=0.3)
STEPS = 5


def knobs_at(step: int, config: Config | None = None) -> Knobs:
    """The MTP modules are at rest in one of the steps, between others in which they learn; at first so are layers."""
    now = replace(NOW, mtp_weight=0.0) if step == 2 else NOW
    return replace(now, layers=1 + step // 2) if config is not None and config.schedule.layers and step < 4 else now


def model_of(config: Config, dtype: torch.dtype) -> Transformer:
    """The model with weights that make the routing uneven, and biases that are not zero."""
    model = Transformer(config.model, dtype).to(dtype)
    generator = torch.Generator().manual_seed(0)
    model.initialise(0.1, generator)
    for router in model.routers().values():
        bias = router.e_score_correction_bias
        assert bias is not None
        bias.copy_(torch.empty(len(bias), dtype=torch.float64).normal_(0.0, 0.05, generator=generator))
    return model


def rows_of(step: int, rows: int, packed: bool) -> list[Tensor | None]:
    """ids, targets, positions, segments [rows, 16]: some targets missing, unevenly over the rows."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 320, (rows, 17), generator=generator)
    ids, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < torch.linspace(0, 0.6, rows)[:, None]] = IGNORE
    if not packed:
        return [ids, targets, None, None]
    cut = torch.randint(3, 13, (rows, 1), generator=generator)
    place = torch.arange(16).expand(rows, -1)
    second = place >= cut
    targets[(place == cut - 1)] = IGNORE  # the last of a sample has no target
    return [ids, targets, torch.where(second, place - cut, place), 1 + second.long()]


Learnt = tuple[list[tuple[float, float, float, float]], list[list[list[int]]], dict[str, Any]]


def learn(
    rank: int,
    world: int,
    overrides: tuple[str, ...],
    rows: int,
    packed: bool,
    dtype: torch.dtype,
    fault: str | None = None,
) -> Learnt:
    """A few steps: the losses of each, the tokens of each expert at each, and the weights that this rank gathers."""
    if fault is not None:
        with FAULTS[fault]():
            return learn(rank, world, overrides, rows, packed, dtype)
    config = config_of(*overrides)
    ranks = ranks_of(config)
    model = parallelize(model_of(config, dtype), config, ranks)
    optimizers = build_optimizers(model, config.optimizer, ranks)
    if config.optimizer.qk_clip is not None:
        watch_logits(model)
    told, loads = [], []
    with watched_loads(loads):
        for step in range(STEPS):
            batch = [
                None if whole is None else whole[part_of(0, rows, ranks.place["dp"], ranks.division.dp)]
                for whole in rows_of(step, rows, packed)
            ]
            ids, targets, positions, segments = batch
            assert ids is not None
            assert targets is not None
            result = train_step(
                model, optimizers, ids, targets, knobs_at(step, config), config, positions, segments, ranks
            )
            told.append((result.loss, result.mtp_loss, result.balance_loss, result.grad_norm))
    whole = gathered(model.state_dict(), parts(model, ranks), ranks)
    return told, loads, {name: tensor.numpy() for name, tensor in whole.items()}


@contextmanager
def watched_loads(loads: list[list[list[int]]]) -> Iterator[None]:
    """Notes the global load of every router at every step."""
    before = step.load_of_all

    def watch(routers: list[Router], ranks: Ranks) -> tuple[list[Tensor], float]:
        found, balance = before(routers, ranks)
        loads.append([load.tolist() for load in found])
        return found, balance

    step.load_of_all = watch
    try:
        yield
    finally:
        step.load_of_all = before


def differs(many: Learnt, one: Learnt, losses: float, weights: float) -> str | None:
    """The first thing in which a run on many ranks is not what one process computes, or None."""
    for number, (a, b) in enumerate(zip(many[0], one[0], strict=True)):
        if not np.allclose(a, b, rtol=losses, atol=losses):
            return f"losses of step {number}: {a}, {b}"
    if many[1] != one[1]:
        return "the counts of experts"
    for name, wanted in one[2].items():
        if name.endswith("e_score_correction_bias"):
            if (many[2][name] != wanted).any():
                return f"{name}: the bias itself"
        elif (far := np.abs(many[2][name] - wanted).max()) > weights:
            return f"{name}: off by {far:.3g}"
    return None


@cache
def alone(overrides: tuple[str, ...], rows: int, packed: bool, dtype: torch.dtype) -> Learnt:
    plain = tuple(override for override in overrides if not override.startswith("mesh."))
    return learn(0, 1, plain, rows, packed, dtype)


def together(many: list[Learnt]) -> Learnt:
    """What the ranks of a run learnt: each weight is gathered on one of them."""
    weights: dict[str, Any] = {}
    for _, _, gathered_there in many:
        assert not weights.keys() & gathered_there.keys()
        weights |= gathered_there
    return many[0][0], many[0][1], weights


def held_against_one(
    pool: Pool, world: int, *overrides: str, rows: int = 7, packed: bool = False, dtype: torch.dtype = torch.float64
) -> None:
    many = pool.run(world, learn, overrides, rows, packed, dtype)
    tolerance = (1e-10, 1e-8) if dtype == torch.float64 else (1e-3, 1e-2)
    assert differs(together(many), alone(overrides, rows, packed, dtype), *tolerance) is None
    assert all(told == many[0][0] for told, _, _ in many[1:])  # every rank says the same


ADAMW = "optimizer.name=adamw"
WAKING = ("schedule.layers=[{until=0.5,value=1}]", "train.zero_outputs=true")
BRINGING = ("model.value_embeddings=true", "model.embedding_shares=true")
TWO_HOPS = ("mesh.ep=4", "mesh.node=2")
# mesh, what else is on, and the batch; every one with MTP, expert groups, non-zero biases and missing targets
QUICK: dict[str, tuple[int, tuple[str, ...], dict[str, Any]]] = {
    "dp": (2, (ADAMW, "train.micro_batch=2"), {}),
    "ep": (2, (ADAMW, "mesh.ep=2"), {"packed": True}),
    "dp × ep, Muon": (4, ("mesh.ep=2", "train.micro_batch=2", "optimizer.qk_clip=0.5"), {}),
    "dp × ep, layers asleep": (4, ("mesh.ep=2", "train.micro_batch=2", *WAKING), {}),
    "dp × ep, MTP of the beginning of rows": (
        4,
        ("mesh.ep=2", "train.micro_batch=2", "train.mtp_length=5"),
        {"packed": True},
    ),
    "dp × ep, tokens that bring, recomputed": (
        4,
        ("mesh.ep=2", "train.micro_batch=2", *BRINGING, "train.recompute=selective"),
        {"packed": True},
    ),
    "ep by node, recomputed": (4, (ADAMW, *TWO_HOPS, "train.recompute=selective"), {}),
}
GRID: dict[str, tuple[int, tuple[str, ...], dict[str, Any]]] = {
    "dp 8": (8, (ADAMW,), {}),
    "dp 8, rows for three": (8, (ADAMW,), {"rows": 3}),
    "dp, copies": (4, (ADAMW, "mesh.replicate=2", "train.micro_batch=1"), {}),
    "dp, two copies of four": (8, (ADAMW, "mesh.replicate=2"), {"packed": True}),
    "dp, nothing shared": (2, (ADAMW, "mesh.replicate=2"), {}),
    "dp, states only": (4, (ADAMW, "mesh.shards=states", "train.micro_batch=1"), {}),
    "ep 8": (8, (ADAMW, "mesh.ep=8"), {}),
    "ep 8 by nodes of 4": (8, (ADAMW, "mesh.ep=8", "mesh.node=4"), {}),
    "ep 8 by nodes of 2, rows for two": (8, (ADAMW, "mesh.ep=8", "mesh.node=2"), {"rows": 2}),
    "ep in one node": (4, (ADAMW, "mesh.ep=4", "mesh.node=8"), {}),
    "dp × ep 8": (8, ("mesh.ep=4", "mesh.node=2", "train.micro_batch=1"), {}),
    "dp × ep, copies": (8, ("mesh.ep=2", "mesh.replicate=2", "optimizer.qk_clip=0.5"), {}),
    "dp × ep, states only": (4, (ADAMW, "mesh.ep=2", "mesh.shards=states", "train.micro_batch=1"), {}),
    "dp × ep, recomputed": (4, ("mesh.ep=2", "train.recompute=full", "train.micro_batch=2"), {"packed": True}),
    "dp × ep, in pieces": (4, (ADAMW, "mesh.ep=2", "mesh.most_load=1.01"), {}),
    "dp × ep, in pieces, recomputed": (4, (ADAMW, *TWO_HOPS, "mesh.most_load=1.01", "train.recompute=full"), {}),
    "dp × ep in FP32": (4, ("mesh.ep=2", "optimizer.moments=bf16"), {"dtype": torch.float32}),
    "dp, Muon": (4, ("train.micro_batch=2",), {}),
    "dp 8, Muon": (8, ("optimizer.qk_clip=0.5",), {"rows": 9}),
}


@pytest.mark.parametrize("case", QUICK)
def test_many_ranks_compute_what_one_computes(pool: Pool, case: str) -> None:
    world, overrides, more = QUICK[case]
    held_against_one(pool, world, *overrides, **more)


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID)
def test_the_grid(pool: Pool, case: str) -> None:
    world, overrides, more = GRID[case]
    held_against_one(pool, world, *overrides, **more)


def local_load(routers: list[Router], ranks: Ranks) -> tuple[list[Tensor], float]:
    """The bias from local load."""
    return [router.load.clone() for router in routers], before_faults["load_of_all"](routers, ranks)[1]


def local_counts(targets: Tensor, segments: Tensor | None, depths: int, ranks: Ranks, *cut: int | None) -> list[int]:
    """A mean of means: every rank's share counts alike, however many targets it has."""
    own = before_faults["valid_targets"](targets, segments, depths, Ranks(), *cut)
    return [count * ranks.division.dp for count in own]


def unreversed(chosen: Tensor) -> expert.Fan:
    """A permutation that combining does not turn back."""
    fan = before_faults["fan_of"](chosen)
    return expert.Fan(fan.source, torch.arange(len(fan.place)), fan.starts)


def kept_nothing(operation: Any, args: Any) -> bool:
    """Routing is recomputed like all else."""
    return False


before_faults: dict[str, Any] = {
    "load_of_all": step.load_of_all,
    "valid_targets": step.valid_targets,
    "fan_of": expert.fan_of,
}
FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "bias from local load": lambda: patch.object(step, "load_of_all", local_load),
    "mean of means": lambda: patch.object(step, "valid_targets", local_counts),
    "unreversed permutation": lambda: patch.object(expert, "fan_of", unreversed),
    "routing counted twice": lambda: patch.object(apply, "_routing_only", kept_nothing),
    "gradients averaged over ranks": lambda: patch.object(FSDPModule, "set_gradient_divide_factor", lambda *_: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(pool: Pool, fault: str) -> None:
    overrides = (ADAMW, "mesh.ep=2", "train.recompute=full")
    many = pool.run(2, learn, overrides, 7, False, torch.float64, fault)
    assert differs(together(many), alone(overrides, 7, False, torch.float64), 1e-10, 1e-8) is not None


# ── what travels ──────────────────────────────────────────────────────────────────────────────────────────────────

TRAVELLERS = {"model.n_routed_experts": 16, "model.num_experts_per_tok": 3, "model.n_group": 4}
D, K, E = 32, 3, 16


def table_of(rank: int) -> Tensor:
    """Three experts of each of a rank's tokens, of which it has 5 to 12."""
    generator = torch.Generator().manual_seed(rank)
    return torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(5 + rank)])


def travel(rank: int, world: int, node: int) -> dict[tuple[str, str], int]:
    """Sends this rank's tokens to their experts, which leave them as they are, and back; what left for other ranks."""
    told = [f"{key}={value}" for key, value in TRAVELLERS.items()]
    ranks = ranks_of(config_of(f"mesh.ep={world}", f"mesh.node={node}", *told))
    traffic = expert.Traffic()
    dispatcher = expert.ParallelDispatcher(E, ranks, traffic)
    table = table_of(rank)
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(len(table), D, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.rand(table.shape, dtype=torch.float64, generator=generator, requires_grad=True)
    dispatcher.beside = expert.Beside(weights)
    rows, counts, way_back = dispatcher.dispatch(x, table)
    expected = torch.bincount(torch.cat([table_of(other).flatten() for other in range(world)]), minlength=E)
    assert counts.tolist() == expected[rank * E // world : (rank + 1) * E // world].tolist()
    y = dispatcher.combine(rows, weights, way_back)
    torch.testing.assert_close(y, x * weights.sum(dim=1, keepdim=True), rtol=0, atol=1e-12)
    cotangent = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    y.backward(cotangent)
    assert x.grad is not None
    assert weights.grad is not None
    torch.testing.assert_close(x.grad, cotangent * weights.sum(dim=1, keepdim=True), rtol=0, atol=1e-12)
    along = (cotangent * x).sum(dim=1, keepdim=True).expand_as(weights)
    torch.testing.assert_close(weights.grad, along, rtol=0, atol=1e-12)
    return dict(traffic)


def counted(world: int, node: int) -> list[dict[tuple[str, str], int]]:
    """The same bytes by rank, token by token from the routing table alone."""
    rows = [Counter[tuple[str, str]]() for _ in range(world)]  # (hop, "out" | "in") → rows to, or from, other ranks
    here = E // world
    for rank in range(world):
        for chosen in table_of(rank).tolist():
            homes = {e // here for e in chosen}
            for machine in {home // node for home in homes}:
                gate = machine * node + rank % node  # where the token enters the machine
                if gate != rank:
                    rows[rank]["node", "out"] += 1
                    rows[gate]["node", "in"] += 1
                for home in homes:
                    if home // node == machine and home != gate:
                        rows[gate]["local", "out"] += 1
                        rows[home]["local", "in"] += 1
    found = []
    for of_rank in rows:
        sent = {}
        for hop in (["node"] if node < world else []) + (["local"] if node > 1 else []):
            out, into = of_rank[hop, "out"], of_rank[hop, "in"]
            sent |= {(hop, "routing"): out * K * 4, (hop, "weights"): (out + into) * K * 8}
            sent |= {(hop, "tokens"): (out + into) * D * 8, (hop, "sums"): (out + into) * D * 8}
        found.append(sent)
    return found


@pytest.mark.parametrize(("world", "node"), [(4, 1), (8, 2), (4, 4)])
def test_bytes_sent_are_those_of_the_routing_table(pool: Pool, world: int, node: int) -> None:
    assert pool.run(world, travel, node) == counted(world, node)


def wishes(rank: int, world: int, limited: bool) -> int:
    """The most copies of one token that leave this rank, where every token's eight best experts are in eight nodes."""
    told = ("model.n_routed_experts=64", "model.num_experts_per_tok=8", "mesh.ep=8")
    ranks = ranks_of(config_of(*told, "model.n_group=8", "model.topk_group=4"))
    generator = torch.Generator().manual_seed(rank)
    scores = torch.rand(20, 8, 8, generator=generator)
    scores[:, :, 0] += 5  # one expert in each node stands out
    experts = choose(scores.flatten(1), 8, 8 if limited else 1, 4, 2)
    traffic = expert.Traffic()
    dispatcher = expert.ParallelDispatcher(64, ranks, traffic)
    most = 0
    for token in experts:
        traffic.clear()
        dispatcher.beside = expert.Beside(torch.ones(1, 8))
        dispatcher.dispatch(torch.ones(1, D), token[None])
        most = max(most, traffic["node", "tokens"] // (D * 4))
    return most


def test_at_most_four_copies_leave_where_routing_is_limited_to_four_nodes(pool: Pool) -> None:
    assert max(pool.run(8, wishes, True)) == 4
    assert pool.run(8, wishes, False) == [7] * 8  # and one stays


class Event:
    def current_stream_wait(self) -> None:
        pass


class TwinBuffer:
    """DeepEP's buffer on the CPU: what its `dispatch` and `combine` say that they do, by one hop of all-to-all."""

    def __init__(self, ranks: Ranks, n_experts: int) -> None:
        group = ranks.group("ep")
        assert group is not None
        self.group, self.here = group, n_experts // ranks.division.ep
        self.first = ranks.place["ep"] * self.here

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[None, None, None, Tensor, Event]:
        return None, None, None, topk_idx // self.here, Event()

    @torch.no_grad()
    def dispatch(
        self,
        x: Tensor,
        handle: expert.Hop | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, expert.Hop, Event]:
        if handle is not None:
            return handle.start(x, "tokens").finish(), None, None, None, handle, Event()
        assert is_token_in_rank is not None
        assert topk_idx is not None
        assert topk_weights is not None
        hop = expert.hop_of(is_token_in_rank, self.group, "ep", expert.Traffic())
        own = hop.start(topk_idx, "routing").finish() - self.first
        own = own.masked_fill((own < 0) | (own >= self.here), -1)
        weights = hop.start(topk_weights, "weights").finish()
        return hop.start(x, "tokens").finish(), own, weights, None, hop, Event()

    @torch.no_grad()
    def combine(
        self, x: Tensor, handle: expert.Hop, topk_weights: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None, Event]:
        return handle.back(x), None if topk_weights is None else handle.back(topk_weights), Event()


def through_deepep(rank: int, world: int, *given: Any) -> Learnt:
    def buffer_of(ranks: Ranks, width: int) -> TwinBuffer:
        return TwinBuffer(ranks, 8)

    with patch.object(apply, "buffer_of", buffer_of):
        return learn(rank, world, *given)


def test_deepep_takes_the_place_of_the_hops(pool: Pool) -> None:
    many = pool.run(2, through_deepep, (ADAMW, "mesh.ep=2"), 7, False, torch.float64)
    # Its weights are FP32, as DeepEP's are.
    assert differs(together(many), alone((ADAMW,), 7, False, torch.float64), 1e-6, 1e-4) is None


def order_of_things(rank: int, world: int) -> list[str]:
    """What happens when in a mixture that is spread over ranks: the tokens' way, and the shared experts."""
    config = config_of("mesh.ep=2")
    ranks = ranks_of(config)
    moe = model_of(config, torch.float64).layers["1"].mlp
    assert isinstance(moe, MoE)
    expert.spread_experts(moe, expert.ParallelDispatcher(8, ranks, expert.Traffic()), ranks, None)
    seen: list[str] = []
    exchange, wait, last = expert.Hop.exchange, expert._await, Plain.after_swiglu

    def exchanges(hop: expert.Hop, rows: Tensor, what: str, backwards: bool) -> Tensor:
        seen.append(f"{what} set out")
        return exchange(hop, rows, what, backwards)

    def waits(under_way: Tensor) -> Tensor:
        if under_way.dim() == 2 and under_way.shape[1] == D:
            seen.append("awaited")
        return wait(under_way)

    def computes(precision: Plain, gate_up: Tensor, weight: Tensor) -> Tensor:
        seen.append("shared")
        gate_up.register_hook(lambda grad: seen.append("shared"))
        return last(precision, gate_up, weight)

    x = torch.randn(2, 8, D, dtype=torch.float64, requires_grad=True)
    with (
        patch.object(expert.Hop, "exchange", exchanges),
        patch.object(expert, "_await", waits),
        patch.object(Plain, "after_swiglu", computes),
    ):
        moe(x).sum().backward()
    return [what for what in seen if not what.startswith(("routing", "weights"))]


def test_shared_experts_are_computed_while_tokens_travel(pool: Pool) -> None:
    forward = ["tokens set out", "shared", "awaited", "sums set out", "awaited"]
    backward = ["sums set out", "awaited", "tokens set out", "shared", "awaited"]
    assert pool.run(2, order_of_things) == [forward + backward] * 2


def through_fp8(rank: int, world: int, node: int) -> dict[str, Any]:
    """Tokens of 200 values that go to experts and come back as they were, in FP8; and what left this rank."""
    config = config_of(f"mesh.ep={world}", f"mesh.node={node}")
    traffic = expert.Traffic()
    dispatcher = expert.ParallelDispatcher(8, ranks_of(config), traffic)
    dispatcher.narrow = True
    make = torch.Generator().manual_seed(rank)
    x = torch.randn(30, 200, generator=make).bfloat16().requires_grad_()
    grad = (torch.randn(30, 200, generator=make) * 1e-3).bfloat16()
    experts = torch.rand(30, 8, generator=make).topk(2).indices
    weights = torch.tensor([1.0, 0.0]).repeat(30, 1)  # all of a token's sum is what its first expert gives back
    dispatcher.beside = expert.Beside(weights)
    rows, _, way = dispatcher.dispatch(x, experts)
    y = dispatcher.combine(rows, weights, way)
    y.backward(grad)
    assert x.grad is not None
    left = {what: sum(n for (_, kind), n in traffic.items() if kind == what) for what in ("tokens", "sums")}
    there = [torch.equal(a, fp8.from_bytes(fp8.to_bytes(b), 200, torch.bfloat16)) for a, b in ((y, x), (x.grad, grad))]
    return {"exact": there, "rounded": not torch.equal(y, x), "left": left}


@pytest.mark.parametrize(("world", "node"), [(2, 1), (2, 2), (4, 2)])
def test_what_goes_to_experts_travels_in_fp8_and_what_comes_back_in_bf16(pool: Pool, world: int, node: int) -> None:
    each = pool.run(world, through_fp8, node)
    assert all(rank["exact"] == [True, True] and rank["rounded"] for rank in each)
    # What leaves one rank arrives at another: of all together as many rows went there as came back, for tokens and for
    # sums, 200 codes and two scales one way, 200 values of two bytes the other.
    left = {what: sum(rank["left"][what] for rank in each) for what in ("tokens", "sums")}
    assert left["tokens"] == left["sums"] > 0
    assert left["tokens"] % (202 + 400) == 0


def overload(rank: int, world: int, most_load: str) -> tuple[int, int]:
    """Routing of which one rank is sent all: the most rows that the experts here computed at once, and in all."""
    config = config_of("mesh.ep=2", "model.n_group=1", "model.topk_group=1", *([most_load] if most_load else []))
    ranks = ranks_of(config)
    model = model_of(config, torch.float64)
    for router in model.routers().values():
        assert router.e_score_correction_bias is not None
        router.e_score_correction_bias[:4] += 10
    rows: list[int] = []
    dispatch = expert.ParallelDispatcher.dispatch

    def watched(*args: Any) -> Any:
        result = dispatch(*args)
        rows.append(result[0].shape[0])
        return result

    with patch.object(expert.ParallelDispatcher, "dispatch", watched):
        parallelize(model, config, ranks)
        ids, *_ = rows_of(0, 4, packed=False)
        assert ids is not None
        model(ids, torch.arange(16).expand_as(ids))
    return max(rows), sum(rows)


def test_an_overloaded_rank_takes_the_tokens_in_pieces(pool: Pool) -> None:
    (most, everything), (none, _) = pool.run(2, overload, "")
    assert none == 0
    (at_once, as_many), _ = pool.run(2, overload, "mesh.most_load=1.01")
    assert as_many == everything
    assert at_once <= most / 2


# ── recomputation ─────────────────────────────────────────────────────────────────────────────────────────────────


class Products(TorchDispatchMode):
    """Counts matrix products by the shape of their second factor, and routings."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.ops.aten.mm.default:
            self.counts[tuple(args[1].shape)] += 1
        elif func == torch.ops.leanseek.route.default:
            self.counts["route"] += 1
        return func(*args, **(kwargs or {}))


def recomputed(what: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[list[int]], Counter[Any]]:
    config = config_of(f"train.recompute={what}", "model.q_lora_rank=20")
    model = parallelize(model_of(config, dtype), config, Ranks())
    model.train()
    ids, targets, *_ = rows_of(0, 4, packed=False)
    assert ids is not None
    assert targets is not None
    with Products() as products:
        sum(step.loss_sums(model, ids, targets)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, [router.load.tolist() for router in model.routers().values()], products.counts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_recomputation_changes_no_bit_and_counts_once(dtype: torch.dtype) -> None:
    gradients, loads, products = recomputed("none", dtype)
    blocks = 4  # three layers and the MTP module's
    up = {(20, 32), (16, 48)}  # q_b_proj and kv_b_proj
    for what in ("selective", "full"):
        again, counted_loads, more = recomputed(what, dtype)
        assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())
        assert counted_loads == loads
        assert more["route"] == products["route"]
        grown = {shape: more[shape] - products[shape] for shape in more if more[shape] != products[shape]}
        if what == "selective":
            assert grown == dict.fromkeys(up, blocks)
        else:
            assert up < grown.keys()
