"""What every stage of training begins and ends with: a run folder, a model with its optimizers, the loop, the bill."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from leanseek import checkpoint
from leanseek.config import BadInput, Config, LoraConfig, TrainConfig
from leanseek.data.tokenizer import Tokenizer
from leanseek.model.lora import adapt
from leanseek.model.transformer import Transformer
from leanseek.ops.backend import Measured, kernels_for
from leanseek.ops.fp8 import SCALE
from leanseek.parallel.apply import parallelize
from leanseek.parallel.mesh import ALONE, Ranks, lead
from leanseek.parallel.pipeline import Pipeline
from leanseek.plan.count import adapted_bytes, loads, training_bytes
from leanseek.train.cpu import ready_cpu
from leanseek.train.log import Log
from leanseek.train.loop import Batches, Step, train
from leanseek.train.optim import build_optimizers, watch_logits
from leanseek.train.peak import faster_dtype, matmul_peak
from leanseek.train.precision import in_fp8
from leanseek.train.receipt import write_receipt
from leanseek.train.schedule import Knobs
from leanseek.train.step import losses_of, train_step
from leanseek.weightfiles import open_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # of the activations


def take_up(
    run: Path,
    config: Config,
    data_fingerprint: str,
    tokenizer: Path,
    data: Path,
    chats: bool = False,
    begun_with: Path | None = None,
    ranks: int = 1,
    scores: bool = False,
) -> Config:
    """The configuration to train RUN with: the stored one where RUN is this very run, else RUN is made, with `config`.

    RUN must be locked; it may be an import, which is trained on from its weights. Raises BadInput where RUN is
    something else, or more than this machine has.
    """
    if config.mesh.tp > 1:
        raise BadInput("mesh.tp cuts weights for serving, and no checkpoint has them so: train with dp, ep, cp and pp")
    if config.mesh.pp > 1 and config.mesh.cp > 1:
        raise BadInput("mesh.cp: the stages of a pipeline take whole rows: take mesh.cp=1 or mesh.pp=1")
    stored = checkpoint.check_run(run, config, data_fingerprint)
    if stored is None:
        config = config.model_copy(update={"train": settled(config.train)})
        _check_memory(config, ranks)
        if checkpoint.is_import(run):
            if not _same_tokenizer(run / "tokenizer", tokenizer):
                kept = run / "tokenizer"
                raise BadInput(
                    f"{run}: an imported model keeps its tokenizer: prepare the data with --tokenizer {kept}"
                )
            config = config.model_copy(update={"model": checkpoint.read_run(run).model})
        checkpoint.create_run(run, config, data_fingerprint, tokenizer, data, chats, begun_with, scores)
    else:
        config = stored
        checkpoint.remember_data(run, data)
    if config.train.device != "cpu" and not getattr(torch, config.train.device).is_available():
        raise BadInput(f"{run}: it runs on {config.train.device!r}, and there is no such device here")
    return config


def build(
    config: Config, ranks: Ranks = ALONE, drawn: bool = True, known: Mapping[str, Tensor] | None = None
) -> tuple[Transformer, list[Optimizer], Pipeline | None]:
    """The initialised model on its device, which is made ready for it, and the optimizers: of many ranks one's part.

    Where the layers are on several ranks, also what takes batches through them. Unless the weights are `drawn` they
    hold anything, and are to be loaded; those that are `known` stand for what would be drawn. Of many ranks none ever
    has the whole model: it draws all weights, one tensor after the other, and keeps its part of each.
    """
    dtype, asked = DTYPES[config.train.dtype], config.train
    generator = torch.Generator().manual_seed(asked.seed) if drawn else None
    if ranks.world == 1:
        model = Transformer(config.model, dtype)
        if generator is not None:
            model.initialise(asked.init_std, generator, asked.embedding_std, asked.zero_outputs)
        for name, value in (known or {}).items():
            model.get_parameter(name).data.copy_(value)
        return ready(config, model, ranks)
    with torch.device("meta"):
        model, whole = Transformer(config.model, dtype), Transformer(config.model, dtype)
    weights = whole.beginning(asked.init_std, generator, asked.embedding_std, asked.zero_outputs)
    if known is not None:
        weights = ((name, known.get(name, drawn_one)) for name, drawn_one in weights)
    return ready(config, model, ranks, weights)


def build_adapted(config: Config, run: Path, ranks: Ranks = ALONE) -> tuple[Transformer, list[Optimizer], None]:
    """The weights that RUN's adapters are for, frozen, with new adapters, and the optimizers of those; no pipeline.

    Never is all of it wide. Of several ranks each has all frozen matrices; they share the rest and the adapters. Raises
    BadInput where those weights are gone.
    """
    assert config.lora is not None
    stored, device = open_folder(checkpoint.base_of(run)), config.train.device

    def read(name: str) -> tuple[Tensor, Tensor | None]:
        values, scales = stored[name].read().to(device), stored.get(name + SCALE)
        return values, None if scales is None else scales.read().to(device)

    with torch.device("meta"):
        model = Transformer(config.model, DTYPES[config.train.dtype])
    adapt(model, config.lora, read, torch.Generator().manual_seed(config.train.seed))
    model, optimizers, _ = ready(config, model, ranks)
    return model, optimizers, None


def resting(lora: LoraConfig, base: Path) -> LoraConfig:
    """How a base rests: `auto` is FP8 where its weights came so, else INT8. Raises BadInput where it has adapters."""
    weights = checkpoint.newest_weights(base)
    if weights.lora is not None:
        raise BadInput(f"{base}: holds adapters itself: export it, which merges them, import that and tune the import")
    if lora.base != "auto":
        return lora
    in_fp8 = any(name.endswith(SCALE) for name in open_folder(weights.folder))
    return lora.model_copy(update={"base": "fp8" if in_fp8 else "int8"})


def ready(
    config: Config,
    model: Transformer,
    ranks: Ranks = ALONE,
    beginning: Iterable[tuple[str, Tensor]] | None = None,
) -> tuple[Transformer, list[Optimizer], Pipeline | None]:
    """Brings a model to its device and makes both ready to train; what `build` returns.

    `beginning` is for a model without memory; see `parallelize`.
    """
    if config.train.device == "cpu":
        ready_cpu()
    device = ranks.device if ranks.meshes else torch.device(config.train.device)
    if beginning is None:
        model.to(device)
    table = Measured.read(Path(config.train.kernel_table)) if config.train.kernel_table is not None else None
    model.use(kernels_for(device, config.train.kernels, table))
    if config.train.dtype == "fp8":
        in_fp8(model)
    if config.train.compile:
        for block in model.layers.values():
            block.compile()
    pipeline = None
    if ranks.division.pp > 1:
        pipeline = Pipeline(model, config, ranks, loads(config.model), losses_of)
    model = parallelize(model, config, ranks, list(pipeline.stages.values()) if pipeline else None, beginning)
    optimizers = build_optimizers(model, config.optimizer, ranks)
    if config.optimizer.qk_clip is not None:
        watch_logits(model)
    return model, optimizers, pipeline


def train_and_bill(
    run: Path,
    config: Config,
    model: Transformer,
    optimizers: list[Optimizer],
    batches: Batches,
    evaluate: Callable[[int], float],
    flops_per_token: Callable[[int, Knobs], float],
    what: str,
    ranks: Ranks = ALONE,
    pipeline: Pipeline | None = None,
    step: Step = train_step,
    measure: str = "bpb",
    spent: tuple[float, float] = (0.0, 0.0),
) -> dict[str, Any]:
    """The loop from where RUN is to where it ends, then its receipt; `what` says what it trains on.

    `step` and `measure`: what a batch does to the model, and what `evaluate` gives (train/log.py · MEASURES).
    """
    device = torch.device(config.train.device)
    peak = torch.tensor(matmul_peak(device, model.dtype, 1024 if device.type == "cpu" else 8192), device=ranks.device)
    with Log(run, config.train.tokens, ranks.total(peak).item(), measure, silent=not ranks.first) as log:
        where = f"on {device.type} in {config.train.dtype} by {model.kernels.told}{ranks.named()}"
        log.say(f"{run}: {config.train.tokens:,} tokens, {what}, {where}")
        parts = model, optimizers, batches, evaluate, flops_per_token, log, ranks, pipeline, step, spent
        progress, ending = train(run, config, *parts)
    return lead(lambda: write_receipt(run, config, progress, ending, ranks.world, measure), ranks.group("world"))


def settled(train: TrainConfig) -> TrainConfig:
    """`auto` replaced by what this machine has and does faster; the run keeps it from then on."""
    device = train.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"  # mps only when asked for: nobody has run it yet
    dtype = faster_dtype(torch.device(device)) if train.dtype == "auto" else train.dtype
    return train.model_copy(update={"device": device, "dtype": dtype})


def _same_tokenizer(a: Path, b: Path) -> bool:
    """Whether two folders hold tokenizers that give the same ids."""
    return Tokenizer.load(a).fingerprint == Tokenizer.load(b).fingerprint


def _check_memory(config: Config, ranks: int) -> None:
    """Refuses, before anything is allocated, a model whose weights, gradients and moments cannot fit."""
    if config.train.device == "cuda":
        there = torch.cuda.get_device_properties(0).total_memory * ranks
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # of all processes
    if config.lora is not None:
        needed, instead = adapted_bytes(config.model, config.lora), "a smaller model"
    else:
        moments = (1 if config.optimizer.name == "muon" else 2) * (0.5 if config.optimizer.moments == "bf16" else 1)
        needed = config.mesh.replicate * training_bytes(config.model, moments)
        instead = "a smaller recipe, or of a run that is trained already only adapters (lora.rank=16)"
    if needed > there:
        raise BadInput(
            f"training this model takes {needed / 2**30:,.0f} GiB for weights, gradients and moments alone; "
            f"this machine has {there / 2**30:,.0f} GiB: take {instead}"
        )
