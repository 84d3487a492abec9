"""The loop of every training stage, in the open: take a batch, step, log, validate, save, and never lose work.

It is handed the batches and the validation; what it adds is order. Its whole state beside weights and optimizer is a
`Progress`, which the checkpoint carries.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from leanseek import checkpoint
from leanseek.config import BadInput, Config
from leanseek.model.transformer import Transformer
from leanseek.parallel.apply import forget_gathered
from leanseek.parallel.mesh import ALONE, Ranks, lead
from leanseek.parallel.pipeline import Pipeline
from leanseek.parallel.watch import Waits, slowest
from leanseek.train.average import Average
from leanseek.train.log import Log
from leanseek.train.schedule import Knobs, knobs
from leanseek.train.step import ANY, Limits, StepResult, train_step

MOST_ROLLBACKS = 10
RECENT = 64  # steps whose median a spike is held against,
FEWEST = 16  # and how many there must be
MEASURED_EVERY = 100  # steps, one of which is watched for a rank that keeps the others waiting

Ending = Literal["complete", "max_steps", "max_seconds", "interrupted"]


class Batch(Protocol):
    @property
    def ids(self) -> NDArray[np.int64]: ...  # [count, T]
    @property
    def targets(self) -> NDArray[np.int64]: ...  # [count, T], IGNORE where there is nothing to predict
    @property
    def positions(self) -> NDArray[np.int64] | None: ...  # [count, T] within the sample, None for 0, 1, …
    @property
    def segments(self) -> NDArray[np.int64] | None: ...  # [count, T] whose token it is, None where all see each other


class Step(Protocol):
    """Learns from one batch, all tensors [B, T]; see `train.step`."""

    def __call__(
        self,
        model: Transformer,
        optimizers: list[Optimizer],
        ids: Tensor,
        targets: Tensor,
        knobs: Knobs,
        config: Config,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        ranks: Ranks = ALONE,
        limits: Limits = ANY,
        pipeline: Pipeline | None = None,
    ) -> StepResult: ...


class Batches(Protocol):
    """A batch is a pure function of its place; see `data.loader`."""

    def samples(self, stage: int) -> int: ...
    def batch(self, stage: int, sample: int, count: int, rank: int = 0, ranks: int = 1) -> Batch: ...


@dataclass
class Progress:
    """Where a run is. `tokens` are those the model has learned from."""

    step: int = 0
    tokens: int = 0
    stage: int = 0
    sample: int = 0
    flops: float = 0.0  # spent, lost and skipped work included, as are the seconds
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    skipped_steps: int = 0
    skipped_windows: list[tuple[int, int, int]] = field(default_factory=list)  # stage, first sample, sample after
    recent: list[tuple[float, float]] = field(default_factory=list)  # loss and gradient norm of the newest steps
    bpb: float | None = None  # the newest validation, of whatever is measured, and the step it was made at
    bpb_step: int | None = None


def train(
    run: Path,
    config: Config,
    model: Transformer,
    optimizers: list[Optimizer],
    batches: Batches,
    evaluate: Callable[[int], float],
    flops_per_token: Callable[[int, Knobs], float],
    log: Log,
    ranks: Ranks = ALONE,
    pipeline: Pipeline | None = None,
    step: Step = train_step,
    spent: tuple[float, float] = (0.0, 0.0),
) -> tuple[Progress, Ending]:
    """Trains until the budget, a limit or a signal; returns where it got to and why it ended.

    `evaluate(stage)` is the validation bpb at a stage's length, or what else `log` says is measured; `flops_per_token`
    is of a stage and its knobs. `step` is what a batch does to the model. `spent` are wall and CPU seconds that this
    process has needed to be ready for it. The same call on the same RUN goes on from
    the newest whole checkpoint. All `ranks` call it and agree on everything but the batch: each reads its rows of it.
    Raises BadInput when training does not recover from non-finite steps, OSError when a checkpoint cannot be written.
    """
    device = next(model.parameters()).device
    average = None if config.train.ema_decay is None else Average(model, config.train.ema_decay)
    kept = Kept(run, model, optimizers, average, ranks)
    saver = checkpoint.Saver(run, config.train.keep_checkpoints, ranks, config.train.background_saves)
    progress = _resume(kept, log)
    clock = Clock(progress, ranks, *spent)
    saved: Progress | None = None if progress.step == 0 else replace(progress)
    bad: list[tuple[int, int, int]] = []  # the windows of the non-finite steps in a row

    def save() -> None:
        nonlocal saved
        if saved != progress:
            clock.stamp(progress)
            saver.save(progress.step, model, optimizers, asdict(progress), kept.averaged)
            saved = replace(progress)

    def validate() -> None:
        if progress.bpb_step != progress.step:
            stage = min(progress.stage, len(config.stages) - 1)
            progress.bpb, progress.bpb_step = evaluate(stage), progress.step
            forget_gathered(model)
            log.validation(progress.step, progress.tokens, progress.bpb)

    with stop_signals() as asked_to_stop:
        while True:
            ending = _ending(config, progress, batches, clock, ranks.any(bool(asked_to_stop)))
            # Before a validation, which may take long, and at step 0 too: there is always something to go back to.
            if ending is not None or (progress.step % config.train.checkpoint_every == 0 and not bad):
                save()
            if ending == "interrupted":
                break
            if ending is not None or (progress.step and progress.step % config.train.eval_every == 0):
                validate()
            if ending is not None:
                save()  # with the validation's result
                break

            begun = time.monotonic()
            if past := _skipped_until(progress):
                progress.sample = past
                continue
            length = config.stages[progress.stage].sequence_length
            wanted = knobs(config.schedule, progress.tokens, config.train.tokens).batch_tokens // length
            count = min(max(wanted, 1), batches.samples(progress.stage) - progress.sample)
            # Rates are read in the middle of the step: neither its first nor its last one is lost to a rate of zero.
            now = knobs(config.schedule, progress.tokens + count * length / 2, config.train.tokens)
            batch = batches.batch(progress.stage, progress.sample, count, ranks.place["dp"], ranks.division.dp)
            ids, targets = torch.from_numpy(batch.ids).to(device), torch.from_numpy(batch.targets).to(device)
            positions, segments = (
                None if array is None else torch.from_numpy(array).to(device)
                for array in (batch.positions, batch.segments)
            )
            measured = ranks.world > 1 and (progress.step + 1) % MEASURED_EVERY == 0
            with Waits(device) if measured else nullcontext() as waits:
                limits = _limits(progress.recent, config.train.spike)
                result = step(
                    model, optimizers, ids, targets, now, config, positions, segments, ranks, limits, pipeline
                )
            if waits is not None and (slow := slowest(ranks.each(waits.own))):
                log.say(f"step {progress.step + 1}: {slow}")

            window = (progress.stage, progress.sample, progress.sample + count)
            progress.sample += count
            tokens = count * length
            flops = tokens * flops_per_token(progress.stage, now)
            progress.flops += flops
            if not result.finite or result.spike:
                bad.append(window)
                progress.skipped_steps += 1
                log.say(f"step {progress.step + 1}: {_wrong_with(result, limits)}; step skipped")
                if len(bad) == config.train.rollback_after:
                    if len(progress.skipped_windows) >= MOST_ROLLBACKS * len(bad):
                        raise BadInput(
                            f"{run}: training does not recover after {MOST_ROLLBACKS} rollbacks: lower its rate"
                        )
                    saver.wait()
                    progress = _roll_back(kept, progress, bad, log)
                    bad = []
                continue
            bad = []
            if average is not None:
                average.update(model)
            progress.step += 1
            progress.tokens += tokens
            if config.train.spike is not None:
                progress.recent = [*progress.recent, (result.loss, result.grad_norm)][-RECENT:]
            clock.stamp(progress)
            log.step(progress, result, now, tokens, flops, time.monotonic() - begun)
    saver.wait()
    return progress, ending


@dataclass(frozen=True)
class Kept:
    """What the checkpoints of a run keep beside its progress."""

    run: Path
    model: Transformer
    optimizers: list[Optimizer]
    average: Average | None
    ranks: Ranks

    @property
    def averaged(self) -> dict[str, Tensor] | None:
        return None if self.average is None else self.average.weights

    def restore(self, log: Log) -> Progress | None:
        """From the newest whole checkpoint; None where there is none."""
        newest = lead(lambda: checkpoint.newest(self.run, log.say), self.ranks.group("world"))
        if newest is None:
            return None
        progress = Progress(**checkpoint.load(newest, self.model, self.optimizers, self.ranks, self.averaged))
        progress.skipped_windows = [(stage, first, after) for stage, first, after in progress.skipped_windows]
        progress.recent = [(loss, norm) for loss, norm in progress.recent]
        return progress

    def cut_metrics(self, progress: Progress) -> dict[str, float]:
        """Cuts the log back to where the run is; returns what was spent in all."""
        step, validated = progress.step, progress.bpb_step
        return lead(lambda: checkpoint.cut_metrics(self.run, step, validated), self.ranks.group("world"))


def _limits(recent: list[tuple[float, float]], spike: float | None) -> Limits:
    """How far above the newest steps' medians a step may lie."""
    if spike is None or len(recent) < FEWEST:
        return ANY
    return Limits(*(spike * median(values) for values in zip(*recent, strict=True)))


