"""The R1 chain (R1 §2.3): from a base model to a reasoner in five stages, each of them a verb of its own.

A cold start on a few demonstrations; GRPO on questions that can be verified; rejection sampling from what came of that;
the base model once more, on those samples and other chats; GRPO for all that it is to be good at. Every stage leaves a
run, or a file, in a folder of the chain and goes on where it was stopped; a stage that is complete is not touched.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leanseek import checkpoint
from leanseek.config import BadInput
from leanseek.eval.ask import Settings
from leanseek.eval.harness import evaluate
from leanseek.post.distill import AS_R1_DID, SAMPLED, Choice, distill
from leanseek.post.grpo import grpo
from leanseek.post.sft import sft
from leanseek.train.receipt import summed

STAGES = ("cold", "reasoning", "samples", "sft", "all-round")


@dataclass(frozen=True)
class Chain:
    """What the stages work with.

    demonstrations: chats that show how to think, for the cold start. task: questions that can be verified. chats: what
    else the model is to be good at, beside the samples. all_round: the last stage's questions; the task's unless told.
    overrides: of each stage that trains, by its name. sampled, choice: how the samples are drawn, and which are kept.
    """

    demonstrations: Path
    task: Path
    chats: Path | None = None
    all_round: Path | None = None
    dev: Path | None = None
    overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sampled: Settings = SAMPLED
    choice: Choice = AS_R1_DID

    def __post_init__(self) -> None:
        for name in self.overrides:
            if name not in STAGES or name == "samples":
                raise BadInput(f"the chain has no stage {name!r} that trains: {', '.join(STAGES)} but for samples")


def r1(base: Path, chain: Chain, out: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs the chain from BASE in the folder OUT, or goes on with it; returns its receipt, of all stages together.

    The receipt's `stages` have the share of `chain.dev` that was right after each. A stage that was stopped before its
    end ends the chain there. Raises BadInput, OSError.
    """
    checkpoint.read_run(base)
    for file in (chain.demonstrations, chain.task, chain.chats, chain.all_round, chain.dev):
        if file is not None and not file.is_file():
            raise BadInput(f"{file}: no such file")
    out.mkdir(parents=True, exist_ok=True)
    cold, reasoner, samples, taught, final = (out / f"{number}-{name}" for number, name in enumerate(STAGES, start=1))
    samples = samples.with_suffix(".jsonl")
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "cold": lambda: sft(base, chain.demonstrations, cold, _of(chain, "cold")),
        "reasoning": lambda: grpo(cold, chain.task, reasoner, _of(chain, "reasoning"), chain.dev),
        "samples": lambda: _sample(reasoner, chain, samples),
        "sft": lambda: sft(base, samples, taught, _of(chain, "sft")),
        "all-round": lambda: grpo(taught, chain.all_round or chain.task, final, _of(chain, "all-round"), chain.dev),
    }
    runs = {"cold": cold, "reasoning": reasoner, "sft": taught, "all-round": final}
    told: list[dict[str, Any]] = []
    for name, step in steps.items():
        say(f"── {name} ──")
        kept = out / f"{name}.json"
        receipt = json.loads(kept.read_bytes()) if kept.exists() else step()
        if receipt.get("ended", "complete") == "complete" and not kept.exists():
            if name in runs and chain.dev is not None:
                receipt["accuracy"] = _accuracy(runs[name], chain.dev)
            checkpoint.write_json(kept, receipt)
        told.append({"stage": name} | receipt)
        if receipt.get("ended", "complete") != "complete":
            break
    return _bill(out, told)


def _of(chain: Chain, stage: str) -> Sequence[str]:
    return chain.overrides.get(stage, ())


def _sample(reasoner: Path, chain: Chain, out: Path) -> dict[str, Any]:
    """Rejection sampling, the other chats behind it; what it took is billed like a stage that trains."""
    began, before = time.monotonic(), os.times()
    drawn = out.with_name(f"{out.stem}-drawn.jsonl")
    counts = distill(reasoner, chain.task, drawn, chain.sampled, chain.choice)
    others = b"" if chain.chats is None else chain.chats.read_bytes()
    writing = out.with_name(f".writing-{out.name}")
    writing.write_bytes(drawn.read_bytes() + others)
    writing.replace(out)
    after = os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    return {"seconds": time.monotonic() - began, "cpu_seconds": cpu, "replies": counts}


def _accuracy(run: Path, dev: Path) -> float:
    (result,) = evaluate(run, (), files=(dev,), settings=Settings()).values()
    score: float = result["score"]
    return score


def _bill(out: Path, told: list[dict[str, Any]]) -> dict[str, Any]:
    trained = [stage for stage in told if "flops" in stage]
    drawn = [stage for stage in told if "flops" not in stage]
    receipt = summed(trained)
    for key in ("seconds", "cpu_seconds"):
        receipt[key] += sum(stage[key] for stage in drawn)
    kept = ("stage", "accuracy", "tokens", "seconds", "cpu_seconds", "replies")
    receipt["stages"] = [{key: stage[key] for key in kept if key in stage} for stage in told]
    receipt.pop("stage")
    checkpoint.write_json(out / "receipt.json", receipt)
    return receipt


def table(receipt: Mapping[str, Any]) -> str:
    """Accuracy and cost after each stage, for people."""
    rows = [f"{'stage':<12} {'right':>8} {'CPU-seconds':>12}"]
    for stage in receipt["stages"]:
        right = f"{stage['accuracy']:.1%}" if "accuracy" in stage else "–"
        rows.append(f"{stage['stage']:<12} {right:>8} {stage['cpu_seconds']:>12,.0f}")
    return "\n".join(rows)
