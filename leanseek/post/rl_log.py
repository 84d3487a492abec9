"""What a run of GRPO tells: a line for each step in `metrics.jsonl`, answers as text in `samples.jsonl`, `grpo.png`."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leanseek.post.rollout import Answer
from leanseek.train.log import PLAIN_EVERY, Log

SAMPLES = "samples.jsonl"


class RLLog(Log):
    """`steps` are what the bar counts."""

    def __init__(self, run: Path, steps: int, silent: bool = False) -> None:
        super().__init__(run, steps, peak=1.0, silent=silent)
        self.dev: float | None = None

    def explored(self, row: dict[str, Any], seconds: float) -> None:
        """One step, which took so long."""
        self.write(row)
        dev = "" if self.dev is None else f" · dev {self.dev:.1%}"
        what = (
            f"step {row['step']} · reward {row['reward']:.3f}{dev} · {row['length']:.1f} tokens an answer · entropy "
            f"{row['entropy']:.2f} · KL {row['kl']:.4f} · {row['answers'] / seconds:,.0f} answers/s"
        )
        self.bar.update(self.task, completed=row["step"], what=what)
        if not self.live and time.monotonic() - self.last_line > PLAIN_EVERY:
            self.last_line = time.monotonic()
            self.say(f"{row['step'] / self.budget:>4.0%} · {what}")

    def answered(self, step: int, dev: float, count: int) -> None:
        """The held-out questions, at a step."""
        self.dev = dev
        self.write({"step": step, "dev": dev, "questions": count})
        self.say(f"step {step} · {dev:.1%} of {count:,} held-out questions right")

    def samples(self, step: int, answers: Sequence[Answer], rewards: Sequence[float | None]) -> None:
        if self.silent:
            return
        with (self.run / SAMPLES).open("a", encoding="utf-8") as file:
            for answer, reward in zip(answers, rewards, strict=True):
                prompt = answer.question.row.get("prompt")
                row = {"step": step, "prompt": prompt, "answer": answer.text, "reward": reward, "cut": answer.cut}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def cut_samples(run: Path, step: int) -> None:
    """Forgets the answers of steps after this one."""
    path = run / SAMPLES
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")


def read(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A run's lines about steps, and about held-out questions."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "reward" in row], [row for row in rows if "dev" in row]


def plot(run: Path) -> None:
    """`grpo.png`: what answers earn and how many held-out questions are right, and what else changes on the way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps, dev = read(run)
    at = [row["step"] for row in steps]
    shown = (("length", "tokens of an answer"), ("entropy", "entropy, nats"), ("kl", "KL to the reference, nats"))
    more = (("grad_norm", "gradient norm"), ("max_violation", "MaxVio of the worst layer"))
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    first, *others = axes.flat
    first.plot(at, [row["reward"] for row in steps], color="#9db4c0", linewidth=1, label="reward of a step's answers")
    first.plot(
        [row["step"] for row in dev], [row["dev"] for row in dev], color="#253237", marker="o", markersize=4,
        label="held-out questions right",
    )  # fmt: skip
    first.legend(frameon=False)
    for axis, (key, name) in zip(others, (*shown, *more), strict=True):
        axis.plot(at, [row[key] for row in steps], color="#5c6b73", linewidth=1)
        axis.set(ylabel=name, ylim=(0, None))
    for axis in axes.flat:
        axis.set(xlabel="step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(run.name)
    figure.savefig(run / "grpo.png", dpi=110)
    plt.close(figure)
