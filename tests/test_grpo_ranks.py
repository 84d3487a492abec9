"""GRPO on many ranks: each draws and reads its share, and all learn what one process learns."""

import json
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from leanseek import checkpoint
from leanseek.config import BadInput
from leanseek.parallel.mesh import Division, Ranks, ranks_of
from leanseek.parallel.parts import everywhere, parts
from leanseek.post import rl_step
from leanseek.post.grpo import grpo
from leanseek.post.objective import policy_terms
from leanseek.post.rl_log import read
from leanseek.post.rl_step import Learnt, learn
from leanseek.post.rollout import Answer, EngineRollouts
from leanseek.train.schedule import Knobs
from leanseek.train.setup import build
from tests.pool import Pool
from tests.runs import make_run, model_of, tokenizer
from tests.test_grpo import NOTHING_CLOSED, answers_of, settings
from tests.test_grpo_run import QUIET, Letters, rows_of, same, write
from tests.test_parallel import config_of
from tests.test_parallel_runs import torchrun
from tests.test_pretrain import tensors_of

# ── one step ──────────────────────────────────────────────────────────────────────────────────────────────────────

SHAPE = ("train.init_std=0.2", "train.micro_batch=3", "optimizer.clip=1e9", "model.vocab_size=64")
Stepped = tuple[dict[str, np.ndarray], Learnt]


def routed(answers: Sequence[Answer], layers: int, experts: int, k: int) -> list[Answer]:
    """The same answers, as if an engine had told where it sent their tokens."""
    generator = torch.Generator().manual_seed(3)
    chosen = [torch.rand(len(a.tokens), layers, experts, generator=generator).topk(k).indices for a in answers]
    return [replace(answer, experts=each.to(torch.int16)) for answer, each in zip(answers, chosen, strict=True)]


def steps(rank: int, world: int, mesh: tuple[str, ...], options: dict[str, object], fault: str = "") -> Stepped:
    """The whole weights after a step on answers made by chance, and what it told."""
    config = config_of(*SHAPE, *mesh)
    ranks, s, c = ranks_of(config), settings(**options), config.model
    model = build(config, ranks)[0]
    seeded = config.model_copy(update={"train": config.train.model_copy(update={"seed": 1})})
    reference = build(seeded, ranks)[0].requires_grad_(False).eval() if s.kl_weight else None
    layers = c.num_hidden_layers - c.first_k_dense_replace
    answers = routed(answers_of(24, s.group, seed=5), layers, c.n_routed_experts, c.num_experts_per_tok)
    rewards = torch.tensor([(7 * i % 5) / 2 for i in range(24)], dtype=torch.float64)
    rewards[4:8] = 1.0  # a group that has nothing to teach
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with FAULTS[fault]():
        knobs = Knobs(0.02, 1, 0.0, 0.0)
        told = learn(model, [optimizer], reference, answers, rewards, NOTHING_CLOSED, knobs, config, s, ranks)
    return {name: w.numpy().copy() for name, w in everywhere(model.state_dict(), parts(model, ranks), ranks)}, told


def own_counts(*given: Any) -> Any:
    *tensors, answers, tokens, config = given
    return policy_terms(*tensors, answers // 2, tokens // 2, config)


FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "": nullcontext,
    "counts of a rank": lambda: patch.object(rl_step, "policy_terms", own_counts),
    "all read the same": lambda: patch.object(Ranks, "place", Division().place(0)),
}


def apart(one: Stepped, other: Stepped, before: dict[str, np.ndarray]) -> float:
    """The largest difference between two results, relative to the largest change."""
    moved = max(np.abs(one[0][name] - before[name]).max() for name in before)
    assert moved > 1e-3
    return max(np.abs(one[0][name] - other[0][name]).max() for name in before) / moved


@pytest.fixture(scope="module")
def before() -> dict[str, np.ndarray]:
    model = build(config_of(*SHAPE))[0]
    return {name: weight.numpy().copy() for name, weight in model.state_dict().items()}


