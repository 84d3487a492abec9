"""How likely a model finds given continuations of prompts; what prompts have in common at their beginning is read once.

Perplexity-based scoring (report §4.4.1) asks for log p of a few tokens behind a long prompt, and most prompts of a
benchmark begin with the same examples. So the texts form a tree: a stretch that several share is read once into the
latent cache, and each text reads only what is its own behind it. Stretches of one depth, and of about one length, are
read side by side.

B rows · T new tokens of each · D hidden_size · V vocab_size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from leanseek.model.transformer import Transformer
from leanseek.serve.cache import Cache

SHARED = 12  # tokens that texts must have in common beyond what is read already: a pass for fewer costs more
CACHE_TOKENS = 1 << 16  # places in the cache; the tree is cut to fit
BATCH_TOKENS = 4096  # new ones of a pass, padding included
SEEN_TOKENS = 1 << 16  # and those that its rows look back at
LOGITS_AT_ONCE = 1 << 22

Text = tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """How likely are the tokens of `continuation` behind those of `prompt`? Neither is empty."""

    prompt: Text
    continuation: Text

    @property
    def read(self) -> Text:
        """What the model reads: all but the last token, which is predicted only."""
        return (*self.prompt, *self.continuation[:-1])


@dataclass(frozen=True)
class Likelihood:
    """`logprob`: ln p of the whole continuation. `greedy`: whether each of its tokens was the likeliest there."""

    logprob: float
    greedy: bool


@dataclass(eq=False)
class Stretch:
    """Tokens behind those of `parent`; its places in the cache once it was read.

    `wanted`: the number of what was asked, the place in this stretch behind which its continuation begins, and that.
    """

    parent: "Stretch | None"
    tokens: Text
    wanted: list[tuple[int, int, Text]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    @property
    def before(self) -> list[int]:
        """The places of all that comes before it."""
        return [] if self.parent is None else self.parent.before + self.parent.places


@torch.inference_mode()
def likelihoods(
    model: Transformer,
    asked: Sequence[Asked],
    cache_tokens: int = CACHE_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Likelihood]:
    """One for each asked, in their order; what is asked beside one changes nothing but the time.

    What is to be read must fit into the model's context. The model is left in the mode it was in.
    """
    assert model.embed_tokens is not None
    by_text: dict[Text, list[int]] = {}
    for number, one in enumerate(asked):
        by_text.setdefault(one.read, []).append(number)
    texts = sorted(by_text)
    # A prompt's last token is read with its continuation, for the first prediction is made there.
    ends = [min(len(asked[number].prompt) - 1 for number in by_text[text]) for text in texts]
    shared = [0, *(min(_common(texts[i - 1], texts[i]), *ends[i - 1 : i + 1]) for i in range(1, len(texts)))]
    cache_tokens = max([cache_tokens, *map(len, texts)])
    cache = Cache(model.config, cache_tokens, model.dtype, model.embed_tokens.weight.device, size=1)
    found: dict[int, Likelihood] = {}
    training = model.training
    model.eval()
    try:
        for first, last in _portions(texts, shared, cache_tokens):
            free = iter(range(1, cache_tokens + 1))
            for level in _tree(texts, shared, first, last):
                for stretch, text in level:
                    for number in by_text[texts[text]] if text >= 0 else ():
                        one = asked[number]
                        begins = len(one.prompt) - 1 - len(one.read) + len(stretch.tokens)
                        stretch.wanted.append((number, begins, one.continuation))
                for rows in _side_by_side([stretch for stretch, _ in level], batch_tokens):
                    for stretch in rows:
                        stretch.places = [next(free) for _ in stretch.tokens]
                    found |= _read(model, cache, rows)
    finally:
        model.train(training)
    return [found[number] for number in range(len(asked))]


def _common(a: Text, b: Text) -> int:
    """How many tokens two texts have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # by halves: comparing tuples is quick, counting is not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _portions(texts: list[Text], shared: list[int], cache_tokens: int) -> Iterator[tuple[int, int]]:
    """Runs of the sorted texts whose trees fit into the cache."""
    first, places = 0, 0
    for i, text in enumerate(texts):
        new = len(text) - (max(0, shared[i] - SHARED) if i > first else 0)
        if places + new > cache_tokens:
            yield first, i
            first, places, new = i, 0, len(text)
        places += new
    if texts:
        yield first, len(texts)


