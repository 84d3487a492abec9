"""GRPO here and by TRL's GRPOTrainer, from the same weights: the same questions, sampling and number of answers.

    python -m scripts.against_trl RUN TASK.jsonl FOLDER --trl TRL_PYTHON [--steps 10] [--rounds 2]

Each draws with its own generation, learns with AdamW at the same rate, the published loss and no KL term. They run in
turn, one thread each, ours first. TRL_PYTHON: a Python with trl 1.16.0 and transformers. Prints for each step the mean
reward of both, and the seconds, wall and CPU, of a step; loading and the first step are left out.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPTS, GROUP, LONGEST, RATE = 64, 16, 16, 5e-5


def right(text: str, answer: str) -> bool:
    """As both judge: the last number behind the thoughts."""
    found = re.findall(r"\d+", text.rpartition("</think>")[2])
    return bool(found) and found[-1] == answer


# ── TRL's side, run by its own Python: nothing of ours is imported ────────────────────────────────────────────────


def theirs(export: Path, task: Path, out: Path, steps: int, seed: int) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    rows = [json.loads(line) for line in task.read_text().splitlines()]
    questions = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in rows]
    at: list[tuple[float, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            at.append((time.monotonic(), sum(os.times()[:4])))

    tokenizer = AutoTokenizer.from_pretrained(export)

    def reward(completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        # Not the completions' text: in that the tags are gone, and with them where the answer begins.
        texts = [text.removesuffix(tokenizer.eos_token) for text in tokenizer.batch_decode(completion_ids)]
        return [float(right(text, wanted)) for text, wanted in zip(texts, answer, strict=True)]

    settings = GRPOConfig(
        output_dir=str(out.with_suffix("")), use_cpu=True, bf16=False, per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP, max_completion_length=LONGEST, max_steps=steps, learning_rate=RATE,
        lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, beta=0.0,
        loss_type="grpo", temperature=1.0, top_p=1.0, top_k=0, logging_steps=1, report_to=[], save_strategy="no",
        seed=seed, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32),
        processing_class=tokenizer,
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list(questions),
        callbacks=[Clock()],
    )
    trainer.train()
    told = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "reward" in row]
    out.write_text(json.dumps({"rewards": told, "lengths": lengths, **_spent(at)}))


def _spent(at: list[tuple[float, float]]) -> dict[str, float]:
    steps = len(at) - 1
    return {"wall": (at[-1][0] - at[0][0]) / steps, "cpu": (at[-1][1] - at[0][1]) / steps}


# ── our side ──────────────────────────────────────────────────────────────────────────────────────────────────────


def ours(run: Path, task: Path, out: Path, steps: int, seed: int) -> dict[str, Any]:
    from leanseek.post.grpo import grpo
    from leanseek.post.rl_log import read

    grpo(
        run, task, out,
        (
            "train.device=cpu", "train.dtype=fp32", "train.micro_batch=128", f"train.seed={seed}",
            f"grpo.steps={steps}", f"grpo.prompts={PROMPTS}", f"grpo.group={GROUP}", f"grpo.max_tokens={LONGEST}",
            "grpo.kl_weight=0", f"rollout.at_once={PROMPTS * GROUP}",
            "train.checkpoint_every=1000", f"schedule.learning_rate=[{{until=1,value={RATE}}}]",
        ),
    )  # fmt: skip
    rows, _ = read(out)
    return {
        "rewards": [row["reward"] for row in rows],
        "lengths": [row["length"] for row in rows],
        **_spent([(row["seconds"], row["cpu_seconds"]) for row in rows]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("task", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trl", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    from leanseek.hub import export_release

    asked.folder.mkdir(parents=True, exist_ok=True)
    export = asked.folder / "export"
    if not export.exists():
        export_release(asked.run, export)
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for seed in range(asked.rounds):
        found["ours"].append(ours(asked.run, asked.task, asked.folder / f"ours-{seed}", asked.steps, seed))
        file = asked.folder / f"trl-{seed}.json"
        command = [asked.trl, __file__, "--theirs", export, asked.task, file, asked.steps, seed]
        quiet = os.environ | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        subprocess.run([str(part) for part in command], check=True, env=quiet, stdout=sys.stderr)
        found["trl"].append(json.loads(file.read_text()))
    for name, results in found.items():
        for result in results:
            print(name, "rewards:", *(f"{reward:.3f}" for reward in result["rewards"]))
        mean = {key: statistics.fmean(result[key] for result in results) for key in ("wall", "cpu")}
        last = statistics.fmean(r for result in results for r in result["rewards"][-3:])
        print(f"{name}: {mean['wall']:.2f} s a step on the clock, {mean['cpu']:.2f} CPU-seconds; last three {last:.3f}")
    for key in ("wall", "cpu"):
        ratios = [a[key] / b[key] for a, b in zip(found["ours"], found["trl"], strict=True)]
        print(f"ours ÷ TRL, {key}: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    (asked.folder / "against-trl.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--theirs"]:
        theirs(*map(Path, sys.argv[2:5]), int(sys.argv[5]), int(sys.argv[6]))
    else:
        main()
