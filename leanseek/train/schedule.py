"""Every knob of a run as a pure function of the tokens seen (report §4.2)."""

import math
from dataclasses import dataclass

from leanseek.config import Piece, ScheduleConfig


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
