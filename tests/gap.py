"""How far training in FP8 lies from training in BF16, beside what one unit in the last place of the weights makes.

    python -m tests.gap FOLDER [VARIANT ...] [--stop STEP]

trains each variant on the project's own stories, from the same seed and data, and prints the gaps of their losses;
FOLDER keeps data and losses, so that a later call trains only what is missing. `tests/test_fp8.py` asks for fewer.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import hypot
from pathlib import Path
from statistics import mean, stdev
from unittest.mock import patch

import torch
from torch import Tensor

from leanseek.config import read_recipe
from leanseek.data.prepare import prepare
from leanseek.data.shards import open_data
from leanseek.data.tokenizer import Tokenizer
from leanseek.model.transformer import Transformer
from leanseek.ops import fp8
from leanseek.ops.fp8 import Quantised
from leanseek.train.pretrain import assemble
from leanseek.train.schedule import knobs
from leanseek.train.step import train_step
from tests.tiny import PLAIN

SEQUENCE, BATCH, STEPS = 128, 4, 300
LAST = 50  # steps whose mean loss is compared
SHAPE = (  # every sum is over 512 values or more, but for the latents' 128 and 256
    "model.vocab_size=1024",
    "model.hidden_size=512",
    "model.intermediate_size=1024",
    "model.moe_intermediate_size=256",
    "model.num_hidden_layers=2",
    "model.num_nextn_predict_layers=0",
    "model.num_attention_heads=4",
    "model.q_lora_rank=256",
    "model.kv_lora_rank=128",
    "model.qk_nope_head_dim=96",
    "model.v_head_dim=128",
    "model.n_routed_experts=8",
    f"stages.0.sequence_length={SEQUENCE}",
    f"schedule.batch_tokens=[{{until=1.0,value={SEQUENCE * BATCH}}}]",
    # At three times this rate runs that differ by an ulp end 0.8% apart, and nothing smaller can be told.
    "schedule.learning_rate=[{until=0.1,value=3e-4,shape='linear'},{until=1.0,value=3e-5,shape='cosine'}]",
    "optimizer.name=adamw",
    "train.micro_batch=2",
    "train.device=cpu",
    f"train.tokens={STEPS * SEQUENCE * BATCH}",
)


def stories(folder: Path) -> Path:
    """The DATA folder, made where it is missing."""
    if not folder.exists():
        prepare(["storyworld:3000000"], folder, vocab_size=1024, workers=1)
    return folder


# ── variants ──────────────────────────────────────────────────────────────────────────────────────────────────────


NUDGES: dict[str, Callable[[Tensor], Tensor]] = {
    "up": lambda weight: torch.full_like(weight, float("inf")),
    "down": lambda weight: torch.full_like(weight, -float("inf")),
    "outward": lambda weight: torch.full_like(weight, float("inf")).copysign(weight),
    "inward": torch.zeros_like,
}


@torch.no_grad()
def nudge(model: Transformer, way: str) -> None:
    """Every weight to the next number in one direction."""
    for parameter in model.parameters():
        parameter.copy_(torch.nextafter(parameter, NUDGES[way](parameter)))


@contextmanager
def instead(name: str, made_of: Callable[..., Callable[..., object]]) -> Iterator[None]:
    """A function of `ops.fp8` replaced by what `made_of` makes of it."""
    with patch.object(fp8, name, made_of(getattr(fp8, name))):
        yield


def neighbours_scale(dequantise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Gives values back with the scale of the tile beside."""

    def faulty(codes: Tensor, scales: Tensor, *rest: object) -> Tensor:
        return dequantise(codes, scales.roll(1, -1 if scales.shape[-1] > 1 else -2), *rest)

    return faulty


