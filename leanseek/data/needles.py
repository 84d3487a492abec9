"""Texts in which something was said long ago that is asked for at the end: to learn to look far back, and to be tested.

A needle is a record, "The password of Mira is cobalt walrus."; the haystack around it is made of the storyworld's
sentences, in which there are names, but none of these words. Below stands the record once more, as a question that
answers itself.
"""

import random
from collections.abc import Iterator, Sequence

from leanseek.data.storyworld import story
from leanseek.data.storyworld.gatherings import NAMES
from leanseek.data.storyworld.questions import sentences
from leanseek.data.storyworld.words import even, listed

HAYSTACK = 1 << 20  # numbers of the stories that a seed's haystacks are made of


def record(rng: random.Random) -> tuple[str, str]:
    """A question up to its answer, and the answer. Both together are the needle."""
    return f"The password of {even(rng, NAMES)} is", f" {even(rng, HUES)} {even(rng, BEASTS)}"


def hay(rng: random.Random, seed: int) -> Iterator[str]:
    """Sentences of story after story, without end."""
    while True:
        text = story(seed, rng.randrange(HAYSTACK)).text
        for start, end in sentences(text):
            yield text[start:end]


def buried(straw: Sequence[str], needle: str, depth: float) -> str:
    """The haystack of these sentences with the needle at a depth: 0 before the first of them, 1 behind the last.

    Depth is measured in characters, at the nearest gap.
    """
    ends = [0]
    for sentence in straw:
        ends.append(ends[-1] + len(sentence) + 1)
    gap = min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))
    return " ".join([*straw[:gap], needle, *straw[gap:]])


def needle_text(rng: random.Random, seed: int, size: int) -> str:
    """About `size` characters: a needle at a random depth of a haystack, and the question with its answer.

    Where there is no room for hay, the question comes several times: what is to be learnt first, and nothing beside it.
    """
    needle = "".join(record(rng)) + "."
    straw: list[str] = []
    left = size - 2 * len(needle)
    for sentence in hay(rng, seed):
        left -= len(sentence) + 1
        if left < 0:
            break
        straw.append(sentence)
    times = 1 if straw else rng.randrange(2, 6)
    return buried(straw, needle, rng.random()) + times * f"\n{needle}"


def needle_texts(seed: int, number: int, size: int, shortest: float, longest: float) -> Iterator[str]:
    """Batch `number`: until they have `size` bytes or more, texts of `shortest` to `longest` characters."""
    rng = random.Random(f"needles:{longest}:{seed}:{number}")
    written = 0
    while written < size:
        text = needle_text(rng, seed, round(rng.uniform(shortest, longest)))
        written += len(text.encode())
        yield text


# 256 passwords, none of whose words the storyworld has.
HUES = listed(
    """amber, azure, cobalt, coral, crimson, emerald, indigo, ivory, jade, maroon, ochre, pearl, russet, saffron,
    scarlet, turquoise"""
)
BEASTS = listed(
    """bison, camel, dolphin, eagle, falcon, gecko, jaguar, koala, lemur, moose, panther, parrot, penguin, tiger,
    walrus, zebra"""
)
