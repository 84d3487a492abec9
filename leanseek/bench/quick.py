"""Ours against the best dense control on a small budget, in minutes: the check that a change made nothing dearer."""

import os
import shutil
from statistics import median
from typing import Any

import torch

from leanseek.bench import controls
from leanseek.bench.queue import Place, say
from leanseek.bench.rows import BEST, OURS, Row, config_of, control_of, vocabulary
from leanseek.bench.score import comparison, tokens_to
from leanseek.bench.speed import counting_cpu_seconds, measure_speed, silence
from leanseek.bench.track import data_of_track
from leanseek.data.shards import open_data
from leanseek.train import peak
from leanseek.train.cpu import ready_cpu
from leanseek.train.log import read_metrics
from leanseek.train.pretrain import pretrain

WORSE = 1.10  # the cost ratio at which `--quick` fails
QUICK_CPU_SECONDS = 90.0  # of training the control, per seed
QUICK_SEEDS, QUICK_EVALUATIONS, QUICK_SCORED_TOKENS = 2, 12, 50_000


def quick(place: Place, rows: tuple[Row, ...], cpu_seconds: float = QUICK_CPU_SECONDS) -> dict[str, Any]:
    """Ours against the best dense control on a small budget, seed by seed in turn: a `comparison`.

    The control trains for so many CPU-seconds, its schedule ending there; what it ends with is the target. Ours is
    given a tenth more, counting included, the most that is tolerated. The ratio of a seed is what ours takes to the
    target over the control's whole cost, infinite when ours does not get there.
    """
    ready_cpu()
    peer, ours = (next(row for row in rows if row.name == name) for name in (BEST, OURS))
    folders = [data_of_track(place.track, place.out, vocabulary(row)) for row in (peer, ours)]
    measured = measure_speed([(peer, folders[0], _faster(peer)), (ours, folders[1], _faster(ours))], 2, steps=8)
    speeds, counting = [median(rounds) for rounds in measured], counting_cpu_seconds(ours, folders[1])
    batch = config_of(ours, ours.tokens, None, 0).schedule.batch_tokens[-1].value
    assert peer.control is not None
    budgets = [
        _whole(cpu_seconds / speeds[0], peer.control.batch_tokens),
        _whole((WORSE * cpu_seconds - counting) / speeds[1], int(batch)),
    ]
    say(f"{peer.name}: {budgets[0]:,} tokens; {ours.name}: up to {budgets[1]:,}, at most {WORSE - 1:.0%} dearer")
    ratios, costs = [], []
    for seed in range(QUICK_SEEDS):
        run = place.out / place.track.name / "runs" / f".quick-{os.getpid()}"
        shutil.rmtree(run, ignore_errors=True)
        try:
            control = control_of(peer, budgets[0], None)
            data = open_data(folders[0], verify=False)
            ended = controls.train(
                control, _faster(peer), seed, data, run / "peer", 1, scored_tokens=QUICK_SCORED_TOKENS
            )
            target = ended["curve"][-1][1]
            config = config_of(ours, budgets[1], None, seed, QUICK_EVALUATIONS)
            train = config.train.model_copy(update={"eval_tokens": QUICK_SCORED_TOKENS})
            with silence():
                pretrain(config.model_copy(update={"train": train}), folders[1], run / "ours")
            curve = [[line["tokens"], line["bpb"]] for line in read_metrics(run / "ours")[1]]
        finally:
            shutil.rmtree(run, ignore_errors=True)
        cost, whole = counting + tokens_to(curve, target) * speeds[1], ended["tokens"] * speeds[0]
        say(f"seed {seed}: {peer.name} {target:.4f}, {ours.name} {curve[-1][1]:.4f} bpb, cost ratio {cost / whole:.3f}")
        ratios.append(cost / whole)
        costs.append((cost, whole))
    means = [median(cost[i] for cost in costs) for i in (0, 1)]
    return comparison(f"{ours.name} / {peer.name}", means[0], means[1], ratios)


def passes(row: dict[str, Any]) -> bool:
    """The verdict: whether ours is less than a tenth worse."""
    ratio: float | None = row["ratio_median"]
    return ratio is not None and ratio < WORSE


def _faster(row: Row) -> str:
    return "auto" if row.control is None else peak.faster_dtype(torch.device("cpu"))


def _whole(tokens: float, batch: int) -> int:
    return max(round(tokens / batch), 1) * batch
