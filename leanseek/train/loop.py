"""The loop of every training stage, in the open: take a batch, step, log, validate, save, and never lose work.

It is handed the batches and the validation; what it adds is order. Its whole state beside weights and optimizer is a
`Progress`, which the checkpoint carries.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from leanseek import checkpoint
from leanseek.config import BadInput, Config
from leanseek.model.transformer import Transformer
from leanseek.train.log import Log
from leanseek.train.schedule import Knobs, knobs
from leanseek.train.step import StepResult, train_step

MOST_ROLLBACKS = 10

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
    ) -> StepResult: ...


class Batches(Protocol):
    """A batch is a pure function of its place; see `data.loader`."""

    def samples(self, stage: int) -> int: ...
    def batch(self, stage: int, sample: int, count: int) -> Batch: ...


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
    bpb: float | None = None  # the newest validation, of whatever is measured, and the step it was made at
    bpb_step: int | None = None


def train(
    run: Path,
    config: Config,
    model: Transformer,
    optimizers: list[Optimizer],
    batches: Batches,
    evaluate: Callable[[int], float],
    flops_per_token: list[float],
    log: Log,
    step: Step = train_step,
) -> tuple[Progress, Ending]:
    """Trains until the budget, a limit or a signal; returns where it got to and why it ended.

    `evaluate(stage)` is the validation bpb at a stage's length, or what else `log` says is measured; `flops_per_token`
    is by stage too. `step` is what a batch does to the model. The same call on
    the same RUN goes on from the newest whole checkpoint. Raises BadInput when training does not recover from non-
    finite steps, OSError when a checkpoint cannot be written.
    """
    device = next(model.parameters()).device
    progress = _resume(run, model, optimizers, log)
    clock = Clock(progress)
    saved: Progress | None = None if progress.step == 0 else replace(progress)
    bad: list[tuple[int, int, int]] = []  # the windows of the non-finite steps in a row

    def save() -> None:
        nonlocal saved
        if saved != progress:
            clock.stamp(progress)
            checkpoint.save(run, progress.step, model, optimizers, asdict(progress), config.train.keep_checkpoints)
            saved = replace(progress)

    def validate() -> None:
        if progress.bpb_step != progress.step:
            stage = min(progress.stage, len(config.stages) - 1)
            progress.bpb, progress.bpb_step = evaluate(stage), progress.step
            log.validation(progress.step, progress.tokens, progress.bpb)

    with stop_signals() as asked_to_stop:
        while True:
            ending = _ending(config, progress, batches, clock, asked_to_stop)
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
            batch = batches.batch(progress.stage, progress.sample, count)
            ids, targets = torch.from_numpy(batch.ids).to(device), torch.from_numpy(batch.targets).to(device)
            positions, segments = (
                None if array is None else torch.from_numpy(array).to(device)
                for array in (batch.positions, batch.segments)
            )
            result = step(model, optimizers, ids, targets, now, config, positions, segments)

            window = (progress.stage, progress.sample, progress.sample + count)
            progress.sample += count
            flops = ids.numel() * flops_per_token[progress.stage]
            progress.flops += flops
            if not result.finite:
                bad.append(window)
                progress.skipped_steps += 1
                log.say(f"step {progress.step + 1}: loss or gradient is not finite; step skipped")
                if len(bad) == config.train.rollback_after:
                    if len(progress.skipped_windows) >= MOST_ROLLBACKS * len(bad):
                        raise BadInput(
                            f"{run}: training does not recover after {MOST_ROLLBACKS} rollbacks: lower its rate"
                        )
                    progress = _roll_back(run, model, optimizers, progress, bad, log)
                    bad = []
                continue
            bad = []
            progress.step += 1
            progress.tokens += ids.numel()
            clock.stamp(progress)
            log.step(progress, result, now, ids.numel(), flops, time.monotonic() - begun)
    return progress, ending


def _ending(
    config: Config, progress: Progress, batches: Batches, clock: "Clock", asked_to_stop: list[int]
) -> Ending | None:
    """Why to end here, if so; moves on to the next stage when one is used up."""
    while progress.stage < len(config.stages) and progress.sample >= batches.samples(progress.stage):
        progress.stage, progress.sample = progress.stage + 1, 0
    if progress.stage == len(config.stages):
        return "complete"
    if asked_to_stop:
        return "interrupted"
    if config.train.max_steps is not None and progress.step >= config.train.max_steps:
        return "max_steps"
    if config.train.max_seconds is not None and clock.seconds() >= config.train.max_seconds:
        return "max_seconds"
    return None


def _resume(run: Path, model: Transformer, optimizers: list[Optimizer], log: Log) -> Progress:
    newest = checkpoint.newest(run, log.say)
    if newest is None:
        return Progress()
    progress = _progress(checkpoint.load(newest, model, optimizers))
    spent = checkpoint.cut_metrics(run, progress.step, progress.bpb_step)  # with what was lost since the checkpoint
    progress.seconds = max(progress.seconds, spent["seconds"])
    progress.cpu_seconds = max(progress.cpu_seconds, spent["cpu_seconds"])
    progress.flops = max(progress.flops, spent["flops"])
    if progress.step:
        log.say(f"goes on from step {progress.step}, {progress.tokens:,} tokens")
    return progress


def _roll_back(
    run: Path,
    model: Transformer,
    optimizers: list[Optimizer],
    failed: Progress,
    bad: list[tuple[int, int, int]],
    log: Log,
) -> Progress:
    """Takes up the last checkpoint, with the windows of the bad steps marked to be skipped and the work billed."""
    newest = checkpoint.newest(run, log.say)
    assert newest is not None
    progress = _progress(checkpoint.load(newest, model, optimizers))
    progress.skipped_windows = [*failed.skipped_windows, *bad]
    progress.skipped_steps, progress.flops = failed.skipped_steps, failed.flops
    checkpoint.cut_metrics(run, progress.step, progress.bpb_step)
    log.say(f"{len(bad)} such steps in a row: back to step {progress.step}, from where their text will be left out")
    return progress


def _progress(state: dict[str, Any]) -> Progress:
    progress = Progress(**state)
    progress.skipped_windows = [(stage, first, after) for stage, first, after in progress.skipped_windows]
    return progress


def _skipped_until(progress: Progress) -> int | None:
    for stage, first, after in progress.skipped_windows:
        if stage == progress.stage and first <= progress.sample < after:
            return after
    return None


class Clock:
    """Wall and CPU seconds of the run: those of earlier processes and this one's."""

    def __init__(self, progress: Progress) -> None:
        self.wall = time.monotonic() - progress.seconds
        self.cpu = _cpu_seconds() - progress.cpu_seconds

    def seconds(self) -> float:
        return time.monotonic() - self.wall

    def stamp(self, progress: Progress) -> None:
        progress.seconds, progress.cpu_seconds = self.seconds(), _cpu_seconds() - self.cpu


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


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
