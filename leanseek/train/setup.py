"""What every stage of training begins and ends with: a run folder, a model with its optimizers, the loop, the bill."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from leanseek import checkpoint
from leanseek.config import BadInput, Config, TrainConfig
from leanseek.data.tokenizer import Tokenizer
from leanseek.model.transformer import Transformer
from leanseek.plan.count import training_bytes
from leanseek.train.cpu import ready_cpu
from leanseek.train.log import Log
from leanseek.train.loop import Batches, Step, train
from leanseek.train.optim import build_optimizers, watch_logits
from leanseek.train.peak import faster_dtype, matmul_peak
from leanseek.train.receipt import write_receipt
from leanseek.train.step import train_step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def take_up(
    run: Path,
    config: Config,
    data_fingerprint: str,
    tokenizer: Path,
    data: Path,
    chats: bool = False,
    begun_with: Path | None = None,
    scores: bool = False,
) -> Config:
    """The configuration to train RUN with: the stored one where RUN is this very run, else RUN is made, with `config`.

    RUN must be locked; it may be an import, which is trained on from its weights. Raises BadInput where RUN is
    something else, or more than this machine has.
    """
    stored = checkpoint.check_run(run, config, data_fingerprint)
    if stored is None:
        config = config.model_copy(update={"train": settled(config.train)})
        _check_memory(config)
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


def build(config: Config) -> tuple[Transformer, list[Optimizer]]:
    """The initialised model on its device, which is made ready for it, and the optimizers."""
    model = Transformer(config.model, DTYPES[config.train.dtype])
    model.initialise(config.train.init_std, torch.Generator().manual_seed(config.train.seed))
    return model, ready(config, model)


def ready(config: Config, model: Transformer) -> list[Optimizer]:
    """Brings a model to its device, makes both ready to train, and returns the optimizers."""
    if config.train.device == "cpu":
        ready_cpu()
    model.to(config.train.device)
    optimizers = build_optimizers(model, config.optimizer)
    if config.optimizer.qk_clip is not None:
        watch_logits(model)
    if config.train.compile:
        for block in model.layers.values():
            block.compile()
    return optimizers


def train_and_bill(
    run: Path,
    config: Config,
    model: Transformer,
    optimizers: list[Optimizer],
    batches: Batches,
    evaluate: Callable[[int], float],
    flops_per_token: list[float],
    what: str,
    step: Step = train_step,
    measure: str = "bpb",
) -> dict[str, Any]:
    """The loop from where RUN is to where it ends, then its receipt; `what` says what it trains on.

    `step` and `measure`: what a batch does to the model, and what `evaluate` gives (train/log.py · MEASURES).
    """
    device = torch.device(config.train.device)
    peak = matmul_peak(device, model.dtype, 1024 if device.type == "cpu" else 8192)
    with Log(run, config.train.tokens, peak, measure) as log:
        log.say(f"{run}: {config.train.tokens:,} tokens, {what}, on {device.type} in {config.train.dtype}")
        progress, ending = train(run, config, model, optimizers, batches, evaluate, flops_per_token, log, step)
    return write_receipt(run, config, progress, ending, measure)


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


def _check_memory(config: Config) -> None:
    """Refuses, before anything is allocated, a model whose weights, gradients and moments cannot fit."""
    if config.train.device == "cuda":
        there = torch.cuda.get_device_properties(0).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = training_bytes(config.model, moments=1 if config.optimizer.name == "muon" else 2)
    if needed > there:
        raise BadInput(
            f"training this model takes {needed / 2**30:,.0f} GiB for weights, gradients and moments alone; "
            f"this machine has {there / 2**30:,.0f} GiB: take a smaller recipe"
        )
