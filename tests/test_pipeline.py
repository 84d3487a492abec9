"""A model cut into stages computes what it computes whole, under every schedule; and PyTorch executes our timetables."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from leanseek.config import Config
from leanseek.model.moe import Router
from leanseek.model.transformer import Transformer
from leanseek.parallel.apply import parallelize
from leanseek.parallel.mesh import Ranks, ranks_of
from leanseek.parallel.parts import gathered, parts
from leanseek.parallel.pipeline import Pipeline
from leanseek.plan.count import loads
from leanseek.train import step
from leanseek.train.optim import build_optimizers
from leanseek.train.step import losses_of, train_step
from tests.pool import Pool
from tests.test_parallel import NOW, STEPS, config_of, model_of, part_of, rows_of

SCHEDULES = ("1F1B", "Interleaved1F1B", "ZBV", "DualPipeV")

Losses = list[tuple[float, float, float, float]]
Counts = list[dict[str, list[int]]]  # by step and router
Learnt = tuple[Losses, Counts, dict[str, Any]]


def learn(rank: int, world: int, overrides: tuple[str, ...], rows: int, packed: bool, dtype: torch.dtype) -> Learnt:
    """A few steps: the losses of each, and what this rank's layers have, the tokens of each expert and the weights."""
    config = config_of(*overrides)
    ranks = ranks_of(config)
    model = model_of(config, dtype)
    pipeline = Pipeline(model, config, ranks, loads(config.model), losses_of) if ranks.division.pp > 1 else None
    parallelize(model, config, ranks, None if pipeline is None else list(pipeline.stages.values()))
    optimizers = build_optimizers(model, config.optimizer, ranks)
    told: Losses = []
    counts: Counts = []
    names = list(model.routers())
    load_of_all = step.load_of_all

    def watch(routers: list[Router], ranks: Ranks) -> tuple[list[Tensor], float]:
        found, balance = load_of_all(routers, ranks)
        counts.append({name: load.tolist() for name, load in zip(names, found, strict=True)})
        return found, balance

    step.load_of_all = watch
    try:
        for number in range(STEPS):
            ids, targets, positions, segments = (
                None if whole is None else whole[part_of(0, rows, ranks.place["dp"], ranks.division.dp)]
                for whole in rows_of(number, rows, packed)
            )
            assert ids is not None
            assert targets is not None
            result = train_step(model, optimizers, ids, targets, NOW, config, positions, segments, ranks, pipeline)
            told.append((result.loss, result.mtp_loss, result.balance_loss, result.grad_norm))
    finally:
        step.load_of_all = load_of_all
    state = model.state_dict()
    whole = gathered(state, parts(model, ranks), dict.fromkeys(state, 0), ranks)
    return told, counts, {name: tensor.numpy() for name, tensor in whole.items()}


@cache
def alone(overrides: tuple[str, ...], rows: int, packed: bool, dtype: torch.dtype) -> Learnt:
    plain = tuple(override for override in overrides if not override.startswith("mesh."))
    return learn(0, 1, plain, rows, packed, dtype)


def differs(many: list[Learnt], one: Learnt, losses: float, weights: float) -> str | None:
    """The first thing in which the ranks together are not what one process computes, or None."""
    for told, _, _ in many:
        for number, (a, b) in enumerate(zip(told, one[0], strict=True)):
            if not np.allclose(a, b, rtol=losses, atol=losses):
                return f"losses of step {number}: {a}, {b}"
    for number, wanted in enumerate(one[1]):
        found = {}
        for _, counts, _ in many:
            found |= counts[number]
        if found != wanted:
            return f"the counts of experts of step {number}"
    missing = set(one[2])
    for _, _, state in many:
        missing -= set(state)
        for name, tensor in state.items():
            if name.endswith("e_score_correction_bias"):
                if (tensor != one[2][name]).any():
                    return f"{name}: the bias itself"
            elif (far := np.abs(tensor - one[2][name]).max()) > weights:
                return f"{name}: off by {far:.3g}"
    return f"nobody has {missing}" if missing else None


def held_against_one(
    pool: Pool, world: int, *overrides: str, rows: int = 7, packed: bool = False, dtype: torch.dtype = torch.float64
) -> str | None:
    many = pool.run(world, learn, overrides, rows, packed, dtype)
    return differs(many, alone(overrides, rows, packed, dtype), 1e-10, 1e-8)
