"""What a run tells while it trains: a live line or plain ones, `metrics.jsonl`, TensorBoard and `loss.png`."""

import json
import math
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from leanseek.train.schedule import Knobs
from leanseek.train.step import StepResult

if TYPE_CHECKING:
    from leanseek.train.loop import Progress as RunProgress

MEASURES = {"bpb": "bits per byte", "accuracy": "of the pairs told apart"}  # what a validation says, and in words
PLAIN_EVERY = 10.0  # seconds between lines where no terminal shows a bar


class Log:
    """`budget` in tokens; `peak` FLOP/s as measured, for the share of it that a run reaches; `measure`: of MEASURES.


    A `silent` one says and writes nothing: all ranks but one have it.
    """

    def __init__(self, run: Path, budget: int, peak: float, measure: str = "bpb", silent: bool = False) -> None:
        self.run, self.budget, self.peak, self.measure, self.silent = run, budget, peak, measure, silent
        self.console = Console(stderr=True, highlight=False, quiet=silent)
        self.live = self.console.is_terminal
        self.validated: float | None = None
        self.last_line = 0.0
        self.tensorboard: Any = None
        columns = (TextColumn("{task.percentage:>3.0f}%"), BarColumn(24), TextColumn("{task.fields[what]}"))
        self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, disable=silent or not self.live)
        self.task = self.bar.add_task("train", total=budget, what="starting")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def say(self, line: str) -> None:
        """One line for whoever watches."""
        self.console.print(line, markup=False, soft_wrap=True)

    def step(
        self, at: "RunProgress", result: StepResult, now: Knobs, tokens: int, flops: float, seconds: float
    ) -> None:
        """One optimizer step, which took so many tokens, FLOPs and seconds."""
        rate = tokens / seconds
        row = {
            "step": at.step,
            "tokens": at.tokens,
            "loss": result.loss,
            "mtp_loss": result.mtp_loss,
            "balance_loss": result.balance_loss,
            "lr": now.learning_rate,
            "bias_speed": now.bias_speed,
            "grad_norm": result.grad_norm,
            "max_violation": result.max_violation,
            "tokens_per_second": rate,
            "seconds": at.seconds,
            "cpu_seconds": at.cpu_seconds,
            "flops": at.flops,
        }
        if result.divergence is not None:
            row["divergence"] = result.divergence
        self.write(row)
        bpb = "" if self.validated is None else f" · {self.measure} {self.validated:.3f}"
        what = (
            f"step {at.step} · loss {result.loss:.3f}{bpb} · {rate:,.0f} tokens/s · {_rate(flops / seconds)} "
            f"({flops / seconds / self.peak:.0%} of peak) · MaxVio {result.max_violation:.2f}"
        )
        self.bar.update(self.task, completed=at.tokens, what=what)
        if not self.live and time.monotonic() - self.last_line > PLAIN_EVERY:
            self.last_line = time.monotonic()
            left = (self.budget - at.tokens) / rate
            self.say(f"{at.tokens / self.budget:>4.0%} · {what} · {_span(left)} left")

    def validation(self, step: int, tokens: int, result: float) -> None:
        self.validated = result
        self.write({"step": step, "tokens": tokens, self.measure: result})
        self.say(f"step {step} · {tokens:,} tokens · validation {result:.4f} {MEASURES[self.measure]}")
        if not self.silent:
            plot_losses(self.run, self.measure)

    def write(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and its numbers for TensorBoard."""
        if self.silent:
            return
        with (self.run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # a second of imports

            self.tensorboard = SummaryWriter(str(self.run / "tensorboard"), purge_step=row["step"])
        for name, value in row.items():
            if value is not None and name not in ("step", "seconds", "cpu_seconds", "flops"):
                self.tensorboard.add_scalar(name, value, row["step"])


def read_metrics(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The step lines and the validation lines of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "loss" in row], [row for row in rows if MEASURES.keys() & row.keys()]


def plot_losses(run: Path, measure: str = "bpb") -> None:
    """`loss.png`: training loss, validation and expert balance over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps, validations = read_metrics(run)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    tokens = [row["tokens"] / 1e6 for row in steps]
    left.plot(tokens, [row["loss"] for row in steps], color="#9db4c0", linewidth=1, label="training loss")
    if any(row["mtp_loss"] for row in steps):
        awake = [row["mtp_loss"] or math.nan for row in steps]  # 0 while the modules are at rest
        left.plot(tokens, awake, color="#e0c9a6", linewidth=1, label="MTP loss")
    left.set(xlabel="million tokens", ylabel="nats per token")
    bits = left.twinx()
    bits.plot(
        [row["tokens"] / 1e6 for row in validations],
        [row[measure] for row in validations],
        color="#253237",
        marker="o",
        markersize=4,
        label="validation",
    )
    bits.set(ylabel=MEASURES[measure])
    lines = [*left.get_lines(), *bits.get_lines()]
    left.legend(lines, [str(line.get_label()) for line in lines], frameon=False)
    right.plot(tokens, [row["max_violation"] for row in steps], color="#5c6b73", linewidth=1)
    right.set(xlabel="million tokens", ylabel="MaxVio of the worst layer", ylim=(0, None))
    for axis in (left, right):
        axis.spines[["top"]].set_visible(False)
    figure.suptitle(run.name)
    figure.savefig(run / "loss.png", dpi=110)
    plt.close(figure)


def _rate(flops: float) -> str:
    for unit, size in (("TFLOP/s", 1e12), ("GFLOP/s", 1e9)):
        if flops >= size:
            return f"{flops / size:.1f} {unit}"
    return f"{flops / 1e6:.1f} MFLOP/s"


def _span(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
