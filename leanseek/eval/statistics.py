"""From the verdicts on single questions to a score that says how far it can be trusted."""

from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np

RESAMPLED = 2000  # times; the ends of the interval are then good to a few hundredths of its width
AT_ONCE = 1 << 22  # drawn numbers held together


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that among k of these samples, drawn without putting back, is a right one: the unbiased estimate.

    Raises ValueError for more than there are.
    """
    if not 0 < k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, there are {samples}")
    return 1 - comb(samples - right, k) / comb(samples, k)


def majority(answers: Sequence[str | None]) -> int | None:
    """The place of the first of those that settle on the most frequent answer; the earlier of two as frequent.

    None when no reply settles on any.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    return answers.index(max(counts, key=lambda answer: counts[answer])) if counts else None


def interval(scores: Sequence[float], seed: int = 0, share: float = 0.95) -> tuple[float, float, float]:
    """Standard error of the mean score, and the interval in which it lies in `share` of all resampled question sets.

    Where all questions have the same score, resampling knows no doubt. Then the interval reaches as far as a mean could
    be that shows as all 0, or all 1, in less than half of 1 − share of the cases.
    """
    values = np.asarray(scores, dtype=np.float64)
    count, tail = len(values), (1 - share) / 2
    if values.min() == values.max():
        unseen = 1 - tail ** (1 / count)
        low = float(values[0]) - unseen if values[0] > 0 else 0.0
        high = float(values[0]) + unseen if values[0] < 1 else 1.0
        return 0.0, max(low, 0.0), min(high, 1.0)
    dice = np.random.default_rng(seed)
    rounds = max(1, AT_ONCE // count)
    means = np.concatenate(
        [
            values[dice.integers(0, count, (min(rounds, RESAMPLED - done), count))].mean(axis=1)
            for done in range(0, RESAMPLED, rounds)
        ]
    )
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(means.std()), float(low), float(high)
