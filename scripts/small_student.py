"""Is distilling better than RL for a small model? A third of the model of scripts/rl_moves.py, taught in both ways.

    python -m scripts.small_student RL CHAIN OUT [--steps 1200]

RL is a folder of scripts/rl_moves.py, with its text and task; CHAIN one of scripts/r1_chain.py on that task, with the
reasoner's answers. The small model is pre-trained on the same text, then tuned on the answers; and, apart from that, on
the demonstrations and by GRPO on the bare questions. Every part goes on where it was stopped. Prints the table.
"""

import argparse
from pathlib import Path
from typing import Any

from leanseek.config import read_recipe
from leanseek.post.grpo import grpo
from leanseek.post.sft import sft
from leanseek.train.pretrain import pretrain
from scripts.rl_moves import HERE, OF_GRPO, OF_SFT, RECIPE, score

SMALLER = (
    "model.hidden_size=64", "model.intermediate_size=176", "model.moe_intermediate_size=48",
    "model.num_hidden_layers=2", "model.num_attention_heads=2",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rl", type=Path)
    parser.add_argument("chain", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1200, help="of GRPO")
    asked = parser.parse_args()
    rl, out = asked.rl, asked.out
    task, dev = rl / "task", rl / "task" / "dev.jsonl"
    pretrain(read_recipe(str(RECIPE), (*HERE, *SMALLER)), rl / "data", out / "base")
    receipts: dict[str, dict[str, Any]] = {}
    for name, chats, tokens in (
        ("distilled", asked.chain / "3-samples.jsonl", 1_800_000),
        ("cold", task / "chats.jsonl", 700_000),
    ):
        receipts[name] = sft(out / "base", chats, out / name, (*OF_SFT, f"train.tokens={tokens}"))
    receipts["rewarded"] = grpo(
        out / "cold", task / "train.jsonl", out / "rewarded", (*OF_GRPO, f"grpo.steps={asked.steps}"), dev
    )
    print("| | dev | test | CPU-seconds |\n|---|---|---|---|")
    for name, what in (
        ("distilled", "SFT on the reasoner's answers"),
        ("cold", "SFT on the demonstrations"),
        ("rewarded", "then GRPO"),
    ):
        right = [score(out / name, file, 0.0) for file in (dev, task / "test.jsonl")]
        print(f"| {what} | {right[0]:.1%} | {right[1]:.1%} | {receipts[name]['cpu_seconds']:.0f} |")


if __name__ == "__main__":
    main()