def _wrong_with(result: StepResult, limits: Limits) -> str:
    if not result.finite:
        return "loss or gradient is not finite"
    return (
        f"a spike: loss {result.loss:.4g} where {limits.loss:.4g} is the most, gradient norm {result.grad_norm:.4g} "
        f"where {limits.grad_norm:.4g} is"
    )


def _ending(config: Config, progress: Progress, batches: Batches, clock: "Clock", asked_to_stop: bool) -> Ending | None:
    """Why to end here, if so; moves on to the next stage when one is used up."""
    while progress.stage < len(config.stages) and progress.sample >= batches.samples(progress.stage):
        progress.stage, progress.sample = progress.stage + 1, 0
    if progress.stage == len(config.stages):
        return "complete"
    if asked_to_stop:
        return "interrupted"
    if config.train.max_steps is not None and progress.step >= config.train.max_steps:
        return "max_steps"
    if config.train.max_seconds is not None and clock.any_past(config.train.max_seconds):
        return "max_seconds"
    return None


def _resume(kept: Kept, log: Log) -> Progress:
    progress = kept.restore(log)
    if progress is None:
        return Progress()
    spent = kept.cut_metrics(progress)  # with what was lost since the checkpoint
    progress.seconds = max(progress.seconds, spent["seconds"])
    progress.cpu_seconds = max(progress.cpu_seconds, spent["cpu_seconds"])
    progress.flops = max(progress.flops, spent["flops"])
    if progress.step:
        log.say(f"goes on from step {progress.step}, {progress.tokens:,} tokens")
    return progress