CASES: dict[str, tuple[int, tuple[str, ...], dict[str, object]]] = {
    "dp, as published": (2, (), {}),
    "dp, three updates": (3, (), {"updates": 3, "clip_low": 0.001, "clip_high": 0.001}),
    "ep, the experts replayed": (2, ("mesh.ep=2",), {"router_replay": True, "normalise": "token"}),
    "more ranks than pieces, no reference": (8, ("mesh.ep=4", "train.micro_batch=24"), {"kl_weight": 0.0}),
    "replicas, whole answers": (4, ("mesh.replicate=2",), {"ratio": "sequence", "importance_cap": 1.1, "updates": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_ranks_is_one_processes(pool: Pool, case: str, before: dict[str, np.ndarray]) -> None:
    world, mesh, options = CASES[case]
    one = steps(0, 1, (), options)
    many = pool.run(world, steps, mesh, options)
    for each in many:
        assert apart(one, each, before) < 1e-4  # FP32
        for name, value in asdict(each[1]).items():
            assert value == pytest.approx(asdict(one[1])[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault])
def test_planted_faults_are_seen(pool: Pool, fault: str, before: dict[str, np.ndarray]) -> None:
    one = steps(0, 1, (), {})
    many = pool.run(2, steps, (), {}, fault)
    assert max(apart(one, each, before) for each in many) > 0.01


# ── a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = tokenizer()
    model = model_of(vocabulary, num_nextn_predict_layers=1, num_hidden_layers=2)
    return make_run(tmp_path_factory.mktemp("begun") / "run", model, vocabulary)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ("walked", "saw", "slept", "came", "said")
    rows = [{"prompt": f"A fox {word}", "verify": "exact", "answer": "the wall"} for word in words]
    return write(tmp_path_factory.mktemp("task") / "task.jsonl", rows)


SMOOTH = "optimizer.eps=1e-3"  # else AdamW makes whole steps of gradients that are nothing but rounding


def runs(rank: int, world: int, run: Path, task: Path, out: Path, *overrides: str) -> dict[str, Any]:
    return grpo(run, task, out, (*QUIET, *overrides), task, (Letters(),))


@pytest.mark.parametrize(("world", "mesh"), [(2, ("mesh.ep=2",)), (4, ())], ids=["ep", "a rank without questions"])
def test_a_run_on_ranks_answers_and_learns_as_one_process(
    pool: Pool, run: Path, task: Path, tmp_path: Path, world: int, mesh: tuple[str, ...]
) -> None:
    asked = SMOOTH, "grpo.reference_every=2"
    one = runs(0, 1, run, task, tmp_path / "one", *asked)
    many = pool.run(world, runs, run, task, tmp_path / "many", *asked, *mesh)
    assert all(each == many[0] for each in many)
    assert (tmp_path / "one/samples.jsonl").read_text() == (tmp_path / "many/samples.jsonl").read_text()
    for ours, theirs in zip(read(tmp_path / "many")[0], read(tmp_path / "one")[0], strict=True):
        assert ours["logprob_gap"] < 1e-4
        assert ours["experts_differ"] == 0
        for name in ("reward", "length", "tokens", "learnt_tokens", "answers", "equal_groups", "flops"):
            assert ours[name] == pytest.approx(theirs[name]), name
        for name in ("kl", "entropy", "grad_norm", "max_violation"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2, abs=1e-5), name
    assert [row["dev"] for row in read(tmp_path / "many")[1]] == [row["dev"] for row in read(tmp_path / "one")[1]]
    assert many[0]["answers"] == one["answers"] == 48
    assert many[0]["device_hours"] == pytest.approx(world * many[0]["seconds"] / 3600)


def without_new_weights(rank: int, world: int, run: Path, task: Path, out: Path) -> None:
    """A run whose engines never see what was learnt."""
    with patch.object(EngineRollouts, "refresh", once(EngineRollouts.refresh)):
        runs(rank, world, run, task, out)


def once(refresh: Callable[[EngineRollouts], None]) -> Callable[[EngineRollouts], None]:
    done: list[bool] = []

    def first(rollouts: EngineRollouts) -> None:
        if not done:
            refresh(rollouts)
        done.append(True)

    return first


def test_old_weights_in_the_engines_are_seen(pool: Pool, run: Path, task: Path, tmp_path: Path) -> None:
    pool.run(2, without_new_weights, run, task, tmp_path / "out")
    assert read(tmp_path / "out")[0][-1]["logprob_gap"] > 1e-3


def test_a_stopped_run_goes_on_bit_identical(pool: Pool, run: Path, task: Path, tmp_path: Path) -> None:
    asked = SMOOTH, "grpo.reference_every=2", "grpo.updates=2", "train.eval_every=100", "mesh.ep=2"
    pool.run(2, runs, run, task, tmp_path / "whole", *asked)
    for limit in (1, 3, 100):
        pool.run(2, runs, run, task, tmp_path / "parts", *asked, f"train.max_steps={limit}")
    rows = rows_of(tmp_path / "parts")
    write(tmp_path / "parts/metrics.jsonl", [row for row in rows if "dev" not in row or row["step"] in (0, 4)])
    assert same(tmp_path / "parts", tmp_path / "whole")
    # And one process takes up what two began.
    pool.run(2, runs, run, task, tmp_path / "fewer", *asked[:4], "train.max_steps=3")
    runs(0, 1, run, task, tmp_path / "fewer", *asked[:4])
    ours, theirs = tensors_of(tmp_path / "fewer"), tensors_of(tmp_path / "whole")
    for name in ours:
        if name.startswith("model/"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=name)


class FailsOnOne:
    """A reward that fails on the second rank, at the second step."""

    name, weight = "fails", 1.0

    def __init__(self, rank: int) -> None:
        self.rank, self.calls = rank, 0

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        self.calls += 1
        if self.rank == 1 and self.calls == 2:
            raise ValueError("a planted fault")
        return Letters()(answers)


def fails(rank: int, world: int, run: Path, task: Path, out: Path) -> str:
    with pytest.raises(BadInput) as refused:
        grpo(run, task, out, (*QUIET, "train.checkpoint_every=100"), None, (FailsOnOne(rank),))
    return str(refused.value)


def test_a_reward_that_fails_on_one_rank_ends_all_and_loses_nothing(
    pool: Pool, run: Path, task: Path, tmp_path: Path
) -> None:
    told = pool.run(2, fails, run, task, tmp_path / "out")
    assert told == ["reward 'fails' failed with ValueError: a planted fault"] * 2
    kept = checkpoint.newest(tmp_path / "out", pytest.fail)
    assert kept is not None
    assert kept.step == 1


def test_meshes_that_cut_answers_or_layers_are_refused(run: Path, task: Path, tmp_path: Path) -> None:
    for mesh in ("mesh.pp=2", "mesh.cp=2"):
        with pytest.raises(BadInput, match=r"take mesh\.dp and mesh\.ep"):
            runs(0, 1, run, task, tmp_path / "out", mesh)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_torchrun_ends_with_a_checkpoint_when_it_is_told_to(run: Path, task: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = [str(run), "--task", str(task), "--out", str(out), *QUIET, "grpo.steps=100000"]
    process = torchrun(2, "grpo", *given)
    assert process.stderr is not None
    for line in process.stderr:
        if "step 2" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    kept = checkpoint.newest(out, pytest.fail)
    assert kept is not None
    assert kept.step >= 1
    assert json.loads((out / "receipt.json").read_bytes())["ended"] == "interrupted"
    assert err.count("(interrupted)") == 1
