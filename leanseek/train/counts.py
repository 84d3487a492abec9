"""Counting before training: what follows what in the text, as a teacher for the first part of a run.

The first thing a language model learns is which tokens follow which, and it learns it one token at a time. Counting
finds the same in seconds, over more text than the run will read, and a count says of every place what may follow and
how likely, where the text has a single token. So at first the model learns from the counts, then more and more from
the text itself, in which there is what no count of a few tokens knows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanseek.config import Config
from leanseek.data.ngrams import NGrams, count
from leanseek.data.shards import Data
from leanseek.data.tokenizer import Tokenizer
from leanseek.ops.loss import Expected


@dataclass(frozen=True)
class Counts:
    """Counted text, its table on the model's device."""

    ngrams: NGrams
    base: Tensor  # [V, V] or [1, V]

    def expected(self, ids: Tensor) -> Expected:
        """ids [b, T] of whole rows → what may follow each of their tokens."""
        after = self.ngrams.after(ids.cpu().numpy())
        parts = after.row, after.scale, after.first, after.tokens, after.shares
        return Expected(self.base, *(torch.from_numpy(part).to(ids.device) for part in parts))


def counts_of(config: Config, data: Data, tokenizer: Tokenizer, device: torch.device) -> Counts | None:
    """The counts that a configuration asks for; None where it asks for none. Raises BadInput where they do not fit."""
    if config.counts is None:
        return None
    asked = config.counts
    ngrams = count(_documents(data, tokenizer), config.model.vocab_size, asked.order, asked.tokens)
    return Counts(ngrams, torch.from_numpy(ngrams.base).to(device))


def _documents(data: Data, tokenizer: Tokenizer) -> Iterator[NDArray[np.integer]]:
    """Training documents as the loader reads them, each between its BOS and its EOS."""
    for ids, _ in data.documents("train"):
        yield np.concatenate(([tokenizer.bos_id], ids, [tokenizer.eos_id]))
