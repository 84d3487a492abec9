"""A model cut into stages computes what the whole one does, under every schedule; PyTorch executes our timetables."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.fsdp
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

import leanseek.parallel.apply as apply
import leanseek.parallel.pipeline as pipelines
import leanseek.train.step as training
from leanseek import checkpoint
from leanseek.config import BadInput
from leanseek.data.loader import part_of
from leanseek.eval.bpb import bits_per_byte
from leanseek.model.moe import Router
from leanseek.parallel.apply import parallelize
from leanseek.parallel.mesh import Ranks, divide, ranks_of
from leanseek.parallel.parts import gathered, parts
from leanseek.parallel.pipeline import Pipeline, layers_of_stages
from leanseek.parallel.timetable import SCHEDULES, Timetable, enough_batches, even_cuts
from leanseek.plan.count import loads
from leanseek.train.optim import build_optimizers, watch_logits
from leanseek.train.pretrain import share_of
from leanseek.train.step import losses_of, train_step
from tests.pool import Pool
from tests.test_parallel import config_of, knobs_at, model_of, rows_of

EXECUTED = ("1F1B", "Interleaved1F1B", "ZBV", "DualPipeV")

# ── one process against stages ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Case:
    """A run of a few steps. Seven rows in micro-batches of two: the last is filled in part, and some are empty."""

    ranks: int
    overrides: tuple[str, ...]
    packed: bool = False
    rows: int = 7
    steps: int = 5
    begun: int = 0  # the first step to take; those before are in a checkpoint

    @property
    def alone(self) -> "Case":
        """The same in one process."""
        plain = tuple(override for override in self.overrides if not override.startswith("mesh."))
        return replace(self, ranks=1, overrides=plain)


@dataclass(frozen=True)
class Learnt:
    """What a rank tells: losses by step; of its own layers the tokens of each expert by step, and the weights; bpb."""

    losses: list[tuple[float, float, float, float]]
    counts: list[dict[str, list[int]]]
    weights: dict[str, Any]
    bpb: float


def learn(rank: int, world: int, case: Case, fault: str | None = None, run: Path | None = None) -> Learnt:
    """Takes the steps of a case, from a checkpoint of RUN if it did not begin with the first; then saves one there."""
    config = config_of("optimizer.name=adamw", "train.micro_batch=2", "model.num_hidden_layers=5", *case.overrides)
    ranks = ranks_of(config)
    model = model_of(config, torch.float64)
    with planted(fault):
        pipeline = Pipeline(model, config, ranks, loads(config.model), losses_of) if ranks.division.pp > 1 else None
        parallelize(model, config, ranks, None if pipeline is None else list(pipeline.stages.values()))
        optimizers = build_optimizers(model, config.optimizer, ranks)
        if config.optimizer.qk_clip is not None:
            watch_logits(model)
        if run is not None and case.begun:
            newest = checkpoint.newest(run, pytest.fail)
            assert newest is not None
            checkpoint.load(newest, model, optimizers, ranks)
        losses = []
        with watched_counts(list(model.routers())) as counts:
            for number in range(case.begun, case.steps):
                ids, targets, positions, segments = (
                    None if whole is None else whole[part_of(0, case.rows, ranks.place["dp"], ranks.division.dp)]
                    for whole in rows_of(number, case.rows, case.packed)
                )
                assert ids is not None
                assert targets is not None
                got = train_step(
                    model,
                    optimizers,
                    ids,
                    targets,
                    knobs_at(number),
                    config,
                    positions,
                    segments,
                    ranks,
                    pipeline=pipeline,
                )
                losses.append((got.loss, got.mtp_loss, got.balance_loss, got.grad_norm))
        if run is not None:
            checkpoint.save(run, case.steps, model, optimizers, {}, 1, ranks)
        scorer = model if pipeline is None else pipeline.nats
        scored = bits_per_byte(scorer, documents(), 16, 0, batch_tokens=40, share=share_of(ranks)).bpb
    whole = gathered(model.state_dict(), parts(model, ranks), ranks)
    return Learnt(losses, counts, {name: tensor.numpy() for name, tensor in whole.items()}, scored)


def documents() -> Iterator[tuple[list[int], int]]:
    """Texts of lengths that make batches of several shapes."""
    for length in (1, 5, 16, 17, 40, 3, 29):
        yield torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(length)).tolist(), 4 * length


@contextmanager
def watched_counts(names: list[str]) -> Iterator[list[dict[str, list[int]]]]:
    """Notes the tokens that each router sent to each expert in the whole batch, at every step."""
    counts: list[dict[str, list[int]]] = []
    load_of_all = training.load_of_all

    def watch(routers: list[Router], ranks: Ranks) -> tuple[list[Tensor], float]:
        found, balance = load_of_all(routers, ranks)
        counts.append({name: load.tolist() for name, load in zip(names, found, strict=True)})
        return found, balance

    training.load_of_all = watch
    try:
        yield counts
    finally:
        training.load_of_all = load_of_all


@cache
def alone(case: Case) -> Learnt:
    return learn(0, 1, case)


def differs(many: list[Learnt], one: Learnt) -> str | None:
    """The first thing in which the ranks together are not what one process computes, or None."""
    for number, wanted in enumerate(one.counts):
        if wanted != {name: count for rank in many for name, count in rank.counts[number].items()}:
            return f"counts of experts, step {number}"
        for rank in many:
            if not np.allclose(rank.losses[number], one.losses[number], rtol=1e-10, atol=1e-10):
                return f"losses of step {number}: {rank.losses[number]}, {one.losses[number]}"
    for name, weight in one.weights.items():
        found = [rank.weights[name] for rank in many if name in rank.weights]
        if not found:
            return f"{name}: nobody has it"
        exact = name.endswith("e_score_correction_bias")
        if any(np.abs(other - weight).max() > (0 if exact else 1e-8) for other in found):
            return f"{name}: off"
    if any(abs(rank.bpb - one.bpb) > 1e-10 for rank in many):
        return f"bpb: {many[0].bpb}, {one.bpb}"
    return None


PP = "mesh.pp=2"
UNEVEN = ("model.num_nextn_predict_layers=2", "mesh.cuts=[2,1,1,5]")  # embedding and 1 layer; 1; 1; 2, 2 MTP, head
QUICK = {
    "1F1B": Case(2, (PP, UNEVEN[0], "mesh.cuts=[5,4]"), packed=True),
    "Interleaved1F1B": Case(2, (PP, *UNEVEN, "mesh.schedule=Interleaved1F1B"), packed=True),
    "ZBV": Case(2, (PP, *UNEVEN, "mesh.schedule=ZBV"), packed=True),
    "DualPipeV": Case(2, (PP, *UNEVEN, "mesh.schedule=DualPipeV"), packed=True),
    "pp × ep, recomputed": Case(4, (PP, "mesh.ep=2", "mesh.schedule=DualPipeV", "train.recompute=selective"), steps=3),
}
MORE = {
    "no MTP": Case(2, (PP, "model.num_nextn_predict_layers=0")),
    "no layer in the first stage": Case(2, (PP, "mesh.cuts=[1,2,2,3]")),
    "Muon, QK-clip": Case(2, (PP, "optimizer.name=muon", "optimizer.qk_clip=0.5")),
    "all recomputed": Case(2, (PP, "train.recompute=full")),
    "pp 4": Case(4, ("mesh.pp=4", "model.num_hidden_layers=9", UNEVEN[0], "train.micro_batch=1"), packed=True),
    "pp 8": Case(8, ("mesh.pp=8", "model.num_hidden_layers=16", "train.micro_batch=1"), rows=9, steps=3),
    "pp × dp": Case(4, (PP, UNEVEN[0]), packed=True),
    "pp × dp, rows for one": Case(4, (PP,), rows=1),
    "pp × dp, states only": Case(4, (PP, "mesh.shards=states")),
    "pp × dp, copies": Case(4, (PP, "mesh.replicate=2")),
    "pp × ep": Case(4, (PP, "mesh.ep=2", UNEVEN[0])),
    "pp × ep × dp": Case(8, (PP, "mesh.ep=2", "train.recompute=full"), rows=10),
    "pp × ep × dp, Muon": Case(8, (PP, "mesh.ep=2", "optimizer.name=muon"), packed=True, rows=5),
    "pp 4 × ep": Case(8, ("mesh.pp=4", "mesh.ep=2", "model.num_hidden_layers=8"), steps=3),
}


@pytest.mark.parametrize("name", QUICK)
def test_stages_compute_what_the_whole_model_computes(pool: Pool, name: str) -> None:
    case = QUICK[name]
    assert differs(pool.run(case.ranks, learn, case), alone(case.alone)) is None


@pytest.mark.slow
@pytest.mark.parametrize("schedule", EXECUTED)
@pytest.mark.parametrize("name", MORE)
def test_the_grid(pool: Pool, name: str, schedule: str) -> None:
    case = replace(MORE[name], overrides=(*MORE[name].overrides, f"mesh.schedule={schedule}"))
    if schedule == "1F1B":  # one stage a rank: the cuts are others
        case = replace(case, overrides=tuple("mesh.cuts=[1,7]" if "cuts" in o else o for o in case.overrides))
    assert differs(pool.run(case.ranks, learn, case), alone(case.alone)) is None


@pytest.mark.parametrize("first", ["stages", "one process"])
def test_a_checkpoint_knows_nothing_of_stages(pool: Pool, tmp_path: Path, first: str) -> None:
    stages = QUICK["DualPipeV"]
    case, other = (stages, stages.alone) if first == "stages" else (stages.alone, stages)
    pool.run(case.ranks, learn, replace(case, steps=2), None, tmp_path)
    resumed = pool.run(other.ranks, learn, replace(other, begun=2), None, tmp_path)
    whole = alone(stages.alone)
    assert differs(resumed, replace(whole, losses=whole.losses[2:], counts=whole.counts[2:])) is None


# ── planted faults ────────────────────────────────────────────────────────────────────────────────────────────────


def _dropped(pipeline: Pipeline) -> None:
    """The last stage keeps the gradient of the embedding that it borrowed."""
    if pipeline.borrowed is not None:
        pipeline.borrowed.weight.grad = None


def _by_micro_batches(made: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Gradients are divided by the number of micro-batches after the losses were: PyTorch's default."""
    return made(*args, **settings | {"scale_grads": True})


