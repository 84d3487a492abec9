"""One process against many: whatever the mesh, a run computes what the plain model computes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import leanseek.train.step as step
from leanseek.config import BadInput, Config, read_recipe
from leanseek.data.loader import part_of
from leanseek.model.moe import Router
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import IGNORE
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


def test_groups_are_as_the_place_says(pool: Pool) -> None:
    config = ("mesh.pp=2", "mesh.cp=2", "mesh.ep=4", "mesh.node=2")
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
    with pytest.raises(RanksFailed, match=r"(?s)rank 1 of 2: no answer in 2 seconds.*in fails"):
        pool.run(2, fails, "hangs", seconds=2)


# ── one process against many ──────────────────────────────────────────────────────────────────────────────────────

NOW = Knobs(learning_rate=0.003, batch_tokens=0, bias_speed=0.01, mtp_weight=0.3)
STEPS = 5


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


def learn(rank: int, world: int, overrides: tuple[str, ...], rows: int, packed: bool, dtype: torch.dtype) -> Learnt:
    """A few steps: the losses of each, the tokens of each expert at each, and the weights, on the first rank."""
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
            result = train_step(model, optimizers, ids, targets, NOW, config, positions, segments, ranks)
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


def held_against_one(
    pool: Pool, world: int, *overrides: str, rows: int = 7, packed: bool = False, dtype: torch.dtype = torch.float64
) -> None:
    many = pool.run(world, learn, overrides, rows, packed, dtype)
    tolerance = (1e-10, 1e-8) if dtype == torch.float64 else (1e-4, 1e-3)
    weights: dict[str, Any] = {}
    for _, _, of_rank in many:
        assert not weights.keys() & of_rank.keys()
        weights |= of_rank
    together = many[0][0], many[0][1], weights
    assert differs(together, alone(overrides, rows, packed, dtype), *tolerance) is None
    assert all(told == many[0][0] for told, _, _ in many[1:])  # every rank says the same


ADAMW = "optimizer.name=adamw"
TWO_HOPS = ("mesh.ep=4", "mesh.node=2")
# mesh, what else is on, and the batch; every one with MTP, expert groups, non-zero biases and missing targets
QUICK: dict[str, tuple[int, tuple[str, ...], dict[str, Any]]] = {
    "dp": (2, (ADAMW, "train.micro_batch=2"), {}),
    "ep": (2, (ADAMW, "mesh.ep=2"), {"packed": True}),
    "dp × ep, Muon": (4, ("mesh.ep=2", "train.micro_batch=2", "optimizer.qk_clip=0.5"), {}),
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
