"""Does RL move a real number? Sums worked out column by column: SFT until its dev score stands still, then GRPO.

    python -m scripts.rl_moves FOLDER [--seeds 3] [--plot FILE.png]

One base model; for each seed SFT on a few demonstrations, of whose checkpoints the best on the dev questions goes on:
by GRPO on questions that have nothing but their answers, and, as the control, by more SFT for as many CPU-seconds, of
which again the best checkpoint counts. Both are then asked the test questions, which chose nothing. Every part goes on
where it was stopped. Prints the table, writes FOLDER/results.json and the plot.
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
from scripts.column_sums import main as write_tasks

RECIPE = Path(__file__).with_name("column_sums.toml")
LONGEST = 16  # tokens of an answer
HERE = ("train.device=cpu", "train.dtype=fp32")
OF_SFT = (
    *HERE, "train.checkpoint_every=12", "train.keep_checkpoints=1000", "train.eval_every=100000",
    "schedule.batch_tokens=[{until=1,value=2048}]",
)  # fmt: skip
SFT_TOKENS = 300_000
OF_GRPO = (
    *HERE, f"grpo.max_tokens={LONGEST}", "grpo.steps=60", "grpo.prompts=64", "grpo.group=16", "grpo.kl_weight=0",
    "optimizer.beta2=0.99", "train.checkpoint_every=20",
    "schedule.learning_rate=[{until=0.1,value=1e-4,shape='linear'},{until=0.5,value=1e-4},{until=1,value=1e-5,shape='linear'}]",
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


def one_seed(folder: Path, seed: int) -> dict[str, Any]:
    task = folder / "task"
    demonstrations, dev, test = task / "chats.jsonl", task / "dev.jsonl", task / "test.jsonl"
    taught, begun, rewarded, control = (folder / f"{name}-{seed}" for name in ("sft", "best", "grpo", "control"))
    of_sft = (*OF_SFT, f"train.seed={seed}")
    receipt = sft(folder / "base", demonstrations, taught, (*of_sft, f"train.tokens={SFT_TOKENS}"))
    before, best = curve(taught, dev)
    begin_at(taught, best, begun)
    spent = grpo(begun, task / "train.jsonl", rewarded, (*OF_GRPO, f"train.seed={seed}"), dev)["cpu_seconds"]
    steps, held_out = read(rewarded)
    at = {row["step"]: row["cpu_seconds"] for row in steps} | {0: 0.0}
    # More of the same for at least as many CPU-seconds as GRPO took, its dev questions included.
    rate = receipt["tokens"] / receipt["cpu_seconds"]
    more = sft(begun, demonstrations, control, (*of_sft, f"train.tokens={round(1.1 * spent * rate)}"))
    after, best_of_more = curve(control, dev)
    named = {
        "sft": (begun, None),
        "grpo": (rewarded, None),
        "control": (control, best_of_more / "model"),
    }
    return {
        "seed": seed,
        "curves": {"sft": before, "grpo": [(at[row["step"]], row["dev"]) for row in held_out], "control": after},
        "dev": {name: score(run, dev, 0.0, weights) for name, (run, weights) in named.items()},
        "dev_drawn": {name: score(run, dev, 1.0, weights) for name, (run, weights) in named.items()},
        "test": {name: score(run, test, 0.0, weights) for name, (run, weights) in named.items()},
        "cpu_seconds": {"sft": receipt["cpu_seconds"], "grpo": spent, "control": more["cpu_seconds"]},
    }


def plot(results: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    looks = {"sft": ("#9c9c9c", "SFT"), "grpo": ("#c1666b", "then GRPO"), "control": ("#4281a4", "or more SFT")}
    for number, result in enumerate(results):
        begun = max(result["curves"]["sft"], key=lambda point: point[1])[0]
        for name, (colour, label) in looks.items():
            points = result["curves"][name]
            across = [spent + (0 if name == "sft" else begun) for spent, _ in points]
            axis.plot(
                across, [100 * right for _, right in points], color=colour, linewidth=1.2, marker="o", markersize=2.5,
                label=label if number == 0 else None,
            )  # fmt: skip
    axis.set(xlabel="CPU-seconds", ylabel="dev questions right, %", ylim=(0, 100))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    folder: Path = asked.folder
    if not (folder / "data").exists():
        write_tasks(folder / "task")
        prepare([str(folder / "task" / "text.jsonl")], folder / "data", vocab_size=276, workers=1)
    pretrain(read_recipe(str(RECIPE), HERE), folder / "data", folder / "base")
    results = []
    for seed in range(asked.seeds):
        results.append(one_seed(folder, seed))
        (folder / "results.json").write_text(json.dumps(results, indent=1))
    for kind in ("dev", "dev_drawn", "test"):
        for result in results:
            told = ", ".join(f"{name} {right:.1%}" for name, right in result[kind].items())
            print(f"{kind:<10} seed {result['seed']}: {told}")
    for result in results:
        print(f"CPU-seconds, seed {result['seed']}:", {name: round(s) for name, s in result["cpu_seconds"].items()})
    plot(results, asked.plot or folder / "rl-moves.png")


if __name__ == "__main__":
    main()
