"""Memory of one training step by length and by what is recomputed (report §3.2.3).

    python scripts/step_memory.py [RECIPE] [KEY=VALUE …] [--lengths 1024,4096,16384]

Each figure is of a process of its own, on the CPU, with one row of text: the most that was resident during its first
step, less what was resident before it (weights and libraries). Gradients and moments are in it, the same in each row.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

WAYS = ("none", "selective", "full")


def measured(recipe: str, overrides: list[str], length: int, way: str) -> dict[str, float]:
    """MiB above the model at rest, CPU-seconds and loss of one step, in this process."""
    import os

    import torch

    from leanseek.config import read_recipe
    from leanseek.train.schedule import knobs
    from leanseek.train.setup import build
    from leanseek.train.step import train_step

    sizes = [f"stages.0.sequence_length={length}", f"model.max_position_embeddings={length}", "stages.0.share=1"]
    fixed = ["train.device=cpu", f"train.recompute={way}", "train.dtype=bf16", *sizes]
    config = read_recipe(recipe, [*overrides, *fixed])
    model, optimizers, _ = build(config)
    ids = torch.randint(config.model.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0))
    now = knobs(config.schedule, config.train.tokens // 2, config.train.tokens)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, began = _resident("VmRSS"), sum(os.times()[:2])
    loss = train_step(model, optimizers, ids[:, :-1], ids[:, 1:], now, config).loss
    return {"mib": _resident("VmHWM") - before, "seconds": sum(os.times()[:2]) - began, "loss": loss}


def _resident(key: str) -> float:
    """MiB, by this name in /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--lengths", default="1024,4096,16384")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measured(asked.recipe, asked.overrides, int(asked.one[0]), asked.one[1])))
        return
    print("| tokens | recomputed | MiB of the step | CPU-seconds | loss |\n|---|---|---|---|---|")
    for length in asked.lengths.split(","):
        for way in WAYS:
            command = [sys.executable, __file__, asked.recipe, *asked.overrides, "--one", length, way]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            row = json.loads(done.stdout)
            print(
                f"| {int(length):,} | {way} | {row['mib']:,.0f} | {row['seconds']:.1f} | {row['loss']:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
