"""Supervised fine-tuning (report §5.1): from a run that continues text to one that answers in chats.

As V3: two epochs, a cosine down from the peak, samples packed into one row and hidden from each other. What the report
does not say, batch and length, is as at the end of pre-training. The MTP modules go on learning, at the weight they had
last; the receipt tells how often their drafts were right before and after.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from leanseek import checkpoint
from leanseek.config import BadInput, Config, DataConfig, MeshConfig, Piece, ScheduleConfig, parse, to_toml
from leanseek.data.chats import ChatLoader, Chats, fingerprint_of, longest_of, open_chats, pack
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.bpb import Answers, answers_bits_per_byte, answers_of
from leanseek.eval.standing import standing
from leanseek.model.transformer import Transformer
from leanseek.parallel.mesh import divide, joined, lead, ranks_of, size_of, together
from leanseek.peft import write_adapter
from leanseek.plan.count import adaptation, flops_per_token, parameters
from leanseek.train.pretrain import share_of
from leanseek.train.schedule import Knobs
from leanseek.train.setup import build, build_adapted, resting, take_up, train_and_bill
from leanseek.train.step import train_step
from leanseek.train.teacher import Teacher, check_teacher, teacher_of

EPOCHS = 2
V3_RATES, LARGE = (5e-6, 1e-6), 1e9  # V3's own peak and end, for models that activate so many parameters
HIGHEST = 6e-3  # peak of pre-training that counts: what a few minutes bear from nothing says no more of trained weights
PEAK, END = 0.3, 0.1  # of smaller ones: the peak as a share of pre-training's, and the end as a share of the peak
ADAPTERS, ADAPTERS_OF_LARGE = 3, 10  # times the rate that all weights would have; measured when small
WARM_UP = 0.03  # share of the budget


def sft(run: Path, file: Path, out: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Trains OUT on a file of chats, from RUN's weights or from where OUT stopped; returns its receipt.

    `overrides` are laid over what `tuned` makes of RUN's configuration. Raises BadInput, OSError. Under torchrun every
    process calls it.
    """
    if out.resolve() == run.resolve():
        raise BadInput(f"{out}: it would train onto the run it begins with: take another folder")
    begun_with = checkpoint.read_run(run)
    adapters = any(override.strip().startswith("lora.") for override in overrides)
    config = parse(to_toml(tuned(begun_with, adapters)), f"sft of {run}", list(overrides))
    check_overrides(config, begun_with, f"sft of {run}")
    tokenizer = tokenizer_of(run, config)
    with joined(config.mesh.timeout) as everyone, ExitStack() as held:
        check_teacher(config, tokenizer, size_of(everyone))
        if config.lora is not None:
            _check_adapters(config)
        weights = lead(lambda: checkpoint.newest_weights(run), everyone)
        if config.lora is not None:
            config = config.model_copy(update={"lora": resting(config.lora, run)})
        longest = longest_of(config.stages)
        training, held_out, too_long = together(lambda: open_chats(file, tokenizer, longest), everyone)
        if too_long:
            left_out = f"left out {too_long:,} chats longer than the {longest} tokens of a row"
            lead(lambda: _warn(left_out), everyone)
        answers = _answers(held_out, config.train.eval_tokens, tokenizer)
        if not any(override.partition("=")[0].strip() == "train.tokens" for override in overrides):
            budgeted = config.train.model_copy(update={"tokens": budget(training, config)})
            config = config.model_copy(update={"train": budgeted})
        world = divide(config, size_of(everyone)).world
        lead(lambda: held.enter_context(checkpoint.lock(out)), everyone)
        given = config, fingerprint_of(file), run / "tokenizer", file
        config = lead(lambda: take_up(out, *given, chats=True, begun_with=run, ranks=world), everyone)
        ranks = ranks_of(config)
        if config.lora is None:  # weights and routing bias: the optimizers begin anew
            model, optimizers, pipeline = build(config, ranks, drawn=False)
            checkpoint.load_weights(weights, model, ranks)
        else:
            model, optimizers, pipeline = build_adapted(config, out, ranks)
        scorer = model if pipeline is None else pipeline.nats
        before = _standing(model, answers) if ranks.world == 1 else None
        teacher = teacher_of(config, tokenizer)
        loader = ChatLoader(training, config.stages, config.train.tokens, config.train.seed, tokenizer.pad_id)

        def evaluate(stage: int) -> float:
            return answers_bits_per_byte(scorer, answers, share=share_of(ranks)).bpb

        reads = sum(loader.samples(i) / len(loader.rows(i)) for i in range(len(config.stages)))
        moves = "moves" if any(piece.value for piece in config.schedule.bias_speed) else "stays"
        what = f"{len(training):,} chats read {reads:.1f} times, {len(held_out):,} held out, the routing bias {moves}"

        def flops(stage: int, now: Knobs) -> float:
            return _flops_per_token(config, training, teacher, now.mtp_weight > 0)

        step = partial(train_step, teacher=teacher)
        receipt = train_and_bill(out, config, model, optimizers, loader, evaluate, flops, what, ranks, pipeline, step)
        if receipt["ended"] != "interrupted":
            if before is not None:
                receipt |= {"before": before, "after": _standing(model, answers)}
            if config.lora is not None:
                if not config.model.brings:  # or its base is exported wider than the adapters are
                    lead(lambda: write_adapter(out, run), everyone)
                receipt["params_trained"] = adaptation(config.model, config.lora).adapters
            lead(lambda: checkpoint.write_json(out / "receipt.json", receipt), everyone)
        return receipt


