"""Bits per byte, the one quality number that no tokenizer can flatter.

−log2 p of every token of each document, the first included (predicted from BOS), the end of the document excluded;
documents independent; non-overlapping windows of the training context; divided by the raw UTF-8 bytes of the text as
given.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from leanseek.config import BadInput
from leanseek.data.tokenizer import Tokenizer
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import IGNORE, token_losses

# A model, or what asks one that is spread over machines: the −ln p of all targets of all batches together, each batch
# ids and targets [B, T].
Scorer = Transformer | Callable[[Iterable[tuple[Tensor, Tensor]]], float]
Window = tuple[NDArray[np.int64], NDArray[np.int64]]  # inputs and targets, [n] each
SORTED_AT_ONCE = 4096  # windows sorted by length together; bounds the memory, not the result


@dataclass(frozen=True)
class BPB:
    bpb: float
    bytes: int
    tokens: int


@dataclass(frozen=True)
class Share:
    """Of many processes that score together, each takes every so-manieth batch; `total` adds up what they found.

    They run their models equally often: where batches run out, on one of no rows.
    """

    rank: int = 0
    ranks: int = 1
    total: Callable[[float], float] = float

    def of(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        while turn := list(islice(batches, self.ranks)):
            yield turn[self.rank] if self.rank < len(turn) else (turn[0][0][:0], turn[0][1][:0])


ALL = Share()


def bits_per_byte(
    model: Scorer,
    documents: Iterable[tuple[Sequence[int] | NDArray[np.integer], int]],
    context: int,
    bos_id: int,
    batch_tokens: int = 8192,
    share: Share = ALL,
) -> BPB:
    """Score documents, each its ids (without BOS and EOS) and the UTF-8 bytes of its text as given.

    Windows of all documents run together, about `batch_tokens` at a time, padding included. Raises BadInput when there
    is no text at all.
    """
    counted = Counter()
    windows = (window for ids in counted.watch(documents) for window in windows_of(ids, context, bos_id))
    nats = nats_of(model, windows, batch_tokens, share)
    if not counted.bytes:
        raise BadInput("there is no text to score: bits per byte need at least one byte")
    return BPB(nats / math.log(2) / counted.bytes, counted.bytes, counted.tokens)


@dataclass(frozen=True)
class Answers:
    """What the assistant says in chats: a window for each chat, with targets for the words of its answers only."""

    windows: list[Window]
    bytes: int
    tokens: int


def answers_of(samples: Iterable[Window], tokenizer: Tokenizer) -> Answers:
    """The answers to score, of inputs and targets as training has them: but for the EOS, as of a document.

    Raises BadInput when they are all empty.
    """
    bytes_of = np.array([len(tokenizer.token_bytes(number)) for number in range(tokenizer.vocab_size)])
    windows, said, tokens = [], 0, 0
    for inputs, targets in samples:
        wanted = np.where(targets == tokenizer.eos_id, IGNORE, targets)
        scored = wanted[wanted != IGNORE]
        said, tokens = said + int(bytes_of[scored].sum()), tokens + len(scored)
        windows.append((inputs, wanted))
    if not said:
        raise BadInput("the held-out chats have no answer with words in it: bits per byte need at least one byte")
    return Answers(windows, said, tokens)


def answers_bits_per_byte(model: Scorer, answers: Answers, batch_tokens: int = 8192, share: Share = ALL) -> BPB:
    """−log2 p of each token of the answers, given all that stands before it in its chat, over the answers' bytes."""
    nats = nats_of(model, iter(answers.windows), batch_tokens, share)
    return BPB(nats / math.log(2) / answers.bytes, answers.bytes, answers.tokens)


@torch.no_grad()
def nats_of(model: Scorer, windows: Iterator[Window], batch_tokens: int, share: Share = ALL) -> float:
    """−ln p of all targets of all windows together, each window by itself; the model is left in the mode it was in."""
    if not isinstance(model, nn.Module):  # a pipeline scores by itself
        return share.total(model(share.of(batches(windows, batch_tokens))))
    model = cast(Transformer, model)  # or what is called like one: the ledger's controls
    assert model.lm_head is not None
    device = model.lm_head.weight.device
    nats = 0.0
    training = model.training
    model.eval()
    try:
        for ids, targets in share.of(batches(windows, batch_tokens)):
            ids, targets = ids.to(device), targets.to(device)
            # Padding is on the right, where causal attention cannot see it.
            hidden = model(ids, torch.arange(ids.shape[1], device=device).expand_as(ids))
            valid = targets != IGNORE
            nats += token_losses(hidden[valid], model.lm_head.weight, targets[valid]).cpu().double().sum().item()
    finally:
        model.train(training)
    return share.total(nats)


@dataclass
class Counter:
    """Bytes and tokens of the documents that passed."""

    bytes: int = 0
    tokens: int = 0

    def watch(
        self, documents: Iterable[tuple[Sequence[int] | NDArray[np.integer], int]]
    ) -> Iterator[NDArray[np.int64]]:
        for ids, raw_bytes in documents:
            self.bytes += raw_bytes
            self.tokens += len(ids)
            yield np.asarray(ids, np.int64)


def windows_of(ids: NDArray[np.int64], context: int, bos_id: int) -> Iterator[Window]:
    """Cuts a document: window j scores tokens jT … (j + 1)T − 1, each from those before it in the window.

    The input of the first is BOS, of every later one the last token of the window before; positions begin at 0 again.
    """
    shifted = np.concatenate(([bos_id], ids[:-1])) if len(ids) else ids
    for start in range(0, len(ids), context):
        yield shifted[start : start + context], ids[start : start + context]


def batches(windows: Iterator[Window], batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of like length side by side: ids and targets [B, T], padded on the right, at most `batch_tokens` each.

    A window longer than that goes alone.
    """
    while chunk := sorted(islice(windows, SORTED_AT_ONCE), key=lambda window: len(window[0]), reverse=True):
        first = 0
        while first < len(chunk):
            longest = len(chunk[first][0])
            rows = chunk[first : first + max(1, batch_tokens // longest)]
            ids = np.zeros((len(rows), longest), np.int64)
            targets = np.full((len(rows), longest), IGNORE, np.int64)
            for row, (inputs, wanted) in enumerate(rows):
                ids[row, : len(inputs)], targets[row, : len(wanted)] = inputs, wanted
            yield torch.from_numpy(ids), torch.from_numpy(targets)
            first += len(rows)
