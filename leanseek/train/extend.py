"""Long-context extension (report §4.3): YaRN, then two short stages of pre-training at growing length.

As V3: 1,000 steps at eight times the context and 1,000 at 32 times, with the batch, in tokens, and the rate that
pre-training ended with, MTP and balancing as they were then, and one YaRN setting for both. What the report does not
say: whether the optimizers' moments came along; here they begin anew, for an imported model has none.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from leanseek import checkpoint
from leanseek.config import BadInput, Config, ModelConfig, Piece, RopeScaling, ScheduleConfig, Stage, parse, to_toml
from leanseek.data.shards import Data, open_data
from leanseek.data.tokenizer import Tokenizer
from leanseek.parallel.mesh import divide, joined, lead, ranks_of, size_of, together
from leanseek.train.pretrain import train_on
from leanseek.train.setup import take_up

GROWTH = (8, 32)  # times the context before: 4K to 32K and 128K
STEPS, MOST = 1000, 0.1  # of a stage, and its tokens as a share of pre-training's at most: a small model sees fewer
RATE = 7.3e-6 / 2.2e-4  # that of the last tokens of pre-training as a share of the peak: small recipes end at zero
HEADROOM = 1.25  # YaRN's factor is 40, and the released file has 163,840 positions, for a training to 32 times 4,096
MSCALE = {"deepseek_v3": 1.0, "deepseek_v2": 0.707}


def extend(
    run: Path, data_folder: Path, out: Path, lengths: Sequence[int] = (), overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Trains OUT in stages of `lengths` tokens, from RUN's weights or from where OUT stopped; returns its receipt.

    Without lengths it takes V3's growth. `overrides` are laid over what `extended` makes of RUN's configuration; of the
    model only YaRN's settings are open, where a factor of 1 is plain RoPE. Raises BadInput, OSError.
    """
    if out.resolve() == run.resolve():
        raise BadInput(f"{out}: it would train onto the run it begins with: take another folder")
    begun_with = checkpoint.read_run(run)
    lengths = tuple(lengths) or tuple(growth * context_of(begun_with) for growth in GROWTH)
    _check_lengths(run, context_of(begun_with), lengths)
    config = parse(to_toml(extended(begun_with, lengths)), f"extend of {run}", list(overrides))
    _check_overrides(run, begun_with.model, config.model)
    with joined(config.mesh.timeout) as everyone, ExitStack() as held:
        weights = lead(lambda: checkpoint.newest(run, _warn), everyone)
        if weights is None:
            raise BadInput(f"{run}: there is no checkpoint in it yet: train it first")
        data, tokenizer = together(lambda: _opened(run, data_folder), everyone)
        _check_data(data, config.stages, context_of(begun_with))
        world = divide(config, size_of(everyone)).world
        lead(lambda: held.enter_context(checkpoint.lock(out)), everyone)
        given = config, data.fingerprint, run / "tokenizer", data_folder
        config = lead(lambda: take_up(out, *given, begun_with=run, ranks=world), everyone)
        return train_on(config, data, tokenizer, out, ranks_of(config), weights)


def _opened(run: Path, data_folder: Path) -> tuple[Data, Tokenizer]:
    data, tokenizer = open_data(data_folder), Tokenizer.load(run / "tokenizer")
    if data.tokenizer_fingerprint != tokenizer.fingerprint:
        raise BadInput(f"{data_folder}: written by another tokenizer: prepare it with --tokenizer {run / 'tokenizer'}")
    return data, tokenizer


def context_of(config: Config) -> int:
    """The longest text, in tokens, that a run's model was trained for."""
    yarn, trained = config.model.rope_scaling, max(stage.sequence_length for stage in config.stages)
    if yarn is None:
        return trained
    return max(trained, round(yarn.factor * yarn.original_max_position_embeddings / HEADROOM))  # of an import too


def extended(config: Config, lengths: Sequence[int]) -> Config:
    """A pre-training configuration turned into one for stages of these lengths, alike in steps."""
    schedule, train = config.schedule, config.train
    batch = max(round(schedule.batch_tokens[-1].value), *lengths)
    peak = max(max(piece.value, piece.start or 0.0) for piece in schedule.learning_rate)
    ends_with = {
        name: (Piece(until=1, value=getattr(schedule, name)[-1].value),) for name in ("bias_speed", "mtp_weight")
    }
    begun_at = config.stages[-1].sequence_length
    settings = {
        "tokens": len(lengths) * max(min(STEPS * batch, round(MOST * train.tokens)), *lengths),
        "micro_batch": max(1, train.micro_batch * begun_at // max(lengths)),  # as many tokens at once, or one row
    } | {"dtype": "auto", "device": "auto", "max_steps": None, "max_seconds": None, "mtp_length": None}
    return config.model_copy(
        update={
            "model": stretched(config.model, context_of(config), max(lengths)),
            "train": train.model_copy(update=settings),
            "schedule": ScheduleConfig(
                unit="fraction",
                learning_rate=(Piece(until=1, value=RATE * peak),),
                batch_tokens=(Piece(until=1, value=batch),),
                **ends_with,
            ),
            "counts": None,
            "stages": tuple(Stage(sequence_length=length, share=1 / len(lengths)) for length in lengths),
        }
    )


def stretched(model: ModelConfig, context: int, longest: int) -> ModelConfig:
    """The model under YaRN, so that `longest` tokens fit where `context` did, with V3's headroom.

    One that has YaRN already is stretched anew from its original length.
    """
    before = model.rope_scaling
    original = context if before is None else before.original_max_position_embeddings
    factor = HEADROOM * longest / original
    mscale = MSCALE[model.model_type]
    yarn = (
        RopeScaling(factor=factor, original_max_position_embeddings=original, mscale=mscale, mscale_all_dim=mscale)
        if before is None
        else before.model_copy(update={"factor": factor})
    )
    return model.model_copy(update={"rope_scaling": yarn, "max_position_embeddings": round(factor * original)})


def _check_lengths(run: Path, context: int, lengths: Sequence[int]) -> None:
    said = ",".join(map(str, lengths))
    if min(lengths) <= context:
        raise BadInput(f"--lengths {said}: {run} reads {context} tokens already: give larger ones")
    if list(lengths) != sorted(set(lengths)):
        raise BadInput(f"--lengths {said}: they must grow from stage to stage")


def _check_overrides(run: Path, before: ModelConfig, model: ModelConfig) -> None:
    ours = {"rope_scaling": before.rope_scaling, "max_position_embeddings": before.max_position_embeddings}
    if model.model_copy(update=ours) != before:
        raise BadInput(f"extend of {run}: the model is the run's own: of model.* leave all but rope_scaling out")


def _check_data(data: Data, stages: Sequence[Stage], context: int) -> None:
    """Raises BadInput for data that cannot fill a row; warns where no document needs the length."""
    for stage in stages:
        sources: list[str | None] = [name for name, weight in stage.mixture.items() if weight] or [None]
        for source in sources:
            counted = data.counts("train", source)
            there = counted.tokens + 2 * counted.documents  # BOS and EOS
            if there < stage.sequence_length:
                named = f" of source {source!r}" if source else ""
                raise BadInput(
                    f"{data.folder}: {there:,} tokens of training text{named}, less than one row of "
                    f"{stage.sequence_length:,}: prepare more text or give smaller --lengths"
                )
    if not any((np.diff(shard.starts) > context).any() for shard in data.select("train")):
        _warn(f"{data.folder}: no document is longer than {context} tokens: there is nothing far away to learn from")


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
