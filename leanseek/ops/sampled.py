"""The output head's loss for part of its work, and from more than the one token that came.

Sampled softmax (Jean et al. 2015, arXiv 1412.2007): a loss needs the logits of the tokens that could have come, and the
others only as a sum, to which a part of them stands for all. Where it is known beforehand what may come, as counts of
the text know, that is a target too, and says which tokens the part must not lack.

N places · D width · V vocabulary · S candidates of a piece of n places. Tokens are numbered by how often they come.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, count
from typing import NamedTuple

import torch
from torch import Tensor

from leanseek.ops.loss import IGNORE, OfLogits, head_loss, total_and_softmax

LIKELY = 0.02  # a token of which as much is expected at a place is among the candidates of its piece
WHOLE = 64  # candidates come in multiples of it: oneDNN compiles a product for every size that it meets


@dataclass(frozen=True)
class Expected:
    """What is expected at N places: q(v | place i) = scale[i] · base[row[i], v], and more for single tokens."""

    base: Tensor  # [R, V]
    row: Tensor  # [N]
    scale: Tensor  # [N]
    first: Tensor  # [N + 1] where the single tokens of each place begin
    tokens: Tensor  # [M]
    shares: Tensor  # [M]


class Candidates(NamedTuple):
    """Those of a piece: the frequent tokens, one group of the others, and what else was asked for."""

    tokens: Tensor  # [S]
    column: Tensor  # [V] where each is among them, -1: it is not
    times: Tensor  # [S] how many tokens each stands for, itself included
    frequent: int
    group: slice

    def of_base(self, base: Tensor, row: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """What base [R, V] has in each of the rows [n] for what all candidates stand for, in three parts, with their
        columns."""
        many, end = self.group.stop - self.group.start, self.frequent + self.group.stop - self.group.start
        yield slice(0, self.frequent), base[:, : self.frequent].index_select(0, row)
        if many:
            times = self.times[self.frequent : end].to(base.dtype)
            yield slice(self.frequent, end), base[:, self.group].index_select(0, row).mul_(times)
        if end < len(self.tokens):
            at = row[:, None] * base.shape[1] + self.tokens[end:]
            yield slice(end, len(self.tokens)), base.view(-1).index_select(0, at.view(-1)).view_as(at)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens numbered by how often they come: the `frequent` are in every piece, of the others one group is, in turn.

    `begins` [groups + 1] are the groups' first numbers and their end; without groups every token is frequent.
    """

    frequent: int
    begins: tuple[int, ...]

    @property
    def groups(self) -> int:
        return len(self.begins) - 1

    @property
    def candidates(self) -> float:
        """How many a piece has, beside those asked for."""
        return self.frequent + (self.begins[-1] - self.frequent) / max(self.groups, 1)

    def of(self, asked: Tensor, turn: int) -> Candidates:
        """The candidates of a piece that must have the tokens `asked`, which then stand for themselves alone."""
        frequent, end = self.frequent, self.begins[-1]
        group = slice(*self.begins[(k := turn % self.groups) : k + 2]) if self.groups else slice(frequent, frequent)
        inside = (asked >= group.start) & (asked < group.stop)
        every = torch.arange(end, device=asked.device)
        others = torch.ones_like(every, dtype=torch.bool)
        others[:frequent] = others[group] = False
        beyond = asked[(asked >= frequent) & ~inside].unique()
        others[beyond] = False
        short = -(frequent + group.stop - group.start + len(beyond)) % WHOLE
        tokens = torch.cat((every[:frequent], every[group], beyond, every[others][:short]))
        times = torch.ones(len(tokens), device=asked.device)
        times[frequent : frequent + group.stop - group.start] = max(self.groups, 1)
        times[asked[inside] - group.start + frequent] = 1
        column = torch.full_like(every, -1)
        column[tokens] = every[: len(tokens)]
        return Candidates(tokens, column, times, frequent, group)


def by_frequency(times: Tensor, frequent: int, groups: int) -> tuple[Tensor, Vocabulary]:
    """The ids [V] of all numbers, and how they are taken: times [V] says how often each id comes.

    Each group has every so manieth of the others, so that all are alike. With `frequent` as many as there are ids, or
    more, there are none.
    """
    ids = times.argsort(descending=True, stable=True)
    if frequent >= len(ids):
        return ids, Vocabulary(len(ids), (len(ids),))
    parts = [ids[:frequent], *(ids[frequent + k :: groups] for k in range(groups))]
    return torch.cat(parts), Vocabulary(frequent, tuple(accumulate(map(len, parts))))


def sampled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocabulary: Vocabulary,
    expected: Expected | None = None,
    share: float = 0.0,
) -> Tensor:
    """The value of `linear_cross_entropy`, with the gradient of −Σ Σᵥ r(v) log p(v) over the valid targets.

    hidden [N, D], weight [V, D], targets [N], all in numbers. r is the target and, `share` of it, what is expected: a
    run learns from that, while what it tells should be comparable. Where the vocabulary has groups, both are estimates:
    on average over the groups Σ exp of the logits is what it is over all tokens.
    """
    # Another group begins in every batch, the same one when a batch is seen again.
    turns = count(int(targets.sum()))

    def of_rows(rows: slice) -> tuple[Tensor | None, OfLogits]:
        wanted = targets[rows]
        valid = wanted != IGNORE
        asked = wanted[valid]
        if expected is not None:
            first = expected.first[rows.start : rows.stop + 1]
            place = torch.repeat_interleave(first.diff())  # [m] of each single token
            tokens, shares = (each[first[0] : first[-1]] for each in (expected.tokens, expected.shares))
            asked = torch.cat((asked, tokens[shares >= LIKELY]))
        found = vocabulary.of(asked, next(turns))

        def of_logits(logits: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
            """logits [n, S] → the target's losses [n], and p − r [n, S]."""
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if vocabulary.groups:
                wide.add_(found.times.log())
            index = found.column[wanted.clamp(min=0)][:, None]
            total, error = total_and_softmax(wide)
            losses = (total - wide.gather(1, index)).squeeze(1) * valid
            if expected is not None:
                scale = -share * expected.scale[rows, None].to(error.dtype)
                for columns, part in found.of_base(expected.base, expected.row[rows]):
                    error[:, columns].addcmul_(part.to(error.dtype), scale)
                column = found.column[tokens]
                of_single = shares * found.times[column] * (column >= 0)
                at = place * error.shape[1] + column.clamp(min=0)
                error.view(-1).index_add_(0, at, of_single.to(error.dtype), alpha=-share)
            error.scatter_add_(1, index, error.new_full(index.shape, share - 1)).mul_(valid[:, None])
            return losses, error.to(logits.dtype)

        return found.tokens if vocabulary.groups else None, of_logits

    return head_loss(hidden, weight, of_rows, vocabulary.candidates, pieces=max(vocabulary.groups, 1))
