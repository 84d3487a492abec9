"""Pre-training (report §4): puts model, optimizers, data and validation together and hands them to the loop."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer

from leanseek import checkpoint
from leanseek.config import BadInput, Config, TrainConfig
from leanseek.data.loader import Loader
from leanseek.data.shards import Data, open_data
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.bpb import bits_per_byte
from leanseek.model.transformer import Transformer
from leanseek.plan.count import flops_per_token, training_bytes
from leanseek.train.log import Log
from leanseek.train.loop import train
from leanseek.train.optim import build_optimizers, watch_logits
from leanseek.train.peak import faster_dtype, matmul_peak
from leanseek.train.receipt import write_receipt

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pretrain(config: Config, data_folder: Path, run: Path) -> dict[str, Any]:
    """Trains RUN from scratch or goes on where it stopped; returns its receipt. Raises BadInput, OSError."""
    data = open_data(data_folder)
    tokenizer = Tokenizer.load(data.tokenizer_folder)
    config = _for_tokenizer(config, tokenizer)
    with checkpoint.lock(run):
        stored = checkpoint.check_run(run, config, data.fingerprint)
        if stored is None:
            config = config.model_copy(update={"train": settled(config.train)})
            _check_memory(config)
            checkpoint.create_run(run, config, data.fingerprint, data.tokenizer_folder, data_folder)
        else:
            config = stored
            checkpoint.remember_data(run, data_folder)
        if config.train.device != "cpu" and not getattr(torch, config.train.device).is_available():
            raise BadInput(f"{run}: it runs on {config.train.device!r}, and there is no such device here")
        return _train(config, data, tokenizer, run)


def assemble(config: Config, data: Data, tokenizer: Tokenizer) -> tuple[Transformer, list[Optimizer], Loader]:
    """What a run begins with: the initialised model on its device, its optimizers, and the batches."""
    model = Transformer(config.model, DTYPES[config.train.dtype])
    model.initialise(config.train.init_std, torch.Generator().manual_seed(config.train.seed))
    model.to(config.train.device)
    optimizers = build_optimizers(model, config.optimizer)
    if config.optimizer.qk_clip is not None:
        watch_logits(model)
    if config.train.compile:
        for block in model.layers.values():
            block.compile()
    loader = Loader(data, config.stages, config.train.tokens, config.train.seed, config.data, tokenizer)
    return model, optimizers, loader


def _train(config: Config, data: Data, tokenizer: Tokenizer, run: Path) -> dict[str, Any]:
    device = torch.device(config.train.device)
    model, optimizers, loader = assemble(config, data, tokenizer)
    documents = _validation_documents(data, config.train.eval_tokens)

    def evaluate(stage: int) -> float:
        return bits_per_byte(model, documents, config.stages[stage].sequence_length, tokenizer.bos_id).bpb

    flops = [flops_per_token(config.model, stage.sequence_length) for stage in config.stages]
    peak = matmul_peak(device, model.dtype, 1024 if device.type == "cpu" else 8192)
    with Log(run, config.train.tokens, peak) as log:
        reads = max(max(loader.epochs(i, loader.samples(i)).values()) for i in range(len(config.stages)))
        of_text = f", the text read {reads:.1f} times" if reads > 1 else f", {reads:.0%} of the text"
        log.say(f"{run}: {config.train.tokens:,} tokens{of_text}, on {device.type} in {config.train.dtype}")
        progress, ending = train(run, config, model, optimizers, loader, evaluate, flops, log)
    return write_receipt(run, config, progress, ending)


def _for_tokenizer(config: Config, tokenizer: Tokenizer) -> Config:
    """The configuration with the tokenizer's own first and last token of a document."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise BadInput(
            f"the data's tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is {config.model.vocab_size}: "
            f"add model.vocab_size={tokenizer.vocab_size} or prepare the data with a smaller vocabulary"
        )
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return config.model_copy(update={"model": config.model.model_copy(update=ends)})


def settled(train: TrainConfig) -> TrainConfig:
    """`auto` replaced by what this machine has and does faster; the run keeps it from then on."""
    device = train.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"  # mps only when asked for: nobody has run it yet
    dtype = faster_dtype(torch.device(device)) if train.dtype == "auto" else train.dtype
    return train.model_copy(update={"device": device, "dtype": dtype})


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


def _validation_documents(data: Data, tokens: int) -> list[tuple[NDArray[np.integer], int]]:
    """The first documents of the validation split, up to so many tokens: always the same ones."""
    documents, counted = [], 0
    for ids, raw_bytes in data.documents("validation"):
        if counted >= tokens:
            break
        documents.append((ids, raw_bytes))
        counted += len(ids)
    if not documents:
        raise BadInput("the data has no validation document: prepare it from at least two documents")
    return documents
