"""How much a stage reads of each source: weights, evened out by temperature, within what may be repeated.

Sources differ in size by orders of magnitude. Reading them in proportion to their tokens drowns the small ones;
reading all alike repeats them until they are learnt by heart. A temperature T lies between: a source of n tokens has
n^(1/T) (Conneau et al. 2020, §3.1, whose α is 1/T). And what has been read some four times is hardly worth reading
again (Muennighoff et al. 2023), so that a limit hands the rest on to the other sources.
"""

from collections.abc import Mapping

from leanseek.config import BadInput

DECIMALS = 4  # of a share: the pattern in which sources take turns then repeats after 10,000 rows at most


def shares(weights: Mapping[str, float], tokens: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Shares that sum to 1, in proportion to weight · tokens^(1/T), by source."""
    raw = {source: weight * tokens[source] ** (1 / temperature) for source, weight in weights.items() if weight}
    return {source: value / sum(raw.values()) for source, value in raw.items()}


def within(shares: Mapping[str, float], wanted: float, left: Mapping[str, float]) -> dict[str, float]:
    """The shares of `wanted` tokens of which no source gives more than it has `left`; the others take over the rest.

    They keep their proportions to each other. Raises BadInput where all together have too little left.
    """
    full: dict[str, float] = {}  # tokens of the sources that give all they have
    while over := [source for source, amount in _others(shares, wanted, full).items() if amount > left[source]]:
        full |= {source: left[source] for source in over}
        if len(full) == len(shares):
            raise BadInput(
                f"{wanted:,.0f} tokens are asked for, and within data.most_epochs {sum(full.values()):,.0f} are left: "
                "take fewer tokens, more text, or a higher limit"
            )
    amounts = full | _others(shares, wanted, full)
    return {source: amounts[source] / wanted for source in shares}


def _others(shares: Mapping[str, float], wanted: float, full: Mapping[str, float]) -> dict[str, float]:
    """What the sources that are not full read of the tokens that those leave over."""
    open_to = {source: share for source, share in shares.items() if source not in full}
    rest, total = wanted - sum(full.values()), sum(open_to.values())
    return {source: share / total * rest for source, share in open_to.items()}
