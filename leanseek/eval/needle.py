"""Needle in a haystack (report §4.3, figure 8): what was said long ago is asked for, over length and depth.

A haystack holds a needle at each depth, every one of another kind, and each is asked for by itself: the others are in
its way. What their questions have in common, which is the haystack, is read once.

An answer is right when each of its tokens is the likeliest behind all before it. That is greedy decoding's exact match
without decoding: if the first i tokens were written, the next one written is the likeliest behind them.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from leanseek.config import BadInput
from leanseek.data.needles import buried, hay, records
from leanseek.data.storyworld import NEEDLES
from leanseek.data.storyworld.questions import sentences
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.likelihood import CACHE_TOKENS, Asked, likelihoods
from leanseek.eval.statistics import interval
from leanseek.model.transformer import Transformer

DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
TRIALS = 100  # haystacks of each length

Straw = Callable[[random.Random], Iterator[str]]  # sentences without end


@dataclass(frozen=True)
class Grid:
    """right[length][depth]: how many of the trials found their needle."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    right: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, results: dict[str, Any]) -> Self:
        """The grid that an evaluation kept."""
        trials = results["trials"]
        right = tuple(tuple(round(share * trials) for share in row) for row in results["found"])
        return cls(tuple(results["lengths"]), tuple(results["depths"]), trials, right)

    def results(self) -> dict[str, Any]:
        """As an evaluation keeps them: the score is the mean over all cells."""
        verdicts = [float(i < count) for row in self.right for count in row for i in range(self.trials)]
        stderr, low, high = interval(verdicts)
        return {
            "score": sum(verdicts) / len(verdicts),
            "stderr": stderr,
            "low": low,
            "high": high,
            "n": len(verdicts),
            "trials": self.trials,
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "found": [[count / self.trials for count in row] for row in self.right],
        }


def search(
    model: Transformer,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    trials: int = TRIALS,
    seed: int = 0,
    straw: Straw | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Grid:
    """Haystack, question and answer together have at most `length` tokens, less than a sentence below it.

    straw: what haystacks are made of; the storyworld's sentences unless given. progress: is told of tokens done with.
    Raises BadInput for a length into which the needles do not fit.
    """
    right = []
    for length in lengths:
        found = [0] * len(DEPTHS)
        at_once = max(1, CACHE_TOKENS // length)
        for first in range(0, trials, at_once):
            some = range(first, min(first + at_once, trials))
            asked = [one for trial in some for one in questions(tokenizer, length, trial, seed, straw)]
            for i, likelihood in enumerate(likelihoods(model, asked)):
                found[i % len(DEPTHS)] += likelihood.greedy
            progress(len(some) * length)
        right.append(tuple(found))
    return Grid(tuple(lengths), DEPTHS, trials, tuple(right))


def straw_of(texts: Sequence[str]) -> Straw:
    """Sentences of these texts: from one chosen by chance on, one after the other, again and again. Raises BadInput."""
    if not any(text.strip() for text in texts):
        raise BadInput("there is no text to make haystacks of")

    def straw(rng: random.Random) -> Iterator[str]:
        for text in itertools.cycle([*texts[(first := rng.randrange(len(texts))) :], *texts[:first]]):
            yield from (text[start:end] for start, end in sentences(text))

    return straw


def questions(tokenizer: Tokenizer, length: int, trial: int, seed: int = 0, straw: Straw | None = None) -> list[Asked]:
    """One haystack with a needle at each depth, and for each depth its question behind it. Raises BadInput."""
    rng = random.Random(f"needle:{seed}:{length}:{trial}")
    there = records(rng, len(DEPTHS))
    needles = [(depth, f"{question}{answer}.") for depth, (question, answer) in zip(DEPTHS, there, strict=True)]
    asked = [(tokenizer.encode(question), tokenizer.encode(answer)) for question, answer in there]
    room = length - max(len(question) + len(answer) for question, answer in asked)

    def read(parts: Sequence[str]) -> list[int]:
        # A line break ends a token, whatever follows: the question may be encoded apart.
        return [tokenizer.bos_id, *tokenizer.encode(buried(parts, needles) + "\n")]

    parts: list[str] = []
    left = room - len(read(parts))
    for sentence in hay(rng, NEEDLES) if straw is None else straw(rng):
        left -= len(tokenizer.encode(f" {sentence}"))
        if left < 0:
            break
        parts.append(sentence)
    while len(haystack := read(parts)) > room:  # a whole may have a few tokens more than its parts
        if not parts:
            raise BadInput(f"--lengths {length}: {len(DEPTHS)} needles and a question do not fit: give larger ones")
        parts.pop()
    return [Asked((*haystack, *question), tuple(answer)) for question, answer in asked]


def plot(grids: dict[str, Grid], file: Path) -> None:
    """A heat map for each, by its name, side by side as PNG: lengths from left to right, depths downwards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = [len(grid.lengths) for grid in grids.values()]
    figure, row = plt.subplots(
        1,
        len(grids),
        figsize=(1.6 + 0.8 * sum(columns), 3.9),
        width_ratios=columns,
        squeeze=False,
        layout="constrained",
    )
    for axis, (name, grid) in zip(row[0], grids.items(), strict=True):
        shares = [[found[i] / grid.trials for found in grid.right] for i in range(len(grid.depths))]
        image = axis.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for i, across in enumerate(shares):
            for j, share in enumerate(across):
                axis.text(j, i, f"{share:.0%}", ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(grid.lengths)), [f"{length:,}" for length in grid.lengths])
        axis.set_yticks(range(len(grid.depths)), [f"{depth:.0%}" for depth in grid.depths])
        axis.set(xlabel="tokens", title=name)
        axis.title.set_size(10)
    row[0, 0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=row[0, -1], label=f"found, of {grid.trials} a cell")
    figure.savefig(file, dpi=110)
    plt.close(figure)
