"""Documents into rows, and sources into turns: pure functions over lengths and weights (report §4.1).

D documents · P pieces of them · R rows.
"""

import bisect
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Rows as lists of pieces: piece p is tokens start[p] … start[p] + length[p] − 1 of document[p].

    Pieces first[r] … first[r+1] − 1 make row r. A document counts its BOS and EOS as tokens.
    """

    document: np.ndarray  # [P]
    start: np.ndarray  # [P]
    length: np.ndarray  # [P]
    first: np.ndarray  # [R+1]

    def __len__(self) -> int:
        return len(self.first) - 1


def best_fit(documents: np.ndarray, lengths: np.ndarray, capacity: int) -> Rows:
    """Best-fit-decreasing: every piece, longest first, into the fullest row of `capacity` tokens that takes it.

    Args: document numbers and lengths [D]. Longer documents are cut into pieces that overlap by one token.
    """
    pieces = -(-(lengths - 1) // (capacity - 1))  # per document; each but the last fills a row
    document = np.repeat(documents, pieces)
    ordinal = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = ordinal * (capacity - 1)
    length = np.minimum(np.repeat(lengths, pieces) - start, capacity)

    order = np.argsort(-length, kind="stable")
    row_of = np.empty(len(order), np.int64)
    whole = int((length == capacity).sum())
    row_of[order[:whole]] = np.arange(whole)
    rows = whole
    spaces: list[int] = []  # the sizes of space that some row has left, ascending …
    with_space: dict[int, list[int]] = {}  # … and those rows
    for piece, size in zip(order[whole:].tolist(), length[order[whole:]].tolist(), strict=True):
        at = bisect.bisect_left(spaces, size)
        if at == len(spaces):
            row, left = rows, capacity - size
            rows += 1
        else:
            space = spaces[at]
            row, left = with_space[space].pop(), space - size
            if not with_space[space]:
                del with_space[space], spaces[at]
        row_of[piece] = row
        if left > 1:  # every piece has two tokens at least
            if left not in with_space:
                with_space[left] = []
                bisect.insort(spaces, left)
            with_space[left].append(row)

    by_row = order[np.argsort(row_of[order], kind="stable")]
    first = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))])
    return _compact(document[by_row], start[by_row], length[by_row], first)


def concat(documents: np.ndarray, lengths: np.ndarray, capacity: int) -> Rows:
    """One stream of all documents in the order given, cut every `capacity` − 1 tokens; rows overlap by one token."""
    ends = np.cumsum(lengths)
    begins, total, stride = ends - lengths, int(ends[-1]), capacity - 1
    row_begins = np.arange(0, max(total - 1, 1), stride)
    at = np.union1d(begins, row_begins)  # where pieces begin in the stream
    document = np.searchsorted(begins, at, side="right") - 1
    row = np.searchsorted(row_begins, at, side="right") - 1
    # A row takes in the first token of the next one as its last target, unless that is a BOS: no target, left out.
    length = np.minimum(ends[document], row_begins[row] + capacity) - at
    first = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(row_begins)))])
    return _compact(documents[document], at - begins[document], length, first)


def interleave(weights: list[float], samples: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Turns [P] of sources by weight: after any number n of samples each has had less than one turn off weight · n.

    Earliest deadline first: turn j of a source of share w is due by sample j / w. The pattern repeats every P samples,
    where the weights, read as the decimal fractions they were written as, come out even; P is `samples` at most.
    Returns source [P], how many turns it had before in the pattern [P], and the turns of each source per pattern.
    """
    shares = [Fraction(str(weight)) for weight in weights]
    shares = [share / sum(shares) for share in shares]
    even = math.lcm(*(share.denominator for share in shares))
    quotas = [int(share * even) for share in shares]
    length = max(min(even, samples), 1)
    source, before = np.empty(length, np.int16), np.empty(length, np.int64)
    taken = [0] * len(quotas)
    for n in range(length):
        _, chosen = min(
            (-(-(taken[i] + 1) * even // quota), i)
            for i, quota in enumerate(quotas)
            if quota and taken[i] * even < quota * (n + 1)
        )
        source[n], before[n] = chosen, taken[chosen]
        taken[chosen] += 1
    return source, before, taken


def _compact(document: np.ndarray, start: np.ndarray, length: np.ndarray, first: np.ndarray) -> Rows:
    def small(array: np.ndarray) -> np.ndarray:
        return array.astype(np.int32) if not len(array) or array.max() < 1 << 31 else array

    return Rows(small(document), small(start), small(length), small(first))
