"""A whole run: it learns, bills honestly, and never loses work, whenever and however it is stopped."""

import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import leanseek.train.loop as loop
import leanseek.train.peak as peak
import leanseek.train.setup as setup
import leanseek.train.step as step
from leanseek import checkpoint
from leanseek.cli import main
from leanseek.config import BadInput, Config, read_recipe
from leanseek.data.loader import Loader
from leanseek.data.shards import open_data
from leanseek.data.tokenizer import Tokenizer
from leanseek.plan.count import flops_per_token, h800_cost, parameters
from leanseek.train.log import Log
from leanseek.train.pretrain import pretrain
from leanseek.train.schedule import Knobs
from tests.tiny import RECIPE, make_data

STEPS = 24
ALWAYS = ("train.checkpoint_every=5", "train.eval_every=12", "train.dtype=fp32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def config_of(*overrides: str) -> Config:
    return read_recipe(str(RECIPE), (*ALWAYS, *overrides))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    pretrain(config_of(), data, run)
    return run


def command(data: Path, run: Path, *overrides: str) -> list[str]:
    arguments = ["pretrain", str(RECIPE), "--data", str(data), "--out", str(run), *ALWAYS, *overrides]
    return [
        sys.executable,
        "-c",
        "import torch; torch.set_num_threads(1); from leanseek.cli import main; main()",
        *arguments,
    ]


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """Weights, biases and optimizer state of the newest checkpoint, by file and name."""
    newest = checkpoint.newest(run, pytest.fail)
    assert newest is not None
    files = sorted(newest.path.rglob("*.safetensors"))
    return {f"{file.parent.name}/{name}": t for file in files for name, t in load_file(file).items()}


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def learned(run: Path) -> list[tuple[Any, ...]]:
    """What a run's log says of the learning itself, timing left out."""
    keys = ("step", "tokens", "loss", "mtp_loss", "balance_loss", "lr", "grad_norm", "max_violation", "bpb")
    return [tuple(row.get(key) for key in keys) for row in rows_of(run)]


def assert_same_outcome(run: Path, undisturbed: Path) -> None:
    ours, theirs = tensors_of(run), tensors_of(undisturbed)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert learned(run) == learned(undisturbed)


# ── a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_learns_and_logs(undisturbed: Path) -> None:
    rows = rows_of(undisturbed)
    steps, validations = [r for r in rows if "loss" in r], [r for r in rows if "bpb" in r]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert set(steps[0]) >= {
        *("step", "tokens", "loss", "mtp_loss", "balance_loss", "lr", "grad_norm", "max_violation"),
        *("tokens_per_second", "seconds"),
    }
    assert [set(row) for row in validations] == [{"step", "tokens", "bpb"}] * 2
    assert validations[-1]["bpb"] < validations[0]["bpb"] < 7
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert (undisturbed / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((undisturbed / "tensorboard").glob("events*"))
    assert read_recipe(str(undisturbed / "config.toml")).train.dtype in ("fp32", "bf16")


def test_the_bill(undisturbed: Path) -> None:
    receipt = json.loads((undisturbed / "receipt.json").read_text())
    config = config_of()
    counted = parameters(config.model)
    tokens = STEPS * 8 * 32
    flops = tokens * flops_per_token(config.model, 32)
    assert receipt["tokens"] == tokens
    assert (receipt["params_total"], receipt["params_activated"]) == (counted.total, counted.activated)
    assert receipt["params_mtp"] == counted.mtp
    assert receipt["flops"] == pytest.approx(flops)
    assert receipt["device_hours"] == pytest.approx(receipt["seconds"] / 3600)
    assert receipt["cost_usd"] == pytest.approx(receipt["device_hours"] * config.cost.usd_per_device_hour)
    assert (receipt["h800_hours"], receipt["h800_usd"]) == pytest.approx(h800_cost(flops))
    assert receipt["bpb"] == rows_of(undisturbed)[-1]["bpb"]
    assert receipt["cpu_seconds"] > 0


def test_the_same_command_on_a_finished_run_changes_nothing(undisturbed: Path, data: Path) -> None:
    before = {
        path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file() and path.name != "receipt.json"
    }
    pretrain(config_of(), data, undisturbed)
    assert {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file() and p.name != "receipt.json"} == before


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_stopping_at_a_step_limit_and_going_on_is_bit_identical(name: str, data: Path, tmp_path: Path) -> None:
    runs = tmp_path / "whole", tmp_path / "parts"
    pretrain(config_of(f"optimizer.name={name}", "optimizer.qk_clip=1.0"), data, runs[0])
    for limit in (7, 8, 100):
        pretrain(
            config_of(f"optimizer.name={name}", "optimizer.qk_clip=1.0", f"train.max_steps={limit}"), data, runs[1]
        )
    ours, theirs = tensors_of(runs[1]), tensors_of(runs[0])
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_bf16_learns_and_goes_on_bit_identically(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "matmul_peak", lambda device, dtype, size: 1e9)  # seconds where BF16 is slow
    asked = (
        "train.dtype=bf16",
        "optimizer.name=adamw",
        "train.eval_tokens=1",
        "train.tokens=2560",
    )  # slow on many CPUs
    for run, limits in ((tmp_path / "whole", (10,)), (tmp_path / "parts", (6, 10))):
        for limit in limits:
            pretrain(config_of(*asked, f"train.max_steps={limit}"), data, run)
    ours, theirs = tensors_of(tmp_path / "parts"), tensors_of(tmp_path / "whole")
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert all(tensor.dtype == torch.float32 for name, tensor in ours.items() if name.startswith("model/"))  # masters
    losses = [row["loss"] for row in rows_of(tmp_path / "whole") if "loss" in row]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    ("fp32", "bf16", "faster"), [(100.0, 3.0, "fp32"), (100.0, 120.0, "fp32"), (100.0, 190.0, "bf16")]
)
def test_auto_takes_bf16_only_where_it_is_clearly_faster(
    fp32: float, bf16: float, faster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {torch.float32: fp32, torch.bfloat16: bf16}
    monkeypatch.setattr(peak, "matmul_peak", lambda device, dtype, size: rates[dtype])
    assert peak.faster_dtype(torch.device("cpu")) == faster


def test_a_run_keeps_the_dtype_it_began_with(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = tmp_path / "run", config_of("train.dtype=auto", "train.max_steps=1")
    monkeypatch.setattr(setup, "faster_dtype", lambda device: "fp32")
    pretrain(asked, data, run)
    monkeypatch.setattr(setup, "faster_dtype", lambda device: "bf16")
    pretrain(asked, data, run)
    assert read_recipe(str(run / "config.toml")).train.dtype == "fp32"


def test_the_live_line_has_rate_share_of_peak_balance_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log(tmp_path, budget=4000, peak=1e9)
    result = step.StepResult(2.0, 2.5, 0.0, 1.0, 0.25, True)
    now = Knobs(learning_rate=0.1, batch_tokens=1000, bias_speed=0.0, mtp_weight=0.0)
    with log:
        log.step(loop.Progress(step=1, tokens=1000), result, now, tokens=1000, flops=5e8, seconds=2.0)
    line = " ".join(capsys.readouterr().err.split())
    for part in ("25%", "loss 2.000", "500 tokens/s", "250.0 MFLOP/s (25% of peak)", "MaxVio 0.25", "0:06 left"):
        assert part in line


def test_max_seconds_ends_a_run_early(data: Path, tmp_path: Path) -> None:
    receipt = pretrain(config_of("train.max_seconds=0.01"), data, tmp_path / "run")
    assert receipt["ended"] == "max_seconds"
    assert receipt["steps"] < STEPS


# ── stops and kills ───────────────────────────────────────────────────────────────────────────────────────────────


def wait_for_step(run: Path, wanted: int, process: subprocess.Popen[str]) -> None:
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b'"loss"') >= wanted):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_exits_cleanly(
    number: signal.Signals, data: Path, tmp_path: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(command(data, run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(run, 3, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    newest = checkpoint.newest(run, pytest.fail)
    assert newest is not None
    assert newest.step == rows_of(run)[-1]["step"] < STEPS
    pretrain(config_of(), data, run)
    ours, theirs = tensors_of(run), tensors_of(undisturbed)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_kill_9_at_any_moment_continues_bit_identically(data: Path, tmp_path: Path, undisturbed: Path) -> None:
    run = tmp_path / "run"
    for kills, wanted in enumerate((2, 9, 18)):
        with subprocess.Popen(command(data, run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            wait_for_step(run, wanted, process)
            process.kill()
        assert process.returncode == -signal.SIGKILL, kills
    receipt = pretrain(config_of(), data, run)
    assert_same_outcome(run, undisturbed)
    assert receipt["tokens"] == STEPS * 8 * 32
    assert receipt["flops"] > STEPS * 8 * 32 * flops_per_token(config_of().model, 32)  # lost work is billed


def test_kill_9_inside_a_save_continues_bit_identically(data: Path, tmp_path: Path, undisturbed: Path) -> None:
    run = tmp_path / "run"
    dying = """
import os, signal, sys, torch
torch.set_num_threads(1)
from leanseek import checkpoint
seal = checkpoint._seal
def die(folder, step, digests):
    if step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    seal(folder, step, digests)
checkpoint._seal = die
from leanseek.cli import main
main()
"""
    told = command(data, run)
    died = subprocess.run([told[0], "-c", dying, *told[3:]], capture_output=True, text=True, timeout=120)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert any(path.name.startswith(".writing") for path in (run / "checkpoints").iterdir())
    pretrain(config_of(), data, run)
    assert_same_outcome(run, undisturbed)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    data: Path, tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    pretrain(config_of("train.max_steps=17"), data, run)
    newest = checkpoint.newest(run, pytest.fail)
    assert newest is not None
    victim = next(newest.model.glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-7])
    capsys.readouterr()
    pretrain(config_of(), data, run)
    assert victim.name in capsys.readouterr().err
    ours, theirs = tensors_of(run), tensors_of(undisturbed)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def forget_bias(state: dict[str, Any], model: torch.nn.Module, optimizers: list[Any]) -> None:
    for router in model.routers().values():  # type: ignore[operator]
        router.e_score_correction_bias.zero_()


def forget_place(state: dict[str, Any], model: torch.nn.Module, optimizers: list[Any]) -> None:
    state["sample"] = 0


def forget_tokens(state: dict[str, Any], model: torch.nn.Module, optimizers: list[Any]) -> None:
    state["tokens"] = 0


def forget_momentum(state: dict[str, Any], model: torch.nn.Module, optimizers: list[Any]) -> None:
    optimizers[0].state.clear()


def forget_moments(state: dict[str, Any], model: torch.nn.Module, optimizers: list[Any]) -> None:
    optimizers[1].state.clear()


@pytest.mark.parametrize("forget", [None, forget_bias, forget_place, forget_tokens, forget_momentum, forget_moments])
def test_a_checkpoint_that_forgot_something_would_be_noticed(
    forget: Callable[..., None] | None, data: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    pretrain(config_of("train.max_steps=7"), data, run)
    load = checkpoint.load

    def forgetful(
        found: checkpoint.Checkpoint, model: torch.nn.Module, optimizers: list[Any], *more: Any
    ) -> dict[str, Any]:
        state = load(found, model, optimizers, *more)
        if forget is not None:
            forget(state, model, optimizers)
        return state

    monkeypatch.setattr(checkpoint, "load", forgetful)
    pretrain(config_of("train.max_steps=24"), data, run)
    ours, theirs = tensors_of(run), tensors_of(undisturbed)
    same = all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith("model/"))
    assert same == (forget is None)


# ── values that are not finite ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch, data: Path) -> Callable[..., None]:
    """Multiplies the loss of the given samples by NaN, wherever in the run they come up."""

    def arrange(samples: range, by: float = math.nan) -> None:
        bad: set[bytes] = set()
        loss_sums = step.loss_sums

        def poisoned(model: Any, ids: torch.Tensor, *others: Any, **further: Any) -> list[torch.Tensor]:
            losses = loss_sums(model, ids, *others, **further)
            return [loss * by for loss in losses] if ids[0].numpy().tobytes() in bad else losses

        opened, config = open_data(data), config_of()
        loader = Loader(
            opened, config.stages, config.train.tokens, config.train.seed, config.data,
            Tokenizer.load(opened.tokenizer_folder),
        )  # fmt: skip
        bad.update(loader.batch(0, first, 1).ids[0].tobytes() for first in samples)
        monkeypatch.setattr(step, "loss_sums", poisoned)

    return arrange


def test_a_single_bad_step_is_skipped_and_counted(poison: Callable[..., None], data: Path, tmp_path: Path) -> None:
    poison(range(8 * 6, 8 * 7, 8))
    receipt = pretrain(config_of(), data, tmp_path / "run")
    assert receipt["skipped_steps"] == 1
    assert receipt["steps"] == STEPS - 1
    assert receipt["tokens"] == (STEPS - 1) * 8 * 32
    assert receipt["flops"] == pytest.approx(STEPS * 8 * 32 * flops_per_token(config_of().model, 32))


def test_repeated_bad_steps_roll_back_and_leave_that_text_out(
    poison: Callable[..., None], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(range(8 * 7, 8 * 10, 8))  # steps 8, 9 and 10; the checkpoint before is of step 5
    run = tmp_path / "run"
    receipt = pretrain(config_of(), data, run)
    assert "back to step 5" in capsys.readouterr().err
    newest = checkpoint.newest(run, pytest.fail)
    assert newest is not None
    assert newest.state()["skipped_windows"] == [[0, 56, 64], [0, 64, 72], [0, 72, 80]]
    assert (receipt["skipped_steps"], receipt["steps"]) == (3, STEPS - 3)
    assert [row["step"] for row in rows_of(run) if "loss" in row] == list(range(1, STEPS - 2))
    # steps 6 and 7 were trained twice, steps 8 to 10 once in vain
    assert receipt["flops"] == pytest.approx((STEPS + 2) * 8 * 32 * flops_per_token(config_of().model, 32))


def test_training_that_never_recovers_says_so(
    poison: Callable[..., None], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "MOST_ROLLBACKS", 2)
    poison(range(0, 8 * STEPS, 8))
    with pytest.raises(BadInput, match="does not recover"):
        pretrain(config_of(), data, tmp_path / "run")


def test_a_spike_is_skipped_and_one_that_nobody_guards_against_is_not(
    poison: Callable[..., None], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(range(8 * 18, 8 * 19, 8), 20.0)  # step 19, when there are enough to compare it with
    receipt = pretrain(config_of("train.spike=3"), data, tmp_path / "run")
    assert (receipt["skipped_steps"], receipt["steps"]) == (1, STEPS - 1)
    assert "step 19: a spike: loss " in capsys.readouterr().err
    assert pretrain(config_of("train.spike=100"), data, tmp_path / "loose")["skipped_steps"] == 0
    assert pretrain(config_of(), data, tmp_path / "free")["skipped_steps"] == 0


# ── bad input, and machines that are too small ────────────────────────────────────────────────────────────────────


def refused(*arguments: str, **limits: Any) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, **limits)
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("leanseek: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_full_disk_leaves_the_last_checkpoint_intact(data: Path, tmp_path: Path, undisturbed: Path) -> None:
    run = tmp_path / "run"
    pretrain(config_of("train.max_steps=6"), data, run)
    before = tensors_of(run)
    small = max(file.stat().st_size for file in run.rglob("*.safetensors")) // 2
    line = refused(*command(data, run), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, small)))
    assert "untouched" in line
    after = tensors_of(run)
    assert all(torch.equal(after[name], before[name]) for name in before)
    pretrain(config_of(), data, run)
    ours, theirs = tensors_of(run), tensors_of(undisturbed)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_no_space_left_says_so(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "checkpoints")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as end:
        main(["pretrain", str(RECIPE), "--data", str(data), "--out", str(tmp_path / "run"), *ALWAYS])
    assert end.value.code == 2
    assert "no space left" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_begun_on_a_device_that_is_not_here_is_refused(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace('device = "cpu"', 'device = "cuda"'))
    with pytest.raises(BadInput, match="no such device"):
        pretrain(config_of(), data, run)


def test_too_little_memory_is_one_line(data: Path, tmp_path: Path) -> None:
    limit = 2 << 30
    line = refused(
        *command(data, tmp_path / "run", "model.hidden_size=12000"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert "out of memory" in line


def test_a_model_beyond_this_machine_is_refused_before_anything_is_made(data: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="GiB for weights, gradients and moments"):
        pretrain(read_recipe("v3", ["mesh.pp=1", "mesh.ep=1"]), data, tmp_path / "run")
    assert not (tmp_path / "run" / "config.toml").exists()


def test_no_permission_is_one_line(data: Path, tmp_path: Path) -> None:
    closed = Path("/sys/leanseek")  # closed even to root
    if os.geteuid() != 0:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
    line = refused(*command(data, closed / "run"))
    assert str(closed) in line


def test_a_run_of_another_configuration_or_other_data_is_refused(
    data: Path, undisturbed: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(BadInput, match=r"holds another config.*train\.seed"):
        pretrain(config_of("train.seed=5"), data, undisturbed)
    other = make_data(tmp_path_factory.mktemp("other"), seed=9)
    with pytest.raises(BadInput, match="other data"):
        pretrain(config_of(), other, undisturbed)


def test_a_vocabulary_beyond_the_models_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"model\.vocab_size"):
        pretrain(config_of("model.vocab_size=280"), data, tmp_path / "run")


def test_a_run_in_use_is_refused(data: Path, undisturbed: Path) -> None:
    with checkpoint.lock(undisturbed):
        assert "in use" in refused(*command(data, undisturbed))
