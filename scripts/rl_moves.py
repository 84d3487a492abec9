"""Does RL move a real number? Sums, worked out column by column: SFT until its dev score stands still, then GRPO.

    python -m scripts.rl_moves FOLDER [--demonstrations 400] [--tokens 1_800_000] [--steps 1200] [--seeds 3]
        [--controls 3] [--plot PNG]

One base model, and SFT on a few demonstrations. Its best checkpoint on the dev questions
goes on, for each seed: by GRPO on questions that have nothing but their answers and, as the control, by more SFT for as
many CPU-seconds, of which again the best checkpoint counts. All are then asked the test questions, which chose nothing:
with the likeliest tokens, and drawn at temperature 1. Every part goes on where it was stopped. Prints the table, writes
FOLDER/results.json and the plot.
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch

from leanseek import checkpoint
from leanseek.config import read_recipe
from leanseek.data.prepare import prepare
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.tasks import read_task
from leanseek.eval.verify import Verifier
from leanseek.post.grpo import grpo
from leanseek.post.rewards import Correct
from leanseek.post.rl_log import read
from leanseek.post.rollout import EngineRollouts, Questions
from leanseek.post.sft import sft
from leanseek.serve.llm import load_model
from leanseek.train.pretrain import pretrain
from scripts.column_sums import DEMONSTRATIONS
from scripts.column_sums import main as write_tasks

RECIPE = Path(__file__).with_name("column_sums.toml")
LONGEST = 16  # tokens of an answer
HERE = ("train.device=cpu", "train.dtype=fp32")
OF_SFT = (
    *HERE, "train.keep_checkpoints=1000", "train.eval_every=100000", "schedule.batch_tokens=[{until=1,value=2048}]",
)  # fmt: skip
# Many small steps: see docs/log.md.
RATE = "{until=0.05,value=4e-5,shape='linear'},{until=0.5,value=4e-5},{until=1,value=4e-6,shape='linear'}"
OF_GRPO = (
    *HERE, f"grpo.max_tokens={LONGEST}", "grpo.prompts=64", "grpo.group=8", "grpo.kl_weight=0",
    "optimizer.beta2=0.99", "train.checkpoint_every=50", "train.eval_every=25", f"schedule.learning_rate=[{RATE}]",
)  # fmt: skip

Curve = list[tuple[float, float]]  # CPU-seconds since the part began, share right


def score(run: Path, file: Path, temperature: float, weights: Path | None = None) -> float:
    """The share of a task's questions that a run's newest checkpoint, or the one given, answers rightly."""
    model, tokenizer = load_model(run, "cpu", torch.float32), Tokenizer.load(run / "tokenizer")
    if weights is not None:
        checkpoint.load_model_weights(weights, model)
    context = model.config.max_position_embeddings
    questions = Questions(read_task(file), tokenizer, True, context, LONGEST, 0)
    rollouts = EngineRollouts(model, tokenizer, LONGEST, (), 256)
    answers = rollouts.draw(questions.items, range(len(questions)), temperature, lambda: False)
    with Verifier() as verifier:
        return statistics.fmean(map(Correct(verifier).right, answers))


def curve(run: Path, dev: Path) -> tuple[Curve, Path]:
    """The dev score at every checkpoint of a run of SFT, and the checkpoint that is best, the first of equals."""
    kept = run / "curve.json"
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    if not kept.exists():
        found = []
        for folder in checkpoints:
            spent = json.loads((folder / "state.json").read_bytes())["cpu_seconds"]
            found.append((spent, score(run, dev, 0.0, folder / "model")))
        kept.write_text(json.dumps(found))
    points: Curve = [(spent, right) for spent, right in json.loads(kept.read_text())]
    best = max(range(len(points)), key=lambda i: points[i][1])
    return points, checkpoints[best]


def begin_at(run: Path, best: Path, out: Path) -> None:
    """OUT becomes RUN as it was at one of its checkpoints."""
    if not (out / "config.toml").exists():
        shutil.copytree(run, out, ignore=shutil.ignore_patterns("step-*", ".lock", "tensorboard", "eval"))
        shutil.copytree(best, out / "checkpoints" / best.name)


def taught(folder: Path, tokens: int) -> tuple[Path, Curve, float]:
    """SFT of the base model: the run as it was at its best checkpoint, its dev scores, its CPU-seconds per token."""
    asked = (*OF_SFT, "train.checkpoint_every=20", f"train.tokens={tokens}")
    receipt = sft(folder / "base", folder / "task" / "chats.jsonl", folder / "sft", asked)
    scores, best = curve(folder / "sft", folder / "task" / "dev.jsonl")
    begin_at(folder / "sft", best, folder / "best")
    return folder / "best", scores, receipt["cpu_seconds"] / receipt["tokens"]


def rewarded(folder: Path, begun: Path, seed: int, steps: int) -> tuple[Path, float]:
    """A run of GRPO, and the CPU-seconds it took, its dev questions included."""
    out, task = folder / f"grpo-{seed}", folder / "task"
    receipt = grpo(
        begun, task / "train.jsonl", out, (*OF_GRPO, f"grpo.steps={steps}", f"train.seed={seed}"), task / "dev.jsonl"
    )
    return out, receipt["cpu_seconds"]


def one_seed(
    folder: Path, begun: Path, cost: float, seed: int, run: Path, spent: float, controlled: bool
) -> dict[str, Any]:
    """A run of GRPO and, as the control, more SFT for as many CPU-seconds, from the same checkpoint."""
    task = folder / "task"
    dev, test = task / "dev.jsonl", task / "test.jsonl"
    steps, held_out = read(run)
    at = {row["step"]: row["cpu_seconds"] for row in steps} | {0: 0.0}
    named: dict[str, tuple[Path, Path | None]] = {"sft": (begun, None), "grpo": (run, None)}
    seconds, after = {"grpo": spent}, []
    if controlled:
        control = folder / f"control-{seed}"
        asked = (*OF_SFT, "train.checkpoint_every=80", f"train.seed={seed}", f"train.tokens={round(spent / cost)}")
        seconds["control"] = sft(begun, task / "chats.jsonl", control, asked)["cpu_seconds"]
        after, best = curve(control, dev)
        named["control"] = (control, best / "model")

    def right(file: Path, temperature: float) -> dict[str, float]:
        return {name: score(run, file, temperature, weights) for name, (run, weights) in named.items()}

    return {
        "seed": seed,
        "grpo": [(at[row["step"]], row["dev"]) for row in held_out],
        "drawn": [(row["cpu_seconds"], row["reward"], row["length"]) for row in steps],
        "control": after,
        "dev": right(dev, 0.0),
        "dev, drawn": right(dev, 1.0),
        "test": right(test, 0.0),
        "test, drawn": right(test, 1.0),
        "cpu_seconds": seconds,
    }


def plot(before: Curve, results: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    grey, red, blue = "#9c9c9c", "#c1666b", "#4281a4"
    begun = max(before, key=lambda point: point[1])[0]

    def line(points: Curve, since: float, colour: str, label: str | None) -> None:
        across, up = [spent + since for spent, _ in points], [100 * share for _, share in points]
        left.plot(across, up, color=colour, linewidth=1.2, marker="o", markersize=2.5, label=label)

    line(before, 0.0, grey, "SFT")
    for number, result in enumerate(results):
        first = number == 0
        line(result["grpo"], begun, red, "then GRPO" if first else None)
        line(result["control"], begun, blue, "or more SFT" if first else None)
        steps = range(1, len(result["drawn"]) + 1)
        right.plot(steps, [length for _, _, length in result["drawn"]], color=red, linewidth=1)
    left.set(xlabel="CPU-seconds", ylabel="dev questions right, %", ylim=(0, 100))
    left.legend(frameon=False)
    right.set(xlabel="step of GRPO", ylabel="tokens of an answer", ylim=(0, None))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--demonstrations", type=int, default=DEMONSTRATIONS)
    parser.add_argument("--tokens", type=int, default=1_800_000, help="of SFT")
    parser.add_argument("--steps", type=int, default=1200, help="of GRPO")
    parser.add_argument("--controls", type=int, help="for so many of the seeds only")
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    folder: Path = asked.folder
    if not (folder / "data").exists():
        write_tasks(folder / "task", asked.demonstrations)
        prepare([str(folder / "task" / "text.jsonl")], folder / "data", vocab_size=276, workers=1)
    pretrain(read_recipe(str(RECIPE), HERE), folder / "data", folder / "base")
    begun, before, cost = taught(folder, asked.tokens)
    results = []
    runs = [rewarded(folder, begun, seed, asked.steps) for seed in range(asked.seeds)]
    for seed, (run, spent) in enumerate(runs):
        controlled = asked.controls is None or seed < asked.controls
        results.append(one_seed(folder, begun, cost, seed, run, spent, controlled))
        (folder / "results.json").write_text(json.dumps({"sft": before, "seeds": results}, indent=1))
    for kind in ("dev", "dev, drawn", "test", "test, drawn"):
        for result in results:
            told = ", ".join(f"{name} {right:.1%}" for name, right in result[kind].items())
            print(f"{kind:<12} seed {result['seed']}: {told}")
    for result in results:
        told = ", ".join(f"{name} {seconds:.0f}" for name, seconds in result["cpu_seconds"].items())
        print(f"CPU-seconds  seed {result['seed']}: {told}")
    plot(before, results, asked.plot or folder / "rl-moves.png")


if __name__ == "__main__":
    main()
