"""Token shards to batches: packing, fill-in-the-middle, split tokens and mixtures (report §4.1).

A batch is a pure function of (seed, stage, sample, rank, ranks). What a stage reads, and in which order, follows from
its index, which follows from (seed, stage) and the data alone; so resuming is exact and the global order does not
depend on the number of ranks. Documents in one row see each other, as in the report.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from leanseek.config import BadInput, DataConfig, Stage
from leanseek.data.clean import mix
from leanseek.data.mixture import DECIMALS, shares, within
from leanseek.data.packing import Rows, best_fit, concat, interleave
from leanseek.data.shards import Data, Shard
from leanseek.data.split import Splitter
from leanseek.data.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer

NO_TARGET = -100
# What random numbers are for: the word after the seed, so that no two uses share them.
ORDER, DOCUMENT_ORDER, FIM_CHOICE, FIM_CUT, SPLIT = range(5)


@dataclass(frozen=True)
class Batch:
    """ids and targets [B, T] int64; a target is the token after, or -100 where none is predicted.

    Padding has no target, nor has BOS, nor the first token of a piece cut out of a longer document: that one was
    predicted at the end of the piece before. Every other token of a document is predicted exactly once per epoch.
    Rows whose samples may not see each other say which token is whose, and where in it: `data.chats` makes them.
    """

    ids: np.ndarray
    targets: np.ndarray
    positions: np.ndarray | None = None  # [B, T]
    segments: np.ndarray | None = None  # [B, T]


class Loader:
    """Batches of every stage of a run.

    Args: the opened data, the run's stages and token budget, its seed, how to pack, and the data's own tokenizer.
    Raises BadInput for a source that is not there, a split without text, or a tokenizer that did not write the data.
    """

    def __init__(
        self,
        data: Data,
        stages: tuple[Stage, ...],
        total_tokens: int,
        seed: int,
        data_config: DataConfig,
        tokenizer: Tokenizer,
    ) -> None:
        if tokenizer.fingerprint != data.tokenizer_fingerprint:
            raise BadInput(
                f"{data.folder}: these shards were written by another tokenizer; prepare the data with yours"
            )
        if data_config.fim_rate and (missing := {FIM_BEGIN, FIM_HOLE, FIM_END} - tokenizer.special.keys()):
            raise BadInput(f"data.fim_rate: the tokenizer has no token {min(missing)}; set data.fim_rate=0")
        self.data, self.stages, self.total_tokens, self.seed = data, stages, total_tokens, seed
        self.data_config, self.tokenizer = data_config, tokenizer
        self._shards = data.select("train")
        self._ends = np.cumsum([shard.entry.documents for shard in self._shards])  # document numbers by shard
        self._splitter = Splitter(tokenizer, data_config.split_rate) if data_config.split_rate else None
        self._mixtures = self._mix()
        self.rows = lru_cache(maxsize=None)(self._rows)  # one index per stage and source
        self._turns = lru_cache(maxsize=None)(self._interleave)
        self._order = lru_cache(maxsize=2 * len(data.sources) + 2)(self._permutation)
        self._changed = lru_cache(maxsize=128)(self._changed_document)

    def samples(self, stage: int) -> int:
        """Rows the stage trains on: its share of the budget, in whole rows."""
        return whole_rows(self.stages[stage], self.total_tokens)

    def epochs(self, stage: int, sample: int) -> dict[str, float]:
        """How often each source, or all text as "", has been read after `sample` rows of the stage."""
        pools = list(self._mixtures[stage])
        if len(pools) == 1:
            taken = [sample]
        else:
            source, _, quotas = self._turns(stage)
            rounds, rest = divmod(sample, len(source))
            taken = [rounds * quota + int((source[:rest] == i).sum()) for i, quota in enumerate(quotas)]
        return {pool or "": n / len(self.rows(stage, pool)) for pool, n in zip(pools, taken, strict=True)}

    def batch(self, stage: int, sample: int, count: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Rows sample … sample + count − 1 of a stage, or this rank's consecutive part of them: B ≈ count ÷ ranks."""
        width = self.stages[stage].sequence_length
        mine = part_of(sample, count, rank, ranks)
        ids = np.full((len(mine), width + 1), self.tokenizer.pad_id, np.int64)
        targets = np.full((len(mine), width + 1), NO_TARGET, np.int64)
        for i, number in enumerate(mine):
            source, row = self._locate(stage, number)
            rows, at = self.rows(stage, source), 0
            for piece in range(rows.first[row], rows.first[row + 1]):
                length = int(rows.length[piece])
                tokens = self._tokens(stage, int(rows.document[piece]), int(rows.start[piece]), length)
                ids[i, at : at + length] = tokens
                targets[i, at + 1 : at + length] = tokens[1:]
                at += length
        return Batch(np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(targets[:, 1:]))

    # ── how much of which source ──────────────────────────────────────────────────────────────────────────────────────

    def _mix(self) -> tuple[dict[str | None, float], ...]:
        """The sources that each stage draws from, with their weights; {None: 1} for all rows alike."""
        most = self.data_config.most_epochs
        counts = {name: self.data.counts("train", name) for name in self.data.sources}
        every = [name for name, count in counts.items() if count.tokens]
        tokens = {name: counts[name].tokens + 2 * counts[name].documents for name in every}  # with BOS and EOS
        left = {name: n * most if most else math.inf for name, n in tokens.items()}
        mixtures: list[dict[str | None, float]] = []
        for stage in self.stages:
            weights = stage.mixture or dict.fromkeys(every, 1.0)
            for name, weight in weights.items():
                self.data.select("train", name)  # refuses a name that is not there, of weight 0 too
                if weight and not tokens.get(name):
                    raise BadInput(f"{self.data.folder}: no training text of source {name!r}")
            if not every:
                raise BadInput(f"{self.data.folder}: no training text")
            wanted = stage.share * self.total_tokens
            as_written = bool(stage.mixture) and stage.temperature is None
            asked = shares(weights, dict.fromkeys(weights, 1) if as_written else tokens, stage.temperature or 1.0)
            given = within(asked, wanted, left)
            for name, share in given.items():
                left[name] -= share * wanted
            if stage.temperature is not None or any(not math.isclose(asked[name], given[name]) for name in given):
                mixtures.append({name: rounded for name, share in given.items() if (rounded := round(share, DECIMALS))})
            elif stage.mixture:
                mixtures.append({name: weight for name, weight in weights.items() if weight})
            else:
                mixtures.append({None: 1.0})
        return tuple(mixtures)

    # ── which row comes when ──────────────────────────────────────────────────────────────────────────────────────

    def _locate(self, stage: int, sample: int) -> tuple[str | None, int]:
        """The source and row that sample of a stage is."""
        pools = list(self._mixtures[stage])
        if len(pools) == 1:
            pool, turn = 0, sample
        else:
            source, before, quotas = self._turns(stage)
            rounds, place = divmod(sample, len(source))
            pool = int(source[place])
            turn = rounds * quotas[pool] + int(before[place])
        epoch, place = divmod(turn, len(self.rows(stage, pools[pool])))
        return pools[pool], int(self._order(stage, pools[pool], epoch)[place])

    def _permutation(self, stage: int, source: str | None, epoch: int) -> np.ndarray:
        rows = len(self.rows(stage, source))
        return shuffled(rows, self.seed, ORDER, stage, self._pool_number(source), epoch)

    def _interleave(self, stage: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        return interleave(list(self._mixtures[stage].values()), self.samples(stage))

    def _pool_number(self, source: str | None) -> int:
        return 0 if source is None else 1 + self.data.sources.index(source)

    # ── which tokens a row has ────────────────────────────────────────────────────────────────────────────────────

    def _rows(self, stage: int, source: str | None) -> Rows:
        documents, lengths = self._lengths(stage, source)
        capacity = self.stages[stage].sequence_length + 1
        if self.data_config.packing == "concat":
            order = shuffled(len(documents), self.seed, DOCUMENT_ORDER, stage, self._pool_number(source))
            return concat(documents[order], lengths[order], capacity)
        return best_fit(documents, lengths, capacity)

    def _lengths(self, stage: int, source: str | None) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and lengths [D] of a source's documents, BOS and EOS included, after fill-in-the-middle."""
        places = [i for i, shard in enumerate(self._shards) if source in (None, shard.entry.source)]
        numbers = np.concatenate([self._numbers(i) for i in places])
        sizes = np.concatenate([np.diff(self._shards[i].starts) + 2 for i in places])
        if self._splitter is not None:
            sizes = sizes + np.concatenate([self._more_by_splitting(stage, i) for i in places])
        for i in np.flatnonzero(self._has_fim(stage, numbers)):
            sizes[i] = len(self._fim_document(stage, int(numbers[i])))
        return numbers, sizes

    def _tokens(self, stage: int, document: int, start: int, length: int) -> np.ndarray:
        """Tokens start … start + length − 1 of BOS, document, EOS."""
        if self._splitter is not None or self._has_fim(stage, np.array([document]))[0]:
            return self._changed(stage, document)[start : start + length]
        ids = self._stored(document)
        tokens = np.empty(length, np.int64)
        inside = ids[max(start - 1, 0) : start - 1 + length]
        at = 1 if start == 0 else 0
        tokens[at : at + len(inside)] = inside
        if start == 0:
            tokens[0] = self.tokenizer.bos_id
        if start + length == len(ids) + 2:
            tokens[-1] = self.tokenizer.eos_id
        return tokens

    def _stored(self, document: int) -> np.ndarray:
        place = int(np.searchsorted(self._ends, document, side="right"))
        shard: Shard = self._shards[place]
        i = document - (int(self._ends[place]) - shard.entry.documents)
        return shard.ids[shard.starts[i] : shard.starts[i + 1]]

    def _numbers(self, place: int) -> np.ndarray:
        """The numbers of a shard's documents [D]."""
        after = int(self._ends[place])
        return np.arange(after - self._shards[place].entry.documents, after)

    def _changed_document(self, stage: int, document: int) -> np.ndarray:
        """BOS, document, EOS, with tokens split or parts moved."""
        if self._has_fim(stage, np.array([document]))[0]:
            return self._fim_document(stage, document)
        ids = self._stored(document).astype(np.int64)
        if self._splitter is not None:
            chance = mix(self.seed, SPLIT, stage, document, np.arange(len(ids)))
            ids = self._splitter.split(ids, chance)
        return np.concatenate(([self.tokenizer.bos_id], ids, [self.tokenizer.eos_id]))

    def _more_by_splitting(self, stage: int, place: int) -> np.ndarray:
        """How many tokens longer each document of a shard becomes [D]."""
        assert self._splitter is not None
        shard = self._shards[place]
        joined = self._splitter.places(shard.ids)
        which = np.searchsorted(shard.starts, joined, side="right") - 1
        chance = mix(self.seed, SPLIT, stage, self._numbers(place)[which], joined - shard.starts[which])
        more = self._splitter.more(shard.ids[joined], chance)
        return np.bincount(which, more, minlength=shard.entry.documents).astype(np.int64)

    def _has_fim(self, stage: int, documents: np.ndarray) -> np.ndarray:
        chance = mix(self.seed, FIM_CHOICE, stage, documents) >> np.uint64(11)  # 53 bits, as a float has
        return chance < np.uint64(self.data_config.fim_rate * 2**53)

    def _fim_document(self, stage: int, document: int) -> np.ndarray:
        """BOS, then the document as prefix, suffix, middle: cut at two uniform places between characters."""
        text = self.tokenizer.decode(self._stored(document).tolist())
        first, second = sorted(int(n) for n in mix(self.seed, FIM_CUT, stage, document, np.arange(2)) % (len(text) + 1))
        prefix, middle, suffix = self.tokenizer.encode_batch([text[:first], text[first:second], text[second:]])
        begin, hole, end = (self.tokenizer.special[name] for name in (FIM_BEGIN, FIM_HOLE, FIM_END))
        parts = [self.tokenizer.bos_id, begin, *prefix, hole, *suffix, end, *middle, self.tokenizer.eos_id]
        return np.array(parts, np.int64)


def whole_rows(stage: Stage, total_tokens: int) -> int:
    """A stage's share of the budget, in whole rows."""
    return math.floor(stage.share * total_tokens + 1e-6) // stage.sequence_length


def part_of(sample: int, count: int, rank: int, ranks: int) -> range:
    """A rank's part of the rows sample … sample + count − 1.

    The parts of all ranks in order are the batch of one; where `count` does not divide, some have a row more.
    """
    return range(sample + count * rank // ranks, sample + count * (rank + 1) // ranks)


def shuffled(count: int, *words: int) -> np.ndarray:
    """A permutation of `count` that the words decide."""
    order = np.argsort(mix(*words, np.arange(count)), kind="stable")
    return order.astype(np.uint32) if count < 1 << 32 else order