def inverted_scale(dequantise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Divides by the scale where it should multiply."""
    return lambda codes, scales, *rest: dequantise(codes, 1 / scales, *rest)


def scale_of_one(scales_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: torch.ones_like(scales_of(*arguments))


def one_scale_for_all(scales_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A single scale for each tensor."""

    def coarse(*arguments: object) -> Tensor:
        scales = scales_of(*arguments)
        return scales.amax().expand_as(scales) if scales.numel() else scales

    return coarse


def gradients_in_blocks(quantised: Callable[..., Quantised]) -> Callable[..., Quantised]:
    """What goes backward has a scale for 128 × 128 values where it had one for 1 × 128."""

    def coarse(values: Tensor, tile: fp8.Tile, power_of_two: bool = False) -> Quantised:
        if tile != fp8.ROW or torch._C._current_graph_task_id() == -1:  # not a gradient, or not going backward
            return quantised(values, tile, power_of_two)
        blocks = fp8.scales_of(values, fp8.BLOCK, power_of_two)
        scales = blocks.repeat_interleave(fp8.SIDE, dim=0)[: values.shape[0]]
        return Quantised(fp8.quantise(values, scales, fp8.ROW), scales, fp8.ROW)

    return coarse


FAULTS = {
    "neighbour's scale": ("dequantise", neighbours_scale),
    "inverted scale": ("dequantise", inverted_scale),
    "scale of one": ("scales_of", scale_of_one),
}
COARSER = {
    "one scale per tensor": ("scales_of", one_scale_for_all),
    "gradients in blocks": ("quantised", gradients_in_blocks),
}
BF16, FP8 = ((kind, *(f"{kind}, an ulp {way}" for way in NUDGES)) for kind in ("bf16", "fp8"))


def losses(variant: str, data: Path, stop: int = STEPS) -> list[float]:
    """The training loss of each step up to `stop`, in nats per token."""
    config = read_recipe(str(PLAIN), (*SHAPE, f"train.dtype={'bf16' if variant in BF16 else 'fp8'}"))
    shards = open_data(data)
    model, optimizers, loader, _ = assemble(config, shards, Tokenizer.load(shards.tokenizer_folder))
    if variant in BF16[1:] + FP8[1:]:
        nudge(model, variant.rpartition(" ")[2])
    found = []
    with instead(*(FAULTS | COARSER).get(variant, ("matmul", lambda same: same))):
        for step in range(stop):
            batch = loader.batch(0, step * BATCH, BATCH)
            now = knobs(config.schedule, (step + 0.5) * SEQUENCE * BATCH, config.train.tokens)
            ids, targets = torch.from_numpy(batch.ids), torch.from_numpy(batch.targets)
            found.append(train_step(model, optimizers, ids, targets, now, config).loss)
    return found


def gap(ours: list[float], theirs: list[float], last: int = LAST) -> float:
    """How much the mean loss differs over the last steps that both have, relative to the second's."""
    end = min(len(ours), len(theirs))
    a, b = (sum(run[end - last : end]) for run in (ours, theirs))
    return abs(a / b - 1)


def middle(runs: Iterable[list[float]]) -> list[float]:
    """The mean loss of each step that all have."""
    return [sum(losses) / len(losses) for losses in zip(*runs, strict=False)]


def error(runs: list[list[float]], last: int = LAST) -> float:
    """The standard error of the mean of so many runs, relative, over their last steps."""
    ends = [sum(run[-last:]) / last for run in runs]
    return stdev(ends) / len(ends) ** 0.5 / mean(ends)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("variants", nargs="*", default=[*BF16, *FP8, *FAULTS, *COARSER])
    parser.add_argument("--stop", type=int, default=STEPS)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    file = asked.folder / "losses.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    for variant in asked.variants:
        if variant not in known:
            begun = time.process_time()
            known[variant] = losses(variant, stories(asked.folder / "data"), asked.stop)
            file.write_text(json.dumps(known))
            print(f"{variant}: {time.process_time() - begun:.0f} CPU-seconds", flush=True)
    for variant, found in known.items():
        gaps = [f"{gap(found, known[other]):9.3%}" for other in BF16 if other in known]
        print(f"{variant:24}{len(found):6} steps{sum(found[-LAST:]) / LAST:10.4f}", *gaps)
    if {*BF16, *FP8} <= known.keys():
        both = (middle(known[variant] for variant in kind) for kind in (FP8, BF16))
        chance = hypot(*(error([known[variant] for variant in kind]) for kind in (FP8, BF16)))
        print(f"the mean of {len(FP8)} in FP8 lies {gap(*both):.3%} ± {chance:.3%} from that of {len(BF16)} in BF16")


if __name__ == "__main__":
    main()
