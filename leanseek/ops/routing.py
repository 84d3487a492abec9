"""Which experts a token visits (report §2.1.2): one custom op, so that recomputation can keep its result.

Routing counts the tokens each expert receives. Were it run again when activations are recomputed, the counts would
double and, on a tie, the choice could change; as a single op, a recomputation policy marks it must-save and it runs
once. N tokens · E experts · K chosen · G groups.
"""

import torch
from torch import Tensor


@torch.library.custom_op("leanseek::route", mutates_args=("load",))
def route(scores: Tensor, load: Tensor, k: int, n_group: int, topk_group: int, group_top: int) -> Tensor:
    """`choose`, in training: the tokens that each expert receives are added to `load` [E] int64."""
    experts = choose(scores, k, n_group, topk_group, group_top)
    load += torch.bincount(experts.flatten(), minlength=load.shape[0])
    return experts


def choose(scores: Tensor, k: int, n_group: int, topk_group: int, group_top: int) -> Tensor:
    """The k best experts of each token among its `topk_group` best groups: scores [N, E] → experts [N, K] int64.

    Scores are biased where a bias steers. A group's score is the sum of its `group_top` best: two in V3, one, the
    maximum, in V2. With one group there is nothing to limit.
    """
    if n_group > 1:
        groups = scores.unflatten(-1, (n_group, -1))  # [N, G, E/G]
        best = groups.topk(group_top, dim=-1).values.sum(dim=-1).topk(topk_group, dim=-1).indices  # [N, topk_group]
        closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
        # Minus infinity and not zero: a biased score may be negative, and a closed group must lose even then.
        scores = groups.masked_fill(closed[..., None], float("-inf")).flatten(1)
    return scores.topk(k, dim=-1).indices


@route.register_fake
def _(scores: Tensor, load: Tensor, k: int, n_group: int, topk_group: int, group_top: int) -> Tensor:
    return scores.new_empty((scores.shape[0], k), dtype=torch.int64)
