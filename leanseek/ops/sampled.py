"""The output head's loss for part of its work, and from more than the one token that came.

Sampled softmax (Jean et al. 2015, arXiv 1412.2007): a loss needs the logits of the tokens that could have come, and the
others only as a sum, in which a part of them stands for all. Where it is known beforehand what may come, as counts of
the text know, that is a target too, and says which tokens the part must not lack.

N places · D width · V vocabulary · S candidates of a piece of n places. In here tokens go by number: the frequent ones
first, the others group by group.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, count
from typing import NamedTuple

import torch
from torch import Tensor

from leanseek.ops import cpu_kernels
from leanseek.ops.loss import IGNORE, OfLogits, head_loss

LIKELY = 0.02  # a token of which a longer context leads to expect so much at a place is a candidate of its piece
MULTIPLE = 64  # of which candidates come: oneDNN compiles a product for every size that it meets


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
    """Those of a piece: the frequent tokens, one group of the others, what else was asked for, and what fills up."""

    tokens: Tensor  # [S]
    column: Tensor  # [V] where each is among them, -1: it is not
    times: Tensor  # [S] how many tokens each stands for, itself included; 0 of what fills up
    frequent: int
    group: slice

    @property
    def beyond(self) -> Tensor:
        """The tokens that are neither frequent nor of the group."""
        return self.tokens[self.frequent + self.group.stop - self.group.start :]

    def of_base(self, base: Tensor, row: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """What base [R, V] has in each of the rows [n] for what all candidates stand for, in three parts, with their
        columns."""
        end = len(self.tokens) - len(self.beyond)
        times = self.times.to(base.dtype)
        yield slice(0, self.frequent), base[:, : self.frequent].index_select(0, row)
        if end > self.frequent:
            yield slice(self.frequent, end), base[:, self.group].index_select(0, row).mul_(times[self.frequent : end])
        if end < len(times):
            at = row[:, None] * base.shape[1] + self.beyond
            yield slice(end, len(times)), base.view(-1).index_select(0, at.view(-1)).view_as(at).mul_(times[end:])


@dataclass(frozen=True)
class Vocabulary:
    """All tokens by number: the `frequent` are in every piece, of the others one group is, in turn.

    `begins` [groups + 1] are the groups' first numbers and their end; without groups every token is frequent.
    """

    ids: Tensor  # [V] of each number
    number: Tensor  # [V] of each id
    frequent: int
    begins: tuple[int, ...]

    @property
    def groups(self) -> int:
        return len(self.begins) - 1

    @property
    def candidates(self) -> float:
        """How many a piece has, beside those asked for."""
        return self.frequent + (len(self.ids) - self.frequent) / max(self.groups, 1)

    def numbers(self, ids: Tensor) -> Tensor:
        """The numbers of ids; IGNORE stays."""
        return torch.where(ids == IGNORE, IGNORE, self.number[ids.clamp(min=0)])

    def of(self, asked: Tensor, turn: int) -> Candidates:
        """The candidates of a piece that must have the tokens `asked`, which then stand for themselves alone."""
        frequent, turn = self.frequent, turn % max(self.groups, 1)
        group = slice(*self.begins[turn : turn + 2]) if self.groups else slice(frequent, frequent)
        inside = (asked >= group.start) & (asked < group.stop)
        beyond = asked[(asked >= frequent) & ~inside].unique()
        every = torch.arange(len(self.ids), device=asked.device)
        tokens = torch.cat((every[:frequent], every[group], beyond))
        column = torch.full_like(every, -1)
        column[tokens] = every[: len(tokens)]
        times = torch.ones(len(tokens), device=asked.device)
        times[frequent : len(tokens) - len(beyond)] = max(self.groups, 1)
        times[column[asked[inside]]] = 1
        if self.groups:
            fill = -len(tokens) % MULTIPLE
            tokens, times = torch.cat((tokens, tokens.new_zeros(fill))), torch.cat((times, times.new_zeros(fill)))
        return Candidates(tokens, column, times, frequent, group)


def by_frequency(times: Tensor, frequent: int, groups: int) -> Vocabulary:
    """The vocabulary of a text in which each id comes so many `times` [V].

    After the frequent ones every `groups`-th of the others makes a group, so that all are alike. With as many
    `frequent` as there are ids, or more, there are no groups, and a number is the id.
    """
    if frequent >= len(times):
        ids = torch.arange(len(times), device=times.device)
        return Vocabulary(ids, ids, len(ids), (len(ids),))
    ids = times.argsort(descending=True, stable=True)
    parts = [ids[:frequent], *(ids[frequent + k :: groups] for k in range(groups))]
    ids = torch.cat(parts)
    return Vocabulary(ids, ids.argsort(), frequent, tuple(accumulate(map(len, parts))))


def sampled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocabulary: Vocabulary,
    expected: Expected | None = None,
    share: float = 0.0,
) -> Tensor:
    """The value of `linear_cross_entropy`, with the gradient of −Σ Σᵥ r(v) log p(v) over the valid targets.

    hidden [N, D], weight [V, D] and targets [N] by id. r is the target and, `share` of it, what is expected, which goes
    by number: a run learns from that, while what it tells should be comparable. Where the vocabulary has groups, both
    are estimates, and depend on how the places are divided: on average over the groups Σ exp of the logits is what it
    is over all tokens. Where PyTorch makes the softmax, below FP64, no place's value is above 87 nats.
    """
    targets = vocabulary.numbers(targets)
    turns = count(first_turn(targets))
    if expected is None:
        expected, share = _nothing(targets, len(vocabulary.ids), hidden.dtype), 0.0

    def of_rows(rows: slice) -> tuple[tuple[Tensor, Tensor | None] | None, OfLogits]:
        at_once = cpu_kernels.takes(hidden, expected.base)
        wanted = targets[rows]
        valid = wanted != IGNORE
        first = expected.first[rows.start : rows.stop + 1]
        tokens, shares = (each[first[0] : first[-1]] for each in (expected.tokens, expected.shares))
        found = vocabulary.of(torch.cat((wanted[valid], tokens[shares >= LIKELY])), next(turns))
        target, single = found.column[wanted.clamp(min=0)], found.column[tokens]

        def of_logits(logits: Tensor, _: bool) -> tuple[Tensor, Tensor]:
            """logits [n, S] → the target's losses [n], and p − r [n, S].

            Where logits are sampled all is in their own precision: in BF16 every pass is of half the bytes, and what
            is rounded off is little beside what sampling leaves out.
            """
            wide = torch.promote_types(logits.dtype, torch.float32)
            error = logits.softmax(dim=-1, dtype=logits.dtype if vocabulary.groups else wide)
            flat = error.view(-1)
            begins = torch.arange(0, error.numel(), error.shape[1], device=error.device)
            losses = flat[begins + target].to(wide).clamp(min=torch.finfo(wide).tiny).log().neg() * valid
            if share:
                scale = -share * expected.scale[rows, None].to(error.dtype)
                for columns, part in found.of_base(expected.base, expected.row[rows]):
                    error[:, columns].addcmul_(part.to(error.dtype), scale)
            place = torch.repeat_interleave(first.diff())  # [m] of each single token
            at = torch.cat((begins + target, begins[place] + single.clamp(min=0)))
            kept = share * shares * found.times[single] * (single >= 0)
            of_single = torch.cat((torch.full_like(losses, 1 - share), kept.to(wide)))
            flat.index_add_(0, at, of_single.to(error.dtype), alpha=-1)
            return losses, error.mul_(valid[:, None]).to(logits.dtype)

        def of_logits_at_once(logits: Tensor, _: bool) -> tuple[Tensor, Tensor]:
            """The same, every logit with what it stands for."""
            of_base = expected.base, expected.row[rows], expected.scale[rows]
            of_single = first - first[0], single, shares
            wish = cpu_kernels.Wish(torch.where(valid, target, -1), share, *of_base, *of_single)
            return cpu_kernels.errors(logits, found.times, found.frequent, found.group, found.beyond, wish), logits

        of = of_logits_at_once if at_once else of_logits
        if not vocabulary.groups:
            return None, of
        return (vocabulary.ids[found.tokens], None if at_once else found.times.log()), of

    return head_loss(hidden, weight, of_rows, vocabulary.candidates, pieces=max(vocabulary.groups, 1))


def _nothing(targets: Tensor, ids: int, dtype: torch.dtype) -> Expected:
    """Expected at the places of targets [N]: nothing."""
    none = targets.new_zeros(len(targets) + 1)
    base, scale = targets.new_zeros(1, ids, dtype=dtype), targets.new_zeros(len(targets), dtype=torch.float32)
    return Expected(base, none[1:], scale, none, none[:0], scale[:0])


def first_turn(targets: Tensor) -> int:
    """The turn of a call's first piece: by chance, and the same when a run that was killed comes there again."""
    return int(targets.sum())