def tuned(config: Config, adapters: bool = False) -> Config:
    """A pre-training configuration turned into one for chats, but for the budget, which the chats decide.

    `adapters` are to be trained instead of the weights: by AdamW, at several times the rate.
    """
    schedule, stage = config.schedule, config.stages[-1]
    peak = PEAK * peak_of(schedule)
    large = parameters(config.model).activated >= LARGE
    peak, end = V3_RATES if large else (peak, END * peak)
    if adapters:
        times = ADAPTERS_OF_LARGE if large else ADAPTERS
        peak, end = times * peak, times * end
    learning_rate = (
        Piece(until=WARM_UP, value=peak, shape="linear"),
        Piece(until=1, value=end, shape="cosine"),
    )
    # The report says nothing of balancing here. The bias stays as pre-training left it: the experts that a few chats
    # prefer are no reason to move it. And a balance loss by sequence would take a row of several chats for one.
    instructed = ScheduleConfig(
        unit="fraction",
        learning_rate=learning_rate,
        batch_tokens=(Piece(until=1, value=schedule.batch_tokens[-1].value),),
        bias_speed=(Piece(until=1, value=0),),
        mtp_weight=(Piece(until=1, value=schedule.mtp_weight[-1].value),),
    )
    here: dict[str, Any] = {"dtype": "auto", "device": "auto", "max_steps": None, "max_seconds": None}
    here |= {"balance_loss_alpha": 0.0, "mtp_length": None}
    for_adapters = {"name": "adamw", "qk_clip": None, "weight_decay": 0.0}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=here),
            "optimizer": config.optimizer.model_copy(
                update={"embedding_rate": 1.0, **(for_adapters if adapters else {})}
            ),
            "schedule": instructed,
            "data": DataConfig(),
            "teacher": None,
            "counts": None,
            "lora": None,
            "grpo": None,
            "rollout": None,
            "stages": (stage.model_copy(update={"share": 1.0, "mixture": {}}),),
            "mesh": MeshConfig(),  # of the processes that run now
        }
    )


def peak_of(schedule: ScheduleConfig) -> float:
    """The peak of pre-training that the rates of what comes after it are shares of."""
    return min(max(max(piece.value, piece.start or 0.0) for piece in schedule.learning_rate), HIGHEST)


def _check_adapters(config: Config) -> None:
    if max(config.mesh.pp, config.mesh.cp, config.mesh.ep) > 1:
        raise BadInput("lora.*: every rank holds the frozen matrices whole: take mesh.dp alone")
    if config.train.dtype == "fp8":
        raise BadInput(
            "lora.*: adapters are trained in bf16 or fp32 (how the base rests is lora.base): set train.dtype"
        )


def budget(chats: Chats, config: Config) -> int:
    """Tokens of as many epochs as V3 took, padding included."""
    length = config.stages[0].sequence_length
    return EPOCHS * len(pack(chats.lengths, length)) * length


def check_overrides(config: Config, begun_with: Config, what: str) -> None:
    """Raises BadInput, for `what`, where the model or what only text needs was to be changed."""
    if config.model != begun_with.model:
        raise BadInput(f"{what}: the model is the run's own: leave model.* out")
    if config.data != DataConfig() or any(stage.mixture for stage in config.stages):
        raise BadInput(f"{what}: chats are neither mixed nor packed like text: leave data.* and mixtures out")
    if config.lora is not None and (
        config.optimizer.qk_clip is not None or any(piece.value for piece in config.schedule.bias_speed)
    ):
        raise BadInput(f"{what}: beside adapters nothing changes: leave optimizer.qk_clip and schedule.bias_speed out")


def tokenizer_of(run: Path, config: Config) -> Tokenizer:
    """The tokenizer of a run. Raises BadInput where it is not its model's."""
    tokenizer, model = Tokenizer.load(run / "tokenizer"), config.model
    ends = (tokenizer.bos_id, tokenizer.eos_id)
    if tokenizer.vocab_size > model.vocab_size or ends != (model.bos_token_id, model.eos_token_id):
        raise BadInput(
            f"{run}: its tokenizer has {tokenizer.vocab_size} ids, with BOS and EOS {ends}; its model has "
            f"{model.vocab_size}, with {(model.bos_token_id, model.eos_token_id)}: they do not belong together"
        )
    return tokenizer


def _answers(chats: Chats, tokens: int, tokenizer: Tokenizer) -> Answers:
    """Those of the first chats, up to so many tokens: always the same ones."""
    enough = int(np.searchsorted(np.cumsum(chats.lengths), tokens)) + 1
    return answers_of(map(chats.sample, range(min(enough, len(chats)))), tokenizer)


def _flops_per_token(config: Config, chats: Chats, teacher: Teacher | None, mtp: bool) -> float:
    # A token sees its own chat only: on average half of a row as long as the chat that a random token is in.
    length = round(float(np.square(chats.lengths).sum() / chats.lengths.sum()))
    own = flops_per_token(config.model, length, mtp=mtp)
    if config.lora is not None:
        own *= 2 / 3  # of the backward pass the half that is for the weights falls away
    return own + (teacher.flops_per_token(length) if teacher else 0.0)


def _standing(model: Transformer, answers: Answers) -> dict[str, Any]:
    """Of the held-out chats: bits per byte of the answers, balance of the experts, share of drafts that are right."""
    return {"bpb": answers_bits_per_byte(model, answers).bpb, **asdict(standing(model, answers.windows))}


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
