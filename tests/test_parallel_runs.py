"""Runs on many ranks: saved on one mesh and taken up on another, stopped and resumed, started by torchrun."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from leanseek import checkpoint
from leanseek.config import BadInput, Config, read_recipe
from leanseek.data.loader import part_of
from leanseek.model.transformer import Transformer
from leanseek.parallel.apply import parallelize
from leanseek.parallel.mesh import Ranks, ranks_of
from leanseek.parallel.parts import gathered, local, parts
from leanseek.parallel.tensor import share
from leanseek.train.average import Average
from leanseek.train.optim import build_optimizers
from leanseek.train.pretrain import pretrain
from leanseek.train.setup import build
from leanseek.train.step import train_step
from tests.pool import Pool
from tests.test_parallel import NOW, config_of, model_of, rows_of
from tests.tiny import RECIPE, make_data

# ── checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────────


def steps(model: Transformer, optimizers: Any, config: Config, ranks: Ranks, first: int, last: int) -> Average:
    average = Average(model, 0.9)
    for number in range(first, last):
        mine = part_of(0, 7, ranks.place["dp"], ranks.division.dp)
        ids, targets, *_ = (None if whole is None else whole[mine] for whole in rows_of(number, 7, packed=False))
        assert ids is not None
        assert targets is not None
        train_step(model, optimizers, ids, targets, NOW, config, ranks=ranks)
        average.update(model)
    return average


def made(overrides: tuple[str, ...]) -> tuple[Config, Ranks, Transformer, Any]:
    config = config_of(*overrides)
    ranks = ranks_of(config)
    model = parallelize(model_of(config, torch.float64), config, ranks)
    return config, ranks, model, build_optimizers(model, config.optimizer, ranks)


def saves(rank: int, world: int, overrides: tuple[str, ...], run: Path) -> None:
    """Two steps, saved."""
    config, ranks, model, optimizers = made(overrides)
    average = steps(model, optimizers, config, ranks, 0, 2)
    checkpoint.save(run, 2, model, optimizers, {"at": 2}, 1, ranks, average.weights)


State = dict[str, Any]


def takes_up(rank: int, world: int, overrides: tuple[str, ...], run: Path) -> tuple[State, State]:
    """What is loaded from the checkpoint, and the weights two steps later: the part that this rank gathers."""
    config, ranks, model, optimizers = made(overrides)
    average = Average(model, 0.9).weights
    newest = checkpoint.newest(run, pytest.fail)
    assert newest is not None
    assert checkpoint.load(newest, model, optimizers, ranks, average) == {"at": 2}
    own = parts(model, ranks)
    loaded = {f"model.{name}": value for name, value in gathered(model.state_dict(), own, ranks).items()}
    loaded |= {f"ema.{name}": value for name, value in gathered(average, own, ranks).items()}
    for number, optimizer in enumerate(optimizers):
        names = {parameter: name for name, parameter in model.named_parameters()}
        for key in {key for values in optimizer.state.values() for key in values if key != "step"}:
            of_key = {names[parameter]: values[key] for parameter, values in optimizer.state.items()}
            loaded |= {f"{number}.{key}.{n}": value for n, value in gathered(of_key, own, ranks).items()}
    loaded = {name: value.numpy().copy() for name, value in loaded.items()}
    steps(model, optimizers, config, ranks, 2, 4)
    return loaded, {n: value.numpy() for n, value in gathered(model.state_dict(), own, ranks).items()}


def whole(answers: list[tuple[State, State]]) -> tuple[State, State]:
    loaded: State = {}
    later: State = {}
    for some, more in answers:
        loaded |= some
        later |= more
    return loaded, later


MESHES = {
    "one process": (1, ()),
    "dp 3": (3, ()),
    "ep 2": (2, ("mesh.ep=2",)),
    "dp × ep, copies": (8, ("mesh.ep=2", "mesh.replicate=2")),
    "ep by node": (4, ("mesh.ep=4", "mesh.node=2")),
}


def from_to(pool: Pool, tmp_path: Path, written: str, read: list[str]) -> None:
    run, saved_by = tmp_path / "run", MESHES[written]
    if saved_by[0] == 1:
        saves(0, 1, (), run)
    else:
        pool.run(saved_by[0], saves, saved_by[1], run)
    loaded, later = takes_up(0, 1, (), run)
    files = sorted((run / "checkpoints/step-00000002/model").glob("*.safetensors"))
    assert len(files) == (saved_by[0] // 2 if "copies" in written else saved_by[0])  # all that write have their share
    for mesh in read:
        world, overrides = MESHES[mesh]
        there, later_there = whole(pool.run(world, takes_up, overrides, run))
        assert there.keys() == loaded.keys()
        assert all((there[name] == value).all() for name, value in loaded.items())
        assert all(np.abs(later_there[name] - value).max() < 1e-8 for name, value in later.items())


def test_what_one_mesh_saves_another_takes_up(pool: Pool, tmp_path: Path) -> None:
    from_to(pool, tmp_path, "ep by node", ["dp 3"])


@pytest.mark.slow
@pytest.mark.parametrize("written", MESHES)
def test_any_mesh_takes_up_what_any_saves(pool: Pool, tmp_path: Path, written: str) -> None:
    from_to(pool, tmp_path, written, list(MESHES))


def test_what_is_saved_beside_the_training_is_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, ranks, model, optimizers = made(())
    may_go, write = threading.Event(), checkpoint._write

    def waits(*args: Any) -> None:
        may_go.wait()
        write(*args)

    monkeypatch.setattr(checkpoint, "_write", waits)
    saver = checkpoint.Saver(tmp_path, 3, beside=True)
    average = steps(model, optimizers, config, ranks, 0, 1).weights
    saver.save(1, model, optimizers, {}, average)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps(model, optimizers, config, ranks, 1, 2)
    assert checkpoint.newest(tmp_path, pytest.fail) is None  # it has no name before it is whole
    may_go.set()
    saver.wait()
    newest = checkpoint.newest(tmp_path, pytest.fail)
    assert newest is not None
    checkpoint.load(newest, model, optimizers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_error_beside_the_training_is_told_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, model, optimizers = made(())
    saver = checkpoint.Saver(tmp_path, 3, beside=True)
    saver.save(1, model, optimizers, {})
    saver.wait()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_seal", full)
    saver.save(2, model, optimizers, {})
    with pytest.raises(OSError, match="No space"):
        saver.save(3, model, optimizers, {})
    newest = checkpoint.newest(tmp_path, pytest.fail)
    assert newest is not None
    assert newest.step == 1


# ── averages and moments ──────────────────────────────────────────────────────────────────────────────────────────


def test_an_average_is_the_sum_it_says() -> None:
    model = model_of(config_of(), torch.float32)
    average, seen = Average(model, 0.75), []
    for number in range(4):
        seen.append(model.lm_head.weight.detach().double().clone())
        if number:
            average.update(model)
        with torch.no_grad():
            model.lm_head.weight.add_(
                torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(number))
            )
    expected = 0.75**3 * seen[0] + 0.25 * (0.75**2 * seen[1] + 0.75 * seen[2] + seen[3])
    torch.testing.assert_close(average.weights["lm_head.weight"].double(), expected, rtol=0, atol=1e-6)


BEGUN = {
    "dp": (2, ()),
    "ep": (2, ("mesh.ep=2",)),
    "tp": (2, ("mesh.tp=2",)),
    "pp, the embedding lent": (2, ("mesh.pp=2",)),
    "pp as a V, the embedding shared": (2, ("mesh.pp=2", "mesh.schedule=ZBV", "model.num_hidden_layers=4")),
    "pp × ep × dp": (8, ("mesh.pp=2", "mesh.ep=2", "mesh.replicate=2")),
}


def never(*_: Any) -> None:
    raise AssertionError("a rank has the whole model")


def begun(rank: int, world: int, overrides: tuple[str, ...], drawn: bool) -> dict[str, np.ndarray]:
    """What a rank begins with, its part of each parameter put where it lies in the whole; NaN elsewhere."""
    config = read_recipe(str(RECIPE), ("train.dtype=fp32", "train.device=cpu", *overrides))
    ranks = ranks_of(config)
    with patch.object(Transformer, "initialise", never):
        model, _, pipeline = build(config, ranks, drawn)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not any(bool(buffer.any()) for buffer in model.buffers())
    found = {}
    for name, part in parts(model, ranks).items():
        if name.endswith("bias"):
            continue
        whole = np.full(part.shape, np.nan, np.float32)
        whole[part.first : part.first + part.rows] = local(model.get_parameter(name)).detach().numpy()
        found[f"{ranks.place['tp']} {name}"] = whole
    if pipeline is not None and pipeline.late is not None:
        late = pipeline.late.weight
        shared = model.embed_tokens is not None and late is model.embed_tokens.weight
        assert shared == (pipeline.borrowed is None)
        if isinstance(late, DTensor):
            late = late.full_tensor()
        found["0 embed_tokens.weight"] = late.detach().numpy()
    return found


@pytest.mark.parametrize("case", BEGUN)
def test_ranks_begin_with_what_one_process_begins_with_and_never_have_it_whole(pool: Pool, case: str) -> None:
    world, overrides = BEGUN[case]
    of_one = ("mesh.pp=1", "mesh.ep=1", "mesh.tp=1", "mesh.replicate=1", "train.dtype=fp32", "train.device=cpu")
    alone, _, _ = build(read_recipe(str(RECIPE), (*overrides, *of_one)))
    tp = 2 if case == "tp" else 1
    expected = {
        f"{rank} {name}": share(name, weight.detach(), rank, tp).numpy() if tp > 1 else weight.detach().numpy()
        for rank in range(tp)
        for name, weight in alone.named_parameters()
    }
    seen: dict[str, np.ndarray] = {}
    for rank in pool.run(world, begun, overrides, True):
        for name, values in rank.items():
            known = ~np.isnan(values)
            assert (values[known] == expected[name][known]).all(), name
            seen[name] = seen.get(name, np.zeros(values.shape, bool)) | known
    assert seen.keys() == expected.keys()
    assert all(known.all() for known in seen.values())


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────

ALWAYS = (
    "train.checkpoint_every=3",
    "train.eval_every=6",
    "train.dtype=fp32",
    "train.device=cpu",
    "train.ema_decay=0.9",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def trains(rank: int, world: int, data: Path, run: Path, *overrides: str) -> dict[str, Any]:
    return pretrain(read_recipe(str(RECIPE), (*ALWAYS, *overrides)), data, run)


def bits_of(run: Path) -> dict[str, bytes]:
    """Weights, averages and optimizer state of the newest checkpoint, by folder and name."""
    newest = checkpoint.newest(run, pytest.fail)
    assert newest is not None
    files = newest.path.rglob("*.safetensors")
    return {f"{file.parent.name}/{n}": t.numpy().tobytes() for file in files for n, t in load_file(file).items()}


def test_a_run_on_ranks_goes_on_bit_by_bit_and_learns_what_one_process_learns(
    pool: Pool, data: Path, tmp_path: Path
) -> None:
    mesh = ("mesh.ep=2", "train.background_saves=true")
    (straight, told) = pool.run(2, trains, data, tmp_path / "straight", *mesh)
    assert straight == told
    assert straight["device_hours"] == pytest.approx(2 * straight["seconds"] / 3600)
    pool.run(2, trains, data, tmp_path / "stopped", *mesh, "train.max_steps=10")
    pool.run(2, trains, data, tmp_path / "stopped", *mesh)
    assert bits_of(tmp_path / "stopped") == bits_of(tmp_path / "straight")
    # Another mesh may take it up, one process among them.
    trains(0, 1, data, tmp_path / "other", "train.max_steps=10")
    assert trains(0, 1, data, tmp_path / "other")["bpb"] == pytest.approx(straight["bpb"], abs=1e-3)
    pool.run(2, trains, data, tmp_path / "moved", *mesh, "train.max_steps=10")
    assert trains(0, 1, data, tmp_path / "moved")["bpb"] == pytest.approx(straight["bpb"], abs=1e-3)


def test_what_is_wrong_is_wrong_for_all(pool: Pool, data: Path, tmp_path: Path) -> None:
    refused = pool.run(2, refuses, data, tmp_path / "run", "mesh.dp=4")
    assert len(set(refused)) == 1
    assert "are 4 ranks, and 2 processes run" in refused[0]
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other.txt").touch()
    refused = pool.run(2, refuses, data, tmp_path / "run")
    assert len(set(refused)) == 1
    assert "a folder with other things in it" in refused[0]


def refuses(rank: int, world: int, data: Path, run: Path, *overrides: str) -> str:
    with pytest.raises(BadInput) as refused:
        trains(rank, world, data, run, *overrides)
    return str(refused.value)


def torchrun(processes: int, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "leanseek"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def test_torchrun_ends_with_a_checkpoint_when_it_is_told_to(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = ["pretrain", str(RECIPE), "--data", str(data), "--out", str(run), *ALWAYS, "train.tokens=1e9", "mesh.ep=2"]
    process = torchrun(2, *given)
    assert process.stderr is not None
    for line in process.stderr:
        if "step 1 ·" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    newest = checkpoint.newest(run, pytest.fail)
    assert newest is not None
    assert newest.state()["step"] >= 1
    receipt = json.loads((run / "receipt.json").read_bytes())
    assert receipt["ended"] == "interrupted"
    assert err.count("(interrupted)") == 1


@pytest.mark.slow
def test_torchrun_tells_bad_input_once(data: Path, tmp_path: Path) -> None:
    given = ["pretrain", str(RECIPE), "--data", str(data), "--out", str(tmp_path / "run"), "mesh.ep=3"]
    process = torchrun(2, *given)
    _, err = process.communicate(timeout=300)
    assert err.count("leanseek: ") == 1
    assert "exitcode  : 2" in err
    assert process.returncode != 0
    process = torchrun(2, "pretrain", "nonesuch", "--data", str(data), "--out", str(tmp_path / "run"))
    _, err = process.communicate(timeout=300)
    assert err.count("leanseek: no recipe") == 1
