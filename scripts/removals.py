"""What each part of the recipe nano is worth: it is taken out again, at a third of the tokens, over several seeds.

    python -m scripts.removals OUT --data DATA [--tokens 1e6] [--seeds 2] [--only NAME…]

Runs stay in OUT and what is there is not done again, so that two such processes share the work. Prints the table: bits
per byte of 150,000 tokens of the validation text; the tokens that would make up for what is lost, at the price that the
row "half the tokens" sets; a token's CPU-seconds beside the recipe's; and the product of both, what the same quality
would cost. CPU-seconds are by the runs' own clocks: beside other work they say little.
"""

import argparse
import math
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from leanseek.config import BadInput, read_recipe
from leanseek.train.log import read_metrics
from leanseek.train.pretrain import pretrain

HALF, WHOLE = "half the tokens", "the recipe"
REMOVED: dict[str, tuple[str, ...]] = {
    WHOLE: (),
    HALF: (),
    "counts until 80%": (
        "schedule.count_weight=[{until=0.4,value=1.0},{until=0.8,value=0.0,shape='linear'},{until=1.0,value=0.0}]",
    ),
    "no counts": ("counts=none", "schedule.count_weight=[{until=1.0,value=0.0}]"),
    "counts, but not begun on the pairs": ("counts.begin=false",),
    "begun on the pairs, but no counts": ("schedule.count_weight=[{until=1.0,value=0.0}]",),
    "counts of three tokens": ("counts.order=3",),
    "all ids in every loss": ("counts.frequent=none",),
    "weight decay 0.1": ("optimizer.weight_decay=0.1",),
    "all layers from the start": ("schedule.layers=[]",),
    "batches of 4,096 from the start": ("schedule.batch_tokens=[{until=1.0,value=4096}]",),
    "rows of 256 from the start": ("stages=[{sequence_length=256}]", "train.micro_batch=16"),
    "embedding like the rest": ("train.embedding_std=none", "optimizer.embedding_rate=1"),
    "outputs not from zero": ("train.zero_outputs=false", "schedule.layers=[]"),
    "queries not compressed": ("model.q_lora_rank=none",),
    "no embedding anew": ("model.embedding_shares=false",),
    "no values of the tokens' own": ("model.value_embeddings=false",),
    "four layers": ("model.num_hidden_layers=4",),
    "beta1 0.9": ("optimizer.beta1=0.9",),
    "decay over the last 30% alone": (
        "schedule.learning_rate=[{until=0.02,value=1.6e-2,shape='linear'},{until=0.7,value=1.6e-2},"
        "{until=1.0,value=0.0,shape='linear'}]",
    ),
    "AdamW, rate 4e-3": (
        "optimizer.name=adamw",
        "optimizer.embedding_rate=4",
        "schedule.learning_rate=[{until=0.02,value=4e-3,shape='linear'},{until=0.3,value=4e-3},"
        "{until=1.0,value=0.0,shape='linear'}]",
    ),
    "MTP from the start": ("schedule.mtp_weight=[{until=1.0,value=0.3}]", "train.mtp_length=none"),
    "no routed experts": ("model.first_k_dense_replace=3",),
    "bias speed 0.001": ("schedule.bias_speed=[{until=1.0,value=0.001}]",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=1e6)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(REMOVED), default=list(REMOVED))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[Ran]] = {}
    for seed in range(asked.seeds):
        for name in asked.only:
            tokens = int(asked.tokens / 2) if name == HALF else int(asked.tokens)
            measured = f"train.tokens={tokens}", f"train.seed={seed}", "train.eval_tokens=150000"
            quiet = "train.eval_every=1000000", "train.checkpoint_every=1000000"
            run = asked.out / f"{name.replace(' ', '-').replace('%', '')}-{seed}"
            try:
                pretrain(read_recipe("nano", (*REMOVED[name], *measured, *quiet)), asked.data, run)
            except BadInput as error:
                if "in use by another process" not in str(error):
                    raise
                continue
            steps, evaluations = read_metrics(run)
            per_token = steps[-1]["cpu_seconds"] / steps[-1]["tokens"]
            found.setdefault(name, []).append(Ran(evaluations[-1]["bpb"], per_token))
            print(f"{name}, seed {seed}: {found[name][-1].bpb:.4f}", flush=True)
    print(table(found))


class Ran(NamedTuple):
    bpb: float
    per_token: float  # CPU-seconds


def table(found: dict[str, list[Ran]]) -> str:
    """Rows by name. What is lost in bits is worth tokens at the price that halving them sets."""
    whole, half = found.get(WHOLE, [Ran(math.nan, math.nan)]), found.get(HALF, [Ran(math.nan, math.nan)])
    bits, cost = (median(each) for each in zip(*whole, strict=True))
    halving = median(ran.bpb for ran in half) - bits
    heads = (
        *("without", "bits per byte, by seed", "more than the recipe, by seed", "tokens that make up for it"),
        *("CPU-s a token ÷ the recipe's", "the same quality costs"),
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, runs in found.items():
        more = ", ".join(f"{there.bpb - here.bpb:+.4f}" for here, there in zip(whole, runs, strict=False))
        cells = [name, ", ".join(f"{ran.bpb:.4f}" for ran in runs), more, "", "", ""]
        if name not in (WHOLE, HALF):
            tokens = 2 ** ((median(ran.bpb for ran in runs) - bits) / halving)
            dearer = median(ran.per_token for ran in runs) / cost
            cells[3:] = [f"{tokens:.2f}×", f"{dearer:.2f}", f"**{tokens * dearer:.2f}×**"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
