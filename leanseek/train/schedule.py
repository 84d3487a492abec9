"""Every knob of a run as a pure function of the tokens seen (report §4.2)."""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from leanseek.config import Config, Piece, ScheduleConfig
from leanseek.plan.count import flops_per_token

PLACES = 1000  # of a run, at which its tokens are looked at


@dataclass(frozen=True)
class Knobs:
    learning_rate: float
    batch_tokens: int
    bias_speed: float  # γ of the bias update
    mtp_weight: float  # λ of the MTP loss
    count_weight: float = 0.0  # share of the counts in the main loss
    layers: int | None = None  # awake, from the first; None: all


def knobs(schedule: ScheduleConfig, tokens: float, budget: int) -> Knobs:
    """The knobs after `tokens` of a `budget` of tokens."""
    at = tokens / budget if schedule.unit == "fraction" else tokens
    return Knobs(
        learning_rate=curve(schedule.learning_rate, at),
        batch_tokens=round(curve(schedule.batch_tokens, at)),
        bias_speed=curve(schedule.bias_speed, at),
        mtp_weight=curve(schedule.mtp_weight, at),
        count_weight=curve(schedule.count_weight, at),
        layers=round(curve(schedule.layers, at)) if schedule.layers and at < schedule.layers[-1].until else None,
    )


def curve(pieces: tuple[Piece, ...], at: float) -> float:
    """The value at a point; a piece covers the points from the end of the one before up to, not including, its `until`.

    `constant` holds its value throughout; the other shapes lead there from the value before: `linear`, `cosine` (half a
    period) or `sqrt`, fast at first (1 − √x of the way is left).
    """
    begin, value = 0.0, 0.0
    for piece in pieces:
        before = value if piece.start is None else piece.start
        value = piece.value
        if at < piece.until:
            x = (at - begin) / (piece.until - begin)
            match piece.shape:
                case "constant":
                    return value
                case "linear":
                    way = x
                case "cosine":
                    way = (1 - math.cos(math.pi * x)) / 2
                case "sqrt":
                    way = math.sqrt(x)
            return before + (value - before) * way
        begin = piece.until
    return value


def scaled(pieces: tuple[Piece, ...], factor: float) -> tuple[Piece, ...]:
    """A curve so many times as high."""

    def times(value: float | None) -> float | None:
        return None if value is None else value * factor

    return tuple(
        piece.model_copy(update={"value": times(piece.value), "start": times(piece.start)}) for piece in pieces
    )


class Kind(NamedTuple):
    """What decides how much work a token is: its stage, whether MTP modules learn from it, whether counts teach, how
    many layers are awake (None: all), and its batch's size (None: of whatever size)."""

    stage: int = 0
    mtp: bool = False
    counted: bool = False
    layers: int | None = None
    batch: int | None = None


def kinds_of_tokens(config: Config) -> dict[Kind, float]:
    """The kinds of a run's tokens and their shares, to a thousandth; a batch that grows is what it grows to."""
    budget, found = config.train.tokens, Counter[Kind]()
    ends = list(accumulate(stage.share for stage in config.stages))
    batches = tuple(Piece(until=piece.until, value=piece.value) for piece in config.schedule.batch_tokens)
    schedule = config.schedule.model_copy(update={"batch_tokens": batches})
    for i in range(PLACES):
        at = (i + 0.5) / PLACES
        stage = min(sum(end <= at for end in ends), len(ends) - 1)
        found[kind_of_token(config, stage, knobs(schedule, budget * at, budget))] += 1
    return {kind: times / PLACES for kind, times in found.items()}


def kind_of_token(config: Config, stage: int, now: Knobs) -> Kind:
    """The kind of the tokens of a stage at a place of the schedule."""
    mtp = bool(config.model.num_nextn_predict_layers and now.mtp_weight > 0)
    counted = config.counts is not None and now.count_weight > 0
    return Kind(stage, mtp, counted, now.layers, now.batch_tokens)


def flops_of_kind(config: Config, kind: Kind) -> float:
    """Training FLOPs of a token of a kind; of a sampled head those of the candidates that are always there."""
    return flops_per_token(
        config.model,
        config.stages[kind.stage].sequence_length,
        mtp=kind.mtp,
        awake=kind.layers,
        mtp_length=config.train.mtp_length,
        candidates=config.counts.candidates(config.model.vocab_size) if config.counts and kind.counted else None,
    )
