"""Pre-training (report §4): puts model, optimizers, data and validation together and hands them to the loop."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from leanseek import checkpoint
from leanseek.config import BadInput, Config
from leanseek.data.loader import Loader
from leanseek.data.shards import Data, open_data
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.bpb import Share, bits_per_byte
from leanseek.model.transformer import Transformer
from leanseek.parallel.mesh import ALONE, Ranks, divide, joined, lead, ranks_of, size_of, together
from leanseek.parallel.pipeline import Pipeline
from leanseek.train.counts import counts_of
from leanseek.train.loop import cpu_seconds
from leanseek.train.pairs import beginning, check_table
from leanseek.train.schedule import Knobs, flops_of_kind, kind_of_token
from leanseek.train.setup import DTYPES, build, take_up, train_and_bill
from leanseek.train.step import train_step
from leanseek.train.teacher import check_teacher, teacher_of


def pretrain(config: Config, data_folder: Path, run: Path) -> dict[str, Any]:
    """Trains RUN from scratch or goes on where it stopped; returns its receipt. Raises BadInput, OSError.

    Under torchrun every process calls it: they train together, as `config.mesh` says.
    """
    with joined(config.mesh.timeout) as everyone, ExitStack() as held:
        data, tokenizer = together(lambda: _opened(data_folder), everyone)
        config = _for_tokenizer(config, tokenizer)
        if config.lora is not None:
            raise BadInput(
                "adapters stand beside weights that are trained already: leave lora.* out, or take leanseek sft"
            )
        check_teacher(config, tokenizer, size_of(everyone))
        check_table(config)
        world = divide(config, size_of(everyone)).world
        lead(lambda: held.enter_context(checkpoint.lock(run)), everyone)
        given = config, data.fingerprint, data.tokenizer_folder, data_folder
        config = lead(lambda: take_up(run, *given, ranks=world), everyone)
        return train_on(config, data, tokenizer, run, ranks_of(config))


def _opened(folder: Path) -> tuple[Data, Tokenizer]:
    data = open_data(folder)
    return data, Tokenizer.load(data.tokenizer_folder)


def assemble(
    config: Config,
    data: Data,
    tokenizer: Tokenizer,
    ranks: Ranks = ALONE,
    drawn: bool = True,
    known: Mapping[str, Tensor] | None = None,
) -> tuple[Transformer, list[Optimizer], Loader, Pipeline | None]:
    """What a run begins with: the initialised model on its device, its optimizers, the batches, and its pipeline.

    Unless the weights are `drawn`, they are to be loaded; those that are `known` stand for what would be drawn.
    """
    model, optimizers, pipeline = build(config, ranks, drawn, known)
    loader = Loader(data, config.stages, config.train.tokens, config.train.seed, config.data, tokenizer)
    return model, optimizers, loader, pipeline


def train_on(
    config: Config,
    data: Data,
    tokenizer: Tokenizer,
    run: Path,
    ranks: Ranks,
    begin: checkpoint.Checkpoint | None = None,
) -> dict[str, Any]:
    """Trains RUN, which is locked, from where it stopped, else from the weights of `begin`, else from scratch."""
    held = begin or lead(lambda: checkpoint.newest(run, lambda _: None), ranks.group("world"))
    wall, cpu = time.monotonic(), cpu_seconds()
    counts = counts_of(config, data, tokenizer, ranks.device, DTYPES[config.train.dtype])
    # Of several ranks one works it out: the last bits of singular vectors are another machine's to turn.
    known = lead(lambda: beginning(config, counts), ranks.group("world")) if held is None else {}
    spent = time.monotonic() - wall, cpu_seconds() - cpu  # counting is a part of the bill
    model, optimizers, loader, pipeline = assemble(config, data, tokenizer, ranks, held is None, known)
    if begin is not None:  # weights and routing bias: the optimizers begin anew
        checkpoint.load_model_weights(begin.model, model, ranks=ranks)
    scorer = model if pipeline is None else pipeline.nats
    teacher = teacher_of(config, tokenizer)
    documents = validation_documents(data, config.train.eval_tokens)

    def evaluate(stage: int) -> float:
        length = config.stages[stage].sequence_length
        return bits_per_byte(scorer, documents, length, tokenizer.bos_id, share=share_of(ranks)).bpb

    def flops(stage: int, now: Knobs) -> float:
        own = flops_of_kind(config, kind_of_token(config, stage, now))
        return own + (teacher.flops_per_token(config.stages[stage].sequence_length) if teacher is not None else 0.0)

    reads = max(max(loader.epochs(i, loader.samples(i)).values()) for i in range(len(config.stages)))
    of_text = f"the text read {reads:.1f} times" if reads > 1 else f"{reads:.0%} of the text"
    step = partial(train_step, teacher=teacher, counts=counts)
    given = config, model, optimizers, loader, evaluate, flops, of_text, ranks, pipeline, step
    return train_and_bill(run, *given, spent=spent)


def share_of(ranks: Ranks) -> Share:
    """Which part of a validation this rank computes."""

    def total(value: float) -> float:
        return ranks.total(torch.tensor(value, dtype=torch.float64, device=ranks.device), "batch").item()

    division, place = ranks.division, ranks.place
    return Share(place["dp"] * division.cp + place["cp"], division.dp * division.cp, total)


def _for_tokenizer(config: Config, tokenizer: Tokenizer) -> Config:
    """The configuration with the tokenizer's own first and last token of a document."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise BadInput(
            f"the data's tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is {config.model.vocab_size}: "
            f"add model.vocab_size={tokenizer.vocab_size} or prepare the data with a smaller vocabulary"
        )
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return config.model_copy(update={"model": config.model.model_copy(update=ends)})


def validation_documents(data: Data, tokens: float) -> list[tuple[NDArray[np.integer], int]]:
    """The first documents of the validation split, up to so many tokens: always the same ones. Raises BadInput."""
    documents, counted = [], 0
    for ids, raw_bytes in data.documents("validation"):
        if counted >= tokens:
            break
        documents.append((ids, raw_bytes))
        counted += len(ids)
    if not documents:
        raise BadInput("the data has no validation document: prepare it from at least two documents")
    return documents