def _tree(texts: list[Text], shared: list[int], first: int, last: int) -> list[list[tuple[Stretch, int]]]:
    """Stretches by depth, each with the number of the text that ends in it, −1 where several go on.

    shared[i]: how much of its beginning text i may share with text i − 1.
    """
    levels: list[list[tuple[Stretch, int]]] = []
    growing: list[tuple[int, int, int, Stretch | None, int]] = [(first, last, 0, None, 0)]
    while growing:
        begin, end, start, parent, depth = growing.pop()
        if len(levels) == depth:
            levels.append([])
        while begin < end:
            after = begin + 1
            while after < end and shared[after] >= start + SHARED:
                after += 1
            if after == begin + 1:
                levels[depth].append((Stretch(parent, texts[begin][start:]), begin))
            else:
                until = min(shared[begin + 1 : after])
                stretch = Stretch(parent, texts[begin][start:until])
                levels[depth].append((stretch, -1))
                growing.append((begin, after, until, stretch, depth + 1))
            begin = after
    return levels


def _side_by_side(level: list[Stretch], batch_tokens: int) -> Iterator[list[Stretch]]:
    """Stretches for one pass each: none less than half as long as the longest."""
    rows: list[Stretch] = []
    seen = 0
    for stretch in sorted(level, key=lambda stretch: -len(stretch.tokens)):
        longest = len(rows[0].tokens) if rows else 0
        looks = max(seen, len(stretch.before) + len(stretch.tokens))
        full = (len(rows) + 1) * longest > batch_tokens or (len(rows) + 1) * looks > SEEN_TOKENS
        if rows and (full or 2 * len(stretch.tokens) < longest):
            yield rows
            rows, looks = [], len(stretch.before) + len(stretch.tokens)
        rows.append(stretch)
        seen = looks
    if rows:
        yield rows


def _read(model: Transformer, cache: Cache, rows: list[Stretch]) -> dict[int, Likelihood]:
    """Reads stretches into the cache; what is known then, by the number of what was asked."""
    befores = [stretch.before for stretch in rows]
    counts = [len(stretch.tokens) for stretch in rows]
    pages = [before + stretch.places for before, stretch in zip(befores, rows, strict=True)]
    places = cache.at(pages, list(map(len, befores)), counts)
    ids = [[*stretch.tokens, *[0] * (max(counts) - count)] for stretch, count in zip(rows, counts, strict=True)]
    device = cache.values.device
    hidden = model(torch.tensor(ids, device=device), places.positions, cache=cache.views(places))  # [B, T, D]
    wanted = [(row, *what) for row, stretch in enumerate(rows) for what in stretch.wanted]
    if not wanted:
        return {}
    row_of = [row for row, _, _, continuation in wanted for _ in continuation]
    place_of = [begins + i for _, _, begins, continuation in wanted for i in range(len(continuation))]
    targets = [token for *_, continuation in wanted for token in continuation]
    logprobs, likeliest = _scores(model, hidden[row_of, place_of], torch.tensor(targets, device=device))
    found, first = {}, 0
    for _, number, _, continuation in wanted:
        last = first + len(continuation)
        found[number] = Likelihood(sum(logprobs[first:last]), all(likeliest[first:last]))
        first = last
    return found


def _scores(model: Transformer, hidden: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
    """hidden [N, D], targets [N] → of each target ln p, and whether nothing was likelier."""
    assert model.lm_head is not None
    logprobs: list[float] = []
    likeliest: list[bool] = []
    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = model.lm_head(some)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        picked = logits.gather(1, wanted[:, None]).squeeze(1)
        logprobs += (picked - logits.logsumexp(dim=-1)).tolist()
        likeliest += (logits.argmax(dim=-1) == wanted).tolist()
    return logprobs, likeliest
