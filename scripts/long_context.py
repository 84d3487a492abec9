"""The long-context experiment of docs/long-context.md from nothing: a model of 256 tokens that learns to read 4,096.

    python scripts/long_context.py OUT [--trials 100] [--pictures docs/img]

Trains scripts/long_context.toml, extends it with YaRN and without, and puts YaRN on it without training; asks all four
for needles and for bits per byte. What is there is not done again. Prints the table; the heat maps and the plot by
position go into OUT, or --pictures.
"""

import argparse
import json
import random
from itertools import islice
from pathlib import Path

from leanseek.config import read_recipe
from leanseek.data.needles import hay, needle_texts
from leanseek.data.prepare import prepare
from leanseek.data.storyworld import NEEDLES, documents
from leanseek.eval import needle, positions
from leanseek.eval.ask import Settings
from leanseek.eval.harness import evaluate, results_of
from leanseek.eval.needle import Grid
from leanseek.eval.positions import Curve
from leanseek.train.extend import extend
from leanseek.train.pretrain import pretrain

BEFORE, AFTER = 256, (1024, 4096)
ASKED = (BEFORE, *AFTER)  # tokens of the haystacks
FAR = f"positions-{AFTER[-1]}-long"  # the name of what is kept of bits per byte by position
HELD_OUT = 9  # a seed of no training text
STAGES = (
    *("train.tokens=1_700_000", "stages.0.share=0.15", "stages.1.share=0.85"),
    *("train.checkpoint_every=50", "train.eval_every=100", "train.eval_tokens=15_000"),
    "stages.0.mixture={needles-3800=0.6,storyworld=0.4}",
    "stages.1.mixture={needles-3800=0.05,needles-14500-15500=0.8,storyworld=0.15}",
)
# Eight times V3's share of the peak, then down: these stages have some hundred steps, V3's a thousand each.
RATE = '{until=0.02,value=3e-3,shape="linear"},{until=0.6,value=3e-3},{until=1,value=1e-4,shape="linear"}'
WAYS = {  # run: its name in the table, and what is asked of `extend`
    "base": ("before", ()),
    "untrained": ("YaRN, no training", ("schedule.learning_rate=[{until=1,value=0}]", "train.max_steps=1")),
    "yarn": ("trained with YaRN", (f"schedule.learning_rate=[{RATE}]",)),
    "plain": ("trained, no YaRN", (f"schedule.learning_rate=[{RATE}]", "model.rope_scaling.factor=1")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trials", type=int, default=needle.TRIALS)
    parser.add_argument("--pictures", type=Path)
    asked = parser.parse_args()
    out, pictures = asked.out, asked.pictures or asked.out
    train(out)
    for run in WAYS:
        score(out / run, out / "long.jsonl", asked.trials)
    kept = {name: results_of(out / run) for run, (name, _) in WAYS.items()}
    needle.plot({name: Grid.of(found["needle"]) for name, found in kept.items()}, pictures / "long-needle.png")
    curves = {name: Curve.of(found[FAR]) for name, found in kept.items()}
    positions.plot(curves, BEFORE, pictures / "long-positions.png")
    print("\n".join(table(kept)))


def train(out: Path) -> None:
    """The four runs and their text, where they are not there yet."""
    out.mkdir(parents=True, exist_ok=True)
    held_out, data, long_data = out / "val.jsonl", out / "data", out / "long-data"
    write(held_out, [*needle_texts(HELD_OUT, 0, 50_000, 900 / 8, 900), *documents(HELD_OUT, 0, 70_000)])
    straw = hay(random.Random(0), NEEDLES)
    write(out / "long.jsonl", [" ".join(islice(straw, 400)) for _ in range(32)])
    if not data.exists():
        made = ["needles-100:400KB", "needles-300:600KB", "needles-900:3MB", "storyworld:3MB"]
        prepare(made, data, 2048, validation=[str(held_out)])
    pretrain(read_recipe(str(Path(__file__).with_suffix(".toml"))), data, out / "base")
    if not long_data.exists():
        made = ["needles-3800:1MB", "needles-14500-15500:5MB", "storyworld:2MB"]
        prepare(made, long_data, tokenizer=out / "base" / "tokenizer", validation=[str(held_out)])
    for run, (_, further) in WAYS.items():
        if further:
            extend(out / "base", long_data, out / run, AFTER, (*STAGES, *further))


def write(file: Path, texts: list[str]) -> None:
    if not file.exists():
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def score(run: Path, long_text: Path, trials: int) -> None:
    """Needles, bits per byte in windows of the context before, and by position of long texts, where not known."""
    known = results_of(run) if (run / "eval").exists() else {}
    if known.get("needle", {}).get("trials") != trials:
        evaluate(run, ["needle"], settings=Settings(limit=trials), lengths=ASKED)
    if f"bpb-{BEFORE}" not in known:
        evaluate(run, ["bpb"], context=BEFORE)
    if FAR not in known:
        evaluate(run, ["positions"], long_text, context=AFTER[-1])


def table(kept: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Needles found at each length, over all depths and at the worst; bits per byte, short and far."""
    lines = [
        "| | " + " | ".join(f"{length:,}" for length in ASKED) + " | bpb at 256 | bpb beyond 2,048 |",
        "|---" * (len(ASKED) + 3) + "|",
    ]
    for name, found in kept.items():
        grid = Grid.of(found["needle"])
        cells = [f"{sum(row) / len(row) / grid.trials:.0%} ({min(row) / grid.trials:.0%})" for row in grid.right]
        short, far = found[f"bpb-{BEFORE}"]["bpb"], Curve.of(found[FAR]).by_position[-1]
        lines.append(f"| {name} | {' | '.join(cells)} | {short:.4f} | {far:.4f} |")
    return lines


if __name__ == "__main__":
    main()
