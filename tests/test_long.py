"""Long proofs, for `make test-slow`: the shipped recipe under repeated kills, balancing over a run, compiled blocks."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from leanseek.config import read_recipe
from leanseek.train.pretrain import pretrain
from tests.test_pretrain import learned, rows_of, tensors_of
from tests.tiny import RECIPE, make_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), documents=2000)


@pytest.mark.all_cores
def test_nano_under_repeated_kills_on_all_cores_is_bit_identical(data: Path, tmp_path: Path) -> None:
    overrides = (
        "train.tokens=122880",
        "schedule.batch_tokens=[{until=1.0,value=1024}]",
        "train.checkpoint_every=3",
        "train.dtype=fp32",
    )
    command = [sys.executable, "-m", "leanseek", "pretrain", "nano", "--data", str(data), *overrides, "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, timeout=600)
    run, dice, kills = tmp_path / "killed", random.Random(0), 0
    while True:
        process = subprocess.Popen([*command, str(run)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=dice.uniform(6, 12))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            assert kills < 40
            time.sleep(0.1)
            continue
        assert process.returncode == 0
        break
    assert kills >= 2
    ours, theirs = tensors_of(run), tensors_of(tmp_path / "whole")
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert learned(run) == learned(tmp_path / "whole")


def test_the_bias_keeps_the_experts_busy_where_without_it_they_idle(data: Path, tmp_path: Path) -> None:
    """Removal over three seeds: the last quarter's mean MaxVio with the bias update is well below that without."""
    worst = {}
    for speed in ("0.02", "0"):
        for seed in ("0", "1", "2"):
            run = tmp_path / f"{speed}-{seed}"
            overrides = (
                "train.tokens=76800",
                f"train.seed={seed}",
                f"schedule.bias_speed=[{{until=1.0, value={speed}}}]",
            )
            pretrain(read_recipe(str(RECIPE), (*overrides, "train.balance_loss_alpha=0")), data, run)
            rows = [row["max_violation"] for row in rows_of(run) if "loss" in row]
            worst[speed, seed] = sum(rows[-75:]) / 75
    for seed in ("0", "1", "2"):
        assert worst["0.02", seed] < 0.6 * worst["0", seed], worst


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about itself, and fails where warnings are errors
def test_compiled_blocks_train_the_same(data: Path, tmp_path: Path) -> None:
    losses = {}
    for compiled in ("false", "true"):
        run = tmp_path / compiled
        pretrain(
            read_recipe(str(RECIPE), (f"train.compile={compiled}", "train.max_steps=4", "train.dtype=fp32")), data, run
        )
        losses[compiled] = [row["loss"] for row in rows_of(run) if "loss" in row]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)
