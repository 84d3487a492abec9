"""Faults: what hangs is named with its ranks, what is slow is named, and what dies starts again and loses nothing."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from leanseek import checkpoint
from leanseek.parallel.watch import Waits, Where, covered, report, slowest
from tests.pool import Pool
from tests.tiny import RECIPE, make_data

IN_IT = Where(told=100.0, entered={"0": 17, "3": 4}, line="step.py:9 (update)", waits="all_reduce of [8]", group="0",
              number=17, since=60.0)  # fmt: skip
AT_WORK = Where(told=99.0, entered={"0": 16, "3": 4}, line="loader.py:7 (batch)")


def test_a_report_names_the_ranks_that_are_not_there() -> None:
    ranks = {0: IN_IT, 1: IN_IT, 2: AT_WORK}
    said = "all_reduce of [8] hangs for 40 s, entered by ranks 0, 1 at step.py:9 (update); it waits for rank 2, which "
    assert report(0, ranks, [0, 1, 2]) == said + "is at loader.py:7 (batch)"
    assert report(1, ranks, [0, 1, 2]) is None  # one says it for both
    stopped = replace(AT_WORK, told=65.0)
    assert (
        report(0, ranks | {2: stopped}, [0, 1, 2]) == said + "has been silent for 35 s and was at loader.py:7 (batch)"
    )
    elsewhere = replace(AT_WORK, waits="all_to_all of [4]", group="3", number=4)
    assert report(0, ranks | {2: elsewhere}, [0, 1, 2]) == said + "waits in all_to_all of [4], at loader.py:7 (batch)"
    assert report(0, {0: IN_IT}, [0, 2]) == said.replace("ranks 0, 1", "rank 0") + "never said anything"
    assert (report(0, {0: IN_IT, 1: IN_IT}, [0, 1]) or "").endswith("it waits for none of them: the network may be cut")


def test_a_message_between_pipeline_ranks_waits_for_who_does_not_wait() -> None:
    receiving = Where(told=100.0, entered={}, line="pipeline.py:5 (gradients)", waits="recv (x.py:1)", since=90.0)
    assert report(0, {0: receiving, 1: receiving, 2: AT_WORK}, [0, 1, 2]) == (
        "recv (x.py:1) hangs for 10 s, entered by ranks 0, 1 at pipeline.py:5 (gradients); it waits for rank 2, which "
        "is at loader.py:7 (batch)"
    )


def test_the_slowest_rank_is_named_where_it_stands_out() -> None:
    assert slowest([1.0, 1.1, 1.2, 1.0]) is None
    said = "rank 2 is slow: 1.50 s of a step are its own work, the median is 1.00 s"
    assert slowest([1.0, 0.9, 1.5, 1.0]) == said
    assert slowest([1.0, 1.5]) == "rank 1 is slow: 1.50 s of a step are its own work, the median is 1.00 s"
    assert covered([(0, 2), (1, 3), (2, 2.5), (5, 6)]) == 4
    assert covered([]) == 0


def works(rank: int, world: int, slow: int) -> tuple[float, float]:
    """Seconds of a step and those of its own, where one rank takes longer than the others."""
    value = torch.ones(1000)
    with Waits(torch.device("cpu")) as waits:
        for _ in range(3):
            time.sleep(0.2 if rank == slow else 0.01)
            dist.all_reduce(value)
    return waits.seconds, waits.own


def test_waiting_for_others_is_not_a_ranks_own_time(pool: Pool) -> None:
    found = pool.run(3, works, 1)
    assert all(seconds > 0.6 for seconds, _ in found)  # all of them last as long as the slow one
    own = [own for _, own in found]
    assert own[1] > 0.6
    assert max(own[0], own[2]) < 0.4
    assert "rank 1 is slow" in str(slowest(own))


@pytest.mark.parametrize("slow", [0, 2])
def test_it_is_the_slow_rank_that_is_named(pool: Pool, slow: int) -> None:
    assert f"rank {slow} is slow" in str(slowest([own for _, own in pool.run(3, works, slow)]))


# ── whole runs ────────────────────────────────────────────────────────────────────────────────────────────────────

ALWAYS = ("train.device=cpu", "train.dtype=fp32", "train.checkpoint_every=5", "train.eval_every=24", "mesh.ep=2")
ROOT = Path(__file__).parent.parent
PRETRAIN = ("-m", "leanseek", "pretrain")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights and optimizer states of two ranks that nothing happened to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = started(data, run)
    assert (done.communicate()[1], done.returncode)[1] == 0
    return tensors_of(run)


def started(data: Path, run: Path, *overrides: str, program: tuple[str, ...] = PRETRAIN) -> "subprocess.Popen[str]":
    """Two ranks under torchrun, which may start them again twice."""
    agent = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2")
    arguments = (str(RECIPE), "--data", str(data), "--out", str(run), *ALWAYS, *overrides)
    return subprocess.Popen(
        [*agent, *program, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """Weights, biases and optimizer state of the newest checkpoint, by file and name."""
    newest = checkpoint.newest(run, pytest.fail)
    assert newest is not None
    files = sorted(newest.path.rglob("*.safetensors"))
    return {f"{file.parent.name}/{name}": t for file in files for name, t in load_file(file).items()}


def same(run: Path, wanted: dict[str, torch.Tensor]) -> bool:
    found = tensors_of(run)
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_rank_costs_nothing(data: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    run = tmp_path / "run"
    process = started(data, run)
    wait_for(run / "checkpoints" / "step-00000010", process)
    _, second = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(second), signal.SIGKILL)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert re.search(r"goes on from step 1[05]", said)
    assert same(run, undisturbed)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(
    data: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    run = tmp_path / "run"
    process = started(data, run)
    wait_for(run / "checkpoints" / "step-00000005", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    newest = checkpoint.newest(run, pytest.fail)
    assert newest is not None
    assert 5 < newest.step < 24  # saved between the periodic ones, or at one
    again = started(data, run)
    said = again.communicate(timeout=300)[1]
    assert f"goes on from step {newest.step}" in said
    assert same(run, undisturbed)


HANGS = """
import os, time
from leanseek.cli import main
from leanseek.data.loader import Loader
before = Loader.batch
def batch(self, stage, sample, *rest):
    while sample > 60 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        time.sleep(0.1)
    return before(self, stage, sample, *rest)
Loader.batch = batch
main()
"""


@pytest.mark.slow
def test_a_hanging_rank_is_named_and_all_start_again(
    data: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    program = tmp_path / "hangs.py"
    program.write_text(HANGS)
    process = started(data, tmp_path / "run", "mesh.timeout=20", program=(str(program), "pretrain"))
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    named = r"rank 0: \w+ of .* hangs for 1\d s, entered by rank 0 at .*; it waits for rank 1, which is at .*\(batch\)"
    assert re.search(named, said), said
    assert "goes on from step 5" in said
    assert same(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_cut_network(data: Path, tmp_path: Path) -> None:
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine")
    script = [str(ROOT / "scripts" / "cut_network.sh"), str(data), str(tmp_path / "out"), str(RECIPE), *ALWAYS]
    env = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(script, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hangs for" in done.stdout
    assert "goes on from step" in done.stdout
    assert "the same weights and optimizer states" in done.stdout