def _roll_back(
    kept: Kept,
    failed: Progress,
    bad: list[tuple[int, int, int]],
    log: Log,
) -> Progress:
    """Takes up the last checkpoint, with the windows of the bad steps marked to be skipped and the work billed."""
    progress = kept.restore(log)
    assert progress is not None
    progress.skipped_windows = [*failed.skipped_windows, *bad]
    progress.skipped_steps, progress.flops = failed.skipped_steps, failed.flops
    kept.cut_metrics(progress)
    log.say(f"{len(bad)} such steps in a row: back to step {progress.step}, from where their text will be left out")
    return progress


def _skipped_until(progress: Progress) -> int | None:
    for stage, first, after in progress.skipped_windows:
        if stage == progress.stage and first <= progress.sample < after:
            return after
    return None


class Clock:
    """Wall and CPU seconds of the run, the latter summed over ranks: those of earlier processes and of these."""

    def __init__(
        self, progress: Progress, ranks: Ranks = ALONE, wall_spent: float = 0.0, cpu_spent: float = 0.0
    ) -> None:
        self.wall = time.monotonic() - progress.seconds - wall_spent
        self.cpu_before, self.cpu_at_start = progress.cpu_seconds, cpu_seconds() - cpu_spent
        self.ranks = ranks

    def seconds(self) -> float:
        return time.monotonic() - self.wall

    def any_past(self, limit: float) -> bool:
        """Whether a rank has so many seconds behind it."""
        return self.ranks.any(self.seconds() >= limit)

    def stamp(self, progress: Progress) -> None:
        mine = torch.tensor(cpu_seconds() - self.cpu_at_start, dtype=torch.float64, device=self.ranks.device)
        progress.seconds, progress.cpu_seconds = self.seconds(), self.cpu_before + self.ranks.total(mine).item()


def cpu_seconds() -> float:
    times = os.times()  # to a hundredth of a second: too coarse for a step of a small model
    return time.process_time() + times.children_user + times.children_system


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM ask for a stop after the step at hand; a second Ctrl-C interrupts at once."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