def _without_examples(*args: Any, **settings: Any) -> Any:
    """PyTorch runs each stage once to see the shapes it makes: its default too."""
    return PipelineStage(*args, **{k: v for k, v in settings.items() if k not in ("input_args", "output_args")})


def _resharding(module: Any, **settings: Any) -> Any:
    """FSDP lets go of gathered weights after each forward pass: its default."""
    return torch.distributed.fsdp.fully_shard(module, **settings | {"reshard_after_forward": True})


FAULTS: dict[str, tuple[Case, Any, str, Any, str]] = {  # run, where the fault is put in, and what shows first
    "gradient of the embedding dropped": (QUICK["1F1B"], Pipeline, "_give_back", _dropped, "losses of step 0"),
    "embedding never lent": (QUICK["1F1B"], Pipeline, "_lend", lambda pipeline: None, "counts of experts, step 1"),
    "gradients scaled twice": (
        QUICK["1F1B"],
        pipelines,
        "Schedule1F1B",
        partial(_by_micro_batches, pipelines.Schedule1F1B),
        "losses of step 0",
    ),
    "routing counted twice": (QUICK["ZBV"], pipelines, "PipelineStage", _without_examples, "counts of experts, step 0"),
    "weights resharded under a V": (
        Case(4, (PP, "mesh.schedule=DualPipeV")),
        apply,
        "fully_shard",
        _resharding,
        "losses of step 0",
    ),
}


