"""One dial: a recipe grown, or shrunk, to a budget of FLOPs.

A recipe is tuned at one size. Its rules for all others are here, as powers of how many times its own FLOPs there are
to spend; docs/least-compute.md says what was measured. Shapes come first, tokens are what the FLOPs then buy.
"""

import math
from typing import Any

from leanseek.config import BadInput, Config, ModelConfig
from leanseek.plan.count import parameters
from leanseek.train.schedule import flops_of_kind, kinds_of_tokens, scaled

WIDTH = 0.18  # parameters then grow with the root of the FLOPs, as tokens do (Hoffmann et al. 2022, arXiv 2203.15556)
DEPTH = 0.8  # layers, of the width
RATE = -0.5  # learning rate and initial weights, of the width: what Muon's updates do to a vector stays the same
BATCH = 1 / 3  # of the FLOPs (DeepSeek LLM, arXiv 2401.02954, §3.1, found 0.3271)
LENGTH = 1 / 6
MOST_LENGTH = 4096  # report §4.2; longer rows are `extend`'s


def run_flops(config: Config) -> float:
    """Model FLOPs of a whole run: what its receipt will say, to a thousandth."""
    return config.train.tokens * mean_flops_per_token(config)


def mean_flops_per_token(config: Config) -> float:
    """Training FLOPs of a token, on average over the schedule and the stages."""
    return sum(share * flops_of_kind(config, kind) for kind, share in kinds_of_tokens(config).items())


def grown(config: Config, flops: float) -> Config:
    """The recipe for so many FLOPs. Raises BadInput where they do not pay for a single batch."""
    if not 0 < flops < math.inf:
        raise BadInput(f"--flops must be a positive number, got {flops:g}")
    if config.schedule.unit != "fraction":
        raise BadInput("--flops: the recipe's schedule counts tokens; only one in fractions of its budget can grow")
    times = flops / run_flops(config)
    model, schedule = _shape(config.model, times), config.schedule
    wider = model.hidden_size / config.model.hidden_size
    deeper = model.num_hidden_layers / config.model.num_hidden_layers
    batches = _power_of_two(times**BATCH)
    longer = min(_power_of_two(times**LENGTH), MOST_LENGTH / config.stages[-1].sequence_length)
    cut, awake = config.train.mtp_length, [float(max(1, round(piece.value * deeper))) for piece in schedule.layers]
    changed: dict[str, dict[str, Any]] = {
        "model": {"max_position_embeddings": int(model.max_position_embeddings * longer)},
        "schedule": {
            "learning_rate": scaled(schedule.learning_rate, wider**RATE),
            "batch_tokens": scaled(schedule.batch_tokens, batches),
            "layers": tuple(
                piece.model_copy(update={"value": many}) for piece, many in zip(schedule.layers, awake, strict=True)
            ),
        },
        # Embeddings are looked up and not multiplied: their own rate does not fall with the width.
        "optimizer": {"embedding_rate": config.optimizer.embedding_rate * wider**-RATE},
        "train": {
            "init_std": config.train.init_std * wider**RATE,
            "micro_batch": max(1, int(config.train.micro_batch / longer)),
            "mtp_length": None if cut is None else int(cut * longer),
        },
    }
    stages = [
        stage.model_copy(update={"sequence_length": int(stage.sequence_length * longer)}) for stage in config.stages
    ]
    new = _changed(config.model_copy(update={"model": model, "stages": tuple(stages)}), changed)
    tokens = int(flops / mean_flops_per_token(new))
    if tokens < new.schedule.batch_tokens[-1].value:
        raise BadInput(f"--flops {flops:g} buys {tokens:,} tokens, less than one batch: take more")
    steps = tokens / batches / config.train.tokens
    every = {name: max(1, round(getattr(config.train, name) * steps)) for name in ("eval_every", "checkpoint_every")}
    what = f"{parameters(model).total_with_mtp / 1e6:,.0f} million parameters, {tokens / 1e6:,.0f} million tokens"
    new = new.model_copy(update={"description": f"grown: {what}"})
    return _changed(new, {"train": {"tokens": tokens, **every}})


def _shape(model: ModelConfig, times: float) -> ModelConfig:
    """The same proportions at another width, more layers, as many experts, each wider.

    The width changes by whole heads, and not before one is due: three and a half heads are three, grown from two.
    """
    head = model.hidden_size // model.num_attention_heads
    heads = max(1, model.num_attention_heads + int(model.num_attention_heads * (times**WIDTH - 1)))
    wider = heads * head / model.hidden_size
    layers = max(model.first_k_dense_replace + 1, round(model.num_hidden_layers * wider**DEPTH))
    even = {
        name: max(32, round(size * wider / 32) * 32) if wider != 1 else size
        for name in ("intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank")
        if (size := getattr(model, name)) is not None
    }
    if model.num_key_value_heads is not None:
        even["num_key_value_heads"] = heads
    return model.model_copy(
        update={"hidden_size": heads * head, "num_attention_heads": heads, "num_hidden_layers": layers, **even}
    )


def _changed(config: Config, sections: dict[str, dict[str, Any]]) -> Config:
    new = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=new)


def _power_of_two(factor: float) -> float:
    """The nearest one: rows and batches stay whole."""
    return 2.0 ** round(math.log2(factor))
