"""What a row costs, from the receipts alone.

score = tokens to the target (median over seeds) × CPU-seconds per token
        + CPU-seconds of tokenizer, tokenisation and, for a row that learns from counts, counting.

The target is the validation bpb that the ordinary control ends with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from leanseek.bench.queue import Place
from leanseek.bench.rows import BEST, ORDINARY, Row, same_settings, shape, vocabulary
from leanseek.bench.track import fixed_cpu_seconds, prepared


@dataclass(frozen=True)
class Score:
    """What a row costs. Infinite where most of its seeds do not reach the target."""

    row: Row
    learning_rate: float | None
    parameters: int
    budget: int
    tokens: tuple[float, ...]  # to the target, by seed
    final_bpb: tuple[float, ...]
    cpu_seconds_per_token: float
    fixed_cpu_seconds: float
    flops_per_token: float

    @property
    def median_tokens(self) -> float:
        return median(self.tokens)

    def cost(self, tokens: float) -> float:
        return tokens * self.cpu_seconds_per_token + self.fixed_cpu_seconds

    @property
    def score(self) -> float:
        return self.cost(self.median_tokens)


def tokens_to(curve: Sequence[Sequence[float]], target: float) -> float:
    """Tokens at which a curve of (tokens, bpb) first reaches the target, linear between its points; else infinity."""
    before: Sequence[float] | None = None
    for tokens, bpb in curve:
        if bpb <= target:
            if before is None or before[1] <= target:
                return tokens
            return before[0] + (tokens - before[0]) * (before[1] - target) / (before[1] - bpb)
        before = (tokens, bpb)
    return math.inf


def full_runs(receipts: list[dict[str, Any]], row: Row) -> dict[int, list[dict[str, Any]]]:
    """The full runs of a row as it is now, by their budget, in the order of the seeds."""
    found: dict[int, list[dict[str, Any]]] = {}
    for receipt in receipts:
        if receipt["kind"] == "run" and receipt["row"] == row.name and same_settings(row, receipt):
            found.setdefault(receipt["settings"]["tokens"], []).append(receipt)
    return {budget: sorted(runs, key=lambda run: run["seed"]) for budget, runs in sorted(found.items())}


def target_of(receipts: list[dict[str, Any]], rows: tuple[Row, ...]) -> float | None:
    """The validation bpb that the ordinary control ends with, median over its seeds."""
    control = next(row for row in rows if row.name == ORDINARY)
    runs = full_runs(receipts, control).get(control.tokens)
    return median(run["bpb"] for run in runs) if runs else None


def scores(
    place: Place, rows: tuple[Row, ...], target: float | None, speed: dict[str, Any] | None = None
) -> list[Score]:
    """Every budget that was run of every row whose speed is known, best first within a row.

    `speed` is a receipt of speeds, the newest where it is None.
    """
    receipts = place.receipts()
    speed = next(iter(place.speeds()), None) if speed is None else speed
    found = []
    for row in rows:
        of_row = []
        data = prepared(place.track, place.out, vocabulary(row))
        for budget, runs in full_runs(receipts, row).items():
            if target is None or speed is None or row.name not in speed["rows"] or data is None:
                continue
            if not same_settings(row, speed["rows"][row.name]):
                continue
            counted, flops = shape(row)
            # The ordinary control reaches the target at its end, by definition; its seeds scatter around it.
            reached = [
                float(run["tokens"]) if row.name == ORDINARY else tokens_to(run["curve"], target) for run in runs
            ]
            of_row.append(
                Score(
                    row,
                    runs[0]["settings"]["learning_rate"],
                    counted,
                    budget,
                    tuple(reached),
                    tuple(run["bpb"] for run in runs),
                    speed["rows"][row.name]["cpu_seconds_per_token"],
                    fixed_cpu_seconds(data) + speed["rows"][row.name].get("counting_cpu_seconds", 0.0),
                    flops,
                )
            )
        found += sorted(of_row, key=lambda score: score.score)
    return found


def best_of_each(found: list[Score]) -> dict[str, Score]:
    """Of each row the budget that reaches the target at the least cost."""
    best: dict[str, Score] = {}
    for score in found:
        best.setdefault(score.row.name, score)
    return best


def as_json(found: list[Score]) -> list[dict[str, Any]]:
    """Each row against each control, for programs: cost ratios are ours ÷ peer; null where a target is not reached."""
    best = best_of_each(found)
    lines = []
    for name, score in best.items():
        for peer in (ORDINARY, BEST):
            if peer in best and peer != name:
                ratios = [score.cost(tokens) / best[peer].score for tokens in score.tokens]
                lines.append(comparison(f"{name} / {peer}", score.score, best[peer].score, ratios))
    return lines


def comparison(name: str, ours: float, peer: float, ratios: Sequence[float]) -> dict[str, Any]:
    return {
        "name": name,
        "ours": finite(ours),
        "peer": finite(peer),
        "ratio_median": finite(median(ratios)),
        "ratio_min": finite(min(ratios)),
        "ratio_max": finite(max(ratios)),
        "unit": "CPU-seconds to the target",
        "n": len(ratios),
    }


# ── quick ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
