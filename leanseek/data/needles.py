"""Texts in which something was said long ago that is asked for at the end: to learn to look far back, and to be tested.

A needle is a record, "The secret of Mira is the river Danube."; the haystack around it is made of the storyworld's
sentences, in which there are names, but none of these secrets. Needles of one haystack are of different kinds: a river,
a gem, a dance. Below stand the records once more in another order, as questions that answer themselves: what is asked
for is the word behind the kind.
"""

import random
from collections.abc import Iterator, Sequence

from leanseek.data.storyworld import story
from leanseek.data.storyworld.gatherings import NAMES
from leanseek.data.storyworld.questions import sentences
from leanseek.data.storyworld.words import even, listed

HAYSTACK = 1 << 20  # numbers of the stories that a seed's haystacks are made of
ROOM = 120  # characters of a text for each needle in it, which takes about 90 with its question


def records(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Questions up to their answers, and the answers, each of another kind. Both together are a needle."""
    kinds = rng.sample(sorted(KINDS), count)
    return [(f"The secret of {even(rng, NAMES)} is the {kind}", f" {even(rng, KINDS[kind])}") for kind in kinds]


def hay(rng: random.Random, seed: int) -> Iterator[str]:
    """Sentences of story after story, without end."""
    while True:
        text = story(seed, rng.randrange(HAYSTACK)).text
        for start, end in sentences(text):
            yield text[start:end]


def buried(straw: Sequence[str], needles: Sequence[tuple[float, str]]) -> str:
    """The haystack of these sentences with each needle at its depth: 0 before the first of them, 1 behind the last.

    Depth is measured in characters, at the nearest gap; needles are in the order of their depths.
    """
    ends = [0]
    for sentence in straw:
        ends.append(ends[-1] + len(sentence) + 1)
    parts, begun = [], 0
    for depth, needle in needles:
        gap = min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))
        parts += [*straw[begun:gap], needle]
        begun = gap
    return " ".join([*parts, *straw[begun:]])


def needle_text(rng: random.Random, seed: int, size: int) -> str:
    """About `size` characters: needles at random depths of a haystack, and the questions with their answers.

    Where there is no room for hay, the question comes several times: what is to be learnt first, and nothing beside it.
    """
    most = min(max(size // ROOM, 1), len(KINDS))
    needles = [f"{question}{answer}." for question, answer in records(rng, rng.randrange((most + 1) // 2, most + 1))]
    straw: list[str] = []
    left = size - 2 * sum(len(needle) + 1 for needle in needles)
    for sentence in hay(rng, seed):
        left -= len(sentence) + 1
        if left < 0:
            break
        straw.append(sentence)
    depths = sorted(rng.random() for _ in needles)
    asked = rng.sample(needles, len(needles)) * (rng.randrange(2, 6) if size < ROOM else 1)
    return "\n".join([buried(straw, list(zip(depths, needles, strict=True))), *asked])


def needle_texts(seed: int, number: int, size: int, shortest: float, longest: float) -> Iterator[str]:
    """Batch `number`: until they have `size` bytes or more, texts of `shortest` to `longest` characters."""
    rng = random.Random(f"needles:{longest}:{seed}:{number}")
    written = 0
    while written < size:
        text = needle_text(rng, seed, round(rng.uniform(shortest, longest)))
        written += len(text.encode())
        yield text


# No word of these is in the storyworld.
KINDS = {
    "beast": listed("bison, camel, falcon, jaguar, panther, penguin, tiger, zebra"),
    "city": listed("Athens, Berlin, Cairo, Dublin, Lisbon, Prague, Tokyo, Vienna"),
    "dance": listed("bolero, fandango, foxtrot, minuet, polka, rumba, tango, waltz"),
    "gem": listed("agate, amber, diamond, emerald, jade, onyx, sapphire, topaz"),
    "instrument": listed("cello, clarinet, lute, mandolin, oboe, saxophone, tuba, viola"),
    "language": listed("Czech, Danish, Greek, Hindi, Latin, Persian, Turkish, Welsh"),
    "river": listed("Amazon, Congo, Danube, Ganges, Nile, Rhine, Thames, Volga"),
    "spice": listed("cumin, fennel, mustard, oregano, saffron, tarragon, turmeric, vanilla"),
}
