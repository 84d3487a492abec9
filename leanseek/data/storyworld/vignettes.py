"""A vignette: a few short sentences about one being, each of which begins with its name.

In a story, what is to be copied from the text before is hidden among much else, and a young model learns the habits of
the language for millions of tokens before it learns to look back. Here looking back is all there is to learn, and it is
learnt in a few dozen steps; stories that are mixed in little by little keep it alive.
"""

import random

from leanseek.data.storyworld import words
from leanseek.data.storyworld.gatherings import ALONE, NAMES, THINGS
from leanseek.data.storyworld.words import even

DOES = (
    *("sang a song", "slept well", "ran home", "smiled", "looked up", "sat down", "laughed", "danced", "told a story"),
    *("sat by the fire", "waved", "drank some water", "went to the {P}", "came back from the {P}", "was at the {P}"),
    *("liked the {T}", "looked for the {T}", "thought of the {T}"),
)


def vignette(rng: random.Random) -> str:
    """The text of one vignette, three to six sentences."""
    name = even(rng, NAMES)
    sentences, used = [], {name}
    for _ in range(rng.randrange(3, 7)):
        if rng.random() < 0.5:
            sentences.append(f"{name} {even(rng, DOES)}.".format(P=even(rng, PLACES), T=even(rng, THINGS)))
        else:
            sentences.append(even(rng, ALONE)(rng, name, used)[0])
    return " ".join(sentences)


PLACES = tuple(words.PLACES)
