"""Bits per byte by position: what a model makes of a long text near its beginning, and far from it.

The first T tokens of documents that have so many, each document by itself: every position is of the same documents, so
that a difference between positions is the model's.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from leanseek.config import BadInput
from leanseek.data.tokenizer import Tokenizer
from leanseek.eval.bpb import Window, batches, windows_of
from leanseek.model.transformer import Transformer
from leanseek.ops.loss import token_losses

FIRST = 64  # tokens of the first stretch; each further one ends at twice the length


@dataclass(frozen=True)
class Curve:
    """by_position[i]: of the tokens from position `edges[i]` up to, not including, `edges[i + 1]`; bpb: of all."""

    bpb: float
    edges: tuple[int, ...]
    by_position: tuple[float, ...]
    documents: int

    @classmethod
    def of(cls, results: dict[str, Any]) -> Self:
        """The curve that an evaluation kept, from `asdict`."""
        return cls(results["bpb"], tuple(results["edges"]), tuple(results["by_position"]), results["documents"])


@torch.no_grad()
def by_position(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Iterable[tuple[Sequence[int] | NDArray[np.integer], int]],
    length: int,
    batch_tokens: int = 8192,
) -> Curve:
    """Over all documents, ids without BOS and EOS, that have `length` tokens. Raises BadInput when none has."""
    assert model.lm_head is not None
    device, bytes_of = model.lm_head.weight.device, byte_counts(tokenizer)
    nats, sizes, read = np.zeros(length), np.zeros(length), 0

    def windows() -> Iterator[Window]:
        for ids, _ in documents:
            if len(ids) >= length:
                yield next(windows_of(np.asarray(ids, np.int64), length, tokenizer.bos_id))

    training = model.training
    model.eval()
    try:
        for inputs, targets in batches(windows(), batch_tokens):
            ids, wanted = inputs.to(device), targets.to(device)
            hidden = model(ids, torch.arange(length, device=device).expand_as(ids))
            losses = token_losses(hidden.flatten(0, 1), model.lm_head.weight, wanted.flatten())
            nats += losses.view_as(wanted).cpu().double().sum(dim=0).numpy()
            sizes += bytes_of[targets.numpy()].sum(axis=0)
            read += len(ids)
    finally:
        model.train(training)
    if not read:
        raise BadInput(f"no document has {length:,} tokens: give longer ones with --text, or a smaller --context")
    edges = [0, *(FIRST << i for i in range(length.bit_length()) if FIRST << i < length), length]
    bits = nats / math.log(2)
    parts = tuple(bits[a:b].sum() / sizes[a:b].sum() for a, b in itertools.pairwise(edges))
    return Curve(bits.sum() / sizes.sum(), tuple(edges), parts, read)


def byte_counts(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of text that each token is [V]."""
    return np.array([len(tokenizer.token_bytes(number)) for number in range(tokenizer.vocab_size)])


def plot(curves: dict[str, Curve], context: int, file: Path) -> None:
    """Curves by their names as PNG; a line stands where the context ends that is to be compared with."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 4), layout="constrained")
    for name, curve in curves.items():
        axis.stairs(curve.by_position, curve.edges, label=name, linewidth=1.8, baseline=None)
    longest = max(curve.edges[-1] for curve in curves.values())
    if context < longest:
        axis.axvline(context, color="#9db4c0", linewidth=1, linestyle="--")
    axis.set_xscale("symlog", base=2, linthresh=FIRST)
    ticks = [0, *(FIRST << i for i in range(longest.bit_length()) if FIRST << i <= longest)]
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.set(xlabel="position in the text, tokens", ylabel="bits per byte", xlim=(0, longest))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)
