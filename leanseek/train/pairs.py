"""Where a model begins that has counted: with all that a model without layers can know, which is what follows a token.

Such a model is an embedding, a norm and a head, and says of the next token v after u what their product says. The best
one for the table of pairs p(v | u) that `data/ngrams.py` has is no matter of training: up to a constant for each u, the
logarithms of the table are to be a product of two matrices of width D, and singular values give the nearest.
`counts.begin` turns it on.

V vocabulary · D hidden_size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from leanseek.config import BadInput, Config
from leanseek.data.ngrams import LARGEST_TABLE
from leanseek.train.counts import Counts

# Random directions beyond those that are kept, and how often they are turned towards the largest singular values
# (Halko, Martinsson and Tropp, 2011).
MORE, TURNS = 20, 2


def check_table(config: Config) -> None:
    """Raises BadInput where there are too many ids for a table of their pairs, and one is asked for."""
    if config.counts is not None and config.counts.begin and config.model.vocab_size > LARGEST_TABLE:
        raise BadInput(
            f"counts.begin: pairs of {config.model.vocab_size:,} ids are no table: take at most {LARGEST_TABLE:,} ids"
        )


def beginning(config: Config, counts: Counts | None) -> dict[str, Tensor]:
    """By name, the first weights of embedding and head, each [V, D] by id in FP32; none unless `counts.begin` asks."""
    if counts is None or config.counts is None or not config.counts.begin:
        return {}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(config.train.seed)
        table = torch.from_numpy(counts.ngrams.base)
        embedding, head = factors(table, counts.times, config.model.hidden_size)
    number = counts.vocabulary.number.cpu()
    std = config.train.init_std if config.train.embedding_std is None else config.train.embedding_std
    return {"embed_tokens.weight": embedding[number] * std, "lm_head.weight": head[number]}


def factors(table: Tensor, times: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Embedding and head [V, D], D = `width`, of the model without layers that is nearest to a `table` p(v | u) [V, V].

    The embedding's rows have a root mean square of 1. Near is meant in logarithms, each weighted by the fourth root of
    the `times` [V] that u comes, and of those that v comes.
    """
    logs = table.log()
    logs -= logs.mean(dim=1, keepdim=True)  # a softmax does not see it
    weight = (1.0 + times)[:, None] ** 0.25
    u, s, v = torch.svd_lowrank(weight * logs * weight.T, q=min(width - 1 + MORE, len(table)), niter=TURNS)
    most = min(width - 1, len(s))
    rows, columns = (F.pad(x[:, :most] * s[:most].sqrt() / weight, (0, width - 1 - most)) for x in (u, v))
    # The norm in front of the head would take away the rows' lengths. In one direction more, which the head does not
    # look at, all get the same.
    lengths = rows.norm(dim=1, keepdim=True)
    rest = (lengths.max().square() - lengths.square()).sqrt()
    scale = width**0.5 / lengths.max()
    turn = torch.linalg.qr(torch.randn(width, width))[0]  # Adam's steps are alike in all directions
    return torch.cat((rows, rest), dim=1) @ turn * scale, F.pad(columns, (0, 1)) @ turn / scale
