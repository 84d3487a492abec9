"""Counting before training: what follows what in the text, as a teacher for the first part of a run.

The first thing a language model learns is which tokens follow which, and it learns it one token at a time. Counting
finds the same in seconds, over more text than the run will read, and a count says of every place what may follow and
how likely, where the text has a single token. So at first the model learns from the counts, then more and more from
the text itself, in which there is what no count of a few tokens knows.

Tokens are counted by number, the frequent ones first, so that a loss can do without most of the rare ones.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanseek.config import Config, CountsConfig
from leanseek.data.ngrams import NGrams, check_order, count
from leanseek.data.shards import Data
from leanseek.data.tokenizer import Tokenizer
from leanseek.ops.sampled import Expected, Vocabulary, by_frequency, sampled_cross_entropy


@dataclass(frozen=True)
class Counts:
    """Counted text, its table on the model's device and in its precision. Tokens go by number. V ids."""

    ngrams: NGrams
    base: Tensor  # [V, V] or [1, V]
    vocabulary: Vocabulary
    times: Tensor  # [V] that each token comes in the text

    def expected(self, ids: Tensor) -> Expected:
        """ids [b, T] of whole rows → what may follow each of their tokens."""
        after = self.ngrams.after(self.vocabulary.number[ids].cpu().numpy())
        parts = after.row, after.scale, after.first, after.tokens, after.shares
        return Expected(self.base, *(torch.from_numpy(part).to(ids.device) for part in parts))

    def loss(self, hidden: Tensor, weight: Tensor, ids: Tensor, targets: Tensor, share: float) -> Tensor:
        """Cross-entropy summed over the valid targets, with the gradient of one from the counts, to that share.

        hidden [b, T, D], weight [V, D] of the head, ids and targets [b, T].
        """
        main = hidden.flatten(0, 1), weight, targets.flatten()
        return sampled_cross_entropy(*main, self.vocabulary, self.expected(ids), share)


def counts_of(
    config: Config, data: Data, tokenizer: Tokenizer, device: torch.device, dtype: torch.dtype = torch.float32
) -> Counts | None:
    """The counts that a configuration asks for; None where it asks for none. Raises BadInput where they do not fit."""
    if config.counts is None:
        return None
    return counted(_documents(data, tokenizer), config.model.vocab_size, config.counts, device, dtype)


def counted(
    documents: Iterable[NDArray[np.integer]],
    vocab_size: int,
    config: CountsConfig,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Counts:
    """Counts of documents, each with its BOS and EOS; their table in `dtype`, the logits' own. Raises BadInput."""
    check_order(config.order, vocab_size)
    text, taken = [], 0
    for document in documents:
        if taken >= config.tokens:
            break
        text.append(document)
        taken += len(document)
    stream = np.concatenate(text).astype(np.int64)
    times = torch.from_numpy(np.bincount(stream, minlength=vocab_size))
    vocabulary = by_frequency(times.to(device), config.frequent or vocab_size, config.groups)
    ngrams = count(vocabulary.number.cpu().numpy()[stream], vocab_size, config.order)
    return Counts(ngrams, torch.from_numpy(ngrams.base).to(device, dtype), vocabulary, times[vocabulary.ids.cpu()])


def _documents(data: Data, tokenizer: Tokenizer) -> Iterator[NDArray[np.integer]]:
    """Training documents as the loader reads them, each between its BOS and its EOS."""
    for ids, _ in data.documents("train"):
        yield np.concatenate(([tokenizer.bos_id], ids, [tokenizer.eos_id]))
