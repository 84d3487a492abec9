"""A training step of a recipe on a GPU, in BF16 and FP8, beside transformers' V3 of the same shapes, in turn.

`python -m scripts.step_on_gpu [RECIPE] [TABLE] [DEVICE]`; TABLE is what `leanseek bench kernels` stored there.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from leanseek.bench.peer import transformers_model
from leanseek.bench.turns import in_turn
from leanseek.bench.workload import seconds
from leanseek.config import Config, read_recipe
from leanseek.plan.count import flops_per_token
from leanseek.train.peak import matmul_peak
from leanseek.train.schedule import Knobs
from leanseek.train.setup import build
from leanseek.train.step import train_step

ROUNDS, ROWS = 7, 8
KNOBS = Knobs(learning_rate=1e-4, batch_tokens=0, bias_speed=0.001, mtp_weight=0.0)


class Ours:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.model, self.optimizers, _ = build(config)

    def __call__(self, ids: Tensor) -> None:
        train_step(self.model, self.optimizers, ids, ids.roll(-1, dims=1), KNOBS, self.config)


class Theirs:
    """As its users write it: FP32 weights, BF16 autocast, fused AdamW, clipping."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.model, self.device = transformers_model(config.model, "grouped_mm").to(device).train(), device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def __call__(self, ids: Tensor) -> None:
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _rate(step: Callable[[Tensor], None], ids: Tensor) -> float:
    return ids.numel() / seconds(partial(step, ids))


def main(recipe: str = "small", table: str | None = None, device: str = "cuda") -> None:
    place = torch.device(device)
    # transformers leaves MTP out
    settings = [f"train.device={device}", f"train.micro_batch={ROWS}", "model.num_nextn_predict_layers=0"]
    settings += [f'train.kernel_table="{table}"'] if table is not None else []
    configs = {dtype: read_recipe(recipe, [*settings, f"train.dtype={dtype}"]) for dtype in ("bf16", "fp8")}
    length = configs["bf16"].stages[0].sequence_length
    ids = torch.randint(configs["bf16"].model.vocab_size, (ROWS, length), device=place)
    sides = {**{dtype: Ours(config) for dtype, config in configs.items()}, "theirs": Theirs(configs["bf16"], place)}
    rates = {
        name: partial(lambda step: ids.numel() / seconds(partial(step, ids)), step) for name, step in sides.items()
    }
    peak = matmul_peak(place, torch.bfloat16, 8192 if place.type == "cuda" else 512)
    per_token = flops_per_token(configs["bf16"].model, length)
    told = sides["bf16"].model.kernels.told
    print(f"{recipe}, {ROWS}×{length}; BF16 matmul {peak / 1e12:,.3g} TFLOP/s; kernels: {told}")
    for name in ("bf16", "fp8"):
        row = in_turn(name, "tokens/s", rates[name], rates["theirs"], ROUNDS)
        speed = row.ours * per_token
        print(
            f"{name}: {row.ours:,.0f} tokens/s, {speed / 1e12:,.3g} TFLOP/s of the model, {speed / peak:.0%} of peak; "
            f"transformers {row.peer:,.0f}; ratio {row.ratio_median:.2f} ({row.ratio_min:.2f}–{row.ratio_max:.2f})"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
