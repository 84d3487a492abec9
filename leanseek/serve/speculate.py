"""Speculative decoding with the MTP module (report §5.4.3): two tokens for the price of a little more than one.

The module foretells the token after the newest. The main model then reads both at once, which costs little more than
reading one, and what follows the newest is drawn from its logits as always. Where that is the draft, what follows the
draft may be drawn in the same step; where it is not, the draft is forgotten and nothing is lost but its cost.

The text is the one that would have been drawn without drafts, token for token, and so its distribution is exact: a
draft never enters the text, it only says whether a second draw is possible. To be right often it is drawn by the same
chance as the token it foretells (`sampling.race`): equal distributions then always draw the same token.

With p the share of right drafts, and verification and draft costing v and d plain steps, tokens come (1 + p) / (v + d)
times as fast.
"""

from collections.abc import Callable, Sequence


def follow(draw: Callable[[list[int], int], list[int]], drafts: Sequence[int | None], read: int) -> list[list[int]]:
    """What follows the newest token of every row, and its draft where that was right; one or two tokens each.

    draw(rows, t): draws for these rows what follows the t-th of the `read` tokens that each has just read, and says
    which; −1 for a text that this has ended.
    """
    followed: list[list[int]] = [[] for _ in drafts]
    going = list(range(len(drafts)))
    for t in range(read):
        for row, token in zip(going, draw(going, t), strict=True):
            followed[row].append(token)
        going = [row for row in going if followed[row][-1] == drafts[row]]
        if not going:
            break
    return followed