@contextmanager
def planted(fault: str | None) -> Iterator[None]:
    if fault is None:
        yield
        return
    _, where, name, wrong, _ = FAULTS[fault]
    right = getattr(where, name)
    setattr(where, name, wrong)
    try:
        yield
    finally:
        setattr(where, name, right)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(pool: Pool, fault: str) -> None:
    case, _, _, _, shows = FAULTS[fault]
    case = replace(case, steps=2)
    said = differs(pool.run(case.ranks, learn, case, fault), alone(case.alone))
    assert said is not None
    assert said.startswith(shows)


# ── the order of execution ────────────────────────────────────────────────────────────────────────────────────────


def executed(rank: int, world: int, batches: int) -> dict[str, list[str]]:
    """By schedule, what PyTorch really did on this rank for a step of one row each micro-batch."""
    done: dict[str, list[str]] = {}
    with watched_stages() as actions:
        for schedule in EXECUTED:
            overrides = (f"mesh.pp={world}", f"mesh.schedule={schedule}", f"model.num_hidden_layers={2 * world}")
            config = config_of(*overrides)
            model = model_of(config, torch.float64)
            pipeline = Pipeline(model, config, ranks_of(config), loads(config.model), losses_of)
            ids = torch.zeros(batches, 16, dtype=torch.int64)
            pipeline.backward(ids, ids, [1.0, 0.3], micro_batch=1, micro_batches=batches)
            done[schedule] = list(actions)
            actions.clear()
    return done


