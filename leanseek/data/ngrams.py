"""What follows what in a text, counted: interpolated Kneser-Ney n-grams (Chen and Goodman, 1998), in sorted arrays.

V vocabulary · n order · C contexts · P pairs of a context and a token seen after it · N places asked about.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leanseek.config import BadInput

LARGEST_TABLE = 8192  # ids of a vocabulary whose pairs are kept as a table, 256 MiB
UNSEEN = 0.5  # occurrences that a token without any is given
LEAST = 5e-4  # share after a context below which a token is dropped there, its share going to the shorter context


@dataclass(frozen=True)
class Order:
    """All n-grams of one n. A context's number is its n − 1 tokens read as digits of base V, the newest one last."""

    n: int
    contexts: NDArray[np.int64]  # [C], ascending
    first: NDArray[np.int64]  # [C + 1] where the tokens after each context begin
    tokens: NDArray[np.int32]  # [P]
    shares: NDArray[np.float32]  # [P] of the probability after the context, discounted
    left: NDArray[np.float32]  # [C] what the discounts leave for the context without its oldest token


@dataclass(frozen=True)
class Followers:
    """What follows at N places: p(v | place i) = scale[i] · base[row[i], v], and the shares of single tokens."""

    row: NDArray[np.int64]  # [N]
    scale: NDArray[np.float32]  # [N]
    first: NDArray[np.int64]  # [N + 1] where the single tokens of each place begin
    tokens: NDArray[np.int32]  # [M]; a token may come several times
    shares: NDArray[np.float32]  # [M]


@dataclass(frozen=True)
class NGrams:
    """A counted text. `base` is the distribution after each single token, [V, V], or, where the vocabulary is large,
    after any, [1, V]; smoothed, so that it is nowhere zero. `longer` are the orders beyond it."""

    base: NDArray[np.float32]
    longer: tuple[Order, ...]

    def after(self, ids: NDArray[np.int64]) -> Followers:
        """ids [B, T] of whole rows → what follows each of their B·T tokens, given it and those before it in its row."""
        vocabulary, places = self.base.shape[1], ids.size
        room, many = np.ones(places, np.float32), np.zeros(places, np.int64)  # what longer contexts leave, and have
        found = []
        for order in reversed(self.longer):
            number, whole = ids.copy(), np.ones(ids.shape, bool)
            for back in range(1, order.n - 1):
                number[:, back:] += ids[:, :-back] * vocabulary**back
                whole[:, :back] = False
            number = number.ravel()
            at = np.minimum(_found(order.contexts, number), len(order.contexts) - 1)
            known = np.flatnonzero((order.contexts[at] == number) & whole.ravel())
            at = at[known]
            more = order.first[at + 1] - order.first[at]
            found.append((order, known, order.first[at], more, room[known], many[known]))
            room[known] *= order.left[at]
            many[known] += more
        first = np.concatenate([[0], many.cumsum()])
        tokens, shares = np.empty(first[-1], np.int32), np.empty(first[-1], np.float32)
        for order, known, begins, more, left, before in found:  # behind those of longer contexts
            each = np.arange(more.sum()) - np.repeat(more.cumsum() - more, more)
            source, place = each + np.repeat(begins, more), each + np.repeat(first[known] + before, more)
            tokens[place] = order.tokens[source]
            shares[place] = order.shares[source] * np.repeat(left, more)
        row = ids.ravel() if len(self.base) > 1 else np.zeros(places, np.int64)
        return Followers(row, room, first, tokens, shares)


def count(stream: NDArray[np.int64], vocabulary: int, longest: int) -> NGrams:
    """Counts n-grams of up to `longest` tokens of a stream, in which documents have their BOS and EOS.

    Sorting is all the work: seconds for ten million tokens. Raises BadInput where an n-gram's number does not fit.
    """
    check_order(longest, vocabulary)
    longer: list[Order] = []
    grams, times = np.unique(_numbers(stream, longest, vocabulary), return_counts=True)
    for n in range(longest, 1, -1):
        in_table = n == 2 and vocabulary <= LARGEST_TABLE
        longer.insert(0, _discounted(n, grams, times, vocabulary, 0.0 if in_table else LEAST))
        # A shorter n-gram counts as often as different tokens came before it (Kneser and Ney, 1995).
        grams, times = np.unique(grams % vocabulary ** (n - 1), return_counts=True)
    single = np.full(vocabulary, UNSEEN)
    single[grams] += times
    base = (single / single.sum()).astype(np.float32)[None]
    if vocabulary <= LARGEST_TABLE:
        pairs, base = longer.pop(0), np.tile(base, (vocabulary, 1))
        base[pairs.contexts] *= pairs.left[:, None]
        base[np.repeat(pairs.contexts, np.diff(pairs.first)), pairs.tokens] += pairs.shares
    return NGrams(base, tuple(longer))


def check_order(longest: int, vocabulary: int) -> None:
    """Raises BadInput where an n-gram's number does not fit."""
    if vocabulary**longest > 1 << 63:
        raise BadInput(f"counts.order: {longest} tokens out of {vocabulary} do not fit in a number: take fewer")


def _found(contexts: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where numbers belong among ascending contexts. Asked in order: each search begins in cache lines just read."""
    order, found = np.argsort(numbers), np.empty(len(numbers), np.int64)
    found[order] = np.searchsorted(contexts, numbers[order])
    return found


def _numbers(stream: NDArray[np.int64], n: int, vocabulary: int) -> NDArray[np.int64]:
    """Every n-gram of the stream as a number."""
    numbers = stream[: len(stream) - n + 1].copy()
    for i in range(1, n):
        numbers *= vocabulary
        numbers += stream[i : len(stream) - n + 1 + i]
    return numbers


def _discounted(n: int, grams: NDArray[np.int64], times: NDArray[np.int64], vocabulary: int, least: float) -> Order:
    """n-grams [P], ascending, and how often each counts → their order, by modified Kneser-Ney discounts.

    Tokens with less than the `least` share are dropped. After frequent contexts they are most of all: each would have
    to be looked up at every such place, for next to nothing.
    """
    contexts, first = np.unique(grams // vocabulary, return_index=True)
    many = np.diff(first, append=len(grams))
    totals = np.repeat(np.add.reduceat(times, first), many)
    shares = (times - _discounts(times)[np.minimum(times, 3)]) / totals
    kept = shares >= least
    shares *= kept
    left = 1 - np.add.reduceat(shares, first)
    first = np.append(0, np.add.reduceat(kept, first, dtype=np.int64).cumsum())
    tokens = (grams[kept] % vocabulary).astype(np.int32)
    return Order(n, contexts, first, tokens, shares[kept].astype(np.float32), left.astype(np.float32))


def _discounts(times: NDArray[np.int64]) -> NDArray[np.float64]:
    """What is taken from an n-gram that counts 0, 1, 2, 3 or more times (Chen and Goodman, 1998, equation 17)."""
    n1, n2, n3, n4 = (max(int((times == i).sum()), 1) for i in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    estimates = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    # Of little text the estimates may be anything; a share must stay positive and something must be left.
    return np.array([0.0, *np.clip(estimates, 0.1, [0.9, 1.8, 2.7])])