@contextmanager
def watched_stages() -> Iterator[list[str]]:
    """Notes what the executor asks of the stages, as `2F0`: stage, kind, micro-batch."""
    actions: list[str] = []
    kinds: dict[str, Callable[[dict[str, Any]], str]] = {
        "forward_one_chunk": lambda asked: "F",
        "backward_one_chunk": lambda asked: "B" if asked.get("full_backward", True) else "I",
        "backward_weight_one_chunk": lambda asked: "W",
    }
    before = {name: getattr(PipelineStage, name) for name in kinds}

    def watch(name: str) -> Callable[..., Any]:
        def noted(stage: Any, chunk: int, *args: Any, **asked: Any) -> Any:
            actions.append(f"{stage.stage_index}{kinds[name](asked)}{chunk}")
            return before[name](stage, chunk, *args, **asked)

        return noted

    for name in kinds:
        setattr(PipelineStage, name, watch(name))
    try:
        yield actions
    finally:
        for name, right in before.items():
            setattr(PipelineStage, name, right)


def in_order(table: Timetable, rank: int) -> list[str]:
    return [f"{action.stage}{action.kind}{action.batch}" for each in table.steps[rank] for action in each]


def test_pytorch_executes_the_timetables(pool: Pool) -> None:
    ranks, batches = 4, 12
    tables = {name: SCHEDULES[name](ranks, batches) for name in EXECUTED}
    for rank, done in enumerate(pool.run(ranks, executed, batches)):
        assert done == {name: in_order(table, rank) for name, table in tables.items()}


# ── the cut ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_layer_is_in_one_stage() -> None:
    model = config_of("model.num_hidden_layers=9", "model.num_nextn_predict_layers=2").model
    for stages in range(2, 12):
        layers = layers_of_stages(model, stages, loads(model))
        assert [layer for each in layers for layer in each] == list(range(9))
        assert all(layers[1:-1])  # only the ends have something else
    assert layers_of_stages(model, 3, loads(model), [4, 6, 3]) == [range(3), range(3, 9), range(9, 9)]


@pytest.mark.parametrize("cuts", ["[4,9]", "[4,6,1,2]", "[4,0,4,5]", "[4,4,4,4]"])
def test_cuts_that_make_no_stages_are_refused(cuts: str) -> None:
    nine = ("model.num_hidden_layers=9", UNEVEN[0], "mesh.pp=4")
    with pytest.raises(BadInput, match=r"mesh\.cuts .*: 4 stages share .* 13 pieces"):
        divide(config_of(*nine, f"mesh.cuts={cuts}"), 4)
    divide(config_of(*nine, "mesh.cuts=[4,4,2,3]"), 4)


def test_pp_and_cp_together_are_refused() -> None:
    with pytest.raises(BadInput, match="pp 2 and cp 2 do not go together yet"):
        divide(config_of("mesh.pp=2", "mesh.cp=2"), 4)


def test_even_cuts_are_the_best_of_all() -> None:
    generator = np.random.default_rng(0)
    for _ in range(100):
        row = tuple(generator.integers(0, 9, generator.integers(2, 8)).tolist())
        stages = int(generator.integers(1, len(row) + 1))

        def squares(ends: tuple[int, ...], row: tuple[int, ...] = row) -> int:
            return sum(sum(row[a:b]) ** 2 for a, b in itertools.pairwise((0, *ends, len(row))))

        best = min(squares(ends) for ends in itertools.combinations(range(1, len(row)), stages - 1))
        cuts = even_cuts(row, stages)
        assert (len(cuts), sum(cuts), min(cuts) > 0) == (stages, len(row), True)
        assert squares(tuple(itertools.accumulate(cuts))[:-1]) == best


@pytest.mark.parametrize("name", SCHEDULES)
def test_enough_batches_are_the_fewest_that_a_schedule_takes(name: str) -> None:
    def takes(ranks: int, batches: int) -> bool:
        if name in ("1F1B", "ZB1P"):
            return batches >= ranks  # our lists are possible with fewer too, PyTorch's executor is not
        try:
            SCHEDULES[name](ranks, batches)
        except ValueError:
            return False
        return True

    for ranks, wanted in itertools.product((2, 4), range(1, 20)):
        enough = enough_batches(name, ranks, wanted)
        assert enough == next(n for n in itertools.count(wanted) if takes(ranks, n))
